//! `cargo xtask run`: the demonstration in network namespaces, or the daemon against a cluster.

use std::{ffi::OsString, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    build::{self, Profile},
    machine, process, suites,
};

/// Build, then show live how clients keep their pods, in network namespaces
///
/// Three clients, five pods and a node that routes between them, all in namespaces that go when it ends; the machine's own
/// interfaces are left alone. With --kubeconfig the daemon runs on this machine against a cluster instead. Needs root, and
/// asks sudo for it.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cargo xtask run           # live, until Ctrl-C\n  \
                        cargo xtask run --once    # the whole tour; exits 0 only if every expectation held\n  \
                        cargo xtask run -- --ipv6 # the same over IPv6\n  \
                        cargo xtask run --kubeconfig ~/.kube/config -- --interface 'veth*'")]
pub struct Args {
    /// Do the tour once and say whether every expectation held
    #[arg(long, conflicts_with = "kubeconfig")]
    once: bool,
    /// Run the daemon against the cluster of this file instead
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Further arguments of the demonstration, or of `affinity run`
    #[arg(last = true)]
    rest: Vec<OsString>,
}

/// Runs the verb.
pub fn verb(args: Args) -> Result<()> {
    let mut command = if let Some(kubeconfig) = args.kubeconfig {
        let kubeconfig = kubeconfig.canonicalize().with_context(|| kubeconfig.display().to_string())?;
        let mut command = Command::new(build::daemon(Profile::Release)?);
        command.arg("run").arg("--kubeconfig").arg(kubeconfig);
        command
    } else {
        let (daemon, demo) = build::daemon_and("demo", Profile::Release)?;
        let mut command = suites::command(&demo, &daemon);
        command.args(args.once.then_some("--once"));
        command
    };
    command.args(args.rest);
    process::become_it(machine::as_root(command)?)
}
