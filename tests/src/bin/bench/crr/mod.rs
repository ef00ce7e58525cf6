//! Connect, request, response, close: how many a second come through, by each way from a client to a backend.
//!
//! All ways stand side by side, each in namespaces of its own, and are measured in rounds: every row once a round, in
//! another order each time. Ratios are taken within a round.

mod load;
mod rules;
pub mod site;

use std::time::Duration;

use anyhow::{Context as _, Result};
use comfy_table::Table;
use indicatif::ProgressBar;
use serde::Serialize;

use crate::figures::{Interval, Samples};
use crate::report::{align, table};
use site::{Site, Way};

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Samples of each row.
    pub rounds: u32,
    /// How long a sample takes.
    pub sample: Duration,
    /// Numbers of services beside the measured one.
    pub services: &'static [u32],
}

/// What came of it.
#[derive(Serialize)]
pub struct Rates {
    /// Samples of each row.
    pub rounds: u32,
    /// How long a sample took, in milliseconds.
    pub sample_ms: u128,
    /// The rows.
    pub rows: Vec<Row>,
    /// What we want.
    pub goals: Vec<Goal>,
}

/// A way with so many services.
#[derive(Serialize)]
pub struct Row {
    /// The way.
    pub way: Way,
    /// Services beside the measured one; none where the rows have nothing to do with services.
    pub services: Option<u32>,
    /// How many threads the client had.
    pub threads: usize,
    /// Exchanges a second.
    pub rate: Interval,
    /// How many times those of the direct way with connections tracked, round by round.
    pub ratio: Interval,
    /// Exchanges that failed, of all rounds.
    pub failed: u64,
}

/// A ratio that we want, and what it came to.
#[derive(Serialize)]
pub struct Goal {
    /// What is held against what.
    pub name: String,
    /// The ratio, round by round.
    pub ratio: Interval,
    /// What it has to reach.
    pub at_least: f64,
    /// Whether it does: its median, or all its interval where it has to exceed 1.
    pub met: bool,
}

/// How many threads the client has.
const THREADS: [usize; 2] = [1, 16];
/// What socket-LB has to reach of the direct way with connections tracked.
const OF_TRACKED: f64 = 0.98;

/// A row while it is measured.
struct Measured {
    way: Way,
    services: Option<u32>,
    threads: usize,
    /// The index of its site.
    site: usize,
    samples: Samples,
    failed: u64,
}

/// Builds every way and measures.
pub fn measure(effort: Effort, bar: &ProgressBar) -> Result<Rates> {
    let mut sites = Vec::new();
    let mut measured: Vec<Measured> = Vec::new();
    let alone = [Way::Direct, Way::DirectTracked].map(|way| (way, None));
    let served = [Way::Nftables, Way::Tc, Way::SocketLb];
    let served = served.iter().flat_map(|way| effort.services.iter().map(|services| (*way, Some(*services))));
    for (way, services) in alone.into_iter().chain(served) {
        let others = services.map_or(String::new(), |n| format!(", {n} services"));
        bar.set_message(format!("building: {}{others}", way.name()));
        let site = Site::new(way, services.unwrap_or(0)).with_context(|| way.name())?;
        let row =
            |threads| Measured { way, services, threads, site: sites.len(), samples: Samples::default(), failed: 0 };
        measured.extend(THREADS.map(row));
        sites.push(site);
    }
    // Not counted: neighbours are found, caches filled.
    for site in &sites {
        site.run(1, Duration::from_millis(50))?;
        site.check()?;
    }
    bar.set_position(0);
    bar.set_length(u64::from(effort.rounds) * measured.len() as u64);
    for round in 1..=effort.rounds {
        bar.set_message(format!("exchanges: round {round} of {}", effort.rounds));
        let mut order: Vec<usize> = (0..measured.len()).collect();
        fastrand::shuffle(&mut order);
        for index in order {
            let row = &mut measured[index];
            let done = sites[row.site].run(row.threads, effort.sample)?;
            row.samples.push(done.rate);
            row.failed += done.failed;
            bar.inc(1);
        }
    }
    let rows = measured.iter().map(|row| {
        let base = find(&measured, Way::DirectTracked, None, row.threads)?;
        let (rate, ratio) = (row.samples.interval(), row.samples.ratio_to(base).interval());
        Ok(Row { way: row.way, services: row.services, threads: row.threads, rate, ratio, failed: row.failed })
    });
    let rows = rows.collect::<Result<_>>()?;
    Ok(Rates { rounds: effort.rounds, sample_ms: effort.sample.as_millis(), rows, goals: goals(&measured)? })
}

