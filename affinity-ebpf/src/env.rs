//! The maps, the clock and random numbers by the kernel's helpers.

use core::ptr::NonNull;

use affinity_common::{
    abi::{
        addresses::AddressKey,
        affinity::{Affinity, AffinityKey, Pair},
        announced::{Announced, AnnouncedKey},
        backends::{Backend, BackendKey},
        conntrack::{Conntrack, ConntrackKey},
        counters,
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
    reason::{Program, Reason},
    types::{BackendId, Nanos, Port, Proto, Seconds, Ticks},
};
use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST, BPF_RB_AVAIL_DATA},
    helpers::generated::{bpf_get_prandom_u32, bpf_ringbuf_query},
};

use crate::{
    clock,
    maps::{
        BACKEND_STATS, CONFIG, COUNTERS, DIRECT_FILTER, EVENTS, LIFETIMES, Maps, SERVICE_FILTER, SLOTS, SNAT_FILTER,
        UNKNOWN_NETNS, range_key,
    },
};

/// The kernel that runs us.
pub struct Kernel;

/// An entry of a map in its place. RCU keeps its memory mapped while the program runs, but not its contents: an LRU
/// element may be recycled meanwhile.
pub struct InPlace<T>(NonNull<T>);

const EEXIST: i32 = -17;

fn refused(error: i32) -> Refused {
    if error == EEXIST { Refused::Exists } else { Refused::Full }
}

impl<F: Maps> Env<F> for Kernel {
    type Conntrack = InPlace<Conntrack<F>>;
    type Affinity = InPlace<Affinity>;
    type Work<'a> = &'a mut Work<F>;

