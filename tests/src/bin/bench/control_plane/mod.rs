//! The control plane: from the events of a watch to maps written.
//!
//! The daemon itself runs in a node, before an API server that is a loop over a socket ([`server`]): decoding is a part of
//! every figure, another program's slowness of none. When a change is in force is seen in the pinned maps.

mod cluster;
pub mod kube_proxy;
mod process;
pub mod real;
mod rules;
mod server;
mod site;

use std::fmt::Write as _;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use affinity_tests::topology::Lab;
use anyhow::{Context as _, Result};
use indicatif::ProgressBar;
use serde::Serialize;
use tempfile::TempDir;

use cluster::Cluster;
use real::Real;
use server::Server;
use site::{Memory, Site};

use crate::report::{align, table};

/// Every this many changes of the sustained ones, one is watched until it is in force.
const SAMPLED: u32 = 10;
/// How many changes are timed before a real kube-apiserver: each takes more than a second.
const MANY: u32 = 60;

/// What is measured.
pub struct Effort {
    /// How many services come at once.
    pub cold: u32,
    /// How many services there are where single ones change.
    pub steady: u32,
    /// How many single changes are timed.
    pub changes: u32,
    /// How many changes a second come for a while.
    pub rate: u32,
    /// For how long.
    pub seconds: u32,
    /// How many services there are where memory is looked at.
    pub large: u32,
    /// How many there are before a real kube-apiserver without affinity.
    pub real: u32,
    /// The same with affinity. Not more: kube-proxy has a set of nftables for each of their endpoints, the kernel goes through
    /// the list of them for each rule that names one, and no one else gets that CPU meanwhile: 22 s with 1,000 services of five
    /// endpoints, and more than 19 minutes with 10,000.
    pub real_sticky: u32,
}

impl Effort {
    /// What the goals are about.
    pub const WHOLE: Self = Self {
        cold: 44_000,
        steady: 10_000,
        changes: 1_000,
        rate: 1_000,
        seconds: 20,
        large: 50_000,
        real: 10_000,
        real_sticky: 300,
    };
    /// That it can be measured.
    pub const QUICK: Self = Self {
        cold: 1_000,
        steady: 500,
        changes: 50,
        rate: 200,
        seconds: 2,
        large: 1_000,
        real: 300,
        real_sticky: 100,
    };
}

/// Everything that was measured.
#[derive(Serialize)]
pub struct Report {
    cold: Vec<Cold>,
    change: Latency,
    sustained: Sustained,
    /// Before a real kube-apiserver, where there is one.
    real: Vec<Real>,
    goals: Vec<Goal>,
}

/// Services that come at once, to empty maps.
#[derive(Serialize)]
struct Cold {
    services: u32,
    endpoints: u32,
    sticky: bool,
    /// Seconds from the start to the lists' last byte: the programs are loaded, and objects decoded as they come.
    listed: f64,
    /// Seconds from then until the maps held everything.
    programmed: f64,
    /// Seconds of a CPU for that: what it takes where nobody else wants the CPUs.
    cpu: f64,
    memory: Memory,
}

/// How long changes took, from the event's sending to the map, in milliseconds.
#[derive(Clone, Copy, Serialize)]
struct Latency {
    services: u32,
    changes: usize,
    median: f64,
    p99: f64,
    most: f64,
}

/// Changes at a rate.
#[derive(Serialize)]
struct Sustained {
    rate: u32,
    seconds: u32,
    first_half: Latency,
    second_half: Latency,
    /// Seconds of a CPU that the daemon used for each second.
    cpu: f64,
}

/// What we want.
#[derive(Serialize)]
struct Goal {
    name: String,
    at_most: f64,
    measured: f64,
    met: bool,
}

/// Measures all of it.
pub fn measure(effort: &Effort, bar: &ProgressBar) -> Result<Report> {
    let mut colds = Vec::new();
    for (services, sticky) in [(effort.cold, false), (effort.cold, true), (effort.large, false), (effort.large, true)] {
        let what = if sticky { "with affinity" } else { "without affinity" };
        bar.set_message(format!("{services} services {what}"));
        colds.push(cold(Cluster { services, endpoints: 5, sticky })?);
    }
    bar.set_message(format!("changes among {} services", effort.steady));
    let (change, sustained) = steady(effort)?;
    let mut real = Vec::new();
    for (services, sticky) in
        [(effort.real, false), (effort.real_sticky, true)].into_iter().filter(|_| real::is_there())
    {
        real.push(real::measure(Cluster { services, endpoints: 5, sticky }, effort.changes.min(MANY), bar)?);
    }
    let mut report = Report { cold: colds, change, sustained, real, goals: Vec::new() };
    report.goals = goals(&report, effort);
    Ok(report)
}

