//! The hashes that choose a slot. The same on every machine, so that all nodes choose alike; not meant to withstand
//! a client that picks its ports to fit.

use crate::{
    family::Family,
    types::{Port, Proto},
};

/// The 64-bit finalizer of `MurmurHash3` (Appleby 2011): two multiplications, full avalanche.
#[inline(always)]
pub const fn mix(mut h: u64) -> u64 {
    h ^= h >> 33;
    h = h.wrapping_mul(0xff51_afd7_ed55_8ccd);
    h ^= h >> 33;
    h = h.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    h ^ (h >> 33)
}

#[inline(always)]
fn of_address<F: Family>(addr: &F::Addr, seed: u64) -> u64 {
    let [high, low] = F::words(addr);
    // One round does for an IPv4 address: its second word is a constant 0.
    if size_of::<F::Addr>() <= 8 { mix(high ^ seed << 32) } else { mix(low ^ mix(high ^ seed << 32)) }
}

/// The hash of a client: its first choice under affinity.
#[inline(always)]
pub fn client<F: Family>(client: &F::Addr, seed: u32) -> u32 {
    fold(of_address::<F>(client, u64::from(seed)))
}

/// The hash of a connection: its choice without affinity. The destination is in the seed, which is the service's.
#[inline(always)]
pub fn connection<F: Family>(
    client: &F::Addr,
    client_port: Port,
    frontend: &F::Addr,
    frontend_port: Port,
    proto: Proto,
    seed: u32,
) -> u32 {
    let ports = u64::from(client_port.get()) << 32 | u64::from(frontend_port.get()) << 16 | u64::from(proto.number);
    let [high, low] = F::words(frontend);
    fold(mix(of_address::<F>(client, u64::from(seed)) ^ ports ^ high.rotate_left(40) ^ low.rotate_left(24)))
}

/// The hash of a socket by its cookie: its choice without affinity. The frontend's address is in the seed, which is the
/// service's.
#[inline(always)]
pub const fn socket(cookie: u64, frontend_port: Port, proto: Proto, seed: u32) -> u32 {
    let asked = (seed as u64) << 32 | (frontend_port.get() as u64) << 16 | proto.number as u64;
    fold(mix(cookie ^ mix(asked)))
}

#[inline(always)]
const fn fold(h: u64) -> u32 {
    (h >> 32) as u32
}

/// A hash's place among `count`: its share of the range, by a multiplication (Lemire 2016). `count` must not be 0.
#[inline(always)]
pub const fn place(hash: u32, count: u32) -> u32 {
    ((hash as u64 * count as u64) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::{V4, V6};

    #[test]
    fn places_are_in_range_at_both_ends() {
        assert_eq!(place(0, 7), 0);
        assert_eq!(place(u32::MAX, 7), 6);
        assert_eq!(place(u32::MAX, 1), 0);
    }

    #[test]
    fn neighbouring_clients_spread_over_the_slots() {
        let mut hits = [0u32; 10];
        for host in 0..10_000u32 {
            hits[place(client::<V4>(&(0x0af4_0000 + host).to_be_bytes(), 42), 10) as usize] += 1;
        }
        assert!(hits.iter().all(|&n| (850..1150).contains(&n)), "{hits:?}");
        let mut hits = [0u32; 10];
        for host in 0..10_000u128 {
            hits[place(client::<V6>(&(0xfd00_u128 << 112 | host).to_be_bytes(), 42), 10) as usize] += 1;
        }
        assert!(hits.iter().all(|&n| (850..1150).contains(&n)), "{hits:?}");
    }

    #[test]
    fn every_part_of_the_connection_matters() {
        let h = |c: [u8; 4], cp, f: [u8; 4], fp, p, s| connection::<V4>(&c, Port::new(cp), &f, Port::new(fp), p, s);
        let base = h([10, 0, 0, 1], 1000, [10, 96, 0, 1], 80, Proto::TCP, 1);
        for other in [
            h([10, 0, 0, 2], 1000, [10, 96, 0, 1], 80, Proto::TCP, 1),
            h([10, 0, 0, 1], 1001, [10, 96, 0, 1], 80, Proto::TCP, 1),
            h([10, 0, 0, 1], 1000, [10, 96, 0, 2], 80, Proto::TCP, 1),
            h([10, 0, 0, 1], 1000, [10, 96, 0, 1], 81, Proto::TCP, 1),
            h([10, 0, 0, 1], 1000, [10, 96, 0, 1], 80, Proto::UDP, 1),
            h([10, 0, 0, 1], 1000, [10, 96, 0, 1], 80, Proto::TCP, 2),
        ] {
            assert_ne!(base, other);
        }
    }
}
