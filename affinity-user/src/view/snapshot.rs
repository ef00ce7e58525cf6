//! The maps, read once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use affinity_common::abi::affinity::{Affinity, AffinityKey};
use affinity_common::abi::backend_stats::BackendStats;
use affinity_common::abi::backends::{Backend, BackendKey};
use affinity_common::abi::conntrack::{Conntrack, ConntrackKey};
use affinity_common::abi::counters::Counter;
use affinity_common::abi::frontends::{Frontend, FrontendKey};
use affinity_common::abi::{self, LAYOUT};
use affinity_common::family::V4;
use affinity_common::types::{BackendId, Nanos, ServiceId};
use nix::time::{ClockId, clock_gettime};
use thiserror::Error;

use crate::model::ServicePortName;
use crate::tables::{ONLY, TableError, Tables, bpf, names};

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
    /// Backends.
    pub backends: BTreeMap<BackendKey, Backend<V4>>,
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
    pub fn address(&self, service: ServiceId, backend: BackendId) -> Option<std::net::SocketAddr> {
        let backend = self.backends.get(&BackendKey { service, backend })?;
        Some(super::socket::<V4>(&backend.addr, backend.port))
    }
}

/// The maps, read once.
pub struct Snapshot {
    /// When, on the clock of the entries.
    pub now: Nanos,
    /// What is where.
    pub names: Names,
    /// Frontends.
    pub frontends: Vec<(FrontendKey<V4>, Frontend)>,
    /// The backend of each slot that a frontend uses.
    pub slots: BTreeMap<u32, BackendId>,
    /// How often each backend was chosen.
    pub stats: BTreeMap<BackendKey, BackendStats>,
    /// Clients.
    pub affinity: Vec<(AffinityKey<V4>, Affinity)>,
    /// Connections.
    pub conntrack: Vec<(ConntrackKey<V4>, Conntrack<V4>)>,
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
    Ok(Names {
        services: services.collect(),
        pods: pods.filter(|(_, name)| !name.is_empty()).collect(),
        backends: tables.v4.backends.entries()?.into_iter().collect(),
    })
}

impl Snapshot {
    /// Reads the maps that are pinned in a directory.
    ///
    /// # Errors
    /// Where there are none, or none of ours, or one can't be read.
    pub fn read(pin_dir: &Path) -> Result<Self, SnapshotError> {
        let tables = open(pin_dir)?;
        let names = read_names(&tables)?;
        let frontends = tables.v4.frontends.entries()?;
        let mut slots = BTreeMap::new();
        for (_, frontend) in &frontends {
            for index in frontend.first_slot..frontend.first_slot.saturating_add(frontend.slot_count) {
                if let Some(slot) = tables.shared.slots.get(&index)? {
                    slots.insert(index, slot.backend);
                }
            }
        }
        let stats: BTreeMap<_, _> = tables.shared.backend_stats.entries()?.into_iter().collect();
        let affinity = tables.v4.affinity.entries()?;
        let conntrack = tables.v4.conntrack.entries()?;
        let fill = vec![
            (abi::frontends::SPEC_V4.name, frontends.len(), tables.v4.frontends.capacity()),
            (abi::backends::SPEC_V4.name, names.backends.len(), tables.v4.backends.capacity()),
            (abi::affinity::SPEC_V4.name, affinity.len(), tables.v4.affinity.capacity()),
            (abi::conntrack::SPEC_V4.name, conntrack.len(), tables.v4.conntrack.capacity()),
            (abi::slots::SPEC.name, slots.len(), tables.shared.slots.capacity()),
            (abi::services::SPEC.name, names.services.len(), tables.shared.services.capacity()),
            (abi::backend_stats::SPEC.name, stats.len(), tables.shared.backend_stats.capacity()),
            (abi::backend_names::SPEC.name, names.pods.len(), tables.shared.backend_names.capacity()),
        ];
        Ok(Self {
            counters: tables.shared.counters.entries()?.into_iter().collect(),
            now: now(),
            names,
            frontends,
            slots,
            stats,
            affinity,
            conntrack,
            fill,
        })
    }

    /// The affinity timeout of a service port; `None` where it has no affinity, or is gone.
    pub fn timeout(&self, service: ServiceId) -> Option<affinity_common::types::Seconds> {
        let frontend = self.frontends.iter().find(|(_, frontend)| frontend.service == service);
        frontend.map(|(_, frontend)| frontend.timeout).filter(|timeout| timeout.secs != 0)
    }
}
