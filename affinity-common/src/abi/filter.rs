//! `service_filter`, `direct_filter`, `snat_filter`: a bit for each hash of an address, of both families. Where it is not set, nothing
//! more need be asked about a packet to that address: most packets pay for a load, and not for a look-up.
//!
//! `service_filter` has the addresses of services, written by user space before their frontends. `direct_filter` has those
//! that a client talks to directly on ports which a translated connection of its own has too; it is written by the
//! datapath, a bit at a time, and cleared by user space when no such connection is left. `snat_filter`, written and cleared in
//! the same way, has the backends that clients from outside were led to.

use super::{Kind, MapSpec};
use crate::{family::Family, pod::pod};

pod! {
    /// A word of the filter.
    #[derive(Default, PartialEq, Eq)]
    pub struct FilterWord: 8 {
        /// A bit for each of 64 hashes.
        pub bits: u64,
    }
}

/// How many bits the filter has, as a power of two: with 20,000 addresses one of 50 others looks like a service's.
const BITS: u32 = 20;
/// Number of words.
pub const SIZE: usize = 1 << (BITS - 6);

/// Where an address has its bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The index of the word, below [`SIZE`].
    pub word: u32,
    /// The word with that bit alone.
    pub bit: u64,
}

impl Place {
    /// The place of an address.
    #[inline(always)]
    pub fn of<F: Family>(addr: &F::Addr) -> Self {
        /// Odd, without a pattern: 2^64 divided by the golden ratio (Knuth, "Sorting and Searching", 6.4).
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        let [high, low] = F::words(addr);
        let mixed = (high ^ low.rotate_left(32).wrapping_mul(GOLDEN)).wrapping_mul(GOLDEN);
        let hash = (mixed >> (64 - BITS)) as u32;
        Self { word: hash >> 6, bit: 1 << (hash & 63) }
    }

    /// Whether the bit is set in the word that [`Self::word`] says.
    #[inline(always)]
    pub const fn is_in(self, word: FilterWord) -> bool {
        word.bits & self.bit != 0
    }
}

/// The filter of services' addresses.
pub const SERVICES: MapSpec = spec("service_filter");
/// The filter of addresses that are talked to directly beside a translated connection.
pub const DIRECT: MapSpec = spec("direct_filter");
/// The filter of backends that clients from outside were led to.
pub const SNAT: MapSpec = spec("snat_filter");

const fn spec(name: &'static str) -> MapSpec {
    MapSpec {
        name,
        kind: Kind::Array,
        key_size: 4,
        value_size: size_of::<FilterWord>(),
        default_size: SIZE,
        resizable: false,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::family::{V4, V6};

    #[test]
    fn places_are_in_range_and_spread() {
        let places = |of: &dyn Fn(u16) -> Place| (0..4096).map(of).collect::<BTreeSet<_>>();
        let v4 = places(&|host| {
            let [high, low] = host.to_be_bytes();
            Place::of::<V4>(&[10, 96, high, low])
        });
        let v6 = places(&|host| {
            let [high, low] = host.to_be_bytes();
            let mut addr = [0; 16];
            (addr[0], addr[14], addr[15]) = (0xfd, high, low);
            Place::of::<V6>(&addr)
        });
        for places in [v4, v6] {
            assert!(places.iter().all(|place| (place.word as usize) < SIZE && place.bit.is_power_of_two()));
            // By chance, 8 of 4,096 meet another one.
            assert!(places.len() > 4_050, "{}", places.len());
        }
    }
}
