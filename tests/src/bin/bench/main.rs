//! What packets and connections cost: `cargo xtask bench`.
//!
//! Everything is measured in rounds: every row once a round, in another order each time, so that the machine's drift meets all
//! of them alike. Packets by `BPF_PROG_TEST_RUN`, which runs the programs of `affinity-ebpf/src/bench.rs` over and over on one
//! packet each; calls of sockets by the kernel's statistics of the programs at the cgroup; exchanges by real connections.

mod attach;
mod cases;
mod control_plane;
mod crr;
mod figures;
mod frame;
mod node;
mod north_south;
mod packets;
mod plan;
mod readme;
mod report;
mod sockets;
mod version;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use affinity_tests::privilege::require_root;
use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::utsname::uname;
use serde::Serialize;

use crate::plan::{Part, Plan};
use crate::report::Report;

/// Measure what packets and connections cost
///
/// All parts but the last three where none is asked for: about ten minutes.
#[derive(Parser)]
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line")]
struct Args {
    /// The programs on packets: nanoseconds a packet, beside an empty program, IPv6 beside IPv4
    #[arg(long)]
    packets: bool,
    /// The programs at the cgroup: nanoseconds a call of a socket, by the kernel's statistics, beside an empty program
    #[arg(long)]
    sockets: bool,
    /// Connect, request, response, close: exchanges a second, beside the direct way and kube-proxy-shaped nftables rules
    #[arg(long)]
    crr: bool,
    /// The same from outside by node ports, to a pod of the node and to one of another: exchanges a second, beside the real
    /// kube-proxy in its nftables mode where there is one; only where it is asked for
    #[arg(long)]
    north_south: bool,
    /// The control plane, and nothing else: from the events of a watch to maps written, the daemon's memory and that of its
    /// maps; some minutes
    #[arg(long, conflicts_with_all = ["packets", "sockets", "crr", "north_south", "plan"])]
    control_plane: bool,
    /// A pod's first packets, and nothing else: from a veth's appearance until the programs are attached to it
    #[arg(long, conflicts_with_all = ["packets", "sockets", "crr", "north_south", "control_plane", "plan"])]
    attach: bool,
    /// How often each row is measured
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Only see that everything can be measured: few runs, few services, figures that mean little
    #[arg(long)]
    quick: bool,
    /// Only say what would be measured, and for how long
    #[arg(long)]
    plan: bool,
    /// How the figures are printed
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// Write the figures to this file too, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The BPF object to measure
    #[arg(long, value_name = "FILE", default_value = "target/bpf/bench.o")]
    object: PathBuf,
}

/// How figures are printed.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
    /// As README.md has them, in Markdown.
    Readme,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if args.control_plane {
        let effort = if args.quick { control_plane::Effort::QUICK } else { control_plane::Effort::WHOLE };
        let markdown = control_plane::Report::markdown;
        return alone(&args, |bar| control_plane::measure(&effort, bar), control_plane::Report::print, Some(markdown));
    }
    if args.attach {
        let interfaces = if args.quick { 5 } else { 200 };
        return alone(&args, |bar| attach::measure(interfaces, bar), attach::Report::print, None);
    }
    let plan = Plan::new(args.rounds, args.quick);
    let all = !(args.packets || args.crr || args.sockets || args.north_south);
    // Packets last, for that part stays on one CPU.
    let parts = [
        (Part::Crr, args.crr || all),
        (Part::NorthSouth, args.north_south),
        (Part::Sockets, args.sockets || all),
        (Part::Packets, args.packets || all),
    ];
    let parts: Vec<Part> = parts.into_iter().filter_map(|(part, asked)| asked.then_some(part)).collect();
    eprint!("{}", plan.describe(&parts));
    if args.plan {
        return Ok(());
    }
    require_root();
    let bar = progress()?;
    let setup = Setup::new(plan.rounds())?;
    let mut bench = Bench { setup, packets: None, crr: None, north_south: None, sockets: None };
    for part in parts {
        let started = Instant::now();
        match part {
            Part::Crr => bench.crr = Some(crr::measure(plan.crr(), &bar)?),
            Part::NorthSouth => bench.north_south = Some(north_south::measure(plan.north_south(), &bar)?),
            Part::Sockets => bench.sockets = Some(sockets::measure(&args.object, plan.sockets(), &bar)?),
            Part::Packets => bench.packets = Some(packets::measure(&args.object, &plan.packets(), &bar)?),
        }
        bar.suspend(|| eprintln!("{}: measured in {} s", part.name(), started.elapsed().as_secs()));
    }
    bar.finish_and_clear();
    match args.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&bench)?),
        Output::Readme => print!("{}", readme::tables(&bench)),
        Output::Table => bench.print(),
    }
    if let Some(file) = args.json {
        let json = serde_json::to_string_pretty(&bench)?;
        std::fs::write(&file, json + "\n").with_context(|| file.display().to_string())?;
    }
    Ok(())
}

/// Measures a part that is no row beside others.
fn alone<R: Serialize>(
    args: &Args,
    measure: impl FnOnce(&ProgressBar) -> Result<R>,
    print: impl FnOnce(&R),
    markdown: Option<fn(&R) -> String>,
) -> Result<()> {
    require_root();
    let bar = progress()?;
    let report = measure(&bar)?;
    bar.finish_and_clear();
    let setup = Setup::new(1)?;
    let json = serde_json::to_string_pretty(&report)?;
    match (args.output, markdown) {
        (Output::Json, _) => println!("{json}"),
        (Output::Readme, Some(markdown)) => {
            print!("{}, Linux {}\n\n{}", setup.processor, setup.kernel, markdown(&report));
        }
        (Output::Readme | Output::Table, _) => {
            println!("{}, Linux {}\n", setup.processor, setup.kernel);
            print(&report);
        }
    }
    if let Some(file) = &args.json {
        std::fs::write(file, json + "\n").with_context(|| file.display().to_string())?;
    }
    Ok(())
}

/// The machine and how it was measured.
#[derive(Serialize)]
struct Setup {
    /// The kernel's release.
    kernel: String,
    /// The processor's name.
    processor: String,
    /// Rounds: samples of each row.
    rounds: u32,
}

/// Everything that was measured; `None` for what was not asked for.
#[derive(Serialize)]
struct Bench {
    setup: Setup,
    packets: Option<Report>,
    crr: Option<crr::Rates>,
    north_south: Option<north_south::Rates>,
    sockets: Option<sockets::Calls>,
}

impl Setup {
    fn new(rounds: u32) -> Result<Self> {
        let text = std::fs::read_to_string("/proc/cpuinfo").context("/proc/cpuinfo")?;
        let name = text.lines().find_map(|line| Some(line.strip_prefix("model name")?.split_once(':')?.1.trim()));
        let processor = name.unwrap_or("unknown processor").to_owned();
        Ok(Self { kernel: uname()?.release().to_string_lossy().into_owned(), processor, rounds })
    }
}

impl Bench {
    /// The tables that people read.
    fn print(&self) {
        let Setup { kernel, processor, rounds } = &self.setup;
        println!("{processor}, Linux {kernel}, {rounds} rounds\n");
        self.packets.iter().for_each(Report::print);
        self.crr.iter().for_each(crr::Rates::print);
        self.north_south.iter().for_each(north_south::Rates::print);
        self.sockets.iter().for_each(sockets::Calls::print);
    }
}

fn progress() -> Result<ProgressBar> {
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} [{elapsed}, {eta} left]")?);
    bar.enable_steady_tick(Duration::from_millis(200));
    Ok(bar)
}
