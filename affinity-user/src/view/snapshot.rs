//! The maps, read once.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use affinity_common::abi::affinity::Affinity;
use affinity_common::abi::backend_stats::BackendStats;
use affinity_common::abi::backends::BackendKey;
use affinity_common::abi::conntrack::{ConntrackKey, FORWARD, REVERSE, SNAT_REPLY};
use affinity_common::abi::counters::Counter;
use affinity_common::abi::frontends::{Frontend, OUTSIDERS};
use affinity_common::abi::lifetimes::Lifetimes;
use affinity_common::abi::source_ranges::RangeKey;
use affinity_common::abi::{self, LAYOUT};
use affinity_common::family::Family;
use affinity_common::types::{BackendId, Nanos, Proto, Seconds, ServiceId, Ticks};
use nix::time::{ClockId, clock_gettime};
use thiserror::Error;

use crate::model::ServicePortName;
use crate::tables::{FamilyTables, ONLY, TableError, Tables, bpf, names};

/// The maps can't be read.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// There are none.
    #[error("no Affinity on this node: nothing is pinned under {}; start it by `affinity run`", .0.display())]
    Missing(PathBuf),
    /// They are of another version.
    #[error("the maps pinned under {} have layout {found}, this affinity reads {LAYOUT}: use the version that made them", path.display())]
    Layout {
        /// The pin directory.
        path: PathBuf,
        /// Their layout.
        found: u32,
    },
    /// They can't be opened.
    #[error(transparent)]
    Open(bpf::OpenError),
    /// One of them can't be read.
    #[error(transparent)]
    Table(#[from] TableError),
}

/// What is where, by id.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// Service ports.
    pub services: BTreeMap<ServiceId, ServicePortName>,
    /// The pods of backends, where they are known.
    pub pods: BTreeMap<BackendKey, String>,
    /// Backends of either family.
    pub backends: BTreeMap<BackendKey, Backend>,
}

/// A backend.
#[derive(Clone, Copy, Debug)]
pub struct Backend {
    /// Address and port.
    pub address: SocketAddr,
    /// Whether it takes new sessions.
    pub eligible: bool,
}

/// An address that a service port is reached by.
#[derive(Clone, Copy, Debug)]
pub struct FrontendAt {
    /// Address and port.
    pub address: SocketAddr,
    /// The protocol.
    pub proto: Proto,
    /// Whether it is for those who come from outside alone, beside one for anybody.
    pub outsiders: bool,
    /// What is behind it.
    pub value: Frontend,
}

/// A client of a service port.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    /// Its address.
    pub address: IpAddr,
    /// The service port.
    pub service: ServiceId,
    /// Which set of the service's backends it is kept on.
    pub scope: u32,
    /// What it is kept on.
    pub entry: Affinity,
}

/// A connection in one direction.
#[derive(Clone, Copy, Debug)]
pub struct Connection {
    /// The protocol.
    pub proto: Proto,
    /// Whether it is the direction from the client.
    pub forward: bool,
    /// The client.
    pub client: SocketAddr,
    /// Whom it talks to.
    pub frontend: SocketAddr,
    /// Who answers.
    pub backend: SocketAddr,
    /// What a backend on another node takes the client for, where it has come from outside.
    pub seen_as: Option<SocketAddr>,
    /// Which backend that is.
    pub key: BackendKey,
    /// Packets in this direction.
    pub packets: u32,
    /// What was seen of it.
    pub seen: u8,
    /// When the last packet came.
    pub last_seen: Ticks,
    /// How long it may be silent.
    pub lifetime: Seconds,
    /// Whether it has been silent for that long: it counts as gone.
    pub expired: bool,
}

impl Names {
    /// `namespace/name` of a service port; its id where nobody knows it any more.
    pub fn service(&self, id: ServiceId) -> String {
        self.services.get(&id).map_or_else(|| format!("#{id}"), |name| name.service.to_string())
    }

    /// The port's name; empty where it has none.
    pub fn port(&self, id: ServiceId) -> String {
        self.services.get(&id).map(|name| name.port.to_string()).unwrap_or_default()
    }

    /// The pod of a backend.
    pub fn pod(&self, service: ServiceId, backend: BackendId) -> Option<String> {
        self.pods.get(&BackendKey { service, backend }).cloned()
    }

    /// Address and port of a backend.
    pub fn address(&self, service: ServiceId, backend: BackendId) -> Option<SocketAddr> {
        self.backends.get(&BackendKey { service, backend }).map(|backend| backend.address)
    }
}

/// What keeps the clients of a service port, or of several that share their affinity.
#[derive(Clone, Debug, Default)]
pub struct Keeping {
    /// For how long after their last packet.
    pub timeout: Seconds,
    /// The service ports.
    pub services: BTreeSet<ServiceId>,
}

