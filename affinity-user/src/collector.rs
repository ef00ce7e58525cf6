//! The collector of connections that are over: what the LRU would evict only when it is full. A thread beside the daemon's
//! walks through conntrack in small parts, with a rest after each.
//!
//! A connection's entry may be refreshed by a packet between the second look at it and its removal. Its next packet then
//! makes it anew, on the same backend where affinity or the hash still say so.

use std::collections::BTreeMap;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{io, mem, slice};

use affinity_common::abi::conntrack::{Conntrack, ConntrackKey, FORWARD};
use affinity_common::abi::filter::{FilterWord, Place};
use affinity_common::abi::fragments::{self, Fragments, FragmentsKey};
use affinity_common::abi::lifetimes::Lifetimes;
use affinity_common::family::Family;
use affinity_common::types::{Nanos, Ticks};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::tables::{BoxTable, FamilyTables, ONLY, Position, TableError, Tables};

/// How often conntrack is walked through.
const INTERVAL: Duration = Duration::from_secs(30);
/// How many entries are looked at at a time.
const PART: usize = 2048;
/// How long the thread rests after each part: a CPU is never held for long.
const REST: Duration = Duration::from_millis(2);

/// What was found and done.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CollectorStatus {
    /// Entries that the last walk has looked at.
    pub looked_at: usize,
    /// Entries that it has taken out.
    pub removed: usize,
    /// Entries that were taken out since the start.
    pub removed_in_all: u64,
    /// How long it took in seconds, its rests included.
    pub seconds: f64,
    /// How long it worked in seconds.
    pub busy_seconds: f64,
}

/// A handle of the thread, which ends when this is dropped.
pub struct Collector {
    stop: Option<mpsc::Sender<()>>,
    status: Arc<Mutex<CollectorStatus>>,
    thread: Option<JoinHandle<()>>,
}

