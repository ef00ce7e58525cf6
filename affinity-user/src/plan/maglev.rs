//! Maglev hashing: a table of slots in which all backends have nearly equal shares, and in which few slots change
//! hands when a backend comes or goes.
//!
//! After section 3.4 of Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016. A
//! backend's permutation is made of its address and port alone, and backends take their turns in the order of these, so
//! every node that sees the same backends has the same table.

use affinity_common::{dp::hash::mix, family::Family, types::Port};

/// The sizes that tables have: primes, each about twice the one before.
///
/// Tables of different sizes have nothing in common, so a size for each number of backends would move nearly every
/// client at every change; this way that happens only where the number crosses one of few bounds.
const SIZES: [u32; 9] = [251, 509, 1021, 2039, 4093, 8191, 16381, 32749, SIZE_MAX];

/// The size of the largest table, and of all that should be larger.
const SIZE_MAX: u32 = 65521;

/// How many slots a backend has on average at least, below [`SIZE_MAX`]: shares differ by 5 % at most.
const SLOTS_PER_BACKEND: u32 = 20;

/// The size of the table of so many backends: a prime.
pub fn size(backends: usize) -> u32 {
    let wanted = u32::try_from(backends).unwrap_or(u32::MAX).saturating_mul(SLOTS_PER_BACKEND);
    SIZES.into_iter().find(|&size| size >= wanted).unwrap_or(SIZE_MAX)
}

/// A backend's way through the table: it visits every slot once, since the size is prime.
struct Walk {
    at: u32,
    step: u32,
}

impl Walk {
    #[expect(clippy::cast_possible_truncation, reason = "remainders of a u32")]
    fn new<F: Family>(addr: &F::Addr, port: Port, size: u32) -> Self {
        let [high, low] = F::words(addr);
        let offset = mix(high ^ mix(low ^ mix(u64::from(port.get()))));
        // Another hash than the offset's: the two have to be independent.
        let skip = mix(offset ^ 0x9e37_79b9_7f4a_7c15);
        Self { at: (offset % u64::from(size)) as u32, step: (skip % u64::from(size - 1)) as u32 + 1 }
    }

    fn advance(&mut self, size: u32) {
        self.at += self.step;
        if self.at >= size {
            self.at -= size;
        }
    }
}