/// The maps, read once.
pub struct Snapshot {
    /// When, on the clock of the entries.
    pub now: Nanos,
    /// What is where.
    pub names: Names,
    /// Frontends of both families.
    pub frontends: Vec<FrontendAt>,
    /// Who is let in by service ports that let in some clients only: ranges of addresses.
    pub ranges: BTreeMap<ServiceId, Vec<String>>,
    /// The backend of each slot that a frontend uses.
    pub slots: BTreeMap<u32, BackendId>,
    /// How often each backend was chosen.
    pub stats: BTreeMap<BackendKey, BackendStats>,
    /// Clients of both families.
    pub clients: Vec<Client>,
    /// Connections of both families.
    pub connections: Vec<Connection>,
    /// What was counted, by index.
    pub counters: BTreeMap<u32, Counter>,
    /// Elements and room of each map.
    pub fill: Vec<(&'static str, usize, usize)>,
}

/// The clock of the entries.
pub fn now() -> Nanos {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE)
        .map_or(0, |time| time.tv_sec().cast_unsigned() * 1_000_000_000 + time.tv_nsec().cast_unsigned());
    Nanos(time)
}

/// Opens the pinned maps for reading.
///
/// # Errors
/// Where there are none, or none of ours.
pub fn open(pin_dir: &Path) -> Result<Tables, SnapshotError> {
    let tables = bpf::open_pinned(pin_dir).map_err(|error| {
        if error.is_missing() { SnapshotError::Missing(pin_dir.to_owned()) } else { SnapshotError::Open(error) }
    })?;
    let found = tables.shared.config.get(&ONLY)?.map_or(0, |config| config.layout);
    if found != 0 && found != LAYOUT {
        return Err(SnapshotError::Layout { path: pin_dir.to_owned(), found });
    }
    Ok(tables)
}

/// Reads what ids stand for.
///
/// # Errors
/// Where a map can't be read.
pub fn read_names(tables: &Tables) -> Result<Names, TableError> {
    let services = tables.shared.services.entries()?;
    let services = services.into_iter().filter_map(|(id, value)| Some((id, names::decode_service(&value)?)));
    let pods = tables.shared.backend_names.entries()?;
    let pods = pods.into_iter().filter_map(|(key, value)| Some((key, names::decode_backend(&value)?.to_owned())));
    let mut backends = read_backends(&tables.v4)?;
    backends.extend(read_backends(&tables.v6)?);
    Ok(Names { services: services.collect(), pods: pods.filter(|(_, name)| !name.is_empty()).collect(), backends })
}

fn read_backends<F: Family>(tables: &FamilyTables<F>) -> Result<BTreeMap<BackendKey, Backend>, TableError> {
    let entries = tables.backends.entries()?.into_iter();
    Ok(entries
        .map(|(key, value)| {
            let address = super::socket::<F>(&value.addr, value.port);
            (key, Backend { address, eligible: value.is_eligible_anywhere() })
        })
        .collect())
}

/// Reads where services are reached.
///
/// # Errors
/// Where a map can't be read.
pub fn read_frontends(tables: &Tables) -> Result<Vec<FrontendAt>, TableError> {
    let mut frontends = frontends_of(&tables.v4)?;
    frontends.extend(frontends_of(&tables.v6)?);
    Ok(frontends)
}

fn frontends_of<F: Family>(tables: &FamilyTables<F>) -> Result<Vec<FrontendAt>, TableError> {
    let entries = tables.frontends.entries()?.into_iter();
    Ok(entries
        .map(|(key, value)| {
            let address = super::socket::<F>(&key.addr, key.port);
            FrontendAt { address, proto: key.proto, outsiders: key.origin == OUTSIDERS, value }
        })
        .collect())
}

fn ranges_of<F: Family>(tables: &FamilyTables<F>) -> Result<Vec<(ServiceId, String)>, TableError> {
    let text = |key: &RangeKey<F>| format!("{}/{}", F::to_ip(&key.addr), key.bits());
    Ok(tables.ranges.keys()?.iter().map(|key| (key.service, text(key))).collect())
}

/// Reads which clients are kept where.
///
/// # Errors
/// Where a map can't be read.
pub fn read_clients(tables: &Tables) -> Result<Vec<Client>, TableError> {
    let mut clients = clients_of(&tables.v4)?;
    clients.extend(clients_of(&tables.v6)?);
    Ok(clients)
}

fn clients_of<F: Family>(tables: &FamilyTables<F>) -> Result<Vec<Client>, TableError> {
    let entries = tables.affinity.entries()?.into_iter();
    Ok(entries
        .map(|(key, entry)| {
            let address = F::to_ip(&key.client);
            Client { address, service: key.service, scope: key.scope, entry }
        })
        .collect())
}

