//! Maps in plain collections, a clock that is set, and faults on demand.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet, VecDeque},
    rc::Rc,
};

use crate::{
    abi::{
        addresses::AddressKey,
        affinity::{Affinity, AffinityKey, Pair},
        announced::{Announced, AnnouncedKey},
        backends::{Backend, BackendKey},
        conntrack::{Conntrack, ConntrackKey},
        events::Event,
        filter::{FilterWord, Place},
        fragments::{Fragments, FragmentsKey},
        frontends::{Frontend, FrontendKey},
        lifetimes::Lifetimes,
        netns::{NetnsClient, NetnsKey},
        sockets::{Socket, SocketKey},
        source_ranges::RangeKey,
        uplinks::Uplink,
        work::Work,
    },
    dp::{
        AffinityEntry, ConntrackEntry, Env, Refused,
        sock::{SocketEntry, SocketEnv},
    },
    family::Family,
    types::{BackendId, Nanos, Port, Proto, Seconds, Ticks},
};

/// What another CPU does just before the next write to an affinity entry.
pub type Hook<F> = Box<dyn FnOnce(&FakeEnv<F>)>;

/// Which maps refuse new entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each map for itself")]
pub struct Faults {
    /// The conntrack map.
    pub conntrack_full: bool,
    /// The affinity map.
    pub affinity_full: bool,
    /// The map of datagrams in fragments.
    pub fragments_full: bool,
    /// The map of sockets.
    pub sockets_full: bool,
}

/// An LRU map: its elements stay alive while they are held, as under RCU.
struct Lru<K, V> {
    entries: BTreeMap<K, (Rc<Cell<V>>, u64)>,
    capacity: usize,
    clock: u64,
}

impl<K: Ord + Copy, V: Copy> Lru<K, V> {
    fn new(capacity: usize) -> Self {
        Self { entries: BTreeMap::new(), capacity, clock: 0 }
    }

    fn get(&mut self, key: &K) -> Option<Rc<Cell<V>>> {
        self.clock += 1;
        let (entry, used) = self.entries.get_mut(key)?;
        *used = self.clock;
        Some(entry.clone())
    }

    fn put(&mut self, key: &K, value: &V) {
        self.clock += 1;
        if !self.entries.contains_key(key) && self.entries.len() == self.capacity {
            let oldest = self.entries.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| *key);
            oldest.and_then(|key| self.entries.remove(&key));
        }
        self.entries.insert(*key, (Rc::new(Cell::new(*value)), self.clock));
    }
}

struct Maps<F: Family> {
    frontends: BTreeMap<FrontendKey<F>, Frontend>,
    slots: BTreeMap<u32, BackendId>,
    backends: BTreeMap<BackendKey, Backend<F>>,
    conntrack: Lru<ConntrackKey<F>, Conntrack<F>>,
    affinity: Lru<AffinityKey<F>, Affinity>,
    fragments: Lru<FragmentsKey<F>, Fragments>,
    netns: BTreeMap<NetnsKey, NetnsClient<F>>,
    sockets: Lru<SocketKey<F>, Socket<F>>,
    direct: BTreeMap<u32, u64>,
    snat: BTreeMap<u32, u64>,
    uplinks: BTreeMap<u32, Uplink<F>>,
    ranges: BTreeSet<RangeKey<F>>,
    announced: BTreeMap<AnnouncedKey<F>, Announced>,
    connections: BTreeMap<BackendKey, u64>,
}

struct State<F: Family> {
    maps: RefCell<Maps<F>>,
    now: Cell<Nanos>,
    random: Cell<u64>,
    faults: Cell<Faults>,
    lifetimes: Cell<Lifetimes>,
    writes: Cell<u64>,
    wants_events: Cell<bool>,
    events: RefCell<Vec<Event>>,
    unknown: Cell<Option<NetnsKey>>,
    hooks: RefCell<VecDeque<Hook<F>>>,
}

/// An environment in plain collections. Clones are the same one.
pub struct FakeEnv<F: Family>(Rc<State<F>>);

