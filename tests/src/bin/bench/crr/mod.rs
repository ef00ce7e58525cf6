//! Connect, request, response, close: how many a second come through, by each way from a client to a backend.
//!
//! All ways stand side by side, each in namespaces of its own, and are measured in rounds: every row once a round, in
//! another order each time. Ratios are taken within a round.

pub mod load;
mod rules;
pub mod site;

use std::time::Duration;

use anyhow::{Context as _, Result};
use comfy_table::Table;
use indicatif::ProgressBar;
use serde::Serialize;

use crate::figures::{Interval, Samples};
use crate::report::{align, interval, table};
use crate::version::Version;
use site::{Site, Way};

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Samples of each row.
    pub rounds: u32,
    /// How long a sample takes.
    pub sample: Duration,
    /// Numbers of services beside the measured one, of IPv4 and of IPv6.
    pub services: [&'static [u32]; 2],
}

impl Setting {
    /// The ways, each with its number of services, where it has to do with services.
    fn ways(self, version: Version) -> Vec<(Way, Option<u32>)> {
        let [v4, v6] = self.services;
        let services = version.of(v4, v6);
        let alone = [Way::Direct, Way::DirectTracked].map(|way| (way, None));
        let served = [Way::Nftables, Way::Tc, Way::SocketLb];
        let served = served.iter().flat_map(|way| services.iter().map(|services| (*way, Some(*services))));
        alone.into_iter().chain(served).collect()
    }
}

/// How many rows there are.
pub fn rows(setting: Setting) -> usize {
    Version::ALL.iter().map(|version| setting.ways(*version).len() * THREADS.len()).sum()
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
    /// The family of the client's and the backends' addresses.
    pub version: Version,
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
    version: Version,
    services: Option<u32>,
    threads: usize,
    /// The index of its site.
    site: usize,
    samples: Samples,
    failed: u64,
}

/// Builds every way and measures.
pub fn measure(setting: Setting, bar: &ProgressBar) -> Result<Rates> {
    let mut sites = Vec::new();
    let mut measured: Vec<Measured> = Vec::new();
    let ways =
        Version::ALL.into_iter().flat_map(|version| setting.ways(version).into_iter().map(move |way| (version, way)));
    let ways: Vec<_> = ways.collect();
    bar.set_length(ways.len() as u64);
    for (version, (way, services)) in ways {
        let others = services.map_or(String::new(), |n| format!(", {n} services"));
        bar.set_message(format!("crr: building {}, {}{others}", way.name(), version.name()));
        let what = || format!("{}, {}", way.name(), version.name());
        let site = Site::new(way, version, services.unwrap_or(0)).with_context(what)?;
        measured.extend(THREADS.map(|threads| Measured {
            way,
            version,
            services,
            threads,
            site: sites.len(),
            samples: Samples::default(),
            failed: 0,
        }));
        sites.push(site);
        bar.inc(1);
    }
    // Not counted: neighbours are found, caches filled.
    for site in &sites {
        site.run(1, Duration::from_millis(50))?;
        site.check()?;
    }
    bar.reset();
    bar.set_length(u64::from(setting.rounds) * measured.len() as u64);
    for round in 1..=setting.rounds {
        bar.set_message(format!("crr: round {round} of {}", setting.rounds));
        let mut order: Vec<usize> = (0..measured.len()).collect();
        fastrand::shuffle(&mut order);
        for index in order {
            let row = &mut measured[index];
            let done = sites[row.site].run(row.threads, setting.sample)?;
            row.samples.push(done.rate);
            row.failed += done.failed;
            bar.inc(1);
        }
    }
    let rows = measured.iter().map(|row| {
        let base = peer(&measured, row, Way::DirectTracked, None)?;
        let (rate, ratio) = (row.samples.interval(), row.samples.ratio_to(base).interval());
        let Measured { way, version, services, threads, failed, .. } = *row;
        Ok(Row { way, version, services, threads, rate, ratio, failed })
    });
    let rows = rows.collect::<Result<_>>()?;
    Ok(Rates { rounds: setting.rounds, sample_ms: setting.sample.as_millis(), rows, goals: goals(&measured)? })
}

/// The samples of another way of the same family, by as many threads.
fn peer<'a>(rows: &'a [Measured], of: &Measured, way: Way, services: Option<u32>) -> Result<&'a Samples> {
    let wanted = (way, of.version, services, of.threads);
    let row = rows.iter().find(|row| (row.way, row.version, row.services, row.threads) == wanted);
    Ok(&row.with_context(|| format!("{} was not measured", way.name()))?.samples)
}

/// What became of the goals.
fn goals(measured: &[Measured]) -> Result<Vec<Goal>> {
    let mut goals = Vec::new();
    for row in measured.iter().filter(|row| row.way == Way::SocketLb) {
        let of = |way, services| anyhow::Ok(row.samples.ratio_to(peer(measured, row, way, services)?).interval());
        let tracked = of(Way::DirectTracked, None)?;
        let rules = of(Way::Nftables, row.services)?;
        let version = row.version.name();
        let setting = format!("{version}, {} thread(s), {} services", row.threads, row.services.unwrap_or(0));
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
        for version in Version::ALL {
            println!("{}\n", self.rows_table(version));
        }
        println!(
            "Connect, request, response, close: exchanges a second from one namespace to another, {} rounds of {} ms: median\n\
             (its confidence interval of 95 %, by order statistics); behind it, how many times the direct way with\n\
             connections tracked in the same family, round by round. The rows without conntrack have no netfilter hook on their way, which is\n\
             checked. The measured service has affinity and two backends; the services are there beside it.\n",
            self.rounds, self.sample_ms
        );
        println!("{}\n", goals_table(&self.goals));
    }

    fn rows_table(&self, version: Version) -> Table {
        let mut head = vec![format!("exchanges a second, {}", version.name()), "services".to_owned()];
        for threads in THREADS {
            head.extend([format!("{threads} thread(s)"), "ratio".to_owned()]);
        }
        let mut table = table(&head);
        for first in self.rows.iter().filter(|row| row.version == version && row.threads == THREADS[0]) {
            let same = |row: &&Row| (row.way, row.version, row.services) == (first.way, first.version, first.services);
            let mut cells =
                vec![first.way.name().to_owned(), first.services.map_or_else(String::new, |n| n.to_string())];
            for Row { rate, ratio, .. } in self.rows.iter().filter(same) {
                cells.push(interval(rate));
                cells.push(ratio_text(ratio));
            }
            table.add_row(cells);
        }
        align(&mut table)
    }
}

/// What became of goals.
pub fn goals_table(goals: &[Goal]) -> Table {
    let mut rows = table(&["goal", "at least", "measured", ""]);
    for Goal { name, ratio, at_least, met } in goals {
        let met = if *met { "met" } else { "missed" };
        rows.add_row([name.clone(), format!("{at_least:.2}"), ratio_text(ratio), met.to_owned()]);
    }
    align(&mut rows)
}

/// To three places: a part in a hundred is what these are about.
pub fn ratio_text(ratio: &Interval) -> String {
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
        Measured { way, version: Version::V6, services, threads: 1, site: 0, samples, failed: 0 }
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
