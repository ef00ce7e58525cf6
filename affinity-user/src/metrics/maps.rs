//! What the maps hold, in numbers. They are walked through in parts, so that it takes no memory, by whoever scrapes.

use std::collections::{BTreeSet, HashMap};

use affinity_common::abi;
use affinity_common::abi::counters::{Counter, index};
use affinity_common::family::{Family, V4};
use affinity_common::reason::{Program, Reason};
use affinity_common::types::{Nanos, Seconds, ServiceId};

use crate::tables::{BoxTable, FamilyTables, TableError, Tables};

/// How many entries are read by one call.
const PART: usize = 2048;

/// A map's fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fill {
    pub map: &'static str,
    pub entries: usize,
    pub capacity: usize,
}

impl Fill {
    /// The part of it that is used, from 0 to 1.
    pub fn pressure(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a ratio; maps have far fewer than 2^52 elements")]
        let pressure = self.entries as f64 / self.capacity.max(1) as f64;
        pressure
    }
}

/// Numbers of one address family.
#[derive(Clone, Debug, Default)]
pub(super) struct OfFamily {
    pub name: &'static str,
    pub frontends: usize,
    pub eligible: usize,
    pub not_eligible: usize,
    pub live: usize,
    pub expired: usize,
}

/// What the maps hold, in numbers.
#[derive(Clone, Debug)]
pub(super) struct Numbers {
    pub fills: Vec<Fill>,
    pub families: [OfFamily; 2],
    pub service_ports: usize,
}

/// Runs of slots, and the timeouts of services: what frontends say.
#[derive(Default)]
struct Found {
    runs: BTreeSet<(u32, u32)>,
    timeouts: HashMap<ServiceId, Seconds>,
}

impl Numbers {
    /// Walks through the maps; `now` is the clock of the entries.
    pub fn read(tables: &Tables, now: Nanos) -> Result<Self, TableError> {
        let mut fills = Vec::new();
        let mut found = Found::default();
        let families =
            [of_family(&tables.v4, now, &mut fills, &mut found)?, of_family(&tables.v6, now, &mut fills, &mut found)?];
        let shared = &tables.shared;
        let service_ports = count(&shared.services)?;
        let slots = found.runs.iter().map(|(_, count)| *count as usize).sum();
        let fill = |map, entries, capacity| Fill { map, entries, capacity };
        fills.extend([
            fill(abi::slots::SPEC.name, slots, shared.slots.capacity()),
            fill(abi::services::SPEC.name, service_ports, shared.services.capacity()),
            fill(abi::backend_stats::SPEC.name, count(&shared.backend_stats)?, shared.backend_stats.capacity()),
            fill(abi::backend_names::SPEC.name, count(&shared.backend_names)?, shared.backend_names.capacity()),
        ]);
        Ok(Self { fills, families, service_ports })
    }
}

fn of_family<F: Family>(
    tables: &FamilyTables<F>,
    now: Nanos,
    fills: &mut Vec<Fill>,
    found: &mut Found,
) -> Result<OfFamily, TableError> {
    let mut numbers = OfFamily { name: if F::VERSION == V4::VERSION { "ipv4" } else { "ipv6" }, ..OfFamily::default() };
    each(&tables.frontends, |_, value| {
        numbers.frontends += 1;
        if value.slot_count > 0 {
            found.runs.insert((value.first_slot, value.slot_count));
        }
        if value.has_affinity() {
            found.timeouts.insert(value.service, value.timeout);
        }
    })?;
    each(&tables.backends, |_, value| {
        *(if value.is_eligible_anywhere() { &mut numbers.eligible } else { &mut numbers.not_eligible }) += 1;
    })?;
    each(&tables.affinity, |key, entry| {
        let is_live = found.timeouts.get(&key.service).is_some_and(|timeout| entry.pair().is_live(*timeout, now));
        *(if is_live { &mut numbers.live } else { &mut numbers.expired }) += 1;
    })?;
    let fill = |map, entries, capacity| Fill { map, entries, capacity };
    fills.extend([
        fill(abi::frontends::spec::<F>().name, numbers.frontends, tables.frontends.capacity()),
        fill(abi::addresses::spec::<F>().name, count(&tables.addresses)?, tables.addresses.capacity()),
        fill(abi::backends::spec::<F>().name, numbers.eligible + numbers.not_eligible, tables.backends.capacity()),
        fill(abi::affinity::spec::<F>().name, numbers.live + numbers.expired, tables.affinity.capacity()),
        fill(abi::conntrack::spec::<F>().name, count(&tables.conntrack)?, tables.conntrack.capacity()),
        fill(abi::fragments::spec::<F>().name, count(&tables.fragments)?, tables.fragments.capacity()),
        fill(abi::netns::spec::<F>().name, count(&tables.netns)?, tables.netns.capacity()),
        fill(abi::sockets::spec::<F>().name, count(&tables.sockets)?, tables.sockets.capacity()),
        fill(abi::source_ranges::spec::<F>().name, tables.ranges.len()?, tables.ranges.capacity()),
        fill(abi::announced::spec::<F>().name, count(&tables.announced)?, tables.announced.capacity()),
    ]);
    Ok(numbers)
}

fn each<K, V>(table: &BoxTable<K, V>, mut see: impl FnMut(&K, &V)) -> Result<(), TableError> {
    let mut from = None;
    loop {
        let (entries, next) = table.part(from, PART)?;
        for (key, value) in &entries {
            see(key, value);
        }
        if next.is_none() {
            return Ok(());
        }
        from = next;
    }
}

fn count<K, V>(table: &BoxTable<K, V>) -> Result<usize, TableError> {
    let mut entries = 0;
    each(table, |_, _| entries += 1)?;
    Ok(entries)
}

/// What a program has counted for a reason.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counted {
    pub program: Program,
    pub reason: Reason,
    pub counter: Counter,
}

/// Everything that is counted.
pub(super) fn counted(tables: &Tables) -> Result<Vec<Counted>, TableError> {
    let each = Program::ALL.into_iter().flat_map(|program| Reason::ALL.map(|reason| (program, reason)));
    each.map(|(program, reason)| {
        let counter = tables.shared.counters.get(&index(program, reason))?.unwrap_or_default();
        Ok(Counted { program, reason, counter })
    })
    .collect()
}

/// How often a backend was chosen for each reason, over all programs.
pub(super) fn selections(counted: &[Counted]) -> Vec<(Reason, u64)> {
    let reasons = Reason::ALL.into_iter().filter(|reason| reason.is_selection());
    reasons
        .map(|reason| (reason, counted.iter().filter(|it| it.reason == reason).map(|it| it.counter.packets).sum()))
        .collect()
}