impl<F: Family> Clone for FakeEnv<F> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<F: Family> FakeEnv<F> {
    /// Empty maps, the LRU ones of the given size, and a clock that says an hour.
    pub fn new(lru_size: usize) -> Self {
        let maps = Maps {
            frontends: BTreeMap::new(),
            slots: BTreeMap::new(),
            backends: BTreeMap::new(),
            conntrack: Lru::new(lru_size),
            affinity: Lru::new(lru_size),
            fragments: Lru::new(lru_size),
            netns: BTreeMap::new(),
            sockets: Lru::new(lru_size),
            direct: BTreeMap::new(),
            snat: BTreeMap::new(),
            uplinks: BTreeMap::new(),
            ranges: BTreeSet::new(),
            announced: BTreeMap::new(),
            connections: BTreeMap::new(),
        };
        Self(Rc::new(State {
            maps: RefCell::new(maps),
            now: Cell::new(Nanos(3_600 * Nanos::SECOND.0)),
            random: Cell::new(0x2545_f491_4f6c_dd1d),
            faults: Cell::default(),
            lifetimes: Cell::default(),
            writes: Cell::default(),
            wants_events: Cell::default(),
            events: RefCell::default(),
            unknown: Cell::default(),
            hooks: RefCell::default(),
        }))
    }

    /// Sets how long connections may be silent.
    pub fn set_lifetimes(&self, lifetimes: Lifetimes) {
        self.0.lifetimes.set(lifetimes);
    }

    /// Lets time pass.
    pub fn sleep(&self, span: Nanos) {
        self.0.now.set(Nanos(self.0.now.get().0 + span.0));
    }

    /// Sets the clock.
    pub fn set_now(&self, now: Nanos) {
        self.0.now.set(now);
    }

    /// The clock.
    pub fn clock(&self) -> Nanos {
        self.0.now.get()
    }

    /// Sets which maps refuse.
    pub fn set_faults(&self, faults: Faults) {
        self.0.faults.set(faults);
    }

    /// What another CPU does before the next write to an affinity entry; one hook for each write.
    pub fn before_affinity_write(&self, hook: Hook<F>) {
        self.0.hooks.borrow_mut().push_back(hook);
    }

    /// How often a map was written by an update or removal (not in place) since the start.
    pub fn writes(&self) -> u64 {
        self.0.writes.get()
    }

    /// Asks for events, or not.
    pub fn want_events(&self, wanted: bool) {
        self.0.wants_events.set(wanted);
    }

    /// The events since the last call.
    pub fn take_events(&self) -> Vec<Event> {
        self.0.events.take()
    }

    /// Writes a frontend.
    pub fn set_frontend(&self, key: FrontendKey<F>, value: Frontend) {
        self.0.maps.borrow_mut().frontends.insert(key, value);
    }

    /// Makes an interface an uplink.
    pub fn set_uplink(&self, ifindex: u32, value: Uplink<F>) {
        self.0.maps.borrow_mut().uplinks.insert(ifindex, value);
    }

    /// Has a service let in a range of clients.
    pub fn let_in(&self, key: RangeKey<F>) {
        self.0.maps.borrow_mut().ranges.insert(key);
    }

    /// Has the node answer for an address, for a time.
    pub fn announce(&self, key: AnnouncedKey<F>, value: Announced) {
        self.0.maps.borrow_mut().announced.insert(key, value);
    }

    /// Removes a frontend.
    pub fn remove_frontend(&self, key: &FrontendKey<F>) {
        self.0.maps.borrow_mut().frontends.remove(key);
    }

    /// Writes slots from an index on.
    pub fn set_slots(&self, first: u32, backends: &[BackendId]) {
        self.0.maps.borrow_mut().slots.extend((first..).zip(backends.iter().copied()));
    }

    /// Writes a backend.
    pub fn set_backend(&self, key: BackendKey, value: Backend<F>) {
        self.0.maps.borrow_mut().backends.insert(key, value);
    }

    /// Removes a backend.
    pub fn remove_backend(&self, key: &BackendKey) {
        self.0.maps.borrow_mut().backends.remove(key);
    }

    /// Reads an affinity entry; no use of it in the LRU's eyes.
    pub fn peek_affinity(&self, key: &AffinityKey<F>) -> Option<Affinity> {
        self.0.maps.borrow().affinity.entries.get(key).map(|(entry, _)| entry.get())
    }

    /// Writes an affinity entry, as another CPU does.
    pub fn set_affinity(&self, key: &AffinityKey<F>, value: Affinity) {
        self.0.maps.borrow_mut().affinity.put(key, &value);
    }

