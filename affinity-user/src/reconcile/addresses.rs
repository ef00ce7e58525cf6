//! The addresses that frontends have, and their bits in the filter. An address is known before its first frontend, and
//! until after its last one: a packet to a service is never taken for one past services.
//!
//! An address of which services have single ports alone, as it is the node's own or an endpoint's, has a bit, and no more.

use std::collections::{BTreeMap, BTreeSet};

use affinity_common::{
    abi::{
        addresses::{Address, AddressKey},
        filter::{FilterWord, Place},
        frontends::{Frontend, FrontendKey},
    },
    family::Family,
};

use super::{audit::Differences, counts::Counts, shared::Shared};
use crate::tables::{BoxTable, SharedTables, Table, TableError};

/// What `addresses` of a family holds.
pub(super) struct Addresses<F: Family> {
    /// Those that are there, with the number of their frontends.
    held: BTreeMap<AddressKey<F>, usize>,
    /// Those of them that have none and could not be taken out, or were found so.
    unused: BTreeSet<AddressKey<F>>,
    /// Those of frontends that have their port alone, with the number of them: they have a place in the filter for that.
    shared: BTreeMap<AddressKey<F>, usize>,
}

impl<F: Family> Default for Addresses<F> {
    fn default() -> Self {
        Self { held: BTreeMap::new(), unused: BTreeSet::new(), shared: BTreeMap::new() }
    }
}

type AddressTable<F> = BoxTable<AddressKey<F>, Address>;

impl<F: Family> Addresses<F> {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Packs what it keeps: see [`super::Reconciler`].
    pub fn pack(&mut self) {
        super::pack(&mut self.held);
    }

    /// An address is about to have a further frontend; `alone`: that has its port alone.
    pub fn arrive(
        &mut self,
        table: &mut AddressTable<F>,
        shared: &mut Shared,
        addr: F::Addr,
        alone: bool,
    ) -> Result<(), TableError> {
        let key = AddressKey { addr };
        if alone {
            if !self.shared.contains_key(&key) {
                shared.filter.set(&mut shared.tables, &mut shared.counts, Place::of::<F>(&addr))?;
            }
            *self.shared.entry(key).or_default() += 1;
            return Ok(());
        }
        if let Some(frontends) = self.held.get_mut(&key) {
            *frontends += 1;
            self.unused.remove(&key);
            return Ok(());
        }
        let place = Place::of::<F>(&addr);
        shared.filter.set(&mut shared.tables, &mut shared.counts, place)?;
        if let Err(error) = shared.counts.put(table, &key, &Address::default()) {
            shared.filter.clear(&mut shared.tables, &mut shared.counts, place);
            return Err(error);
        }
        self.held.insert(key, 1);
        Ok(())
    }

    /// An address has a frontend less; `alone`: one that had its port alone.
    pub fn leave(
        &mut self,
        table: &mut AddressTable<F>,
        shared: &mut Shared,
        addr: F::Addr,
        alone: bool,
    ) -> Result<(), TableError> {
        let key = AddressKey { addr };
        if alone {
            let Some(frontends) = self.shared.get_mut(&key) else { return Ok(()) };
            *frontends -= 1;
            if *frontends == 0 {
                self.shared.remove(&key);
                shared.filter.clear(&mut shared.tables, &mut shared.counts, Place::of::<F>(&addr));
            }
            return Ok(());
        }
        let Some(frontends) = self.held.get_mut(&key) else { return Ok(()) };
        *frontends = frontends.saturating_sub(1);
        if *frontends > 0 {
            return Ok(());
        }
        self.unused.insert(key);
        self.take_out(table, shared, key)
    }

    /// Takes out the addresses that have no frontend.
    pub fn take_unused_out(&mut self, table: &mut AddressTable<F>, shared: &mut Shared) -> Result<(), TableError> {
        while let Some(key) = self.unused.first().copied() {
            self.take_out(table, shared, key)?;
        }
        Ok(())
    }

    fn take_out(
        &mut self,
        table: &mut AddressTable<F>,
        shared: &mut Shared,
        key: AddressKey<F>,
    ) -> Result<(), TableError> {
        shared.counts.take(table, &key)?;
        self.unused.remove(&key);
        self.held.remove(&key);
        shared.filter.clear(&mut shared.tables, &mut shared.counts, Place::of::<F>(&key.addr));
        Ok(())
    }