fn find(rows: &[Measured], way: Way, services: Option<u32>, threads: usize) -> Result<&Samples> {
    let row = rows.iter().find(|row| (row.way, row.services, row.threads) == (way, services, threads));
    Ok(&row.with_context(|| format!("{} was not measured", way.name()))?.samples)
}

/// What became of the goals.
fn goals(measured: &[Measured]) -> Result<Vec<Goal>> {
    let mut goals = Vec::new();
    for row in measured.iter().filter(|row| row.way == Way::SocketLb) {
        let of =
            |way, services| anyhow::Ok(row.samples.ratio_to(find(measured, way, services, row.threads)?).interval());
        let tracked = of(Way::DirectTracked, None)?;
        let rules = of(Way::Nftables, row.services)?;
        let setting = format!("{} thread(s), {} services", row.threads, row.services.unwrap_or(0));
        goals.push(Goal {
            name: format!("socket-LB to direct with conntrack, {setting}"),
            ratio: tracked,
            at_least: OF_TRACKED,
            met: tracked.median >= OF_TRACKED,
        });
        goals.push(Goal {
            name: format!("socket-LB to nftables, {setting}"),
            ratio: rules,
            at_least: 1.0,
            met: rules.lower > 1.0,
        });
    }
    Ok(goals)
}

impl Rates {
    /// The tables that people read.
    pub fn print(&self) {
        println!("{}\n", self.rows_table());
        println!(
            "Connect, request, response, close: exchanges a second from one namespace to another, {} rounds of {} ms: median\n\
             (its confidence interval of 95 %, by order statistics); behind it, how many times the direct way with\n\
             connections tracked, round by round. The rows without conntrack have no netfilter hook on their way, which is\n\
             checked. The measured service has affinity and two backends; the services are there beside it.\n",
            self.rounds, self.sample_ms
        );
        let mut goals = table(&["goal", "at least", "measured", ""]);
        for Goal { name, ratio, at_least, met } in &self.goals {
            let met = if *met { "met" } else { "missed" };
            goals.add_row([name.clone(), format!("{at_least:.2}"), ratio_text(ratio), met.to_owned()]);
        }
        println!("{}\n", align(&mut goals));
    }

    fn rows_table(&self) -> Table {
        let mut head = vec!["exchanges a second".to_owned(), "services".to_owned()];
        for threads in THREADS {
            head.extend([format!("{threads} thread(s)"), "ratio".to_owned()]);
        }
        let mut table = table(&head);
        for first in self.rows.iter().filter(|row| row.threads == THREADS[0]) {
            let same = |row: &&Row| (row.way, row.services) == (first.way, first.services);
            let mut cells =
                vec![first.way.name().to_owned(), first.services.map_or_else(String::new, |n| n.to_string())];
            for Row { rate, ratio, .. } in self.rows.iter().filter(same) {
                cells.push(format!("{:.0} ({:.0}-{:.0})", rate.median, rate.lower, rate.upper));
                cells.push(ratio_text(ratio));
            }
            table.add_row(cells);
        }
        align(&mut table)
    }
}

fn ratio_text(ratio: &Interval) -> String {
    format!("{:.3} ({:.3}-{:.3})", ratio.median, ratio.lower, ratio.upper)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(way: Way, services: Option<u32>, rates: [u32; 3]) -> Measured {
        let mut samples = Samples::default();
        for rate in rates {
            samples.push(rate.into());
        }
        Measured { way, services, threads: 1, site: 0, samples, failed: 0 }
    }

    #[test]
    fn goals_are_held_against_the_peers_of_the_same_round() {
        let peers = |rules| {
            let tracked = row(Way::DirectTracked, None, [1_000, 2_000, 3_000]);
            let socket = row(Way::SocketLb, Some(1), [990, 1_980, 2_970]);
            [tracked, row(Way::Nftables, Some(1), rules), socket]
        };
        let met = |rules| goals(&peers(rules)).map(|goals| goals.iter().map(|goal| goal.met).collect::<Vec<_>>());
        assert_eq!(met([900, 1_800, 2_700]).expect("goals"), [true, true]);
        // Once slower: the spread reaches over.
        assert_eq!(met([900, 1_990, 2_700]).expect("goals"), [true, false]);
        let without_rules = [row(Way::SocketLb, Some(1), [1, 1, 1]), row(Way::DirectTracked, None, [2, 2, 2])];
        assert!(goals(&without_rules).is_err(), "nothing to be held against");
    }
}
