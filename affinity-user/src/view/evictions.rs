//! How many entries the LRU maps have evicted. The kernel counts none: it is estimated, from what the programs have counted
//! anyway, as what was inserted less what was taken out and what is present. Of both families together, as the counters are.

use std::collections::BTreeMap;

use affinity_common::abi::counters::{Counter, index};
use affinity_common::reason::{Program, Reason};
use serde::Serialize;

use super::Snapshot;

/// What can be told of a pair of maps since they were made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EvictionRow {
    /// The maps' name without the family.
    pub maps: &'static str,
    /// Entries that were inserted.
    pub inserted: u64,
    /// Entries that were taken out, as far as that was counted.
    pub removed: u64,
    /// Entries that are there.
    pub present: u64,
    /// What is left of the insertions: so many were evicted.
    pub evicted: u64,
    /// How that is to be read.
    pub certainty: Certainty,
    /// Why it is not certain.
    pub because: &'static str,
}

/// How an estimate is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Certainty {
    /// Near that number.
    About,
    /// It can be far less.
    AtMost,
}

impl Certainty {
    /// How people say it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::About => "about",
            Self::AtMost => "at most",
        }
    }
}

/// The estimates. `collected`: connections' entries that the collector of the daemon that runs has taken out.
pub fn evictions(snapshot: &Snapshot, collected: u64) -> [EvictionRow; 3] {
    estimate(&snapshot.counters, &snapshot.fill, collected)
}

fn estimate(
    counters: &BTreeMap<u32, Counter>,
    fill: &[(&'static str, usize, usize)],
    collected: u64,
) -> [EvictionRow; 3] {
    let counted = |programs: &[Program], reasons: &[Reason]| -> u64 {
        let each = programs.iter().flat_map(|program| reasons.iter().map(|reason| index(*program, *reason)));
        each.filter_map(|index| counters.get(&index)).map(|counter| counter.packets).sum()
    };
    let selections: Vec<Reason> = Reason::ALL.into_iter().filter(|reason| reason.is_selection()).collect();
    let opening = [Program::Connect, Program::Sendmsg];
    let row = |maps: &'static str, inserted: u64, removed: u64, certainty, because| {
        let of_them =
            fill.iter().filter(|(name, ..)| name.strip_prefix(maps).is_some_and(|rest| rest.starts_with('_')));
        let present = of_them.map(|(_, entries, _)| u64::try_from(*entries).unwrap_or(u64::MAX)).sum();
        let evicted = inserted.saturating_sub(removed).saturating_sub(present);
        EvictionRow { maps, inserted, removed, present, evicted, certainty, because }
    };
    [
        row(
            "affinity",
            counted(&[Program::Ingress, Program::Connect, Program::Sendmsg], &[Reason::AffinityNew]),
            0,
            Certainty::About,
            "expired entries are among them, and a client whose first packet was not sent on is not counted",
        ),
        row(
            "conntrack",
            counted(&[Program::Ingress], &selections).saturating_mul(2),
            collected,
            Certainty::AtMost,
            "a connection on the ports of an earlier one takes over its entries, and what `conntrack flush` and earlier \
             daemons have taken out is not known",
        ),
        row(
            "sockets",
            counted(&opening, &selections),
            counted(&[Program::Release], &[Reason::Closed]),
            Certainty::AtMost,
            "the daemon takes out what sockets have left behind that were not connected when they were closed",
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILL: [(&str, usize, usize); 6] = [
        ("affinity_v4", 60, 64),
        ("affinity_v6", 10, 64),
        ("conntrack_v4", 50, 64),
        ("conntrack_v6", 0, 64),
        ("sockets_v4", 5, 64),
        // No LRU, and none of its name.
        ("affinity", 1000, 1000),
    ];

    fn counters(of: &[(Program, Reason, u64)]) -> BTreeMap<u32, Counter> {
        let counter = |packets| Counter { packets, bytes: 0 };
        of.iter().map(|(program, reason, packets)| (index(*program, *reason), counter(*packets))).collect()
    }

    #[test]
    fn what_is_neither_there_nor_taken_out_was_evicted() {
        let counters = counters(&[
            (Program::Ingress, Reason::AffinityNew, 80),
            (Program::Connect, Reason::AffinityNew, 20),
            (Program::Ingress, Reason::AffinityHit, 20),
            (Program::Connect, Reason::Hashed, 10),
            (Program::Release, Reason::Closed, 12),
            // Not a selection, not a new entry.
            (Program::Ingress, Reason::Established, 5_000),
        ]);
        let [affinity, conntrack, sockets] = estimate(&counters, &FILL, 30);
        assert_eq!((affinity.inserted, affinity.present, affinity.evicted), (100, 70, 30));
        assert_eq!((conntrack.inserted, conntrack.removed, conntrack.present), (200, 30, 50));
        assert_eq!((conntrack.evicted, conntrack.certainty), (120, Certainty::AtMost));
        assert_eq!((sockets.inserted, sockets.removed, sockets.evicted), (30, 12, 13));
    }

    #[test]
    fn more_than_was_inserted_is_no_eviction() {
        let counters = counters(&[(Program::Ingress, Reason::AffinityNew, 3)]);
        assert!(estimate(&counters, &FILL, 0).iter().all(|row| row.evicted == 0));
    }
}