fn cold(cluster: Cluster) -> Result<Cold> {
    let lab = site::node()?;
    let server = Server::start(&lab.node.netns, cluster)?;
    let (mut site, _directory) = launch(&lab, &server, cluster)?;
    let listed = server.wait_listed()?;
    let used = site.cpu_time()?;
    let (synced, in_all) = site.wait_synced()?;
    let cpu = site.cpu_time()?.saturating_sub(used);
    let programmed = synced.saturating_duration_since(listed);
    // What is freed a moment later is not held against it, nor for it.
    thread::sleep(Duration::from_secs(3));
    Ok(Cold {
        services: cluster.services,
        endpoints: cluster.endpoints,
        sticky: cluster.sticky,
        listed: in_all.saturating_sub(programmed).as_secs_f64(),
        programmed: programmed.as_secs_f64(),
        cpu: cpu.as_secs_f64(),
        memory: site.memory()?,
    })
}

/// Starts a daemon; the directory has its kubeconfig, which it reads soon.
fn launch<'a>(lab: &'a Lab, server: &Server, cluster: Cluster) -> Result<(Site<'a>, TempDir)> {
    let directory = tempfile::tempdir()?;
    let kubeconfig = directory.path().join("kubeconfig");
    std::fs::write(&kubeconfig, server.kubeconfig())?;
    Ok((Site::start(lab, &kubeconfig, cluster)?, directory))
}

fn steady(effort: &Effort) -> Result<(Latency, Sustained)> {
    let cluster = Cluster { services: effort.steady, endpoints: 5, sticky: true };
    let lab = site::node()?;
    let server = Server::start(&lab.node.netns, cluster)?;
    let (mut site, _directory) = launch(&lab, &server, cluster)?;
    site.wait_synced()?;
    let mut latencies = Vec::new();
    let mut versions = vec![0; effort.steady as usize];
    for _ in 0..effort.changes {
        let service = fastrand::u32(..cluster.services);
        let before = site.frontend(service)?;
        let version = next(&mut versions, service);
        let sent = Instant::now();
        server.change(service, version);
        let (_, seen) = site.wait_change(service, before)?;
        latencies.push(seen - sent);
        thread::sleep(Duration::from_micros(fastrand::u64(500..3_000)));
    }
    let change = Latency::of(effort.steady, latencies);
    Ok((change, sustained(effort, &server, &mut site, versions)?))
}

/// The version after the last one of a service.
fn next(versions: &mut [u32], service: u32) -> u32 {
    let Some(version) = versions.get_mut(service as usize) else { return 0 };
    *version += 1;
    *version
}

/// Changes at a rate, whatever becomes of them; some services' are watched.
fn sustained(effort: &Effort, server: &Server, site: &mut Site<'_>, mut versions: Vec<u32>) -> Result<Sustained> {
    let (watched, used) = (effort.steady / SAMPLED, site.cpu_time()?);
    let mut known = (0..watched).map(|service| site.frontend(service)).collect::<Result<Vec<_>>>()?;
    let (sender, sent) = mpsc::channel();
    let count = effort.rate * effort.seconds;
    let (rate, steady, server) = (effort.rate, effort.steady, server.clone());
    let started = Instant::now();
    let load = thread::spawn(move || {
        for n in 0..count {
            let due = started + Duration::from_secs(1) * n / rate;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let service = if n % SAMPLED == 0 { n / SAMPLED % watched } else { watched + n % (steady - watched) };
            let now = Instant::now();
            server.change(service, next(&mut versions, service));
            if n % SAMPLED == 0 && sender.send((service, now)).is_err() {
                return;
            }
        }
    });
    let mut latencies = Vec::new();
    for (service, at) in sent {
        let known = known.get_mut(service as usize).context("a service that is watched")?;
        let (found, seen) = site.wait_change(service, *known)?;
        *known = found;
        latencies.push(seen - at);
    }
    load.join().map_err(|_| anyhow::anyhow!("the load panicked"))?;
    let took = started.elapsed();
    let second = latencies.split_off(latencies.len() / 2);
    Ok(Sustained {
        rate,
        seconds: effort.seconds,
        first_half: Latency::of(steady, latencies),
        second_half: Latency::of(steady, second),
        cpu: site.cpu_time()?.saturating_sub(used).as_secs_f64() / took.as_secs_f64(),
    })
}

impl Latency {
    fn of(services: u32, mut latencies: Vec<Duration>) -> Self {
        latencies.sort_unstable();
        let at = |percent: usize| {
            let index = (latencies.len() * percent / 100).min(latencies.len().saturating_sub(1));
            latencies.get(index).map_or(0.0, |latency| latency.as_secs_f64() * 1_000.0)
        };
        Self { services, changes: latencies.len(), median: at(50), p99: at(99), most: at(100) }
    }
}

const MIB: f64 = 1_048_576.0;

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB
}

