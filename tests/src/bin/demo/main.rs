//! The demonstration: three clients, five pods, a node between them, and two services of the same pods, one that keeps its
//! clients (`sessionAffinity: ClientIP`) and one that spreads them (`None`).
//!
//! Everything is in network namespaces that this process alone holds; nothing of the machine is touched, and nothing but an
//! empty cgroup is
//! left, however it ends.

mod live;
mod manifests;
mod stage;
mod tour;

use std::io::IsTerminal as _;
use std::process::ExitCode;

use affinity_tests::privilege::NEEDS_ROOT;
use affinity_tests::topology::Families;
use anyhow::{Result, bail};
use clap::Parser;
use nix::unistd::geteuid;

/// Shows sticky services at work, on this machine alone.
#[derive(Debug, Parser)]
#[command(name = "demo")]
struct Args {
    /// Walk through the whole tour once, check what is seen, and exit 0 only if all of it was as expected
    #[arg(long)]
    once: bool,
    /// The service's sessionAffinityConfig.clientIP.timeoutSeconds
    #[arg(long, value_name = "SECONDS", default_value_t = 8, value_parser = clap::value_parser!(u32).range(4..=86_400))]
    timeout: u32,
    /// How the daemon attaches: auto, tcx or clsact
    #[arg(long, default_value = "auto")]
    attach: String,
    /// Show it over IPv6 (the tour: over IPv6 alone; otherwise it is walked through twice)
    #[arg(long)]
    ipv6: bool,
    /// Requests of the tour to the sticky service, over all clients
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(30..))]
    requests: u32,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args) -> Result<bool> {
    if !geteuid().is_root() {
        bail!("{NEEDS_ROOT}");
    }
    let set = |families| stage::Stage::set(args.timeout, &args.attach, families);
    if !args.once && std::io::stdout().is_terminal() {
        live::run(&mut set(if args.ipv6 { Families::V6 } else { Families::V4 })?)?;
        return Ok(true);
    }
    let mut held = true;
    if !args.ipv6 {
        println!("Over IPv4");
        held &= tour::run(&mut set(Families::V4)?, args.requests)?;
    }
    println!("Over IPv6");
    held &= tour::run(&mut set(Families::V6)?, args.requests)?;
    Ok(held)
}
