//! Who is let in where not all are. A service port's ranges are there before the first frontend that asks for them, and until
//! after the last: nobody is let in for want of them, since where there are none nobody is.

use std::collections::{BTreeMap, BTreeSet};

use affinity_common::{
    abi::source_ranges::{Range, RangeKey},
    family::Family,
    types::ServiceId,
};

use super::{Fill, ReconcileError, audit::Differences, counts::Counts};
use crate::tables::{BoxTable, TableError};

type RangeTable<F> = BoxTable<RangeKey<F>, Range>;

/// What `ranges` of a family holds: few services have any.
pub(super) struct Ranges<F: Family> {
    held: BTreeMap<ServiceId, BTreeSet<RangeKey<F>>>,
    /// How many there are.
    count: usize,
}

impl<F: Family> Default for Ranges<F> {
    fn default() -> Self {
        Self { held: BTreeMap::new(), count: 0 }
    }
}

impl<F: Family> Ranges<F> {
    pub fn fill(&self, table: &RangeTable<F>) -> Fill {
        Fill::of(table, self.count)
    }

    /// The service ports that have some.
    pub fn services(&self) -> impl Iterator<Item = ServiceId> {
        self.held.keys().copied()
    }

    /// Whether a service port has some.
    pub fn has(&self, service: ServiceId) -> bool {
        self.held.contains_key(&service)
    }

    /// Whether a service port has some that are not wanted.
    pub fn has_others(&self, service: ServiceId, wanted: &BTreeSet<RangeKey<F>>) -> bool {
        self.held.get(&service).is_some_and(|held| !held.is_subset(wanted))
    }

    /// Puts in those that are missing. Where not all of them find room, none is left that is new.
    pub fn put_in(
        &mut self,
        table: &mut RangeTable<F>,
        counts: &mut Counts,
        service: ServiceId,
        wanted: &BTreeSet<RangeKey<F>>,
    ) -> Result<(), ReconcileError> {
        let held = self.held.get(&service);
        let new: Vec<_> = wanted.iter().filter(|key| held.is_none_or(|held| !held.contains(key))).copied().collect();
        if new.is_empty() {
            return Ok(());
        }
        let capacity = table.capacity();
        if self.count + new.len() > capacity {
            return Err(TableError::Full { map: table.name().to_owned(), capacity }.into());
        }
        let (count, done) = counts.put_all(table, &new, &vec![Range::default(); new.len()]);
        let mut put = new;
        put.truncate(count);
        if done.is_err() {
            put.retain(|key| counts.take(table, key).is_err());
        }
        self.count += put.len();
        if !put.is_empty() {
            self.held.entry(service).or_default().extend(put);
        }
        Ok(done?)
    }

    /// Takes out those that are not wanted.
    pub fn take_out(
        &mut self,
        table: &mut RangeTable<F>,
        counts: &mut Counts,
        service: ServiceId,
        wanted: &BTreeSet<RangeKey<F>>,
    ) -> Result<(), ReconcileError> {
        let Some(held) = self.held.get_mut(&service) else { return Ok(()) };
        let gone: Vec<_> = held.difference(wanted).copied().collect();
        for key in gone {
            counts.take(table, &key)?;
            held.remove(&key);
            self.count -= 1;
        }
        if held.is_empty() {
            self.held.remove(&service);
        }
        Ok(())
    }

    /// Reads the map anew.
    pub fn refresh(&mut self, table: &RangeTable<F>, differences: &mut Differences) -> Result<(), TableError> {
        let found = table.keys()?.into_iter().map(|key| (key, ())).collect();
        let written = self.held.values().flatten().map(|key| (*key, ())).collect();
        differences.note(table.name(), &written, &found);
        self.count = found.len();
        self.held.clear();
        for key in found.into_keys() {
            self.held.entry(key.service).or_default().insert(key);
        }
        Ok(())
    }
}
