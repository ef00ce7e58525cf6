//! Maglev hashing: a table of slots in which all backends have nearly equal shares, and in which few slots change
//! hands when a backend comes or goes.
//!
//! After section 3.4 of Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016. A
//! backend's permutation is made of its address and port alone, and backends take their turns in the order of these, so
//! every node that sees the same backends has the same table.

use affinity_common::{dp::hash::mix, family::Family, types::Port};

/// The least size of a table: up to 12 backends it is enough for shares that differ by 5 % at most.
const SIZE_MIN: u32 = 251;

/// The size that larger tables are cut at: the largest prime that fits in 16 bits but for 65537's neighbour.
const SIZE_MAX: u32 = 65521;

/// How many slots a backend has on average, below [`SIZE_MAX`].
const SLOTS_PER_BACKEND: u32 = 20;

/// The size of the table of so many backends: a prime.
pub fn size(backends: usize) -> u32 {
    let wanted = u32::try_from(backends).unwrap_or(u32::MAX).saturating_mul(SLOTS_PER_BACKEND);
    (wanted.max(SIZE_MIN)..SIZE_MAX).find(|&n| is_prime(n)).unwrap_or(SIZE_MAX)
}

fn is_prime(n: u32) -> bool {
    n >= 2 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
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