    /// Changes an affinity entry in place, as another CPU does.
    pub fn change_affinity(&self, key: &AffinityKey<F>, value: Affinity) {
        if let Some((entry, _)) = self.0.maps.borrow().affinity.entries.get(key) {
            entry.set(value);
        }
    }

    /// Evicts an affinity entry.
    pub fn evict_affinity(&self, key: &AffinityKey<F>) {
        self.0.maps.borrow_mut().affinity.entries.remove(key);
    }

    /// Every affinity entry.
    pub fn affinity_entries(&self) -> Vec<(AffinityKey<F>, Affinity)> {
        self.0.maps.borrow().affinity.entries.iter().map(|(key, (entry, _))| (*key, entry.get())).collect()
    }

    /// Reads a conntrack entry; no use of it in the LRU's eyes.
    pub fn peek_conntrack(&self, key: &ConntrackKey<F>) -> Option<Conntrack<F>> {
        self.0.maps.borrow().conntrack.entries.get(key).map(|(entry, _)| entry.get())
    }

    /// Evicts a conntrack entry.
    pub fn evict_conntrack(&self, key: &ConntrackKey<F>) {
        self.0.maps.borrow_mut().conntrack.entries.remove(key);
    }

    /// Every conntrack entry.
    pub fn conntrack_entries(&self) -> Vec<(ConntrackKey<F>, Conntrack<F>)> {
        self.0.maps.borrow().conntrack.entries.iter().map(|(key, (entry, _))| (*key, entry.get())).collect()
    }

    /// Evicts what is noted of a datagram.
    pub fn evict_fragments(&self, key: &FragmentsKey<F>) {
        self.0.maps.borrow_mut().fragments.entries.remove(key);
    }

    /// What is noted of datagrams in fragments.
    pub fn fragments_entries(&self) -> Vec<(FragmentsKey<F>, Fragments)> {
        self.0.maps.borrow().fragments.entries.iter().map(|(key, (entry, _))| (*key, entry.get())).collect()
    }

    /// Writes who the sockets of a namespace are.
    pub fn set_netns(&self, key: NetnsKey, value: NetnsClient<F>) {
        self.0.maps.borrow_mut().netns.insert(key, value);
    }

    /// Forgets a namespace.
    pub fn remove_netns(&self, key: &NetnsKey) {
        self.0.maps.borrow_mut().netns.remove(key);
    }

    /// Evicts the entry of a socket.
    pub fn evict_socket(&self, key: &SocketKey<F>) {
        self.0.maps.borrow_mut().sockets.entries.remove(key);
    }

    /// The namespace that was told of as unknown, if one was since the last call.
    pub fn take_unknown(&self) -> Option<NetnsKey> {
        self.0.unknown.take()
    }

    /// Every entry of a socket.
    pub fn socket_entries(&self) -> Vec<(SocketKey<F>, Socket<F>)> {
        self.0.maps.borrow().sockets.entries.iter().map(|(key, (entry, _))| (*key, entry.get())).collect()
    }

    /// Evicts every entry of a socket.
    pub fn evict_sockets(&self) {
        self.0.maps.borrow_mut().sockets.entries.clear();
    }

    /// How many connections a backend was given.
    pub fn connections(&self, key: &BackendKey) -> u64 {
        self.0.maps.borrow().connections.get(key).copied().unwrap_or_default()
    }

    fn run_hook(&self) {
        let hook = self.0.hooks.borrow_mut().pop_front();
        if let Some(hook) = hook {
            hook(self);
        }
    }

    fn count_write(&self) {
        self.0.writes.set(self.0.writes.get() + 1);
    }
}

/// An affinity entry in its place.
pub struct AffinityHandle<F: Family> {
    entry: Rc<Cell<Affinity>>,
    env: FakeEnv<F>,
}

impl<F: Family> AffinityEntry for AffinityHandle<F> {
    fn load(&self) -> Pair {
        self.entry.get().pair()
    }

    fn compare_exchange(&self, old: Pair, new: Pair) -> Result<(), Pair> {
        self.env.run_hook();
        let held = self.entry.get();
        if held.pair() != old {
            return Err(held.pair());
        }
        self.entry.set(Affinity { backend: new.backend, last_used: new.last_used, ..held });
        Ok(())
    }

    fn set_since(&self, since: Ticks) {
        self.entry.set(Affinity { since, ..self.entry.get() });
    }
}