    #[inline(always)]
    fn now(&self) -> Nanos {
        clock::now()
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: takes nothing, returns a number.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn work(&self) -> Option<&mut Work<F>> {
        // SAFETY: the element is this CPU's own, no other program of ours runs on it at the same time, and each takes it
        // once.
        F::work().get_ptr_mut(0).map(|work| unsafe { &mut *work })
    }

    #[inline(always)]
    fn service_filter(&self, word: u32) -> FilterWord {
        SERVICE_FILTER.get(word).copied().unwrap_or_default()
    }

    #[inline(always)]
    fn direct_filter(&self, word: u32) -> FilterWord {
        DIRECT_FILTER.get(word).copied().unwrap_or_default()
    }

    #[inline(always)]
    fn mark_direct(&self, place: Place) {
        if let Some(word) = DIRECT_FILTER.get_ptr_mut(place.word) {
            set_bits(word.cast(), place.bit);
        }
    }

    #[inline(always)]
    fn snat_filter(&self, word: u32) -> FilterWord {
        SNAT_FILTER.get(word).copied().unwrap_or_default()
    }

    #[inline(always)]
    fn mark_snat(&self, place: Place) {
        if let Some(word) = SNAT_FILTER.get_ptr_mut(place.word) {
            set_bits(word.cast(), place.bit);
        }
    }

    #[inline(always)]
    fn uplink(&self, ifindex: u32) -> Option<Uplink<F>> {
        // SAFETY: user space replaces values of this map, it never changes them in place.
        unsafe { F::uplinks().get(ifindex) }.copied()
    }

    #[inline(always)]
    fn lets_in(&self, key: &RangeKey<F>) -> bool {
        F::ranges().get(&range_key(key)).is_some()
    }

    #[inline(always)]
    fn announced(&self, key: &AnnouncedKey<F>) -> Option<Announced> {
        // SAFETY: user space replaces values of this map, it never changes them in place.
        unsafe { F::announced().get(key) }.copied()
    }

    #[inline(always)]
    fn is_service_address(&self, key: &AddressKey<F>) -> bool {
        F::addresses().get_ptr(key).is_some()
    }

    #[inline(always)]
    fn frontend(&self, key: &FrontendKey<F>) -> Option<Frontend> {
        // SAFETY: user space replaces values of this map, it never changes them in place.
        unsafe { F::frontends().get(key) }.copied()
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<BackendId> {
        Some(SLOTS.get(index)?.backend)
    }

    #[inline(always)]
    fn backend(&self, key: &BackendKey) -> Option<Backend<F>> {
        // SAFETY: user space replaces values of this map, it never changes them in place.
        unsafe { F::backends().get(key) }.copied()
    }

    #[inline(always)]
    fn lifetime(&self, proto: Proto, seen: u8) -> Seconds {
        LIFETIMES.get(0).unwrap_or(&Lifetimes::DEFAULT).of(proto, seen)
    }

    #[inline(always)]
    fn conntrack(&self, key: &ConntrackKey<F>) -> Option<Self::Conntrack> {
        F::conntrack().get_ptr_mut(key).and_then(NonNull::new).map(InPlace)
    }

    #[inline(always)]
    fn conntrack_insert(&self, key: &ConntrackKey<F>, value: &Conntrack<F>) -> Result<(), Refused> {
        F::conntrack().insert(key, value, BPF_NOEXIST.into()).map_err(refused)
    }

    #[inline(always)]
    fn conntrack_replace(&self, key: &ConntrackKey<F>, value: &Conntrack<F>) -> Result<(), Refused> {
        F::conntrack().insert(key, value, BPF_ANY.into()).map_err(|_| Refused::Full)
    }

    #[inline(always)]
    fn conntrack_remove(&self, key: &ConntrackKey<F>) {
        // Not there: evicted meanwhile, which is as well.
        let _ = F::conntrack().remove(key);
    }

    #[inline(always)]
    fn fragments(&self, key: &FragmentsKey<F>) -> Option<Fragments> {
        // SAFETY: whatever another CPU writes meanwhile, the ports are those of some packet of this key.
        unsafe { F::fragments().get(key) }.copied()
    }

    #[inline(always)]
    fn note_fragments(&self, key: &FragmentsKey<F>, value: &Fragments) -> Result<(), Refused> {
        F::fragments().insert(key, value, BPF_ANY.into()).map_err(|_| Refused::Full)
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey<F>) -> Option<Self::Affinity> {
        F::affinity().get_ptr_mut(key).and_then(NonNull::new).map(InPlace)
    }

    #[inline(always)]
    fn affinity_insert(&self, key: &AffinityKey<F>, value: &Affinity) -> Result<(), Refused> {
        F::affinity().insert(key, value, BPF_NOEXIST.into()).map_err(refused)
    }

    #[inline(always)]
    fn count_connection(&self, key: &BackendKey) {
        if let Some(stats) = BACKEND_STATS.get_ptr_mut(key) {
            // SAFETY: the element is live.
            add(unsafe { &raw mut (*stats).connections }, 1);
        }
    }

    #[inline(always)]
    fn wants_events(&self, now: Nanos) -> bool {
        CONFIG.get(0).is_some_and(|config| now.0 < config.monitor_until)
    }

    #[inline(always)]
    fn emit(&self, event: Event) {
        // A full ring means a reader that is too slow: it sees the gap by the counters.
        if let Some(mut place) = EVENTS.reserve_untyped::<Event>(0) {
            place.write(event);
            place.submit(0);
        }
    }

    #[inline(always)]
    fn in_memory<T>(&self, value: &T) {
        // SAFETY: does nothing; but for all that the compiler knows, it keeps the address. An instruction there must be:
        // the verifier takes no two lines of source for one.
        unsafe { core::arch::asm!("{0} = {0}", inout(reg) value => _, options(nostack)) };
    }
}

impl<F: Maps> SocketEnv<F> for Kernel {
    type Socket = InPlace<Socket<F>>;

    #[inline(always)]
    fn netns(&self, key: &NetnsKey) -> Option<NetnsClient<F>> {
        // SAFETY: values are replaced as a whole, none is changed in place.
        unsafe { F::netns().get(key) }.copied()
    }

    #[inline(always)]
    fn tell_unknown(&self, key: &NetnsKey) {
        // SAFETY: takes the map, returns a number.
        let unread =
            unsafe { bpf_ringbuf_query((&raw const UNKNOWN_NETNS).cast_mut().cast(), BPF_RB_AVAIL_DATA.into()) };
        if unread == 0 {
            // Another CPU may have been quicker, and a second one is read with the first.
            let _ = UNKNOWN_NETNS.output_untyped::<NetnsKey>(key, 0);
        }
    }

    #[inline(always)]
    fn socket(&self, key: &SocketKey<F>) -> Option<Self::Socket> {
        F::sockets().get_ptr_mut(key).and_then(NonNull::new).map(InPlace)
    }

    #[inline(always)]
    fn socket_put(&self, key: &SocketKey<F>, value: &Socket<F>) -> Result<(), Refused> {
        F::sockets().insert(key, value, BPF_ANY.into()).map_err(|_| Refused::Full)
    }

    #[inline(always)]
    fn socket_remove(&self, key: &SocketKey<F>) {
        // Not there: evicted meanwhile, which is as well.
        let _ = F::sockets().remove(key);
    }
}

impl<F: Maps> SocketEntry<F> for InPlace<Socket<F>> {
    #[inline(always)]
    fn load(&self) -> Socket<F> {
        // SAFETY: the element is live and plain memory, written by the socket's own calls; one that is recycled meanwhile is
        // another socket's, whose address would be shown once.
        unsafe { self.0.read() }
    }

    #[inline(always)]
    fn set_due(&self, at: Ticks) {
        // SAFETY: the element is live. Of one that is recycled meanwhile, another socket's choice stands for that much longer.
        put(unsafe { &raw mut (*self.0.as_ptr()).due }, at);
    }
}

impl AffinityEntry for InPlace<Affinity> {
    #[inline(always)]
    fn load(&self) -> Pair {
        // SAFETY: the element is live and begins with an aligned word, which one volatile load reads as a whole.
        Pair::from_word(unsafe { self.0.cast().read_volatile() })
    }

    #[inline(always)]
    fn compare_exchange(&self, old: Pair, new: Pair) -> Result<(), Pair> {
        let found = compare_exchange(self.0.as_ptr().cast(), old.to_word(), new.to_word());
        if found == old.to_word() { Ok(()) } else { Err(Pair::from_word(found)) }
    }

    #[inline(always)]
    fn set_since(&self, since: Ticks) {
        // SAFETY: the element is live.
        put(unsafe { &raw mut (*self.0.as_ptr()).since }, since);
    }
}

// The BPF target has no atomics in `core::sync::atomic`, though the instruction set has (v3, kernel 5.12).

/// Adds to an aligned word of a live map element.
#[inline(always)]
fn add(word: *mut u64, by: u64) {
    // SAFETY: the word is aligned and in a live map element; the instruction touches nothing else.
    unsafe { core::arch::asm!("lock *(u64 *)({word} + 0) += {by}", word = in(reg) word, by = in(reg) by) };
}

/// Sets bits of an aligned word of a live map element.
#[inline(always)]
fn set_bits(word: *mut u64, bits: u64) {
    // SAFETY: the word is aligned and in a live map element; the instruction touches nothing else.
    unsafe { core::arch::asm!("lock *(u64 *)({word} + 0) |= {bits}", word = in(reg) word, bits = in(reg) bits) };
}

/// Compares and exchanges an aligned word of a live map element; returns what it held.
#[inline(always)]
fn compare_exchange(word: *mut u64, old: u64, new: u64) -> u64 {
    let found;
    // SAFETY: the word is aligned and in a live map element; the instruction touches nothing else.
    unsafe {
        core::arch::asm!(
            "r0 = cmpxchg_64({word} + 0, r0, {new})",
            word = in(reg) word,
            new = in(reg) new,
            inlateout("r0") old => found,
            options(nostack),
        );
    }
    found
}

impl<F: Maps> ConntrackEntry<F> for InPlace<Conntrack<F>> {
    #[inline(always)]
    fn load(&self) -> Conntrack<F> {
        // SAFETY: the element is live and plain memory; a field that another CPU writes meanwhile is an aligned word or
        // a byte, so it is seen old or new.
        unsafe { self.0.read() }
    }

    #[inline(always)]
    fn count_packet(&self) {
        // SAFETY: the element is live.
        let packets = unsafe { &raw mut (*self.0.as_ptr()).packets };
        // SAFETY: as above. No locked addition: a packet that two CPUs count as one is cheaper than a bus lock on each.
        put(packets, unsafe { packets.read() }.wrapping_add(1));
    }

    #[inline(always)]
    fn set_last_seen(&self, at: Ticks) {
        // SAFETY: the element is live.
        put(unsafe { &raw mut (*self.0.as_ptr()).last_seen }, at);
    }

    #[inline(always)]
    fn set_due(&self, at: Ticks) {
        // SAFETY: the element is live.
        put(unsafe { &raw mut (*self.0.as_ptr()).due }, at);
    }

    #[inline(always)]
    fn set_seen(&self, seen: u8) {
        // SAFETY: the element is live.
        put(unsafe { &raw mut (*self.0.as_ptr()).seen }, seen);
    }

    #[inline(always)]
    fn set_snat_port(&self, port: Port) {
        // SAFETY: the element is live.
        put(unsafe { &raw mut (*self.0.as_ptr()).snat_port }.cast(), u16::from_ne_bytes(port.be));
    }
}

/// Writes a field of a live map element that other CPUs may read and write at the same time: an aligned store of a word
/// or a byte is one instruction, and volatile keeps it one.
#[inline(always)]
fn put<T: Copy>(field: *mut T, value: T) {
    // SAFETY: the field is aligned and in a live map element.
    unsafe { field.write_volatile(value) };
}

/// Counts a packet, on this CPU.
#[inline(always)]
pub fn count(program: Program, reason: Reason, bytes: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(counters::index(program, reason)) {
        // SAFETY: the element is this CPU's own. Where the kernel lets another task's program of a socket in between, one of
        // the two is not counted.
        let counter = unsafe { &mut *counter };
        counter.packets += 1;
        counter.bytes += u64::from(bytes);
    }
}
