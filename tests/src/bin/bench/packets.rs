//! The part about packets: nodes with more and fewer services, of each family, and the rows that are measured on them.

use std::path::Path;

use affinity_common::abi::conntrack;
use anyhow::{Context as _, Result, bail};
use indicatif::ProgressBar;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::cases::{self, CASES, Case, Effort, FRESH, Fresh, HEADERS, NOTHING, OVERHEAD, STOP_WATCH, SUMS};
use crate::figures::Samples;
use crate::node::Node;
use crate::report::{Floor, Report, Row, goals};
use crate::version::Version;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Samples of each row.
    pub rounds: u32,
    /// Numbers of services beside the measured ones.
    pub services: &'static [u32],
    /// How long a sample takes.
    pub effort: Effort,
}

/// A row while it is measured.
struct Measured {
    case: Case,
    /// The index of its node.
    node: usize,
    /// Whether that one's tables are full.
    full: bool,
    samples: Samples,
}

/// What a row came to without the overhead, which is not the packet's.
struct Own {
    name: &'static str,
    services: u32,
    full: bool,
    samples: Samples,
}

impl Own {
    /// What it is held against in another family.
    fn setting(&self) -> (&str, u32, bool) {
        (self.name, self.services, self.full)
    }
}

/// What stands beside the rows.
const FLOOR: [Case; 4] = [NOTHING, HEADERS, OVERHEAD, STOP_WATCH];

/// How many rows there are with so many numbers of services.
pub const fn rows(services: usize) -> usize {
    Version::ALL.len() * (FLOOR.len() + CASES.len() * services + FRESH.len())
}

/// Measures every row.
pub fn measure(object: &Path, setting: &Setting, bar: &ProgressBar) -> Result<Report> {
    let Setting { rounds, services, effort } = *setting;
    stay_on_one_cpu()?;
    let mut nodes: Vec<(Node, Fresh)> = Vec::new();
    let mut measured = Vec::new();
    for version in Version::ALL {
        let row = |case, node, full| Measured { case, node, full, samples: Samples::default() };
        measured.extend(FLOOR.map(|case| row(case, nodes.len(), false)));
        for others in services {
            bar.set_message(format!("packets: filling the maps, {others} services, {}", version.name()));
            measured.extend(CASES.map(|case| row(case, nodes.len(), false)));
            nodes.push((Node::load(object, version, *others)?, Fresh::new(version)));
        }
        bar.set_message(format!("packets: filling the tables of connections, {}", version.name()));
        measured.extend(FRESH.map(|case| row(case, nodes.len(), true)));
        nodes.push(full_node(object, version, effort)?);
    }
    bar.reset();
    bar.set_length(u64::from(rounds) * measured.len() as u64);
    for round in 1..=rounds {
        bar.set_message(format!("packets: round {round} of {rounds}"));
        let mut order: Vec<usize> = (0..measured.len()).collect();
        fastrand::shuffle(&mut order);
        for index in order {
            let row = &mut measured[index];
            let (node, fresh) = &mut nodes[row.node];
            row.samples.push(row.case.sample(node, fresh, effort, row.full)?);
            bar.inc(1);
        }
    }
    let nodes: Vec<Node> = nodes.into_iter().map(|(node, _)| node).collect();
    report(&measured, &nodes)
}

/// A node whose tables of connections and clients have no room left.
fn full_node(object: &Path, version: Version, effort: Effort) -> Result<(Node, Fresh)> {
    let (mut node, mut fresh) = (Node::load(object, version, 1)?, Fresh::new(version));
    // Two entries a connection, and a few more than there is room for.
    let connections = u32::try_from(conntrack::DEFAULT_SIZE)? * 3 / 4;
    for _ in 0..connections.div_ceil(effort.connections) {
        cases::FILL.sample(&mut node, &mut fresh, effort, true)?;
    }
    Ok((node, fresh))
}

fn report(measured: &[Measured], nodes: &[Node]) -> Result<Report> {
    let (mut floors, mut rows, mut programs) = (Vec::new(), Vec::new(), Vec::new());
    let mut ipv4: Vec<Own> = Vec::new();
    for version in Version::ALL {
        let of_it: Vec<&Measured> = measured.iter().filter(|row| nodes[row.node].version == version).collect();
        let [empty, parse, wrapper, watch, rest @ ..] = &of_it[..] else { bail!("nothing was measured") };
        let over_empty = |row: &Measured| row.samples.over(&empty.samples).summary();
        floors.push(Floor {
            version,
            empty: empty.samples.summary(),
            parse: over_empty(parse),
            wrapper: over_empty(wrapper),
            watch: watch.samples.summary(),
        });
        let own = rest.iter().map(|row| {
            let is_timed = row.case.overhead().name == watch.case.name;
            let samples = row.samples.over(if is_timed { &watch.samples } else { &wrapper.samples });
            Own { name: row.case.name, services: nodes[row.node].others, full: row.full, samples }
        });
        let mut own: Vec<Own> = own.collect();
        own.extend(sums(&own)?);
        rows.extend(own.iter().map(|row| {
            let peer = ipv4.iter().find(|peer| peer.setting() == row.setting());
            let Own { name, services, full, samples } = row;
            let to_ipv4 = peer.map(|peer| samples.ratio_to(&peer.samples).interval());
            Row { name, version, services: *services, full: *full, nanos: samples.summary(), to_ipv4 }
        }));
        if version == Version::V4 {
            ipv4 = own;
        }
        programs.extend(nodes[empty.node].sizes()?);
    }
    Ok(Report { floors, goals: goals(&rows), rows, programs })
}

/// The ways that are the sum of two rows, in each setting that has these.
fn sums(rows: &[Own]) -> Result<Vec<Own>> {
    let mut sums = Vec::new();
    for sum in SUMS {
        let [first, second] = sum.parts;
        for row in rows.iter().filter(|row| row.name == first.name) {
            let other = rows.iter().find(|other| other.setting() == (second.name, row.services, row.full));
            let samples = row.samples.plus(&other.with_context(|| format!("no row {}", second.name))?.samples);
            sums.push(Own { name: sum.name, services: row.services, full: row.full, samples });
        }
    }
    Ok(sums)
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
