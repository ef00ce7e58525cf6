//! What the logic needs of the world.

use core::ops::DerefMut;

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
        source_ranges::RangeKey,
        uplinks::Uplink,
        work::Work,
    },
    family::Family,
    types::{BackendId, Nanos, Port, Proto, Seconds, Ticks},
};

/// Why a map took no new entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The key is there already.
    Exists,
    /// The map has no room, or no memory.
    Full,
}

/// The kernel refused to write to the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RewriteError;

/// The maps of a family, the clock and random numbers.
pub trait Env<F: Family> {
    /// A conntrack entry in its place in the map. It may be evicted, and its memory reused, while it is held.
    type Conntrack: ConntrackEntry<F>;
    /// An affinity entry in its place in the map. It may be evicted, and its memory reused, while it is held.
    type Affinity: AffinityEntry;
    /// Memory of the CPU's own.
    type Work<'a>: DerefMut<Target = Work<F>>
    where
        Self: 'a;

    /// The coarse monotonic clock.
    fn now(&self) -> Nanos;
    /// A uniformly distributed number.
    fn random(&self) -> u32;
    /// Memory for what a program has in hand, which takes it once. What it holds at first means nothing.
    fn work(&self) -> Option<Self::Work<'_>>;

    /// A word of the filter of services' addresses.
    fn service_filter(&self, word: u32) -> FilterWord;
    /// A word of the filter of addresses that are talked to directly beside a translated connection.
    fn direct_filter(&self, word: u32) -> FilterWord;
    /// Sets a bit of that filter.
    fn mark_direct(&self, place: Place);
    /// A word of the filter of backends that clients from outside were led to.
    fn snat_filter(&self, word: u32) -> FilterWord;
    /// Sets a bit of that filter.
    fn mark_snat(&self, place: Place);
    /// The uplink of this index; `None` where the interface is none.
    fn uplink(&self, ifindex: u32) -> Option<Uplink<F>>;
    /// Whether a service lets a client in, by the key of a client.
    fn lets_in(&self, key: &RangeKey<F>) -> bool;
    /// For how long the node answers for an address, if it does.
    fn announced(&self, key: &AnnouncedKey<F>) -> Option<Announced>;
    /// Whether a service has the address.
    fn is_service_address(&self, key: &AddressKey<F>) -> bool;
    /// The service port behind an address and port.
    fn frontend(&self, key: &FrontendKey<F>) -> Option<Frontend>;
    /// The backend of a slot.
    fn slot(&self, index: u32) -> Option<BackendId>;
    /// A backend of a service port.
    fn backend(&self, key: &BackendKey) -> Option<Backend<F>>;

    /// How long a connection of which `seen` was seen may be silent.
    fn lifetime(&self, proto: Proto, seen: u8) -> Seconds;
    /// A connection's entry.
    fn conntrack(&self, key: &ConntrackKey<F>) -> Option<Self::Conntrack>;
    /// Adds an entry that is not there yet.
    fn conntrack_insert(&self, key: &ConntrackKey<F>, value: &Conntrack<F>) -> Result<(), Refused>;
    /// Adds or replaces an entry; never [`Refused::Exists`].
    fn conntrack_replace(&self, key: &ConntrackKey<F>, value: &Conntrack<F>) -> Result<(), Refused>;
    /// Removes an entry, if it is there.
    fn conntrack_remove(&self, key: &ConntrackKey<F>);

    /// The ports of a datagram that comes in fragments.
    fn fragments(&self, key: &FragmentsKey<F>) -> Option<Fragments>;
    /// Notes them.
    fn note_fragments(&self, key: &FragmentsKey<F>, value: &Fragments) -> Result<(), Refused>;

    /// A client's entry.
    fn affinity(&self, key: &AffinityKey<F>) -> Option<Self::Affinity>;
    /// Adds an entry that is not there yet.
    fn affinity_insert(&self, key: &AffinityKey<F>, value: &Affinity) -> Result<(), Refused>;

