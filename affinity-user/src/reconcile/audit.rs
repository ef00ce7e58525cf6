//! Differences between what the maps hold and what was written to them.

use std::{collections::BTreeMap, fmt};

/// In what way an entry differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Difference {
    /// It was written and is not there.
    Missing,
    /// It is there and nobody wrote it.
    Extra,
    /// It holds another value than was written.
    Changed,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Missing => "missing",
            Self::Extra => "extra",
            Self::Changed => "changed",
        })
    }
}

/// The number of entries that differ, by map and in what way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// The numbers; none is 0.
    pub by_map: BTreeMap<(String, Difference), usize>,
}

impl Differences {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_map.is_empty()
    }

    /// Their number.
    pub fn total(&self) -> usize {
        self.by_map.values().sum()
    }

    /// Compares what was written to a map with what it holds.
    pub(super) fn note<K: Ord, V: PartialEq>(&mut self, map: &str, written: &BTreeMap<K, V>, found: &BTreeMap<K, V>) {
        let missing = written.keys().filter(|key| !found.contains_key(key)).count();
        let extra = found.keys().filter(|key| !written.contains_key(key)).count();
        let changed = found.iter().filter(|(key, value)| written.get(key).is_some_and(|w| w != *value)).count();
        self.add(map, Difference::Missing, missing);
        self.add(map, Difference::Extra, extra);
        self.add(map, Difference::Changed, changed);
    }

    /// Notes an entry that holds another value than was written.
    pub(super) fn changed(&mut self, map: &str) {
        self.add(map, Difference::Changed, 1);
    }

    fn add(&mut self, map: &str, difference: Difference, count: usize) {
        if count > 0 {
            *self.by_map.entry((map.to_owned(), difference)).or_default() += count;
        }
    }
}

impl fmt::Display for Differences {
    /// `frontends_v4: 1 missing, slots: 2 changed`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        for (i, ((map, difference), count)) in self.by_map.iter().enumerate() {
            write!(f, "{}{map}: {count} {difference}", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}
