//! Everything that differs by address family, so that nothing else does.

use core::{fmt::Debug, hash::Hash};

use bytemuck::Pod;
use network_types::eth::EtherType;

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::V4 {}
    impl Sealed for super::V6 {}
}

/// An address family: [`V4`] or [`V6`].
///
/// All code is written once for `F: Family` and compiled twice; a value of a family is a type, never a run-time flag.
pub trait Family: sealed::Sealed + Copy + Clone + Debug + Default + Eq + Ord + Hash + Send + Sync + 'static {
    /// An address: its octets in network byte order.
    type Addr: Pod + AsRef<[u8]> + Debug + Default + Eq + Ord + Hash + Send + Sync;

    /// What maps and messages call the family: `v4`, `v6`.
    const NAME: &'static str;
    /// The number that events carry: 4, 6.
    const VERSION: u8;
    /// Ethertype of a frame that carries the family, octets as on the wire.
    const ETHERTYPE: [u8; 2];

    /// The address as two words for hashing. The same on every machine, whatever its byte order.
    fn words(addr: &Self::Addr) -> [u64; 2];
    /// The address padded with zeroes on the right to the size that both families fit in.
    fn octets16(addr: &Self::Addr) -> [u8; 16];
    /// The address out of what [`Family::octets16`] made of it.
    fn from_octets16(octets: &[u8; 16]) -> Self::Addr;
    /// The address as the standard library knows it.
    fn to_ip(addr: &Self::Addr) -> core::net::IpAddr;
    /// The address of an [`core::net::IpAddr`] of this family; `None` if it is of the other one.
    fn from_ip(ip: core::net::IpAddr) -> Option<Self::Addr>;
}

/// IPv4.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct V4;

/// IPv6.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct V6;

impl Family for V4 {
    type Addr = [u8; 4];

    const NAME: &'static str = "v4";
    const VERSION: u8 = 4;
    const ETHERTYPE: [u8; 2] = (EtherType::Ipv4 as u16).to_ne_bytes();

    #[inline(always)]
    fn words(addr: &[u8; 4]) -> [u64; 2] {
        [u64::from(u32::from_be_bytes(*addr)), 0]
    }

    #[inline(always)]
    fn octets16(addr: &[u8; 4]) -> [u8; 16] {
        let mut out = [0; 16];
        out[..4].copy_from_slice(addr);
        out
    }

    #[inline(always)]
    fn from_octets16(o: &[u8; 16]) -> [u8; 4] {
        [o[0], o[1], o[2], o[3]]
    }

    fn to_ip(addr: &[u8; 4]) -> core::net::IpAddr {
        (*addr).into()
    }

    fn from_ip(ip: core::net::IpAddr) -> Option<[u8; 4]> {
        match ip {
            core::net::IpAddr::V4(ip) => Some(ip.octets()),
            core::net::IpAddr::V6(_) => None,
        }
    }
}

impl Family for V6 {
    type Addr = [u8; 16];

    const NAME: &'static str = "v6";
    const VERSION: u8 = 6;
    const ETHERTYPE: [u8; 2] = (EtherType::Ipv6 as u16).to_ne_bytes();

    #[inline(always)]
    fn words(addr: &[u8; 16]) -> [u64; 2] {
        let halves: [[u8; 8]; 2] = bytemuck::cast(*addr);
        halves.map(u64::from_be_bytes)
    }

    #[inline(always)]
    fn octets16(addr: &[u8; 16]) -> [u8; 16] {
        *addr
    }

    #[inline(always)]
    fn from_octets16(octets: &[u8; 16]) -> [u8; 16] {
        *octets
    }

    fn to_ip(addr: &[u8; 16]) -> core::net::IpAddr {
        (*addr).into()
    }

    fn from_ip(ip: core::net::IpAddr) -> Option<[u8; 16]> {
        match ip {
            core::net::IpAddr::V4(_) => None,
            core::net::IpAddr::V6(ip) => Some(ip.octets()),
        }
    }
}
