//! Connect, request, response, close from outside by node ports: how many a second come through, to a pod of the node and to one
//! of another, with Affinity and with the real kube-proxy.
//!
//! Both proxies stand side by side, each on a node of its own and given the same objects, and are measured in rounds: every
//! row once a round, in another order each time. Ratios are taken within a round.

mod site;

use std::time::Duration;

use affinity_tests::apiserver::{ApiOptions, ApiServer};
use anyhow::{Context as _, Result};
use indicatif::ProgressBar;
use serde::Serialize;

use crate::control_plane::kube_proxy;
use crate::crr::{Goal, goals_table, ratio_text};
use crate::figures::{Interval, Samples};
use crate::report::{align, interval, table};
use crate::version::Version;
use site::Site;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Samples of each row.
    pub rounds: u32,
    /// How long a sample takes.
    pub sample: Duration,
}

/// What serves the node's services.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Proxy {
    /// The programs on the node's uplinks.
    Affinity,
    /// kube-proxy in its nftables mode.
    KubeProxy,
}

impl Proxy {
    const ALL: [Self; 2] = [Self::Affinity, Self::KubeProxy];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Affinity => "Affinity",
            Self::KubeProxy => "kube-proxy, nftables",
        }
    }
}

/// Where the pods of a service are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pod {
    /// On the node that the client's packets come to.
    Here,
    /// On another one: they leave the node as its own.
    Elsewhere,
}

impl Pod {
    const ALL: [Self; 2] = [Self::Here, Self::Elsewhere];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Here => "this node",
            Self::Elsewhere => "another node",
        }
    }
}

/// How many threads the client has.
const THREADS: [usize; 2] = [1, 16];
/// What Affinity has to reach of kube-proxy.
const OF_KUBE_PROXY: f64 = 1.05;

/// How many rows there are, with kube-proxy.
pub const ROWS: usize = Proxy::ALL.len() * Version::ALL.len() * Pod::ALL.len() * THREADS.len();

/// What came of it.
#[derive(Serialize)]
pub struct Rates {
    /// Samples of each row.
    pub rounds: u32,
    /// How long a sample took, in milliseconds.
    pub sample_ms: u128,
    /// The rows; none of kube-proxy where there is no such program.
    pub rows: Vec<Row>,
    /// What we want of kube-proxy's rates.
    pub goals: Vec<Goal>,
}

/// A client's exchanges with a service.
#[derive(Serialize)]
pub struct Row {
    /// What serves it.
    pub proxy: Proxy,
    /// The family of the addresses.
    pub version: Version,
    /// Where its pods are.
    pub pod: Pod,
    /// How many threads the client had.
    pub threads: usize,
    /// Exchanges a second.
    pub rate: Interval,
    /// Of Affinity's: how many times kube-proxy's, round by round.
    pub ratio: Option<Interval>,
    /// Exchanges that failed, of all rounds.
    pub failed: u64,
}

impl Row {
    /// What it has in common with the row that it is held against.
    pub fn setting(&self) -> (Version, Pod, usize) {
        (self.version, self.pod, self.threads)
    }
}

/// A row while it is measured.
struct Measured {
    proxy: Proxy,
    version: Version,
    pod: Pod,
    threads: usize,
    /// The index of its site.
    site: usize,
    samples: Samples,
    failed: u64,
}

/// Builds both sites and measures.
pub fn measure(setting: Setting, bar: &ProgressBar) -> Result<Rates> {
    let Setting { rounds, sample } = setting;
    let mut sites = vec![];
    bar.set_message("north-south: building Affinity");
    sites.push(Site::with_affinity()?);
    // It outlives the site whose proxy watches it.
    let api;
    if kube_proxy::is_there() {
        bar.set_message("north-south: building kube-proxy, before a kube-apiserver");
        api = ApiServer::start(ApiOptions::default())?;
        sites.push(Site::with_kube_proxy(&api)?);
    }
    let mut measured: Vec<Measured> = Vec::new();
    for (index, site) in sites.iter_mut().enumerate() {
        site.warm_up().with_context(|| site.proxy().name())?;
        let proxy = site.proxy();
        for (version, pod) in settings() {
            let row = |threads| Measured {
                proxy,
                version,
                pod,
                threads,
                site: index,
                samples: Samples::default(),
                failed: 0,
            };
            measured.extend(THREADS.map(row));
        }
    }
    bar.reset();
    bar.set_length(u64::from(rounds) * measured.len() as u64);
    for round in 1..=rounds {
        bar.set_message(format!("north-south: round {round} of {rounds}"));
        let mut order: Vec<usize> = (0..measured.len()).collect();
        fastrand::shuffle(&mut order);
        for index in order {
            let row = &mut measured[index];
            let done = sites[row.site].run(row.version, row.pod, row.threads, sample)?;
            row.samples.push(done.rate);
            row.failed += done.failed;
            bar.inc(1);
        }
    }
    Ok(Rates { rounds, sample_ms: sample.as_millis(), rows: rows(&measured), goals: goals(&measured) })
}

