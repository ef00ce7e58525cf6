//! How the use of a table can fail.

use std::fmt;

use nix::errno::Errno;
use thiserror::Error;

/// What was to be done with a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read an entry.
    Get,
    /// Add or replace an entry.
    Insert,
    /// Take an entry out.
    Remove,
    /// List the keys.
    List,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Get => "read an entry",
            Self::Insert => "write an entry",
            Self::Remove => "remove an entry",
            Self::List => "list the keys",
        })
    }
}

/// A table did not do what it was asked to.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TableError {
    /// There is no room for a new entry.
    #[error("{map} is full ({capacity}): raise --map-size {}=N", option(map))]
    Full {
        /// The map.
        map: String,
        /// How many entries it holds.
        capacity: usize,
    },
    /// The entry to be removed is not there.
    #[error("{map} has no such entry")]
    NotFound {
        /// The map.
        map: String,
    },
    /// The kernel refused.
    #[error("{map}: can't {op}: {errno}")]
    Syscall {
        /// What was to be done.
        op: Operation,
        /// The map.
        map: String,
        /// Why not.
        errno: Errno,
    },
}

/// The name of a map's size among the daemon's options: that of all families.
fn option(map: &str) -> &str {
    map.strip_suffix("_v4").or_else(|| map.strip_suffix("_v6")).unwrap_or(map)
}

impl TableError {
    /// Whether there was no room.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_to_do() {
        let full = TableError::Full { map: "frontends_v4".into(), capacity: 65_536 };
        assert_eq!(full.to_string(), "frontends_v4 is full (65536): raise --map-size frontends=N");
        let refused = TableError::Syscall { op: Operation::Insert, map: "slots".into(), errno: Errno::ENOMEM };
        assert_eq!(refused.to_string(), "slots: can't write an entry: ENOMEM: Out of memory");
    }
}
