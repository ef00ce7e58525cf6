//! `cargo xtask bench`: what packets and connections cost.

use std::{ffi::OsString, path::PathBuf};

use anyhow::{Context as _, Result};

use crate::{
    build::{self, Profile},
    machine, process, setup, suites, workspace,
};

/// Build, then measure what packets and connections cost
///
/// All parts where none is asked for: about ten minutes, of which loading 10,000 services' nftables rules takes one or
/// two. Interleaved rounds, each row beside its peers: medians and what they are worth. Needs root, and asks sudo for it;
/// `--crr` also needs `nft` (Debian's package nftables), which is installed where it is missing.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cargo xtask bench\n  cargo xtask bench --packets --json bench.json\n  \
                        cargo xtask bench --crr -- --rounds 30")]
pub struct Args {
    /// The programs on packets: nanoseconds a packet, with 1, 1,000 and 20,000 services, beside an empty program
    #[arg(long)]
    packets: bool,
    /// Connect, request, response, close: exchanges a second, with 1, 1,000 and 10,000 services, beside the direct way
    /// and kube-proxy-shaped nftables rules
    #[arg(long)]
    crr: bool,
    /// The programs at the cgroup: nanoseconds a call of a socket, IPv4 beside IPv6
    #[arg(long)]
    sockets: bool,
    /// How the figures are printed: table or json
    #[arg(short, long, value_name = "FORMAT", default_value = "table", value_parser = ["table", "json"])]
    output: String,
    /// Write the figures to this file too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Further arguments of the benchmark
    #[arg(last = true)]
    rest: Vec<OsString>,
}

/// Runs the verb.
pub fn verb(args: Args) -> Result<()> {
    setup::tools()?;
    let (daemon, bench) = build::daemon_and("bench", Profile::Release)?;
    let mut command = suites::command(&bench, &daemon);
    command.arg("--object").arg(workspace::bench_object());
    for (asked, flag) in [(args.packets, "--packets"), (args.crr, "--crr"), (args.sockets, "--sockets")] {
        if asked {
            command.arg(flag);
        }
    }
    command.arg("--output").arg(args.output);
    if let Some(json) = args.json {
        let json = std::path::absolute(&json).with_context(|| json.display().to_string())?;
        command.arg("--json").arg(json);
    }
    command.args(args.rest);
    process::become_it(machine::as_root(command)?)
}