fn connections_of<F: Family>(
    tables: &FamilyTables<F>,
    lifetimes: &Lifetimes,
    now: Nanos,
) -> Result<Vec<Connection>, TableError> {
    let (answers, entries): (Vec<_>, Vec<_>) =
        tables.conntrack.entries()?.into_iter().partition(|(key, _)| key.direction == SNAT_REPLY);
    let seen_as: HashMap<_, _> = answers
        .into_iter()
        .map(|(key, entry)| {
            let of = ConntrackKey::reverse(entry.addr, entry.port, key.peer, key.peer_port, key.proto);
            (of, (key.client, key.client_port))
        })
        .collect();
    Ok(entries
        .into_iter()
        // What another version has left there is none of ours.
        .filter(|(key, _)| [FORWARD, REVERSE].contains(&key.direction))
        .map(|(key, entry)| {
            let mut as_reverse = key;
            if key.direction == FORWARD {
                as_reverse.turn_reverse(entry.client_port, entry.addr, entry.port);
            }
            let peer = super::socket::<F>(&key.peer, key.peer_port);
            let other = super::socket::<F>(&entry.addr, entry.port);
            let forward = key.direction == FORWARD;
            let lifetime = lifetimes.of(key.proto, entry.seen);
            let (frontend, backend) = if forward { (peer, other) } else { (other, peer) };
            Connection {
                proto: key.proto,
                forward,
                client: super::socket::<F>(&key.client, key.client_port),
                frontend,
                backend,
                seen_as: seen_as.get(&as_reverse).map(|(addr, port)| super::socket::<F>(addr, *port)),
                key: BackendKey { service: entry.service, backend: entry.backend },
                packets: entry.packets,
                seen: entry.seen,
                last_seen: entry.last_seen,
                lifetime,
                expired: entry.has_expired(lifetime, now.ticks()),
            }
        })
        .collect())
}

/// Names, entries and room of a family's maps.
fn fill_of<F: Family>(tables: &FamilyTables<F>) -> Result<[(&'static str, usize, usize); 7], TableError> {
    Ok([
        (abi::frontends::spec::<F>().name, tables.frontends.len()?, tables.frontends.capacity()),
        (abi::backends::spec::<F>().name, tables.backends.len()?, tables.backends.capacity()),
        (abi::affinity::spec::<F>().name, tables.affinity.len()?, tables.affinity.capacity()),
        (abi::conntrack::spec::<F>().name, tables.conntrack.len()?, tables.conntrack.capacity()),
        (abi::netns::spec::<F>().name, tables.netns.len()?, tables.netns.capacity()),
        (abi::sockets::spec::<F>().name, tables.sockets.len()?, tables.sockets.capacity()),
        (abi::source_ranges::spec::<F>().name, tables.ranges.len()?, tables.ranges.capacity()),
    ])
}

impl Snapshot {
    /// Reads the maps that are pinned in a directory.
    ///
    /// # Errors
    /// Where there are none, or none of ours, or one can't be read.
    pub fn read(pin_dir: &Path) -> Result<Self, SnapshotError> {
        Ok(Self::of(&open(pin_dir)?)?)
    }

    /// Reads maps.
    ///
    /// # Errors
    /// Where one can't be read.
    pub fn of(tables: &Tables) -> Result<Self, TableError> {
        let names = read_names(tables)?;
        let frontends = read_frontends(tables)?;
        let mut slots = BTreeMap::new();
        for FrontendAt { value, .. } in &frontends {
            let run: Vec<u32> = (value.first_slot..value.first_slot.saturating_add(value.slot_count)).collect();
            let found = tables.shared.slots.get_all(&run)?;
            slots.extend(run.into_iter().zip(found).filter_map(|(index, slot)| Some((index, slot?.backend))));
        }
        let mut ranges: BTreeMap<ServiceId, Vec<String>> = BTreeMap::new();
        for (service, range) in ranges_of(&tables.v4)?.into_iter().chain(ranges_of(&tables.v6)?) {
            ranges.entry(service).or_default().push(range);
        }
        let stats: BTreeMap<_, _> = tables.shared.backend_stats.entries()?.into_iter().collect();
        let now = now();
        let lifetimes = tables.shared.lifetimes.get(&ONLY)?.unwrap_or_default();
        let mut connections = connections_of(&tables.v4, &lifetimes, now)?;
        connections.extend(connections_of(&tables.v6, &lifetimes, now)?);
        let mut fill = [fill_of(&tables.v4)?, fill_of(&tables.v6)?].concat();
        fill.extend([
            (abi::slots::SPEC.name, slots.len(), tables.shared.slots.capacity()),
            (abi::services::SPEC.name, names.services.len(), tables.shared.services.capacity()),
            (abi::backend_stats::SPEC.name, stats.len(), tables.shared.backend_stats.capacity()),
            (abi::backend_names::SPEC.name, names.pods.len(), tables.shared.backend_names.capacity()),
        ]);
        Ok(Self {
            counters: tables.shared.counters.entries()?.into_iter().collect(),
            clients: read_clients(tables)?,
            now,
            names,
            frontends,
            ranges,
            slots,
            stats,
            connections,
            fill,
        })
    }

    /// What keeps clients, by the service port that their entries go by.
    pub fn affinities(&self) -> BTreeMap<ServiceId, Keeping> {
        let mut affinities: BTreeMap<ServiceId, Keeping> = BTreeMap::new();
        for FrontendAt { value, .. } in self.frontends.iter().filter(|frontend| frontend.value.has_affinity()) {
            let keeping = affinities.entry(value.affinity).or_default();
            keeping.timeout = value.timeout;
            keeping.services.insert(value.service);
        }
        affinities
    }
}
