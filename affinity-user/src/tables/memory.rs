//! Tables in memory, for tests of what works on tables. They can hold no more than the kernel's would.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use affinity_common::{
    abi::{
        self,
        addresses::{Address, AddressKey},
        affinity::{Affinity, AffinityKey},
        announced::{self, Announced, AnnouncedKey},
        backend_names::BackendName,
        backend_stats::BackendStats,
        backends::{Backend, BackendKey},
        config::Config,
        conntrack::{Conntrack, ConntrackKey},
        counters::Counter,
        filter::{self, FilterWord},
        fragments::{self, Fragments, FragmentsKey},
        frontends::{Frontend, FrontendKey},
        ids::NextIds,
        lifetimes::Lifetimes,
        netns::{NetnsClient, NetnsKey},
        services::ServicePortName,
        slots::Slot,
        sockets::{Socket, SocketKey},
        source_ranges::{self, Range, RangeKey},
        uplinks::{self, Uplink},
    },
    family::{Family, V4, V6},
    types::ServiceId,
};

use super::{BoxTable, FamilyTables, SharedTables, Table, TableError, Tables};

/// A hash table. A clone is another handle of the same table.
pub struct MemoryTable<K, V> {
    name: Arc<str>,
    capacity: usize,
    rows: Arc<Mutex<BTreeMap<K, V>>>,
}

impl<K, V> Clone for MemoryTable<K, V> {
    fn clone(&self) -> Self {
        Self { name: self.name.clone(), capacity: self.capacity, rows: self.rows.clone() }
    }
}

impl<K, V> MemoryTable<K, V> {
    /// An empty table.
    pub fn new(name: &str, capacity: usize) -> Self {
        Self { name: name.into(), capacity, rows: Arc::default() }
    }

