//! The datapath's maps as tables: one trait over BPF maps, maps in memory and maps that fail on demand.
//!
//! - [`Table`]: what can be done with one map.
//! - [`Tables`]: all maps together, by address family.
//! - [`bpf`]: the kernel's maps; [`memory`]: a stand-in for them; [`faulty`]: any of them with injected faults.
//! - [`dump`]: every entry of every map as a line of text; [`names`]: the fixed-size texts in map values.

pub mod bpf;
pub mod dump;
mod error;
pub mod faulty;
pub mod memory;
pub mod names;

use affinity_common::{
    abi::{
        addresses::{Address, AddressKey},
        affinity::{Affinity, AffinityKey},
        announced::{Announced, AnnouncedKey},
        backend_names::BackendName,
        backend_stats::BackendStats,
        backends::{Backend, BackendKey},
        config::Config,
        conntrack::{Conntrack, ConntrackKey},
        counters::Counter,
        filter::FilterWord,
        fragments::{Fragments, FragmentsKey},
        frontends::{Frontend, FrontendKey},
        ids::NextIds,
        lifetimes::Lifetimes,
        netns::{NetnsClient, NetnsKey},
        services::ServicePortName,
        slots::Slot,
        sockets::{Socket, SocketKey},
        source_ranges::{Range, RangeKey},
        uplinks::Uplink,
    },
    family::{Family, V4, V6},
    types::ServiceId,
};

pub use self::error::{Operation, TableError};

/// A map. In an array every key up to its capacity is there, and zero where nothing was written.
pub trait Table<K, V>: Send {
    /// The map's name, for errors.
    fn name(&self) -> &str;

    /// How many entries have room.
    fn capacity(&self) -> usize;

    /// The value of a key; `None` where it is not there.
    fn get(&self, key: &K) -> Result<Option<V>, TableError>;

    /// Adds an entry or replaces its value.
    ///
    /// # Errors
    /// [`TableError::Full`] where a new key has no room.
    fn insert(&mut self, key: &K, value: &V) -> Result<(), TableError>;

    /// Adds entries or replaces their values, in their order. Returns how many, and why it was not all of them.
    fn insert_all(&mut self, keys: &[K], values: &[V]) -> (usize, Result<(), TableError>) {
        for (done, (key, value)) in keys.iter().zip(values).enumerate() {
            if let Err(error) = self.insert(key, value) {
                return (done, Err(error));
            }
        }
        (keys.len().min(values.len()), Ok(()))
    }

    /// The values of keys; `None` for those that are not there.
    fn get_all(&self, keys: &[K]) -> Result<Vec<Option<V>>, TableError> {
        keys.iter().map(|key| self.get(key)).collect()
    }

    /// Takes an entry out. In an array it becomes zero.
    ///
    /// # Errors
    /// [`TableError::NotFound`] where it is not there.
    fn remove(&mut self, key: &K) -> Result<(), TableError>;

    /// Every key, in order. Of a map that others write to meanwhile, those that stay are in it, each once.
    fn keys(&self) -> Result<Vec<K>, TableError>;

    /// Every entry, in the order of the keys.
    fn entries(&self) -> Result<Vec<(K, V)>, TableError> {
        let mut entries = Vec::new();
        for key in self.keys()? {
            if let Some(value) = self.get(&key)? {
                entries.push((key, value));
            }
        }
        Ok(entries)
    }

    /// Some further entries, about `most` of them, in no order; `from` is what the last call has returned, or none at the
    /// start. Returns where the next call goes on, or none at the end. Of a map that others write to meanwhile, those that
    /// stay are in one of the parts, each once.
    fn part(&self, from: Option<Position>, most: usize) -> Result<Part<K, V>, TableError> {
        let start = from.map_or(0, |Position(start)| start as usize);
        let entries: Vec<(K, V)> = self.entries()?.into_iter().skip(start).take(most).collect();
        let next = (entries.len() == most).then(|| Position(u32::try_from(start + most).unwrap_or(u32::MAX)));
        Ok((entries, next))
    }

    /// Takes entries out; returns how many were there.
    fn remove_all(&mut self, keys: &[K]) -> Result<usize, TableError> {
        let mut removed = 0;
        for key in keys {
            match self.remove(key) {
                Ok(()) => removed += 1,
                Err(TableError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(removed)
    }

    /// How many entries there are.
    fn len(&self) -> Result<usize, TableError> {
        Ok(self.keys()?.len())
    }

    /// Whether there is no entry.
    fn is_empty(&self) -> Result<bool, TableError> {
        Ok(self.len()? == 0)
    }
}

/// Where a walk through a table goes on: the table's own number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position(pub(crate) u32);

/// A part of a table, and where the next one begins.
pub type Part<K, V> = (Vec<(K, V)>, Option<Position>);

/// A table of any make.
pub type BoxTable<K, V> = Box<dyn Table<K, V>>;

/// The key of the one element of an array that has only that.
pub const ONLY: u32 = 0;

/// The maps of one address family.
pub struct FamilyTables<F: Family> {
    /// `frontends_*`
    pub frontends: BoxTable<FrontendKey<F>, Frontend>,
    /// `addresses_*`
    pub addresses: BoxTable<AddressKey<F>, Address>,
    /// `backends_*`
    pub backends: BoxTable<BackendKey, Backend<F>>,
    /// `affinity_*`
    pub affinity: BoxTable<AffinityKey<F>, Affinity>,
    /// `fragments_*`
    pub fragments: BoxTable<FragmentsKey<F>, Fragments>,
    /// `conntrack_*`
    pub conntrack: BoxTable<ConntrackKey<F>, Conntrack<F>>,
    /// `netns_*`
    pub netns: BoxTable<NetnsKey, NetnsClient<F>>,
    /// `sockets_*`
    pub sockets: BoxTable<SocketKey<F>, Socket<F>>,
    /// `uplinks_*`
    pub uplinks: BoxTable<u32, Uplink<F>>,
    /// `ranges_*`
    pub ranges: BoxTable<RangeKey<F>, Range>,
    /// `announced_*`
    pub announced: BoxTable<AnnouncedKey<F>, Announced>,
}

/// The maps that the families share.
pub struct SharedTables {
    /// `service_filter`
    pub service_filter: BoxTable<u32, FilterWord>,
    /// `direct_filter`
    pub direct_filter: BoxTable<u32, FilterWord>,
    /// `snat_filter`
    pub snat_filter: BoxTable<u32, FilterWord>,
    /// `slots`
    pub slots: BoxTable<u32, Slot>,
    /// `services`
    pub services: BoxTable<ServiceId, ServicePortName>,
    /// `backend_names`
    pub backend_names: BoxTable<BackendKey, BackendName>,
    /// `backend_stats`
    pub backend_stats: BoxTable<BackendKey, BackendStats>,
    /// `ids`
    pub ids: BoxTable<u32, NextIds>,
    /// `config`
    pub config: BoxTable<u32, Config>,
    /// `lifetimes`
    pub lifetimes: BoxTable<u32, Lifetimes>,
    /// `counters`, each the sum over all CPUs
    pub counters: BoxTable<u32, Counter>,
}

/// All maps but the ring buffer.
pub struct Tables {
    /// IPv4's.
    pub v4: FamilyTables<V4>,
    /// IPv6's.
    pub v6: FamilyTables<V6>,
    /// Those of both.
    pub shared: SharedTables,
}