impl Collector {
    /// Starts the thread on tables of its own.
    ///
    /// # Errors
    /// Where there is no further thread.
    pub fn start(tables: Tables) -> io::Result<Self> {
        let status: Arc<Mutex<CollectorStatus>> = Arc::default();
        let (stop, stopped) = mpsc::channel();
        let shared = status.clone();
        let thread = thread::Builder::new().name("collector".to_owned()).spawn(move || {
            let mut walker = Walker::new(tables);
            while stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                match walker.walk(|| stopped.recv_timeout(REST) == Err(RecvTimeoutError::Timeout)) {
                    Ok(walk) => {
                        let mut status = lock(&shared);
                        let removed_in_all = status.removed_in_all + walk.removed as u64;
                        *status = CollectorStatus { removed_in_all, ..walk };
                    }
                    Err(error) => tracing::warn!(%error, "connections that are over stay for now"),
                }
            }
        })?;
        Ok(Self { stop: Some(stop), status, thread: Some(thread) })
    }

    /// What was found and done.
    pub fn status(&self) -> CollectorStatus {
        lock(&self.status).clone()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(status: &Mutex<CollectorStatus>) -> MutexGuard<'_, CollectorStatus> {
    status.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What walks through the maps.
pub struct Walker {
    tables: Tables,
    /// The clock that entries are stamped by.
    clock: Box<dyn Fn() -> Ticks + Send>,
    direct: Marks,
    snat: Marks,
}

/// What the last walk has found of a filter that the datapath writes.
#[derive(Default)]
struct Marks {
    /// The bits that were set when it began.
    set: Bits,
    /// Those that connections want.
    wanted: Bits,
}

/// Words that are not zero, by their index.
type Bits = BTreeMap<u32, u64>;

/// The state of a walk.
struct Walk {
    status: CollectorStatus,
    lifetimes: Lifetimes,
    now: Ticks,
    direct: Bits,
    snat: Bits,
}

impl Walker {
    /// One that has seen nothing yet.
    pub fn new(tables: Tables) -> Self {
        Self { tables, clock: Box::new(now), direct: Marks::default(), snat: Marks::default() }
    }

    /// Walks through all once, and takes out what is over. `rest` is called after each part; the walk ends early where that
    /// returns that it is not to go on.
    ///
    /// # Errors
    /// Where a map can't be read or written.
    pub fn walk(&mut self, mut rest: impl FnMut() -> bool) -> Result<CollectorStatus, TableError> {
        let start = Instant::now();
        let mut rested = Duration::ZERO;
        let mut rest = || {
            let since = Instant::now();
            let goes_on = rest();
            rested += since.elapsed();
            goes_on
        };
        let mut walk = Walk {
            status: CollectorStatus::default(),
            lifetimes: self.tables.shared.lifetimes.get(&ONLY)?.unwrap_or_default(),
            now: (self.clock)(),
            direct: Bits::new(),
            snat: Bits::new(),
        };
        let direct = bits(&self.tables.shared.direct_filter)?;
        let snat = bits(&self.tables.shared.snat_filter)?;
        let is_whole = of_family(&mut self.tables.v4, &mut walk, &mut rest)?
            && of_family(&mut self.tables.v6, &mut walk, &mut rest)?;
        if is_whole {
            let shared = &mut self.tables.shared;
            self.direct.follow(&mut shared.direct_filter, Marks { set: direct, wanted: walk.direct })?;
            self.snat.follow(&mut shared.snat_filter, Marks { set: snat, wanted: walk.snat })?;
        }
        walk.status.seconds = start.elapsed().as_secs_f64();
        walk.status.busy_seconds = start.elapsed().saturating_sub(rested).as_secs_f64();
        Ok(walk.status)
    }
}

fn of_family<F: Family>(
    tables: &mut FamilyTables<F>,
    walk: &mut Walk,
    rest: &mut impl FnMut() -> bool,
) -> Result<bool, TableError> {
    let lifetimes = walk.lifetimes;
    let is_over = |key: &ConntrackKey<F>, entry: &Conntrack<F>, now: Ticks| {
        entry.has_expired(lifetimes.of(key.proto, entry.seen), now)
    };
    let (mut direct, mut snat) = (mem::take(&mut walk.direct), mem::take(&mut walk.snat));
    let mark = |bits: &mut Bits, place: Place| *bits.entry(place.word).or_default() |= place.bit;
    let is_whole = remove_parts(&mut tables.conntrack, walk, rest, is_over, |key, entry| {
        if key.direction == FORWARD && entry.addr == key.peer {
            mark(&mut direct, Place::of::<F>(&key.peer));
        }
        if entry.is_from_outside() {
            // Of whichever of its entries is there: the others are made again from that.
            let backend = if key.direction == FORWARD { &entry.addr } else { &key.peer };
            mark(&mut snat, Place::of::<F>(backend));
        }
    })?;
    (walk.direct, walk.snat) = (direct, snat);
    let is_old =
        |_: &FragmentsKey<F>, entry: &Fragments, now: Ticks| entry.at.until(now) >= fragments::LIFETIME.ticks();
    Ok(is_whole && remove_parts(&mut tables.fragments, walk, rest, is_old, |_, _| {})?)
}

/// Takes what is over out of a table, part by part. Returns whether it came to the end.
fn remove_parts<K: Copy, V: Copy>(
    table: &mut BoxTable<K, V>,
    walk: &mut Walk,
    rest: &mut impl FnMut() -> bool,
    is_over: impl Fn(&K, &V, Ticks) -> bool,
    mut stays: impl FnMut(&K, &V),
) -> Result<bool, TableError> {
    let mut from: Option<Position> = None;
    loop {
        let (entries, next) = table.part(from, PART)?;
        walk.status.looked_at += entries.len();
        for (key, entry) in &entries {
            // A packet may have come since, of a new connection on the same ports. So entries are read again, and go one by
            // one: in the time that a batch of them takes, such packets do come.
            if is_over(key, entry, walk.now) && table.get(key)?.is_some_and(|entry| is_over(key, &entry, walk.now)) {
                walk.status.removed += table.remove_all(slice::from_ref(key))?;
            } else {
                stays(key, entry);
            }
        }
        if next.is_none() {
            return Ok(true);
        }
        from = next;
        if !rest() {
            return Ok(false);
        }
    }
}

/// The words of a filter that are not zero.
fn bits(table: &BoxTable<u32, FilterWord>) -> Result<Bits, TableError> {
    let set = table.entries()?.into_iter().filter(|(_, word)| word.bits != 0);
    Ok(set.map(|(index, word)| (index, word.bits)).collect())
}

impl Marks {
    /// Clears the marks that were there before the last walk began, and that neither that nor this one, which is `next`, has
    /// found to be wanted: a connection that is marked has its entry at once.
    fn follow(&mut self, table: &mut BoxTable<u32, FilterWord>, next: Self) -> Result<(), TableError> {
        let before = mem::replace(self, next);
        for (index, bits) in &before.set {
            let of = |wanted: &Bits| wanted.get(index).copied().unwrap_or_default();
            let stale = bits & !of(&before.wanted) & !of(&self.wanted);
            if stale != 0 {
                let bits = table.get(index)?.unwrap_or_default().bits & !stale;
                table.insert(index, &FilterWord { bits })?;
            }
        }
        Ok(())
    }
}

/// The clock that entries are stamped by.
pub(crate) fn now() -> Ticks {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map(Duration::from).unwrap_or_default();
    Nanos(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)).ticks()
}