    /// Reads the map anew, and counts the frontends that there are.
    pub fn refresh<'a>(
        &mut self,
        table: &dyn Table<AddressKey<F>, Address>,
        frontends: impl Iterator<Item = (&'a FrontendKey<F>, &'a Frontend)>,
        differences: &mut Differences,
    ) -> Result<(), TableError> {
        let found = table.keys()?.into_iter().map(|key| (key, ())).collect();
        let written = self.held.keys().map(|key| (*key, ())).collect();
        differences.note(table.name(), &written, &found);
        self.held = found.into_keys().map(|key| (key, 0)).collect();
        self.shared.clear();
        for (FrontendKey { addr, .. }, value) in frontends {
            let key = AddressKey { addr: *addr };
            if value.is_port_alone() {
                *self.shared.entry(key).or_default() += 1;
            } else if let Some(frontends) = self.held.get_mut(&key) {
                *frontends += 1;
            }
        }
        self.unused = self.held.iter().filter(|(_, frontends)| **frontends == 0).map(|(key, _)| *key).collect();
        Ok(())
    }

    /// Adds the addresses of frontends that were found without.
    pub fn add_missing<'a>(
        &mut self,
        table: &mut AddressTable<F>,
        shared: &mut Shared,
        frontends: impl Iterator<Item = (&'a FrontendKey<F>, &'a Frontend)>,
    ) -> Result<(), TableError> {
        let whole = frontends.filter(|(_, value)| !value.is_port_alone()).map(|(key, _)| key.addr);
        let missing: Vec<_> = whole.filter(|addr| !self.held.contains_key(&AddressKey { addr: *addr })).collect();
        missing.into_iter().try_for_each(|addr| self.arrive(table, shared, addr, false))
    }

    /// The places of all that are there; one twice where it is an address' for both reasons.
    pub fn places(&self) -> impl Iterator<Item = Place> {
        self.held.keys().chain(self.shared.keys()).map(|key| Place::of::<F>(&key.addr))
    }
}

/// What `service_filter` holds, and why.
#[derive(Default)]
pub(super) struct Filter {
    /// How many addresses have a place.
    wanted: BTreeMap<Place, usize>,
    /// The words that are not zero.
    words: BTreeMap<u32, u64>,
}

impl Filter {
    /// One more address has a place.
    fn set(&mut self, tables: &mut SharedTables, counts: &mut Counts, place: Place) -> Result<(), TableError> {
        let word = self.words.get(&place.word).copied().unwrap_or_default();
        if word & place.bit == 0 {
            self.write(tables, counts, place.word, word | place.bit)?;
        }
        *self.wanted.entry(place).or_default() += 1;
        Ok(())
    }

    /// An address has a place no more. A bit that is set without need does no harm: where it can't be cleared, the next
    /// comparison does it.
    fn clear(&mut self, tables: &mut SharedTables, counts: &mut Counts, place: Place) {
        let Some(addresses) = self.wanted.get_mut(&place) else { return };
        *addresses -= 1;
        if *addresses > 0 {
            return;
        }
        self.wanted.remove(&place);
        let word = self.words.get(&place.word).copied().unwrap_or_default();
        if let Err(error) = self.write(tables, counts, place.word, word & !place.bit) {
            tracing::debug!(%error, "a bit of the filter stays until the next comparison");
        }
    }

    fn write(
        &mut self,
        tables: &mut SharedTables,
        counts: &mut Counts,
        word: u32,
        bits: u64,
    ) -> Result<(), TableError> {
        counts.put(&mut tables.service_filter, &word, &FilterWord { bits })?;
        if bits == 0 {
            self.words.remove(&word);
        } else {
            self.words.insert(word, bits);
        }
        Ok(())
    }

    /// Reads the map anew.
    pub fn refresh(&mut self, tables: &SharedTables, differences: &mut Differences) -> Result<(), TableError> {
        let entries = tables.service_filter.entries()?;
        let found = entries.into_iter().filter(|(_, word)| word.bits != 0).map(|(index, word)| (index, word.bits));
        let found = found.collect();
        differences.note(tables.service_filter.name(), &self.words, &found);
        self.words = found;
        Ok(())
    }

    /// Takes the places of all addresses for those that are wanted.
    pub fn adopt(&mut self, places: impl Iterator<Item = Place>) {
        self.wanted.clear();
        for place in places {
            *self.wanted.entry(place).or_default() += 1;
        }
    }

    /// Brings the map to what is wanted.
    pub fn settle(&mut self, tables: &mut SharedTables, counts: &mut Counts) -> Result<(), TableError> {
        let mut wanted: BTreeMap<u32, u64> = BTreeMap::new();
        for place in self.wanted.keys() {
            *wanted.entry(place.word).or_default() |= place.bit;
        }
        let words: BTreeSet<u32> = wanted.keys().chain(self.words.keys()).copied().collect();
        for word in words {
            let bits = wanted.get(&word).copied().unwrap_or_default();
            if self.words.get(&word).copied().unwrap_or_default() != bits {
                self.write(tables, counts, word, bits)?;
            }
        }
        Ok(())
    }
}
