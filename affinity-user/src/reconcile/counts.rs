//! What was done, in numbers; every write to a map goes by here.

use crate::tables::{BoxTable, TableError};

/// What was done since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Entries that were written.
    pub written: u64,
    /// Entries that were taken out, affinity entries not included.
    pub removed: u64,
    /// Service ports that could not be programmed, each time counted.
    pub failures: u64,
    /// Further attempts at them.
    pub retries: u64,
    /// Differences between the maps and what was written to them, which were repaired.
    pub differences: u64,
    /// Affinity entries that were taken out since their service has no affinity any more.
    pub swept: u64,
}

impl Counts {
    /// How many entries were written or taken out.
    pub fn writes(&self) -> u64 {
        self.written + self.removed
    }

    /// Writes an entry.
    pub(super) fn put<K, V>(&mut self, table: &mut BoxTable<K, V>, key: &K, value: &V) -> Result<(), TableError> {
        table.insert(key, value)?;
        self.written += 1;
        Ok(())
    }

    /// Writes entries, in their order; returns how many, and why it was not all of them.
    pub(super) fn put_all<K, V>(
        &mut self,
        table: &mut BoxTable<K, V>,
        keys: &[K],
        values: &[V],
    ) -> (usize, Result<(), TableError>) {
        let (count, done) = table.insert_all(keys, values);
        self.written += count as u64;
        (count, done)
    }

    /// Takes an entry out. One that is not there is as good.
    pub(super) fn take<K, V>(&mut self, table: &mut BoxTable<K, V>, key: &K) -> Result<(), TableError> {
        match table.remove(key) {
            Ok(()) => self.removed += 1,
            Err(TableError::NotFound { map }) => tracing::warn!(map, "an entry was gone before it was taken out"),
            Err(error) => return Err(error),
        }
        Ok(())
    }
}