#[cfg(test)]
mod tests {
    use affinity_common::abi::conntrack::{REPLIED, STREAM};
    use affinity_common::family::V4;
    use affinity_common::types::{Port, Proto, Seconds};

    use super::*;
    use crate::tables::{Table as _, memory::MemoryTables};

    const NOW: Ticks = Ticks { at: 10_000_000 };

    fn walker(memory: &MemoryTables) -> Walker {
        Walker { clock: Box::new(|| NOW), ..Walker::new(memory.tables()) }
    }

    fn key(port: u16, proto: Proto) -> ConntrackKey<V4> {
        ConntrackKey::forward([10, 0, 0, 1], Port::new(port), [10, 96, 0, 1], Port::new(80), proto)
    }

    fn silent_for(seconds: u32, seen: u8) -> Conntrack<V4> {
        let last_seen = Ticks { at: NOW.at - Seconds::new(seconds).ticks() };
        Conntrack { last_seen, seen, ..Conntrack::default() }
    }

    #[test]
    fn what_is_over_goes_at_its_bound_and_nothing_else() {
        let memory = MemoryTables::default();
        let mut table = memory.v4.conntrack.clone();
        for (port, proto, seen, seconds) in [
            (1, Proto::TCP, REPLIED, 21_599),
            (2, Proto::TCP, REPLIED, 21_600),
            (3, Proto::UDP, 0, 29),
            (4, Proto::UDP, REPLIED, 30),
            (5, Proto::UDP, REPLIED | STREAM, 119),
            (6, Proto::UDP, REPLIED | STREAM, 120),
        ] {
            table.insert(&key(port, proto), &silent_for(seconds, seen)).unwrap();
        }
        let walk = walker(&memory).walk(|| true).unwrap();
        assert_eq!((walk.looked_at, walk.removed), (6, 3));
        assert_eq!(table.keys().unwrap().iter().map(|key| key.client_port.get()).collect::<Vec<_>>(), [1, 3, 5]);
        // Other lifetimes.
        let set = Lifetimes { udp: Seconds::new(20), ..Lifetimes::default() };
        memory.lifetimes.clone().insert(&ONLY, &set).unwrap();
        assert_eq!(walker(&memory).walk(|| true).unwrap().removed, 1);
    }