/// The table of these backends, in any order, each once: for every slot an index into `backends`. Empty if there is none.
pub fn table<F: Family>(backends: &[(F::Addr, Port)]) -> Vec<u32> {
    const FREE: u32 = u32::MAX;
    if backends.is_empty() {
        return Vec::new();
    }
    let size = size(backends.len());
    let mut order: Vec<u32> = (0..).zip(backends).map(|(i, _)| i).collect();
    order.sort_by_key(|&i| backends[i as usize]);
    let mut walks: Vec<_> = order
        .into_iter()
        .map(|i| {
            let (addr, port) = &backends[i as usize];
            (i, Walk::new::<F>(addr, *port, size))
        })
        .collect();
    let mut slots = vec![FREE; size as usize];
    let mut free = size;
    loop {
        for (backend, walk) in &mut walks {
            if free == 0 {
                return slots;
            }
            while slots[walk.at as usize] != FREE {
                walk.advance(size);
            }
            slots[walk.at as usize] = *backend;
            walk.advance(size);
            free -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use affinity_common::family::{V4, V6};
    use proptest::prelude::*;

    use super::*;

    type Backend = ([u8; 4], Port);

    fn backends() -> impl Strategy<Value = Vec<Backend>> {
        prop::collection::btree_set((any::<u32>(), 1u16..), 1..120)
            .prop_map(|set| set.into_iter().map(|(addr, port)| (addr.to_be_bytes(), Port::new(port))).collect())
    }

    /// The table with the backends themselves in place of their indices.
    fn named(backends: &[Backend]) -> Vec<Backend> {
        table::<V4>(backends).into_iter().map(|i| backends[i as usize]).collect()
    }

    #[test]
    fn sizes_are_primes_with_twenty_slots_a_backend() {
        for (backends, expected) in
            [(0, 251), (1, 251), (12, 251), (13, 509), (100, 2039), (1637, 32749), (1638, 65521), (100_000, 65521)]
        {
            assert_eq!(size(backends), expected);
        }
        for size in SIZES {
            assert!((2..=size.isqrt()).all(|divisor| !size.is_multiple_of(divisor)), "{size} is no prime");
        }
    }

    #[test]
    fn the_table_stays_as_it_is() {
        // Nodes of different versions have to agree: if this fails, clients move while a cluster is upgraded.
        let pods = [1, 2, 3, 4, 5].map(|last| ([10, 244, 0, last], Port::new(8080)));
        let digest = |table: &[u32]| table.iter().fold(0u64, |hash, &i| mix(hash ^ u64::from(i)));
        assert_eq!(digest(&table::<V4>(&pods)), V4_DIGEST);
        let pods = [1, 2, 3, 4, 5].map(|last| (u128::to_be_bytes(0xfd00 << 112 | last), Port::new(8080)));
        assert_eq!(digest(&table::<V6>(&pods)), V6_DIGEST);
    }

    const V4_DIGEST: u64 = 16_703_987_213_033_482_040;
    const V6_DIGEST: u64 = 1_777_592_967_391_210_592;

    #[test]
    fn more_backends_than_slots_fill_the_table() {
        let backends: Vec<_> = (0..70_000u32).map(|i| (i.to_be_bytes(), Port::new(80))).collect();
        let table = table::<V4>(&backends);
        assert_eq!(table.len(), SIZE_MAX as usize);
        assert_eq!(table.iter().collect::<BTreeSet<_>>().len(), SIZE_MAX as usize, "nobody has two");
    }

    #[test]
    fn neighbours_move_few_slots() {
        // What clusters have: consecutive addresses on one port.
        for count in [2u8, 5, 10, 50, 200] {
            let all: Vec<_> = (1..=count).map(|last| ([10, 244, 1, last], Port::new(8080))).collect();
            let before = named(&all);
            let mut moved = 0;
            for gone in &all {
                let left: Vec<_> = all.iter().filter(|backend| *backend != gone).copied().collect();
                // A table of another size is another table: there are few of those.
                if size(left.len()) == size(all.len()) {
                    let after = named(&left);
                    moved += before.iter().zip(&after).filter(|(b, a)| *b != gone && b != a).count();
                }
            }
            let (share, slots) = (moved * 100 / (before.len() * all.len()), before.len());
            assert!(share < 8, "{count} backends, {slots} slots: {share} % of them moved needlessly");
        }
    }

    proptest! {
        #[test]
        fn shares_differ_by_one_slot_at_most(backends in backends()) {
            let mut shares: BTreeMap<_, u32> = backends.iter().map(|&backend| (backend, 0)).collect();
            for slot in named(&backends) {
                *shares.entry(slot).or_default() += 1;
            }
            let (least, most) = (shares.values().min(), shares.values().max());
            prop_assert!(most.unwrap_or(&0) - least.unwrap_or(&0) <= 1, "{:?}", shares);
        }

        #[test]
        fn order_does_not_matter(backends in backends(), seed in any::<u64>()) {
            let mut shuffled = backends.clone();
            shuffled.sort_by_key(|(addr, port)| mix(seed ^ u64::from(u32::from_be_bytes(*addr)) << 16 ^ u64::from(port.get())));
            prop_assert_eq!(named(&backends), named(&shuffled));
        }

        #[test]
        fn a_removal_moves_few_slots(backends in backends(), gone in any::<prop::sample::Index>()) {
            prop_assume!(backends.len() > 1);
            let gone = backends[gone.index(backends.len())];
            let left: Vec<_> = backends.iter().filter(|&&backend| backend != gone).copied().collect();
            prop_assume!(size(left.len()) == size(backends.len()));
            let (before, after) = (named(&backends), named(&left));
            prop_assert!(!after.contains(&gone));
            let moved = before.iter().zip(&after).filter(|(b, a)| **b != gone && b != a).count();
            // At worst; how many in general is what neighbours show.
            prop_assert!(moved * 3 <= before.len(), "{} of {} moved", moved, before.len());
        }
    }
}