fn goals(report: &Report, effort: &Effort) -> Vec<Goal> {
    let goal = |name: String, at_most: f64, measured: f64| Goal { name, at_most, measured, met: measured <= at_most };
    let kind = |sticky| if sticky { "with affinity" } else { "without affinity" };
    let mut goals = Vec::new();
    for cold in report.cold.iter().filter(|cold| cold.services == effort.cold) {
        let name = format!("{} services at once {}, after the lists: s", cold.services, kind(cold.sticky));
        goals.push(goal(name, 2.0, cold.programmed));
    }
    for cold in report.cold.iter().filter(|cold| cold.services == effort.large) {
        let name = format!("the daemon's memory, {} services {}: MiB", cold.services, kind(cold.sticky));
        goals.push(goal(name, 100.0, mib(cold.memory.resident)));
    }
    let Report { change, sustained, .. } = report;
    goals.push(goal(format!("one endpoint's change among {} services, p99: ms", change.services), 2.0, change.p99));
    let name = format!("{} changes a second, p99 of the second half: ms", sustained.rate);
    // Bounded: no more than a few times what a single one takes, and no growth.
    goals.push(goal(name, 20.0, sustained.second_half.p99));
    goals
}

impl Report {
    /// As README.md has it, in Markdown.
    pub fn markdown(&self) -> String {
        let mut text = "| services | affinity | programmed, after the lists | CPU time for that | RSS | the maps |\n|---|---|---|---|---|---|\n".to_owned();
        for Cold { services, endpoints, sticky, programmed, cpu, memory, .. } in &self.cold {
            let sticky = if *sticky { "with" } else { "without" };
            let [resident, maps] = [memory.resident, memory.maps].map(mib);
            let _ = writeln!(
                text,
                "| {services} x {endpoints} | {sticky} | {programmed:.2} s | {cpu:.2} s | {resident:.0} MiB | {maps:.0} MiB |"
            );
        }
        let Sustained { rate, second_half, cpu, .. } = &self.sustained;
        text += "\n| from an event to the map | median | p99 |\n|---|---|---|\n";
        let alone = format!("one change among {} services", self.change.services);
        for (name, Latency { median, p99, .. }) in
            [(alone, &self.change), (format!("{rate} changes a second ({:.0} % of one CPU)", cpu * 100.0), second_half)]
        {
            let _ = writeln!(text, "| {name} | {median:.2} ms | {p99:.2} ms |");
        }
        for real in &self.real {
            let _ = write!(text, "\n{}\n{}\n", real.markdown(), real.note());
        }
        text
    }

    /// The tables that people read.
    pub fn print(&self) {
        let mut cold =
            table(&["services at once", "affinity", "lists taken", "then programmed", "CPU", "RSS", "peak", "maps"]);
        for row in &self.cold {
            let Memory { resident, peak, maps } = row.memory;
            let memory = [resident, peak, maps].map(|bytes| format!("{:.1} MiB", mib(bytes)));
            let mut cells = vec![
                format!("{} x {}", row.services, row.endpoints),
                if row.sticky { "ClientIP" } else { "None" }.to_owned(),
                format!("{:.2} s", row.listed),
                format!("{:.2} s", row.programmed),
                format!("{:.2} s", row.cpu),
            ];
            cells.extend(memory);
            cold.add_row(cells);
        }
        println!("{}\n", align(&mut cold));
        let mut change = table(&["changes, from the event to the map", "services", "number", "median", "p99", "most"]);
        let Sustained { rate, seconds, first_half, second_half, cpu } = &self.sustained;
        let rows = [
            ("one at a time".to_owned(), &self.change),
            (format!("{rate} a second, first half of {seconds} s"), first_half),
            (format!("{rate} a second, second half"), second_half),
        ];
        for (name, Latency { services, changes, median, p99, most }) in rows {
            let times = [median, p99, most].map(|ms| format!("{ms:.2} ms"));
            let [median, p99, most] = times;
            change.add_row([name, services.to_string(), changes.to_string(), median, p99, most]);
        }
        println!("{}\n", align(&mut change));
        println!(
            "The daemon itself, before an API server that is a loop over a socket; services with one port and one slice,\n\
             {:.0} % of one CPU used at {rate} changes a second. RSS is looked at three seconds after the sync.\n",
            cpu * 100.0
        );
        for real in &self.real {
            println!("{}\n\n{}\n", align(&mut real.table()), real.note());
        }
        let mut goals = table(&["goal", "at most", "measured", ""]);
        for Goal { name, at_most, measured, met } in &self.goals {
            let met = if *met { "met" } else { "missed" };
            goals.add_row([name.clone(), format!("{at_most:.1}"), format!("{measured:.2}"), met.to_owned()]);
        }
        println!("{}\n", align(&mut goals));
    }
}