/// Every service in every family.
fn settings() -> impl Iterator<Item = (Version, Pod)> {
    Version::ALL.into_iter().flat_map(|version| Pod::ALL.map(|pod| (version, pod)))
}

fn rows(measured: &[Measured]) -> Vec<Row> {
    let row = |row: &Measured| {
        let Measured { proxy, version, pod, threads, failed, .. } = *row;
        Row { proxy, version, pod, threads, rate: row.samples.interval(), ratio: ratio(measured, row), failed }
    };
    measured.iter().map(row).collect()
}

/// How many times kube-proxy's a row of Affinity's is.
fn ratio(measured: &[Measured], row: &Measured) -> Option<Interval> {
    let wanted = (Proxy::KubeProxy, row.version, row.pod, row.threads);
    let peer = measured.iter().find(|peer| (peer.proxy, peer.version, peer.pod, peer.threads) == wanted)?;
    (row.proxy == Proxy::Affinity).then(|| row.samples.ratio_to(&peer.samples).interval())
}

/// What became of the goals.
fn goals(measured: &[Measured]) -> Vec<Goal> {
    let goal = |row: &Measured| {
        let ratio = ratio(measured, row)?;
        let name = format!(
            "Affinity to kube-proxy, {}, pods on {}, {} thread(s)",
            row.version.name(),
            row.pod.name(),
            row.threads
        );
        Some(Goal { name, ratio, at_least: OF_KUBE_PROXY, met: ratio.median >= OF_KUBE_PROXY })
    };
    measured.iter().filter_map(goal).collect()
}

impl Rates {
    /// The tables that people read.
    pub fn print(&self) {
        let head = ["exchanges a second by node port", "family", "pods on", "threads", "rate", "to kube-proxy"];
        let mut rows = table(&head);
        for row in &self.rows {
            rows.add_row([
                row.proxy.name().to_owned(),
                row.version.name().to_owned(),
                row.pod.name().to_owned(),
                row.threads.to_string(),
                interval(&row.rate),
                row.ratio.as_ref().map(ratio_text).unwrap_or_default(),
            ]);
        }
        println!("{}\n", align(&mut rows));
        println!(
            "Connect, request, response, close: exchanges a second from a machine outside to a node port, {} rounds of {} ms: median\n\
             (its confidence interval of 95 %, by order statistics), and how many times kube-proxy's in the same round. Each service\n\
             has affinity and two backends. Pods on another node see the node's address, by both proxies, and have no other way\n\
             back; pods on this node see the client's own with Affinity, and the node's with kube-proxy.\n",
            self.rounds, self.sample_ms
        );
        if self.goals.is_empty() {
            println!("There is no kube-proxy to be measured beside.\n");
            return;
        }
        println!("{}\n", goals_table(&self.goals));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(proxy: Proxy, pod: Pod, rates: [u32; 3]) -> Measured {
        let mut samples = Samples::default();
        for rate in rates {
            samples.push(rate.into());
        }
        Measured { proxy, version: Version::V4, pod, threads: 1, site: 0, samples, failed: 0 }
    }

    #[test]
    fn affinity_is_held_against_kube_proxy_with_the_same_pods_in_the_same_round() {
        let here = row(Proxy::Affinity, Pod::Here, [1_060, 2_120, 3_180]);
        let elsewhere = row(Proxy::Affinity, Pod::Elsewhere, [1_040, 2_080, 3_120]);
        let peers = Pod::ALL.map(|pod| row(Proxy::KubeProxy, pod, [1_000, 2_000, 3_000]));
        let met = |rows: &[Measured]| goals(rows).iter().map(|goal| goal.met).collect::<Vec<_>>();
        let [peer_here, peer_elsewhere] = peers;
        assert_eq!(met(&[here, elsewhere, peer_here, peer_elsewhere]), [true, false]);
        let alone = [row(Proxy::Affinity, Pod::Here, [1, 1, 1]), row(Proxy::KubeProxy, Pod::Elsewhere, [1, 1, 1])];
        assert_eq!(goals(&alone).len(), 0, "nothing to be held against");
        assert!(rows(&alone).iter().all(|row| row.ratio.is_none()));
    }
}
