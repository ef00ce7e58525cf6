//! Tables whose writes fail by a script, and are watched.

use std::{
    any::Any,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::errno::Errno;

use super::{BoxTable, Operation, Part, Position, Table, TableError, memory::Wrapper};

/// How a write fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// As in a map that has no room.
    Full,
    /// As by a system call.
    Errno(Errno),
}

type Watcher = Arc<dyn Fn(&str, Operation, &dyn Any) + Send + Sync>;

#[derive(Default)]
struct State {
    writes: u64,
    /// The numbers of writes that fail, and how.
    by_number: Vec<(u64, Fault)>,
    /// The write from which on all fail, and how.
    from: Option<(u64, Fault)>,
    /// The maps that fail at every write.
    by_map: Vec<(String, Fault)>,
    watcher: Option<Watcher>,
}

/// The script of the faults of any number of tables, which count their writes together. A clone is another handle.
#[derive(Clone, Default)]
pub struct Faults {
    state: Arc<Mutex<State>>,
}

impl Faults {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the `n`th write from now on fail: 0 is the next one.
    pub fn fail_nth(&self, n: u64, fault: Fault) {
        let mut state = self.state();
        let number = state.writes + n;
        state.by_number.push((number, fault));
    }

    /// Lets the next `count` writes fail.
    pub fn fail_next(&self, count: u64, fault: Fault) {
        for n in 0..count {
            self.fail_nth(n, fault);
        }
    }

    /// Lets the `n`th write from now on fail and all that follow, as if whoever writes had died.
    pub fn fail_from(&self, n: u64, fault: Fault) {
        let mut state = self.state();
        state.from = Some((state.writes + n, fault));
    }

    /// Lets all writes to a map fail from now on: with [`Fault::Full`] those of new keys, and no others.
    pub fn fail_map(&self, map: &str, fault: Fault) {
        self.state().by_map.push((map.to_owned(), fault));
    }

    /// Lets nothing fail any more.
    pub fn clear(&self) {
        let mut state = self.state();
        state.by_number.clear();
        state.from = None;
        state.by_map.clear();
    }

    /// How many writes were tried so far.
    pub fn writes(&self) -> u64 {
        self.state().writes
    }

    /// Calls `watcher` after each write that was done, with the map's name and the key.
    pub fn watch(&self, watcher: impl Fn(&str, Operation, &dyn Any) + Send + Sync + 'static) {
        self.state().watcher = Some(Arc::new(watcher));
    }

    /// Counts a write and says how it fails.
    fn next(&self, map: &str, new_key: bool) -> Option<Fault> {
        let mut state = self.state();
        let number = state.writes;
        state.writes += 1;
        let by_number = state.by_number.iter().find(|(n, _)| *n == number).map(|(_, fault)| *fault);
        let by_map = state.by_map.iter().find(|(name, _)| name == map).map(|(_, fault)| *fault);
        let from = state.from.filter(|(n, _)| *n <= number).map(|(_, fault)| fault);
        by_number.or(from).or(by_map).filter(|fault| *fault != Fault::Full || new_key)
    }

    fn done(&self, map: &str, op: Operation, key: &dyn Any) {
        let watcher = self.state().watcher.clone();
        if let Some(watcher) = watcher {
            watcher(map, op, key);
        }
    }
}

impl Wrapper for Faults {
    fn wrap<K: Ord + Copy + Send + 'static, V: Copy + Send + 'static>(
        &self,
        table: impl Table<K, V> + 'static,
    ) -> BoxTable<K, V> {
        Box::new(FaultyTable { table, faults: self.clone() })
    }
}

/// A table whose writes fail by a script.
pub struct FaultyTable<T> {
    table: T,
    faults: Faults,
}

impl<T> FaultyTable<T> {
    /// Wraps a table.
    pub fn new(table: T, faults: Faults) -> Self {
        Self { table, faults }
    }
}

impl<K: Send + 'static, V: Send, T: Table<K, V>> Table<K, V> for FaultyTable<T> {
    fn name(&self) -> &str {
        self.table.name()
    }

    fn capacity(&self) -> usize {
        self.table.capacity()
    }

    fn get(&self, key: &K) -> Result<Option<V>, TableError> {
        self.table.get(key)
    }

    fn insert(&mut self, key: &K, value: &V) -> Result<(), TableError> {
        let map = self.table.name().to_owned();
        let new_key = self.table.get(key)?.is_none();
        match self.faults.next(&map, new_key) {
            Some(Fault::Full) => return Err(TableError::Full { map, capacity: self.table.capacity() }),
            Some(Fault::Errno(errno)) => return Err(TableError::Syscall { op: Operation::Insert, map, errno }),
            None => {}
        }
        self.table.insert(key, value)?;
        self.faults.done(&map, Operation::Insert, key);
        Ok(())
    }

    fn remove(&mut self, key: &K) -> Result<(), TableError> {
        let map = self.table.name().to_owned();
        if let Some(Fault::Errno(errno)) = self.faults.next(&map, false) {
            return Err(TableError::Syscall { op: Operation::Remove, map, errno });
        }
        self.table.remove(key)?;
        self.faults.done(&map, Operation::Remove, key);
        Ok(())
    }

    fn keys(&self) -> Result<Vec<K>, TableError> {
        self.table.keys()
    }

    fn part(&self, from: Option<Position>, most: usize) -> Result<Part<K, V>, TableError> {
        self.table.part(from, most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::memory::MemoryTable;

    #[test]
    fn writes_fail_by_the_script_and_only_by_it() {
        let faults = Faults::default();
        let mut table = FaultyTable::new(MemoryTable::new("t", 8), faults.clone());
        faults.fail_nth(1, Fault::Errno(Errno::ENOMEM));
        table.insert(&1, &1).unwrap();
        let refused = TableError::Syscall { op: Operation::Insert, map: "t".into(), errno: Errno::ENOMEM };
        assert_eq!(table.insert(&2, &2), Err(refused));
        table.insert(&2, &2).unwrap();
        faults.fail_map("t", Fault::Full);
        table.insert(&2, &3).unwrap();
        assert!(table.insert(&3, &3).unwrap_err().is_full());
        table.remove(&2).unwrap();
        faults.clear();
        table.insert(&3, &3).unwrap();
        assert_eq!(faults.writes(), 7);
    }
}
