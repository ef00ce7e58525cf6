//! Affinity entries of services that have no affinity any more: taken out, so that one which has it again starts afresh.
//!
//! Entries that have expired are left where they are: they say that the client's next choice is to be a random one.

use std::{collections::BTreeSet, time::Instant};

use affinity_common::{
    abi::affinity::{Affinity, AffinityKey},
    family::Family,
    types::ServiceId,
};

use super::{counts::Counts, runs::REST};
use crate::tables::{BoxTable, TableError};

/// What is to be swept.
pub(super) struct Sweeper<F: Family> {
    /// Services that have lost their affinity since the last sweep.
    off: BTreeSet<ServiceId>,
    /// When the map is to be looked through: programs that still hold a frontend's old value can add entries until then.
    due: Option<Instant>,
    /// Entries to be taken out.
    queue: Vec<AffinityKey<F>>,
}

impl<F: Family> Default for Sweeper<F> {
    fn default() -> Self {
        Self { off: BTreeSet::new(), due: None, queue: Vec::new() }
    }
}

impl<F: Family> Sweeper<F> {
    /// A service has no affinity any more.
    pub fn switched_off(&mut self, service: ServiceId, now: Instant) {
        self.off.insert(service);
        self.due = Some(now + REST);
    }

    /// The whole map is to be looked through: there can be entries of services that went unseen.
    pub fn look_through(&mut self, now: Instant) {
        self.due = Some(now + REST);
    }

    /// When there is something to do.
    pub fn next(&self, now: Instant) -> Option<Instant> {
        if self.queue.is_empty() { self.due } else { Some(now) }
    }

    /// Takes out what is left of a service that is about to have affinity again.
    pub fn sweep_service(
        &mut self,
        table: &mut BoxTable<AffinityKey<F>, Affinity>,
        counts: &mut Counts,
        service: ServiceId,
    ) -> Result<(), TableError> {
        if !self.off.contains(&service) {
            return Ok(());
        }
        for key in table.keys()?.iter().filter(|key| key.service == service) {
            take(table, counts, key)?;
        }
        self.off.remove(&service);
        Ok(())
    }

    /// Takes out up to `limit` entries of services without affinity.
    pub fn sweep(
        &mut self,
        table: &mut BoxTable<AffinityKey<F>, Affinity>,
        counts: &mut Counts,
        limit: usize,
        now: Instant,
        has_affinity: impl Fn(ServiceId) -> bool,
    ) -> Result<(), TableError> {
        if self.queue.is_empty() && self.due.is_some_and(|due| due <= now) {
            // Where they can't be listed: later.
            self.due = Some(now + REST);
            self.queue = table.keys()?;
            self.queue.retain(|key| !has_affinity(key.service));
            self.due = None;
        }
        for _ in 0..limit {
            let Some(key) = self.queue.pop() else { break };
            if !has_affinity(key.service)
                && let Err(error) = take(table, counts, &key)
            {
                self.queue.clear();
                self.due = Some(now + REST);
                return Err(error);
            }
        }
        if self.queue.is_empty() && self.due.is_none() {
            self.off.clear();
        }
        Ok(())
    }
}

/// Takes an entry out. It may have been evicted.
fn take<F: Family>(
    table: &mut BoxTable<AffinityKey<F>, Affinity>,
    counts: &mut Counts,
    key: &AffinityKey<F>,
) -> Result<(), TableError> {
    match table.remove(key) {
        Ok(()) => counts.swept += 1,
        Err(TableError::NotFound { .. }) => {}
        Err(error) => return Err(error),
    }
    Ok(())
}