/// A conntrack entry in its place.
pub struct ConntrackHandle<F: Family>(Rc<Cell<Conntrack<F>>>);

impl<F: Family> ConntrackHandle<F> {
    fn change(&self, change: impl FnOnce(&mut Conntrack<F>)) {
        let mut value = self.0.get();
        change(&mut value);
        self.0.set(value);
    }
}

impl<F: Family> ConntrackEntry<F> for ConntrackHandle<F> {
    fn load(&self) -> Conntrack<F> {
        self.0.get()
    }

    fn count_packet(&self) {
        self.change(|value| value.packets = value.packets.wrapping_add(1));
    }

    fn set_last_seen(&self, at: Ticks) {
        self.change(|value| value.last_seen = at);
    }

    fn set_due(&self, at: Ticks) {
        self.change(|value| value.due = at);
    }

    fn set_seen(&self, seen: u8) {
        self.change(|value| value.seen = seen);
    }

    fn set_snat_port(&self, port: Port) {
        self.change(|value| value.snat_port = port);
    }
}

/// A socket's entry in its place.
pub struct SocketHandle<F: Family>(Rc<Cell<Socket<F>>>);

impl<F: Family> SocketEntry<F> for SocketHandle<F> {
    fn load(&self) -> Socket<F> {
        self.0.get()
    }

    fn set_due(&self, at: Ticks) {
        self.0.set(Socket { due: at, ..self.0.get() });
    }
}

impl<F: Family> Env<F> for FakeEnv<F> {
    type Conntrack = ConntrackHandle<F>;
    type Affinity = AffinityHandle<F>;
    type Work<'a> = Box<Work<F>>;

    fn now(&self) -> Nanos {
        self.0.now.get()
    }

    fn random(&self) -> u32 {
        // xorshift64* (Vigna 2014).
        let mut x = self.0.random.get();
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.0.random.set(x);
        (x.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    }

    /// The bits of all addresses that have frontends.
    fn work(&self) -> Option<Self::Work<'_>> {
        let mut work = Box::<Work<F>>::default();
        bytemuck::bytes_of_mut(&mut *work).fill(0xaa);
        Some(work)
    }

    fn service_filter(&self, word: u32) -> FilterWord {
        let maps = self.0.maps.borrow();
        let places = maps.frontends.keys().map(|key| Place::of::<F>(&key.addr)).filter(|place| place.word == word);
        FilterWord { bits: places.fold(0, |bits, place| bits | place.bit) }
    }

    fn direct_filter(&self, word: u32) -> FilterWord {
        FilterWord { bits: self.0.maps.borrow().direct.get(&word).copied().unwrap_or_default() }
    }

    fn mark_direct(&self, place: Place) {
        *self.0.maps.borrow_mut().direct.entry(place.word).or_default() |= place.bit;
    }

    fn snat_filter(&self, word: u32) -> FilterWord {
        FilterWord { bits: self.0.maps.borrow().snat.get(&word).copied().unwrap_or_default() }
    }

    fn mark_snat(&self, place: Place) {
        *self.0.maps.borrow_mut().snat.entry(place.word).or_default() |= place.bit;
    }

    fn uplink(&self, ifindex: u32) -> Option<Uplink<F>> {
        self.0.maps.borrow().uplinks.get(&ifindex).copied()
    }

    fn lets_in(&self, client: &RangeKey<F>) -> bool {
        self.0.maps.borrow().ranges.iter().any(|range| {
            let bits = range.prefix_len - RangeKey::<F>::SERVICE_BITS;
            let in_prefix = (0..bits as usize).all(|bit| {
                let of = |addr: &F::Addr| addr.as_ref()[bit / 8] >> (7 - bit % 8) & 1;
                of(&range.addr) == of(&client.addr)
            });
            range.service == client.service && in_prefix
        })
    }

    fn announced(&self, key: &AnnouncedKey<F>) -> Option<Announced> {
        self.0.maps.borrow().announced.get(key).copied()
    }

    fn is_service_address(&self, key: &AddressKey<F>) -> bool {
        let maps = self.0.maps.borrow();
        // By the node's own addresses services have single ports only.
        maps.frontends.keys().any(|frontend| frontend.addr == key.addr)
            && maps.uplinks.values().all(|uplink| uplink.addr != key.addr)
    }

    fn frontend(&self, key: &FrontendKey<F>) -> Option<Frontend> {
        self.0.maps.borrow().frontends.get(key).copied()
    }

