//! `cargo xtask cluster`: a real Kubernetes cluster of two nodes on this machine, without a container engine and without
//! kube-proxy. `tests/cluster` has what runs in it.

mod images;
mod packages;

use std::{env, ffi::OsString, path::PathBuf, process::Command, time::Instant};

use anyhow::Result;
use clap::Subcommand;

use crate::{
    assets::{Assets, Cache, Set},
    build::{self, Profile},
    image, machine, process, say, workspace,
};

/// Run a Kubernetes cluster of two nodes in namespaces of this machine; needs no Docker
///
/// API server, controllers, scheduler, two nodes with kubelet and containerd, cluster DNS, and a machine outside;
/// dual stack, without kube-proxy. Kubernetes' programs are built once from their Go modules into ~/.cache/affinity (about 15
/// minutes), containerd, runc and the CNI plugins are unpacked there from Debian's packages. Needs root, and asks sudo for
/// it. Nothing of the machine is touched but network namespaces and cgroups by the name `affinity-*`.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cargo xtask cluster test\n  cargo xtask cluster up\n  \
                        cargo xtask cluster kubectl apply -k kind/deploy\n  cargo xtask cluster kubectl get pods -A\n  \
                        cargo xtask cluster in n1 bpftool link\n  cargo xtask cluster in client busybox ping -c 1 198.51.100.11\n  \
                        cargo xtask cluster down")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Start it anew, with Affinity's image on its nodes
    Up,
    /// End it; nothing is left of it
    Down,
    /// Run the tests of the whole on a cluster of their own: the image and kind/deploy, over TC and sockets, IPv4 and IPv6
    ///
    /// Without --short that takes about 20 minutes, and begins with building the image of an earlier commit, once, to upgrade
    /// from: the checkout must have its history.
    Test {
        /// The core of it, in minutes, as `cargo xtask test cluster` does
        #[arg(long)]
        short: bool,
        /// Leave the cluster up afterwards
        #[arg(long)]
        keep: bool,
        /// The steps to run, by their names; by default all
        #[arg(value_name = "STEP")]
        only: Vec<String>,
    },
    /// Run kubectl as the cluster's administrator
    #[command(disable_help_flag = true)]
    Kubectl {
        /// kubectl's arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Run a command in a machine: cp, n1, n2 or client
    In {
        /// The machine
        #[arg(value_parser = ["cp", "n1", "n2", "client"])]
        machine: String,
        /// The command
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<OsString>,
    },
}

/// Runs the verb.
pub fn verb(args: Args) -> Result<()> {
    match args.verb {
        Verb::Up => {
            Cluster::prepare(&mut Assets::find_or_build(Set::Cluster))?.up()?;
            say::progress("Running", "nodes n1 and n2: `cargo xtask cluster kubectl get nodes`");
            Ok(())
        }
        Verb::Down => down(),
        Verb::Test { short, keep, only } => {
            let cluster = Cluster::prepare(&mut Assets::find_or_build(Set::Cluster))?;
            if !short && are_wanted(&only, "daemon-upgrades") {
                image::earlier::build()?;
            }
            let mut suite = cluster.suite(short)?;
            suite.args(only);
            let running = cluster.up_for_now(keep)?;
            let done = process::run(machine::as_root(suite)?);
            running.end()?;
            done
        }
        Verb::Kubectl { arguments } => {
            let mut command = script("kubectl");
            command.env("BIN", Cache::find()?.kubernetes()).args(arguments);
            process::become_it(machine::as_root(command)?)
        }
        Verb::In { machine, command } => {
            let mut entered = script("in");
            entered.arg(machine).args(command);
            process::become_it(machine::as_root(entered)?)
        }
    }
}

/// Programs that the cluster starts, and the Debian packages that have them.
const TOOLS: [(&str, &str); 5] =
    [("ip", "iproute2"), ("openssl", "openssl"), ("curl", "curl"), ("busybox", "busybox-static"), ("nft", "nftables")];

/// All that a cluster is made of.
pub struct Cluster {
    /// Where Kubernetes' programs are.
    programs: PathBuf,
    /// Where containerd, runc and the CNI plugins are.
    system: PathBuf,
    /// What its nodes have.
    images: Vec<PathBuf>,
}

impl Cluster {
    /// Builds, finds or installs what is needed.
    pub fn prepare(assets: &mut Assets) -> Result<Self> {
        machine::install_missing(&TOOLS)?;
        let system = packages::unpack()?;
        let affinity = image::build()?;
        let programs = assets.directory(Set::Cluster)?;
        let mut images = images::build(&programs, &assets.coredns()?)?;
        images.push(affinity);
        Ok(Self { programs, system, images })
    }

    /// Starts it, in place of one that there is.
    pub fn up(&self) -> Result<()> {
        let started = Instant::now();
        say::progress("Starting", "a cluster of two nodes");
        let images: Vec<String> = self.images.iter().map(|image| image.display().to_string()).collect();
        let mut up = script("up");
        up.env("BIN", &self.programs).env("SYSTEM", &self.system).env("IMAGES", images.join(" "));
        process::run(machine::as_root(up)?)?;
        say::progress("Started", &format!("the cluster in {}", say::duration(started.elapsed())));
        Ok(())
    }

    /// Starts it until what is returned is dropped, or we are interrupted.
    pub fn up_for_now(&self, keep: bool) -> Result<Running> {
        let running = Running { ended: keep };
        if !keep {
            process::on_interrupt(|| {
                if let Ok(mut down) = machine::as_root(script("down")) {
                    let _ = down.status();
                }
            });
        }
        self.up()?;
        Ok(running)
    }

    /// The suite that runs on it.
    pub fn suite(&self, short: bool) -> Result<Command> {
        let [suite] = build::binaries([("affinity-tests", "cluster")], Profile::Debug)?;
        let mut command = Command::new(suite);
        command.env("PATH", env::join_paths(machine::search_path())?);
        command.arg("--state").arg(state()).arg("--kubectl").arg(self.programs.join("kubectl"));
        command.arg("--system").arg(&self.system).args(short.then_some("--short"));
        command.current_dir(workspace::root());
        Ok(command)
    }
}

/// Whether a step is to be run, by either way, as the suite understands names of steps.
fn are_wanted(only: &[String], step: &str) -> bool {
    let names = ["sockets", "tc"].map(|way| format!("{way}/{step}"));
    only.is_empty() || only.iter().any(|wanted| names.iter().any(|name| name.starts_with(wanted.as_str())))
}

/// A cluster that ends with this.
pub struct Running {
    ended: bool,
}

impl Running {
    /// Ends it, and says where that fails.
    pub fn end(mut self) -> Result<()> {
        if std::mem::replace(&mut self.ended, true) { Ok(()) } else { down() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended
            && let Err(error) = down()
        {
            say::error(&error);
        }
    }
}

/// Ends the cluster of this checkout, where there is one.
pub fn down() -> Result<()> {
    process::run(machine::as_root(script("down"))?)
}

/// Where everything about the cluster is written.
fn state() -> PathBuf {
    workspace::root().join("target/cluster")
}

fn script(verb: &str) -> Command {
    let mut command = Command::new(workspace::root().join("tests/cluster/cluster.sh"));
    if let Ok(path) = env::join_paths(machine::search_path()) {
        command.env("PATH", path);
    }
    command.env("STATE", state()).arg(verb);
    command
}
