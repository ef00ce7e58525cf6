//! A daemon in a node, before an API server, and what can be seen of it from outside: its maps, its memory, its time.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use affinity_common::abi::frontends::Frontend;
use affinity_tests::daemon::{Daemon, DaemonOptions, PIN_DIR, Source};
use affinity_tests::topology::{Lab, LabOptions};
use affinity_user::status::{STATE_DIR, StatusFile};
use affinity_user::tables::{Tables, bpf};
use anyhow::{Context as _, Result, bail};

use super::cluster::Cluster;
use super::process;

/// How often a map is looked at; a sleep takes some 60 µs longer than was asked for.
const LOOK: Duration = Duration::from_micros(10);
/// How long anything may take.
const PATIENCE: Duration = Duration::from_mins(5);
/// How many slots a service with affinity and few backends takes.
const SLOTS: u32 = 251;

/// A node without pods.
pub fn node() -> Result<Lab> {
    Lab::new(LabOptions { clients: 0, backends: 0, ..LabOptions::default() })
}

/// A daemon that runs.
pub struct Site<'a> {
    daemon: Daemon,
    lab: &'a Lab,
    started: Instant,
    tables: Option<Tables>,
}

impl<'a> Site<'a> {
    /// Starts a daemon whose maps are large enough.
    pub fn start(lab: &'a Lab, kubeconfig: &Path, cluster: Cluster) -> Result<Self> {
        let mut options = DaemonOptions::new(Source::Kubeconfig(kubeconfig.to_owned()));
        options.arguments = map_sizes(cluster);
        let mut daemon = Daemon::stopped(&lab.node, options)?;
        let started = Instant::now();
        daemon.launch()?;
        Ok(Self { daemon, lab, started, tables: None })
    }

    /// Waits until it takes events: its programs and maps are loaded. Returns how long after the start that was.
    pub fn wait_loaded(&mut self) -> Result<Duration> {
        Ok(self.wait_status(|_| true)? - self.started)
    }

    /// Waits until the maps hold everything; returns when that was, and how long after the start.
    pub fn wait_synced(&mut self) -> Result<(Instant, Duration)> {
        let synced = self.wait_status(|status| status.synced)?;
        self.tables = Some(self.lab.node.place().enter(|| Ok(bpf::open_pinned(Path::new(PIN_DIR))?))?);
        Ok((synced, synced - self.started))
    }

    /// Waits for a status; returns when it was seen.
    fn wait_status(&mut self, is_it: impl Fn(&StatusFile) -> bool + Send + Sync) -> Result<Instant> {
        let pid = self.pid()?;
        let seen = self.lab.node.place().enter(|| {
            let deadline = Instant::now() + PATIENCE;
            loop {
                let status = StatusFile::read(Path::new(STATE_DIR)).ok().flatten();
                if status.is_some_and(|status| status.pid == pid && is_it(&status)) {
                    return Ok(Instant::now());
                }
                if Instant::now() > deadline || !fs::exists(format!("/proc/{pid}/fd"))? {
                    bail!("the daemon has not got as far as it should");
                }
                thread::sleep(Duration::from_millis(2));
            }
        });
        seen.with_context(|| tail(&self.daemon))
    }

    /// What the maps say of a service.
    pub fn frontend(&self, service: u32) -> Result<Option<Frontend>> {
        let tables = self.tables.as_ref().context("not synced yet")?;
        Ok(tables.v4.frontends.get(&Cluster::frontend(service))?)
    }

    /// Waits until a service's frontend is another than it was: its new backends and slots are written, and packets see
    /// them. Returns it, and when it was seen.
    pub fn wait_change(&self, service: u32, before: Option<Frontend>) -> Result<(Option<Frontend>, Instant)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self.frontend(service)?;
            let now = Instant::now();
            if found != before {
                return Ok((found, now));
            }
            if now > deadline {
                bail!("service {service} has not changed: {}", tail(&self.daemon));
            }
            thread::sleep(LOOK);
        }
    }

    /// Its memory and that of its maps.
    pub fn memory(&mut self) -> Result<Memory> {
        let pid = self.pid()?;
        let of = |name| process::memory(pid, name);
        Ok(Memory { resident: of("VmRSS:")?, peak: of("VmHWM:")?, maps: map_memory(pid)? })
    }

    /// How much time of a CPU it has used so far.
    pub fn cpu_time(&mut self) -> Result<Duration> {
        process::cpu_time(self.pid()?)
    }

    fn pid(&mut self) -> Result<u32> {
        Ok(self.daemon.process().context("no daemon")?.pid())
    }
}

fn tail(daemon: &Daemon) -> String {
    let log = daemon.log();
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}

/// `--map-size` for so many services, where the defaults don't do.
fn map_sizes(cluster: Cluster) -> Vec<String> {
    let services = cluster.services.next_power_of_two().max(1 << 14);
    let slots = if cluster.sticky { SLOTS } else { cluster.endpoints } * services;
    // Twice: while a service's backends switch, its old run rests.
    let sizes = [("frontends", services), ("services", services), ("slots", slots)];
    let backends = ["backends", "backend_names", "backend_stats"].map(|name| (name, 8 * services));
    sizes.into_iter().chain(backends).map(|(name, size)| format!("--map-size={name}={size}")).collect()
}

/// Memory, in bytes.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Memory {
    /// The daemon's resident memory.
    pub resident: u64,
    /// The most that it was.
    pub peak: u64,
    /// The BPF maps', as the kernel accounts for them.
    pub maps: u64,
}

/// The memory of all BPF maps that a process has open, each once.
fn map_memory(pid: u32) -> Result<u64> {
    let mut maps: BTreeMap<u64, u64> = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // Descriptors come and go.
        let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
        let of = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
        if let (Some(id), Some(bytes)) = (of("map_id:"), of("memlock:")) {
            maps.insert(id, bytes);
        }
    }
    Ok(maps.values().sum())
}