    fn slot(&self, index: u32) -> Option<BackendId> {
        self.0.maps.borrow().slots.get(&index).copied()
    }

    fn backend(&self, key: &BackendKey) -> Option<Backend<F>> {
        self.0.maps.borrow().backends.get(key).copied()
    }

    fn lifetime(&self, proto: Proto, seen: u8) -> Seconds {
        self.0.lifetimes.get().of(proto, seen)
    }

    fn conntrack(&self, key: &ConntrackKey<F>) -> Option<ConntrackHandle<F>> {
        self.0.maps.borrow_mut().conntrack.get(key).map(ConntrackHandle)
    }

    fn conntrack_insert(&self, key: &ConntrackKey<F>, value: &Conntrack<F>) -> Result<(), Refused> {
        self.count_write();
        if self.0.maps.borrow().conntrack.entries.contains_key(key) {
            return Err(Refused::Exists);
        }
        self.conntrack_put(key, value)
    }

    fn conntrack_replace(&self, key: &ConntrackKey<F>, value: &Conntrack<F>) -> Result<(), Refused> {
        self.count_write();
        self.conntrack_put(key, value)
    }

    fn conntrack_remove(&self, key: &ConntrackKey<F>) {
        self.count_write();
        self.evict_conntrack(key);
    }

    fn fragments(&self, key: &FragmentsKey<F>) -> Option<Fragments> {
        self.0.maps.borrow_mut().fragments.get(key).map(|entry| entry.get())
    }

    fn note_fragments(&self, key: &FragmentsKey<F>, value: &Fragments) -> Result<(), Refused> {
        self.count_write();
        if self.0.faults.get().fragments_full {
            return Err(Refused::Full);
        }
        self.0.maps.borrow_mut().fragments.put(key, value);
        Ok(())
    }

    fn affinity(&self, key: &AffinityKey<F>) -> Option<AffinityHandle<F>> {
        let entry = self.0.maps.borrow_mut().affinity.get(key)?;
        Some(AffinityHandle { entry, env: self.clone() })
    }

    fn affinity_insert(&self, key: &AffinityKey<F>, value: &Affinity) -> Result<(), Refused> {
        self.run_hook();
        self.count_write();
        if self.0.faults.get().affinity_full {
            return Err(Refused::Full);
        }
        if self.0.maps.borrow().affinity.entries.contains_key(key) {
            return Err(Refused::Exists);
        }
        self.0.maps.borrow_mut().affinity.put(key, value);
        Ok(())
    }

    fn count_connection(&self, key: &BackendKey) {
        *self.0.maps.borrow_mut().connections.entry(*key).or_default() += 1;
    }

    fn wants_events(&self, _now: Nanos) -> bool {
        self.0.wants_events.get()
    }

    fn emit(&self, event: Event) {
        self.0.events.borrow_mut().push(event);
    }

    fn in_memory<T>(&self, _value: &T) {}
}

impl<F: Family> SocketEnv<F> for FakeEnv<F> {
    type Socket = SocketHandle<F>;

    fn netns(&self, key: &NetnsKey) -> Option<NetnsClient<F>> {
        self.0.maps.borrow().netns.get(key).copied()
    }

    fn tell_unknown(&self, key: &NetnsKey) {
        if self.0.unknown.get().is_none() {
            self.0.unknown.set(Some(*key));
        }
    }

    fn socket(&self, key: &SocketKey<F>) -> Option<SocketHandle<F>> {
        self.0.maps.borrow_mut().sockets.get(key).map(SocketHandle)
    }

    fn socket_put(&self, key: &SocketKey<F>, value: &Socket<F>) -> Result<(), Refused> {
        self.count_write();
        if self.0.faults.get().sockets_full {
            return Err(Refused::Full);
        }
        self.0.maps.borrow_mut().sockets.put(key, value);
        Ok(())
    }

    fn socket_remove(&self, key: &SocketKey<F>) {
        self.count_write();
        self.evict_socket(key);
    }
}

impl<F: Family> FakeEnv<F> {
    fn conntrack_put(&self, key: &ConntrackKey<F>, value: &Conntrack<F>) -> Result<(), Refused> {
        if self.0.faults.get().conntrack_full {
            return Err(Refused::Full);
        }
        self.0.maps.borrow_mut().conntrack.put(key, value);
        Ok(())
    }
}