    fn rows(&self) -> MutexGuard<'_, BTreeMap<K, V>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Ord + Copy + Send, V: Copy + Send> Table<K, V> for MemoryTable<K, V> {
    fn name(&self) -> &str {
        &self.name
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn get(&self, key: &K) -> Result<Option<V>, TableError> {
        Ok(self.rows().get(key).copied())
    }

    fn insert(&mut self, key: &K, value: &V) -> Result<(), TableError> {
        let mut rows = self.rows();
        if rows.len() >= self.capacity && !rows.contains_key(key) {
            return Err(TableError::Full { map: self.name.to_string(), capacity: self.capacity });
        }
        rows.insert(*key, *value);
        Ok(())
    }

    fn remove(&mut self, key: &K) -> Result<(), TableError> {
        match self.rows().remove(key) {
            Some(_) => Ok(()),
            None => Err(TableError::NotFound { map: self.name.to_string() }),
        }
    }

    fn keys(&self) -> Result<Vec<K>, TableError> {
        Ok(self.rows().keys().copied().collect())
    }
}

/// An array, zero at first. A clone is another handle of the same array.
pub struct MemoryArray<V> {
    name: Arc<str>,
    elements: Arc<Mutex<Vec<V>>>,
}

impl<V> Clone for MemoryArray<V> {
    fn clone(&self) -> Self {
        Self { name: self.name.clone(), elements: self.elements.clone() }
    }
}

impl<V: Default + Clone> MemoryArray<V> {
    /// An array of zeroes.
    pub fn new(name: &str, capacity: usize) -> Self {
        Self { name: name.into(), elements: Arc::new(Mutex::new(vec![V::default(); capacity])) }
    }
}

impl<V> MemoryArray<V> {
    fn elements(&self) -> MutexGuard<'_, Vec<V>> {
        self.elements.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<V: Default + Copy + Send> Table<u32, V> for MemoryArray<V> {
    fn name(&self) -> &str {
        &self.name
    }

    fn capacity(&self) -> usize {
        self.elements().len()
    }

    fn get(&self, key: &u32) -> Result<Option<V>, TableError> {
        Ok(self.elements().get(*key as usize).copied())
    }

    fn insert(&mut self, key: &u32, value: &V) -> Result<(), TableError> {
        let mut elements = self.elements();
        let capacity = elements.len();
        let element =
            elements.get_mut(*key as usize).ok_or(TableError::Full { map: self.name.to_string(), capacity })?;
        *element = *value;
        Ok(())
    }

    fn remove(&mut self, key: &u32) -> Result<(), TableError> {
        self.insert(key, &V::default())
    }

    fn keys(&self) -> Result<Vec<u32>, TableError> {
        Ok((0..).zip(&*self.elements()).map(|(i, _)| i).collect())
    }
}

/// How many entries the tables have room for.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Frontends of a family, and as many addresses.
    pub frontends: usize,
    /// Backends of a family; twice as many names and counters.
    pub backends: usize,
    /// Affinity entries of a family.
    pub affinity: usize,
    /// Conntrack entries of a family.
    pub conntrack: usize,
    /// Slots.
    pub slots: usize,
    /// Service ports.
    pub services: usize,
}

impl Default for Sizes {
    /// The maps' own sizes.
    fn default() -> Self {
        Self {
            frontends: abi::frontends::DEFAULT_SIZE,
            backends: abi::backends::DEFAULT_SIZE,
            affinity: abi::affinity::DEFAULT_SIZE,
            conntrack: abi::conntrack::DEFAULT_SIZE,
            slots: abi::slots::DEFAULT_SIZE,
            services: abi::services::DEFAULT_SIZE,
        }
    }
}

/// The tables of one address family. Clones are handles of the same tables.
#[derive(Clone)]
pub struct MemoryFamily<F: Family> {
    /// `frontends_*`
    pub frontends: MemoryTable<FrontendKey<F>, Frontend>,
    /// `addresses_*`
    pub addresses: MemoryTable<AddressKey<F>, Address>,
    /// `backends_*`
    pub backends: MemoryTable<BackendKey, Backend<F>>,
    /// `affinity_*`
    pub affinity: MemoryTable<AffinityKey<F>, Affinity>,
    /// `fragments_*`
    pub fragments: MemoryTable<FragmentsKey<F>, Fragments>,
    /// `conntrack_*`
    pub conntrack: MemoryTable<ConntrackKey<F>, Conntrack<F>>,
    /// `netns_*`
    pub netns: MemoryTable<NetnsKey, NetnsClient<F>>,
    /// `sockets_*`
    pub sockets: MemoryTable<SocketKey<F>, Socket<F>>,
    /// `uplinks_*`
    pub uplinks: MemoryTable<u32, Uplink<F>>,
    /// `ranges_*`
    pub ranges: MemoryTable<RangeKey<F>, Range>,
    /// `announced_*`
    pub announced: MemoryTable<AnnouncedKey<F>, Announced>,
}

impl<F: Family> MemoryFamily<F> {
    fn new(sizes: &Sizes) -> Self {
        let name = |map: &str| format!("{map}_{}", F::NAME);
        Self {
            frontends: MemoryTable::new(&name("frontends"), sizes.frontends),
            addresses: MemoryTable::new(&name("addresses"), sizes.frontends),
            backends: MemoryTable::new(&name("backends"), sizes.backends),
            affinity: MemoryTable::new(&name("affinity"), sizes.affinity),
            fragments: MemoryTable::new(&name("fragments"), fragments::DEFAULT_SIZE),
            conntrack: MemoryTable::new(&name("conntrack"), sizes.conntrack),
            netns: MemoryTable::new(&name("netns"), abi::netns::DEFAULT_SIZE),
            sockets: MemoryTable::new(&name("sockets"), abi::sockets::DEFAULT_SIZE),
            uplinks: MemoryTable::new(&name("uplinks"), uplinks::SIZE),
            ranges: MemoryTable::new(&name("ranges"), source_ranges::DEFAULT_SIZE),
            announced: MemoryTable::new(&name("announced"), announced::DEFAULT_SIZE),
        }
    }

