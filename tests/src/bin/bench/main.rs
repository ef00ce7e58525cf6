//! What packets and connections cost: `cargo xtask bench`.
//!
//! Packets, in nanoseconds: `BPF_PROG_TEST_RUN` runs the programs of `affinity-ebpf/src/bench.rs` over and over on one packet each, in rounds:
//! every row once a round, in another order each time, so that the machine's drift meets all of them alike.

mod cases;
mod crr;
mod figures;
mod frame;
mod node;
mod report;
mod sockets;

use std::path::{Path, PathBuf};
use std::time::Duration;

use affinity_common::abi::conntrack;
use affinity_tests::privilege::require_root;
use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::utsname::uname;
use nix::unistd::Pid;
use serde::Serialize;

use crate::cases::{CASES, Case, Effort, FRESH, Fresh, HEADERS, NOTHING, OVERHEAD, STOP_WATCH};
use crate::figures::Samples;
use crate::node::Node;
use crate::report::{Floor, Report, Row, Setup, goals};

/// Measure what packets and connections cost
///
/// All parts where none is asked for: about ten minutes.
#[derive(Parser)]
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line")]
struct Args {
    /// The programs on packets: nanoseconds a packet, beside an empty program
    #[arg(long)]
    packets: bool,
    /// Connect, request, response, close: exchanges a second, beside the direct way and kube-proxy-shaped nftables rules
    #[arg(long)]
    crr: bool,
    /// The programs at the cgroup: nanoseconds a call of a socket, by the kernel's statistics
    #[arg(long)]
    sockets: bool,
    /// How often each row is measured
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Only see that everything can be measured: few runs, few services, figures that mean little
    #[arg(long)]
    quick: bool,
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
}

/// A row while it is measured.
struct Measured {
    case: Case,
    /// The index of its node.
    node: usize,
    full: bool,
    samples: Samples,
}

fn main() -> Result<()> {
    let args = Args::parse();
    require_root();
    let all = !(args.packets || args.crr || args.sockets);
    let (packets, crr, sockets) = (all || args.packets, all || args.crr, all || args.sockets);
    let bar = progress()?;
    // First, for the part about packets stays on one CPU.
    let crr = crr.then(|| crr::measure(crr_effort(&args), &bar)).transpose()?;
    let calls = if args.quick { 200 } else { 5_000 };
    let sockets = sockets.then(|| sockets::measure(args.rounds, calls, &bar)).transpose()?;
    let packets = packets.then(|| measure_packets(&args, &bar)).transpose()?;
    bar.finish_and_clear();
    let bench = Bench { packets, crr, sockets };
    if args.output == Output::Json {
        println!("{}", serde_json::to_string_pretty(&bench)?);
    } else {
        bench.packets.iter().for_each(Report::print);
        bench.crr.iter().for_each(crr::Rates::print);
        bench.sockets.iter().for_each(sockets::Calls::print);
    }
    if let Some(file) = args.json {
        let json = serde_json::to_string_pretty(&bench)?;
        std::fs::write(&file, json + "\n").with_context(|| file.display().to_string())?;
    }
    Ok(())
}

/// Everything that was measured; `None` for what was not asked for.
#[derive(Serialize)]
struct Bench {
    packets: Option<Report>,
    crr: Option<crr::Rates>,
    sockets: Option<sockets::Calls>,
}

fn crr_effort(args: &Args) -> crr::Effort {
    let (sample, services) = if args.quick { (50, &[1, 20][..]) } else { (400, &[1, 1_000, 10_000][..]) };
    let rounds = if args.quick { args.rounds.min(2) } else { args.rounds };
    crr::Effort { rounds, sample: Duration::from_millis(sample), services }
}