    /// Counts a new connection to a backend.
    fn count_connection(&self, key: &BackendKey);
    /// Whether a reader wants events at `now`.
    fn wants_events(&self, now: Nanos) -> bool;
    /// Hands an event to the reader.
    fn emit(&self, event: Event);

    /// Has a value that is used all along lie in memory, packed. A stack of 512 bytes has no room for each field of it in
    /// eight bytes of its own, which is where a compiler that is short of registers puts what it has read.
    fn in_memory<T>(&self, value: &T);
}

/// An affinity entry in place.
pub trait AffinityEntry {
    /// The backend and its last use, as one.
    fn load(&self) -> Pair;
    /// Writes `new` if the entry still holds `old`; else says what it holds.
    fn compare_exchange(&self, old: Pair, new: Pair) -> Result<(), Pair>;
    /// Notes when the client was given its backend.
    fn set_since(&self, since: Ticks);
}

/// A conntrack entry in place. Writers on several CPUs may overtake each other; no field depends on another.
pub trait ConntrackEntry<F: Family> {
    /// What it holds.
    fn load(&self) -> Conntrack<F>;
    /// Counts a packet.
    fn count_packet(&self);
    /// Sets [`Conntrack::last_seen`].
    fn set_last_seen(&self, at: Ticks);
    /// Sets [`Conntrack::due`].
    fn set_due(&self, at: Ticks);
    /// Sets [`Conntrack::seen`].
    fn set_seen(&self, seen: u8);
    /// Sets [`Conntrack::snat_port`].
    fn set_snat_port(&self, port: Port);
}

/// How a transport checksum covers what changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum {
    /// Where the checksum is, in bytes from the start of the frame.
    pub at: usize,
    /// A value of 0 means that there is none, and stays so (UDP over IPv4: RFC 768).
    pub zero_is_none: bool,
}

/// The bytes of one packet, from its link-layer header on, and the ways to change them that keep every checksum right,
/// offloaded ones too (`CHECKSUM_PARTIAL`, `CHECKSUM_COMPLETE`).
pub trait Packet {
    /// The length of the frame in bytes, link-layer header included.
    fn frame_len(&self) -> usize;
    /// The index of the interface that it has come by or, at egress, that it leaves by.
    fn ifindex(&self) -> u32;
    /// `N` bytes at an offset; `None` where the packet ends before.
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;
    /// A number, as one that the verifier knows nothing of: it has no way of its own to follow for each value. The verifier
    /// of Linux 6.1 takes what it knows of a value on the first way to a branch for true on the others, and leaves out what
    /// only they would do (seen with IPv6 extension headers: the ports were written over the first of them).
    fn unknown(&self, number: usize) -> usize;
    /// Writes bytes in place.
    fn write<const N: usize>(&mut self, offset: usize, bytes: &[u8; N]) -> Result<(), RewriteError>;
    /// Makes the transport checksum follow an address of the pseudo-header that changes.
    fn update_checksum_by_address(&mut self, sum: Checksum, from: &[u8], to: &[u8]) -> Result<(), RewriteError>;
    /// Makes the transport checksum follow a port that changes.
    fn update_checksum_by_port(&mut self, sum: Checksum, from: [u8; 2], to: [u8; 2]) -> Result<(), RewriteError>;
    /// Leaves a word with the packet for the program that it is handed over to.
    fn leave_note(&mut self, note: u32);
    /// The word that was left with the packet.
    fn note(&self) -> u32;
    /// Makes the frame shorter or longer, by zeroes; a segment of several packets becomes one.
    fn resize(&mut self, len: usize) -> Result<(), RewriteError>;
    /// The sum of big-endian words, what is over 16 bits added to them (RFC 1071), of as many bytes as four divides.
    fn sum(&self, bytes: &[u8]) -> u16;
    /// Completes the transport checksum at `at`, which holds the sum of the pseudo-header: hardware that is to compute it
    /// starts from there; otherwise it becomes what the sum of `whole`, pseudo-header included, makes it.
    fn finish_checksum(&mut self, at: usize, pseudo: u16, whole: u16) -> Result<(), RewriteError>;
}
