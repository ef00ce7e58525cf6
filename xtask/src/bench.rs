//! `cargo xtask bench`: what packets and connections cost.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::{
    assets::{self, Assets, Set},
    build::{self, Profile},
    machine, process, say, setup, suites, workspace,
};

/// Build, then measure what packets and connections cost
///
/// Packets, sockets and exchanges where no part is asked for: about a quarter of an hour; `--plan` says what would be measured, and for how long.
/// Interleaved rounds, each row beside its peers: medians and what they are worth. Needs root, and asks sudo for it; `--crr`
/// also needs `nft` (Debian's package nftables), which is installed where it is missing.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cargo xtask bench\n  cargo xtask bench --plan\n  \
                        cargo xtask bench --packets --json bench.json\n  cargo xtask bench --crr --rounds 30\n  \
                        cargo xtask bench --north-south\n  cargo xtask bench --control-plane\n  cargo xtask bench --attach\n  cargo xtask bench -o readme   # the tables of README.md")]
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line")]
pub struct Args {
    /// The programs on packets: nanoseconds a packet, with 1, 1,000 and 20,000 services, IPv6 beside IPv4, over an empty
    /// program
    #[arg(long)]
    packets: bool,
    /// Connect, request, response, close: exchanges a second in both families, with 1, 1,000 and (IPv4) 10,000 services,
    /// beside the direct way and kube-proxy-shaped nftables rules
    #[arg(long)]
    crr: bool,
    /// The programs at the cgroup: nanoseconds a call of a socket, IPv6 beside IPv4, over an empty program
    #[arg(long)]
    sockets: bool,
    /// Connect, request, response, close from outside by node ports, to a pod of the node and to one of another: exchanges
    /// a second in both families, beside the real kube-proxy (nftables mode); only where it is asked for, as building that
    /// takes some minutes
    #[arg(long)]
    north_south: bool,
    /// The control plane, and nothing else: from the events of a watch to maps written, at up to 50,000 services, the
    /// daemon's memory and that of its maps, the same before a real kube-apiserver, and kube-proxy (nftables mode) beside
    /// it; some minutes
    #[arg(long, conflicts_with_all = ["packets", "crr", "sockets", "north_south", "plan"])]
    control_plane: bool,
    /// A pod's first packets, and nothing else: from a veth's appearance until the programs are attached to it, by TCX and by
    /// clsact, beside what the kernel waits for; a minute
    #[arg(long, conflicts_with_all = ["packets", "crr", "sockets", "north_south", "control_plane", "plan"])]
    attach: bool,
    /// How often each row is measured
    #[arg(long, value_name = "N", default_value_t = 15)]
    rounds: u32,
    /// Only see that everything can be measured: a minute or two, and figures that mean little
    #[arg(long)]
    quick: bool,
    /// Only say what would be measured, and for how long
    #[arg(long)]
    plan: bool,
    /// How the figures are printed: table, json, or readme (the tables of README.md)
    #[arg(short, long, value_name = "FORMAT", default_value = "table", value_parser = ["table", "json", "readme"])]
    output: String,
    /// Write the figures to this file too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs the verb.
pub fn verb(args: Args) -> Result<()> {
    setup::tools()?;
    let (daemon, bench) = build::daemon_and("bench", Profile::Release)?;
    let mut command = suites::command(&bench, &daemon);
    command.arg("--object").arg(workspace::bench_object());
    let flags = [
        (args.packets, "--packets"),
        (args.crr, "--crr"),
        (args.sockets, "--sockets"),
        (args.north_south, "--north-south"),
        (args.control_plane, "--control-plane"),
        (args.attach, "--attach"),
        (args.quick, "--quick"),
        (args.plan, "--plan"),
    ];
    for (asked, flag) in flags {
        if asked {
            command.arg(flag);
        }
    }
    command.arg("--rounds").arg(args.rounds.to_string()).arg("--output").arg(args.output);
    if let Some(json) = args.json {
        let json = std::path::absolute(&json).with_context(|| json.display().to_string())?;
        command.arg("--json").arg(json);
    }
    if args.control_plane || args.north_south && !args.plan {
        // What can't be had is left out.
        for (set, what) in [(Set::Bench, "kube-proxy"), (Set::Api, "the real kube-apiserver")] {
            match Assets::find_or_build(set).directory(set) {
                Ok(directory) => {
                    command.env(assets::VARIABLE, directory);
                    break;
                }
                Err(error) => say::progress("Leaving", &format!("out {what}: {error:#}")),
            }
        }
    }
    process::become_it(machine::as_root(command)?)
}
