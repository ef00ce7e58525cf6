//! `affinity_v4`, `affinity_v6`: which backend a client is kept on. Written by the datapath.

use super::{Kind, MapSpec};
use crate::pod::pod;
use crate::{
    family::Family,
    types::{BackendId, Nanos, Seconds, ServiceId, Ticks},
};

pod! {
    /// A client of a service port, or of all of a service's.
    #[derive(Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct AffinityKey<F>: 12, 24 {
        /// The client's address, as the backend's cluster sees it.
        pub client: F::Addr,
        /// The service port: [`super::frontends::Frontend::affinity`].
        pub service: ServiceId,
        /// The set of backends that the frontend sees: [`super::frontends::Frontend::scope`].
        pub scope: u32,
    }

    /// The backend that it is kept on. `backend` and `last_used` are read and exchanged as one aligned 8-byte word, in
    /// place: an LRU element can be recycled for another client under a pointer that a program still holds.
    #[derive(Default, PartialEq, Eq)]
    pub struct Affinity: 16 {
        /// The backend.
        pub backend: BackendId,
        /// When a packet of the client last used it.
        pub last_used: Ticks,
        /// When the client was given this backend, for people to read: the tick, and no part of any decision.
        pub since: Ticks,
        /// Zero.
        pub zero: u32,
    }
}

/// The part of an affinity entry that is exchanged as one word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pair {
    /// The backend.
    pub backend: BackendId,
    /// When a packet of the client last used it.
    pub last_used: Ticks,
}

impl Pair {
    /// The word as it lies in memory.
    #[inline(always)]
    pub const fn to_word(self) -> u64 {
        let (backend, at) = (self.backend.id as u64, self.last_used.at as u64);
        if cfg!(target_endian = "little") { backend | at << 32 } else { backend << 32 | at }
    }

    /// The pair of a word as it lies in memory.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the two halves are what is wanted")]
    pub const fn from_word(word: u64) -> Self {
        let (low, high) = (word as u32, (word >> 32) as u32);
        let (backend, at) = if cfg!(target_endian = "little") { (low, high) } else { (high, low) };
        Self { backend: BackendId { id: backend }, last_used: Ticks { at } }
    }

    /// Whether the entry still holds the client at `now`: in `[last_used, last_used + timeout)` by the recorded time.
    #[inline(always)]
    pub const fn is_live(self, timeout: Seconds, now: Nanos) -> bool {
        self.last_used.age(now).0 < timeout.nanos().0
    }

    /// Whether the entry's time is to be written anew at `now`.
    #[inline(always)]
    pub const fn is_stale(self, timeout: Seconds, now: Nanos) -> bool {
        self.last_used.age(now).0 > refresh_after(timeout).0
    }
}

impl Affinity {
    /// The part that is exchanged as one word.
    pub const fn pair(&self) -> Pair {
        Pair { backend: self.backend, last_used: self.last_used }
    }
}

/// How old a recorded use may be before a packet writes it anew: 1 s, or a sixteenth of the timeout if that is less.
#[inline(always)]
pub const fn refresh_after(timeout: Seconds) -> Nanos {
    let sixteenth = timeout.nanos().0 >> 4;
    if sixteenth < Nanos::SECOND.0 { Nanos(sixteenth) } else { Nanos::SECOND }
}

impl<F: Family> AffinityKey<F> {
    /// The key of a client of a service port, in the given scope.
    #[inline(always)]
    pub fn new(client: F::Addr, service: ServiceId, scope: u16) -> Self {
        Self { client, service, scope: scope.into() }
    }
}

/// Default number of clients, over all services of a family.
pub const DEFAULT_SIZE: usize = 1 << 16;

/// The map of a family.
pub const fn spec<F: Family>() -> MapSpec {
    MapSpec {
        name: super::of_family::<F>("affinity_v4", "affinity_v6"),
        kind: Kind::LruHash,
        key_size: size_of::<AffinityKey<F>>(),
        value_size: size_of::<Affinity>(),
        default_size: DEFAULT_SIZE,
        resizable: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pair_is_the_first_word_of_the_entry() {
        let entry = Affinity { backend: BackendId { id: 7 }, last_used: Ticks { at: 9 }, ..Affinity::default() };
        let word = u64::from_ne_bytes(bytemuck::bytes_of(&entry)[..8].try_into().unwrap());
        assert_eq!(word, entry.pair().to_word());
        assert_eq!(Pair::from_word(word), entry.pair());
    }

    #[test]
    fn an_entry_expires_at_the_bound() {
        let pair = Pair { backend: BackendId { id: 1 }, last_used: Ticks { at: 0 } };
        assert!(pair.is_live(Seconds::new(3), Nanos(3_000_000_000 - 1)));
        assert!(!pair.is_live(Seconds::new(3), Nanos(3_000_000_000)));
    }

    #[test]
    fn refresh_is_due_after_a_second_or_a_sixteenth() {
        assert_eq!(refresh_after(Seconds::new(1)), Nanos(62_500_000));
        assert_eq!(refresh_after(Seconds::new(16)), Nanos::SECOND);
        assert_eq!(refresh_after(Seconds::new(86_400)), Nanos::SECOND);
    }
}