    #[test]
    fn a_long_table_is_walked_in_parts_and_a_walk_can_end_early() {
        let memory = MemoryTables::default();
        let mut table = memory.v4.conntrack.clone();
        for port in 0..5_000 {
            table.insert(&key(port, Proto::UDP), &silent_for(u32::from(port % 2) * 60, 0)).unwrap();
        }
        let mut parts = 0;
        let early = walker(&memory).walk(|| false).unwrap();
        assert!(early.looked_at <= PART);
        let walk = walker(&memory)
            .walk(|| {
                parts += 1;
                true
            })
            .unwrap();
        assert!(parts >= 1 && table.len().unwrap() < 5_000 - 1_000, "{walk:?}");
    }

    #[test]
    fn backends_of_clients_from_outside_stay_marked_by_any_of_their_entries() {
        use affinity_common::abi::conntrack::OUTSIDE;
        let backend = [10, 244, 1, 9];
        let ports = (Port::new(1), Port::new(8080));
        let reverse = ConntrackKey::<V4>::reverse([192, 0, 2, 1], ports.0, backend, ports.1, Proto::TCP);
        let answers = ConntrackKey::<V4>::snat_reply([172, 18, 0, 2], ports.0, backend, ports.1, Proto::TCP);
        for (key, entry) in [
            (key(1, Proto::TCP), Conntrack { addr: backend, ends: OUTSIDE, ..silent_for(1, REPLIED) }),
            (reverse, Conntrack { ends: OUTSIDE, ..silent_for(1, REPLIED) }),
            (answers, Conntrack { ends: OUTSIDE, ..silent_for(1, REPLIED) }),
        ] {
            let memory = MemoryTables::default();
            let (mut table, mut filter) = (memory.v4.conntrack.clone(), memory.snat_filter.clone());
            table.insert(&key, &entry).unwrap();
            let place = Place::of::<V4>(&backend);
            filter.insert(&place.word, &FilterWord { bits: place.bit }).unwrap();
            let is_marked = || place.is_in(memory.snat_filter.get(&place.word).unwrap().unwrap());
            let mut walker = walker(&memory);
            for _ in 0..3 {
                walker.walk(|| true).unwrap();
                assert!(is_marked(), "{key:?}");
            }
            table.remove(&key).unwrap();
            for _ in 0..2 {
                walker.walk(|| true).unwrap();
            }
            assert!(!is_marked(), "{key:?}");
        }
    }

    #[test]
    fn marks_of_connections_that_are_gone_are_cleared_after_two_walks() {
        let memory = MemoryTables::default();
        let (mut table, mut filter) = (memory.v4.conntrack.clone(), memory.direct_filter.clone());
        let direct = ConntrackKey::<V4>::forward([10, 0, 0, 1], Port::new(1), [10, 0, 0, 2], Port::new(2), Proto::TCP);
        let entry = Conntrack { addr: direct.peer, ..silent_for(1, REPLIED) };
        table.insert(&direct, &entry).unwrap();
        let (held, lost) = (Place::of::<V4>(&direct.peer), Place::of::<V4>(&[10, 0, 0, 3]));
        assert_ne!(held.word, lost.word);
        for place in [held, lost] {
            filter.insert(&place.word, &FilterWord { bits: place.bit }).unwrap();
        }
        let is_marked = |place: Place| place.is_in(memory.direct_filter.get(&place.word).unwrap().unwrap());
        let mut walker = walker(&memory);
        walker.walk(|| true).unwrap();
        assert!(is_marked(held) && is_marked(lost), "it may have been marked just now");
        walker.walk(|| true).unwrap();
        assert!(is_marked(held) && !is_marked(lost));
        table.remove(&direct).unwrap();
        walker.walk(|| true).unwrap();
        assert!(is_marked(held));
        walker.walk(|| true).unwrap();
        assert!(!is_marked(held));
    }
}