    /// The tables, each wrapped.
    fn wrapped(&self, wrapper: &impl Wrapper) -> FamilyTables<F> {
        FamilyTables {
            frontends: wrapper.wrap(self.frontends.clone()),
            addresses: wrapper.wrap(self.addresses.clone()),
            backends: wrapper.wrap(self.backends.clone()),
            affinity: wrapper.wrap(self.affinity.clone()),
            fragments: wrapper.wrap(self.fragments.clone()),
            conntrack: wrapper.wrap(self.conntrack.clone()),
            netns: wrapper.wrap(self.netns.clone()),
            sockets: wrapper.wrap(self.sockets.clone()),
            uplinks: wrapper.wrap(self.uplinks.clone()),
            ranges: wrapper.wrap(self.ranges.clone()),
            announced: wrapper.wrap(self.announced.clone()),
        }
    }
}

/// All tables, of both families. Clones are handles of the same tables.
#[derive(Clone)]
pub struct MemoryTables {
    /// IPv4's.
    pub v4: MemoryFamily<V4>,
    /// IPv6's.
    pub v6: MemoryFamily<V6>,
    /// `service_filter`
    pub service_filter: MemoryArray<FilterWord>,
    /// `direct_filter`
    pub direct_filter: MemoryArray<FilterWord>,
    /// `snat_filter`
    pub snat_filter: MemoryArray<FilterWord>,
    /// `slots`
    pub slots: MemoryArray<Slot>,
    /// `services`
    pub services: MemoryTable<ServiceId, ServicePortName>,
    /// `backend_names`
    pub backend_names: MemoryTable<BackendKey, BackendName>,
    /// `backend_stats`
    pub backend_stats: MemoryTable<BackendKey, BackendStats>,
    /// `ids`
    pub ids: MemoryArray<NextIds>,
    /// `config`
    pub config: MemoryArray<Config>,
    /// `lifetimes`
    pub lifetimes: MemoryArray<Lifetimes>,
    /// `counters`
    pub counters: MemoryArray<Counter>,
}

impl Default for MemoryTables {
    fn default() -> Self {
        Self::new(&Sizes::default())
    }
}

impl MemoryTables {
    /// Empty tables.
    pub fn new(sizes: &Sizes) -> Self {
        Self {
            v4: MemoryFamily::new(sizes),
            v6: MemoryFamily::new(sizes),
            service_filter: MemoryArray::new(filter::SERVICES.name, filter::SIZE),
            direct_filter: MemoryArray::new(filter::DIRECT.name, filter::SIZE),
            snat_filter: MemoryArray::new(filter::SNAT.name, filter::SIZE),
            slots: MemoryArray::new("slots", sizes.slots),
            services: MemoryTable::new("services", sizes.services),
            backend_names: MemoryTable::new("backend_names", 2 * sizes.backends),
            backend_stats: MemoryTable::new("backend_stats", 2 * sizes.backends),
            ids: MemoryArray::new("ids", 1),
            config: MemoryArray::new("config", 1),
            lifetimes: MemoryArray::new("lifetimes", 1),
            counters: MemoryArray::new("counters", abi::counters::SIZE),
        }
    }

    /// Handles of them, for whoever works on tables.
    pub fn tables(&self) -> Tables {
        self.wrapped(&Plainly)
    }

    /// Handles of them, each inside what the wrapper makes of it.
    pub fn wrapped(&self, wrapper: &impl Wrapper) -> Tables {
        Tables {
            v4: self.v4.wrapped(wrapper),
            v6: self.v6.wrapped(wrapper),
            shared: SharedTables {
                service_filter: wrapper.wrap(self.service_filter.clone()),
                direct_filter: wrapper.wrap(self.direct_filter.clone()),
                snat_filter: wrapper.wrap(self.snat_filter.clone()),
                slots: wrapper.wrap(self.slots.clone()),
                services: wrapper.wrap(self.services.clone()),
                backend_names: wrapper.wrap(self.backend_names.clone()),
                backend_stats: wrapper.wrap(self.backend_stats.clone()),
                ids: wrapper.wrap(self.ids.clone()),
                config: wrapper.wrap(self.config.clone()),
                lifetimes: wrapper.wrap(self.lifetimes.clone()),
                counters: wrapper.wrap(self.counters.clone()),
            },
        }
    }
}

/// Puts something between a table and whoever works on it.
pub trait Wrapper {
    /// The table, wrapped.
    fn wrap<K: Ord + Copy + Send + 'static, V: Copy + Send + 'static>(
        &self,
        table: impl Table<K, V> + 'static,
    ) -> BoxTable<K, V>;
}

/// No wrapper.
struct Plainly;

impl Wrapper for Plainly {
    fn wrap<K: Ord + Copy + Send + 'static, V: Copy + Send + 'static>(
        &self,
        table: impl Table<K, V> + 'static,
    ) -> BoxTable<K, V> {
        Box::new(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_table_takes_new_values_but_no_new_keys() {
        let mut table = MemoryTable::new("t", 1);
        table.insert(&1, &10).unwrap();
        table.insert(&1, &11).unwrap();
        assert_eq!(table.insert(&2, &20), Err(TableError::Full { map: "t".into(), capacity: 1 }));
        assert_eq!(table.entries().unwrap(), [(1, 11)]);
        assert_eq!(table.remove(&2), Err(TableError::NotFound { map: "t".into() }));
        table.remove(&1).unwrap();
        assert!(table.is_empty().unwrap());
    }

    #[test]
    fn an_array_has_every_element() {
        let mut array = MemoryArray::new("a", 2);
        assert_eq!(array.get(&1).unwrap(), Some(0));
        assert_eq!(array.get(&2).unwrap(), None);
        array.insert(&1, &5).unwrap();
        assert!(array.insert(&2, &5).unwrap_err().is_full());
        assert_eq!(array.entries().unwrap(), [(0, 0), (1, 5)]);
        array.remove(&1).unwrap();
        assert_eq!(array.get(&1).unwrap(), Some(0));
    }
}
