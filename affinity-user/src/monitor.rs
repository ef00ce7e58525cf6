//! What the datapath chooses, as it happens: its ring buffer, read while it is asked for, and the expiries that no packet
//! tells of.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use affinity_common::abi::events::{self, Event};
use affinity_common::reason::Reason;
use affinity_common::types::{BackendId, Nanos, Seconds, ServiceId};
use aya::maps::{Map, MapData, MapError, RingBuf};
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use thiserror::Error;
use tokio::time::{MissedTickBehavior, interval};

use crate::tables::{ONLY, TableError, Tables};
use crate::view::{Client, Names, SnapshotError, kind_of, now, open, read_clients, read_frontends, read_names};

/// For how long the datapath is asked for events at a time: a reader that dies is forgotten after that.
const LEASE: Duration = Duration::from_secs(3);
/// How often the ring is read: what people call at once.
const LOOK: Duration = Duration::from_millis(50);
/// How often the lease is renewed, and expiries are looked for.
const TICK: Duration = Duration::from_secs(1);

/// The monitor can't run.
#[derive(Debug, Error)]
pub enum MonitorError {
    /// Another one does: the ring has one reader.
    #[error("another monitor is running (pid {0}): end it first")]
    Busy(String),
    /// The lock file can't be made.
    #[error("{}: {source}", path.display())]
    Lock {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The maps can't be read.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A map can't be read or written.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The ring can't be read.
    #[error("the ring of events can't be read: {0}")]
    Ring(#[from] MapError),
    /// The system.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Happening {
    /// When, in seconds on the monotonic clock.
    pub time_seconds: f64,
    /// `selection`, `failover` or `expired`.
    pub event: &'static str,
    /// Why: a reason's name, or `expired`.
    pub reason: &'static str,
    /// The client's address.
    pub client: IpAddr,
    /// The client's port; none for an expiry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_port: Option<u16>,
    /// Whether it is outside of the cluster: it came in by one of the node's uplinks. None for an expiry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outside: Option<bool>,
    /// What the client has asked for: `ClusterIP`, `ExternalIP`, `LoadBalancer` or `NodePort`. None for an expiry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frontend_kind: Option<String>,
    /// `namespace/name`.
    pub service: String,
    /// The port's name.
    pub port_name: String,
    /// The pod, where it is known.
    pub pod: Option<String>,
    /// The backend's address, where it is still there.
    pub backend: Option<SocketAddr>,
    /// The pod, or address, that the client had before, if another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub previous: Option<String>,
}

/// Runs until `show` says that nobody listens any more.
///
/// # Errors
/// Where there is nothing to read, or another reader.
pub async fn run(
    pin_dir: &Path,
    state_dir: &Path,
    mut show: impl FnMut(&Happening) -> io::Result<()>,
) -> Result<(), MonitorError> {
    let mut tables = open(pin_dir)?;
    let _lock = lock(state_dir)?;
    let ring = MapData::from_pin(pin_dir.join(events::SPEC.name)).and_then(Map::from_map_data)?;
    let mut ring = RingBuf::try_from(ring)?;
    // What an earlier reader left.
    while ring.next().is_some() {}
    let mut names = read_names(&tables)?;
    let mut expiries = Expiries::default();
    let (mut look, mut tick) = (interval(LOOK), interval(TICK));
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let ended = loop {
        let mut happenings = Vec::new();
        tokio::select! {
            _ = tick.tick() => {
                ask(&mut tables, Some(LEASE))?;
                happenings = expiries.look(&tables, &names)?;
            }
            _ = look.tick() => while let Some(item) = ring.next() {
                let Ok(event) = bytemuck::try_pod_read_unaligned::<Event>(&item) else { continue };
                drop(item);
                if !names.backends.keys().any(|key| key.service == event.service && key.backend == event.backend) {
                    names = read_names(&tables)?;
                }
                happenings.extend(of_event(&event, &names));
            },
            _ = tokio::signal::ctrl_c() => break Ok(()),
        }
        if let Err(error) = happenings.iter().try_for_each(&mut show) {
            break Err(error);
        }
    };
    ask(&mut tables, None)?;
    match ended {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// One reader at a time; it is gone with its process.
fn lock(state_dir: &Path) -> Result<Flock<File>, MonitorError> {
    let path = state_dir.join("monitor.lock");
    let failed = |source| MonitorError::Lock { path: path.clone(), source };
    fs::create_dir_all(state_dir).map_err(failed)?;
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
    let mut lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| MonitorError::Busy(fs::read_to_string(&path).unwrap_or_default().trim().to_owned()))?;
    lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id())).map_err(failed)?;
    Ok(lock)
}

/// Asks the datapath for events, or for none.
fn ask(tables: &mut Tables, lease: Option<Duration>) -> Result<(), TableError> {
    let mut config = tables.shared.config.get(&ONLY)?.unwrap_or_default();
    let until = lease.map(|lease| now().0 + u64::try_from(lease.as_nanos()).unwrap_or(u64::MAX));
    config.monitor_until = until.unwrap_or_default();
    tables.shared.config.insert(&ONLY, &config)
}

fn of_event(event: &Event, names: &Names) -> Option<Happening> {
    let reason = Reason::from_number(event.reason)?;
    let moved = event.previous != BackendId::default() && event.previous != event.backend;
    Some(Happening {
        time_seconds: Duration::from_nanos(event.at).as_secs_f64(),
        event: if reason == Reason::AffinityFailover { "failover" } else { "selection" },
        reason: reason.name(),
        client: event.client_ip(),
        client_port: Some(event.client_port.get()),
        outside: Some(event.outside != 0),
        frontend_kind: Some(kind_of(event.frontend_flags).to_string()),
        service: names.service(event.service),
        port_name: names.port(event.service),
        pod: names.pod(event.service, event.backend),
        backend: names.address(event.service, event.backend),
        previous: moved.then(|| called(names, event.service, event.previous)),
    })
}

/// What people call a backend: its pod, its address, or its id.
fn called(names: &Names, service: ServiceId, backend: BackendId) -> String {
    let address = || names.address(service, backend).map(|address| address.to_string());
    names.pod(service, backend).or_else(address).unwrap_or_else(|| format!("#{backend}"))
}

/// Entries that pass their time while nobody uses them.
#[derive(Default)]
struct Expiries {
    /// Client, service port, scope and backend of each.
    live: BTreeSet<(IpAddr, ServiceId, u32, BackendId)>,
}

impl Expiries {
    fn look(&mut self, tables: &Tables, names: &Names) -> Result<Vec<Happening>, TableError> {
        let timeouts: BTreeMap<ServiceId, Seconds> = read_frontends(tables)?
            .into_iter()
            .filter(|frontend| frontend.value.has_affinity())
            .map(|frontend| (frontend.value.affinity, frontend.value.timeout))
            .collect();
        let at = now();
        let mut live = BTreeSet::new();
        let mut happenings = Vec::new();
        for client in read_clients(tables)? {
            let Some(timeout) = timeouts.get(&client.service) else { continue };
            let who = (client.address, client.service, client.scope, client.entry.backend);
            if client.entry.pair().is_live(*timeout, at) {
                live.insert(who);
            } else if self.live.contains(&who) {
                happenings.push(expired(&client, at, names));
            }
        }
        self.live = live;
        Ok(happenings)
    }
}

fn expired(client: &Client, at: Nanos, names: &Names) -> Happening {
    let (service, backend) = (client.service, client.entry.backend);
    Happening {
        time_seconds: Duration::from_nanos(at.0).as_secs_f64(),
        event: "expired",
        reason: "expired",
        client: client.address,
        client_port: None,
        outside: None,
        frontend_kind: None,
        service: names.service(service),
        port_name: names.port(service),
        pod: names.pod(service, backend),
        backend: names.address(service, backend),
        previous: None,
    }
}