fn measure_packets(args: &Args, bar: &ProgressBar) -> Result<Report> {
    let mut rounds = args.rounds;
    let (services, effort) = if args.quick {
        rounds = rounds.min(3);
        (&[1, 1_000][..], Effort { runs: 5_000, connections: 2_000 })
    } else {
        (&[1, 1_000, 20_000][..], Effort { runs: 100_000, connections: 20_000 })
    };
    stay_on_one_cpu()?;
    let mut nodes = Vec::new();
    for others in services {
        bar.set_message(format!("filling the maps: {others} services"));
        nodes.push(Node::load(&args.object, *others)?);
    }
    let mut fresh = Fresh::default();
    bar.set_message("filling the tables of connections");
    nodes.push(full_node(&args.object, &mut fresh, effort)?);

    let mut measured = rows(nodes.len());
    bar.set_position(0);
    bar.set_length(u64::from(rounds) * measured.len() as u64);
    for round in 1..=rounds {
        bar.set_message(format!("packets: round {round} of {rounds}"));
        let mut order: Vec<usize> = (0..measured.len()).collect();
        fastrand::shuffle(&mut order);
        for index in order {
            let row = &mut measured[index];
            row.samples.push(row.case.sample(&mut nodes[row.node], &mut fresh, effort, row.full)?);
            bar.inc(1);
        }
    }
    report(&measured, &nodes, rounds)
}

/// Every row; the last of the nodes is the one with full tables.
fn rows(nodes: usize) -> Vec<Measured> {
    let row = |case, node, full| Measured { case, node, full, samples: Samples::default() };
    let mut rows: Vec<Measured> = [NOTHING, HEADERS, OVERHEAD, STOP_WATCH].map(|case| row(case, 0, false)).into();
    rows.extend((0..nodes - 1).flat_map(|node| CASES.map(|case| row(case, node, false))));
    rows.extend(FRESH.map(|case| row(case, nodes - 1, true)));
    rows
}

/// A node whose tables of connections and clients have no room left.
fn full_node(object: &Path, fresh: &mut Fresh, effort: Effort) -> Result<Node> {
    let mut node = Node::load(object, 1)?;
    // Two entries a connection, and a few more than there is room for.
    let connections = u32::try_from(conntrack::DEFAULT_SIZE)? * 3 / 4;
    for _ in 0..connections.div_ceil(effort.connections) {
        cases::FILL.sample(&mut node, fresh, effort, true)?;
    }
    Ok(node)
}

fn report(measured: &[Measured], nodes: &[Node], rounds: u32) -> Result<Report> {
    let [empty, parse, wrapper, watch, rest @ ..] = measured else { anyhow::bail!("nothing was measured") };
    let overhead = |row: &Measured| {
        let of_its_own = row.case.overhead().name == watch.case.name;
        if of_its_own { &watch.samples } else { &wrapper.samples }
    };
    let rows: Vec<Row> = rest
        .iter()
        .map(|row| Row {
            name: row.case.name,
            services: nodes[row.node].others,
            full: row.full,
            nanos: row.samples.over(overhead(row)).summary(),
        })
        .collect();
    let over_empty = |row: &Measured| row.samples.over(&empty.samples).summary();
    Ok(Report {
        setup: Setup { kernel: uname()?.release().to_string_lossy().into_owned(), processor: processor()?, rounds },
        floor: Floor {
            empty: empty.samples.summary(),
            parse: over_empty(parse),
            wrapper: over_empty(wrapper),
            watch: watch.samples.summary(),
        },
        goals: goals(&rows),
        rows,
        programs: nodes[0].sizes()?,
    })
}

/// Neither the caches nor the counters of another CPU are wanted.
fn stay_on_one_cpu() -> Result<()> {
    let ours = Pid::from_raw(0);
    let allowed = sched_getaffinity(ours).context("asking for our CPUs")?;
    let last = (0..CpuSet::count()).rev().find(|cpu| allowed.is_set(*cpu).unwrap_or(false)).context("no CPU")?;
    let mut one = CpuSet::new();
    one.set(last)?;
    sched_setaffinity(ours, &one).context("staying on one CPU")
}

fn processor() -> Result<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").context("/proc/cpuinfo")?;
    let name = text.lines().find_map(|line| Some(line.strip_prefix("model name")?.split_once(':')?.1.trim()));
    Ok(name.unwrap_or("unknown processor").to_owned())
}

fn progress() -> Result<ProgressBar> {
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} [{elapsed}]")?);
    bar.enable_steady_tick(Duration::from_millis(200));
    Ok(bar)
}
