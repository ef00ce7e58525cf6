//! What the datapath has counted, and how full its maps are.

use affinity_common::abi::counters::index;
use affinity_common::reason::{Program, Reason};
use serde::Serialize;

use super::Snapshot;

/// Packets of a program that ended alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CounterRow {
    /// The program.
    pub program: &'static str,
    /// The reason.
    pub reason: &'static str,
    /// `pass`, `drop` or `send-back`.
    pub verdict: &'static str,
    /// Packets.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What the reason means.
    pub meaning: &'static str,
}

/// What was counted; also what never happened, with `all`.
pub fn counters(snapshot: &Snapshot, all: bool) -> Vec<CounterRow> {
    let each = Program::ALL.into_iter().flat_map(|program| Reason::ALL.map(|reason| (program, reason)));
    each.map(|(program, reason)| {
        let counter = snapshot.counters.get(&index(program, reason)).copied().unwrap_or_default();
        CounterRow {
            program: program.name(),
            reason: reason.name(),
            verdict: reason.verdict().name(),
            packets: counter.packets,
            bytes: counter.bytes,
            meaning: reason.meaning(),
        }
    })
    .filter(|row| all || row.packets > 0)
    .collect()
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MapRow {
    /// Its name.
    pub name: &'static str,
    /// Its entries.
    pub entries: usize,
    /// How many have room.
    pub capacity: usize,
    /// The part of it that is used, from 0 to 1.
    pub fill: f64,
}

impl MapRow {
    /// Whether it is about time to make it larger. (Those of clients and connections are LRUs: full is usual.)
    pub fn is_nearly_full(&self) -> bool {
        self.fill >= 0.8
    }
}

/// How full the maps are.
pub fn maps(snapshot: &Snapshot) -> Vec<MapRow> {
    let row = |&(name, entries, capacity): &(&'static str, usize, usize)| {
        #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
        let fill = if capacity == 0 { 0.0 } else { entries as f64 / capacity as f64 };
        MapRow { name, entries, capacity, fill }
    };
    snapshot.fill.iter().map(row).collect()
}
