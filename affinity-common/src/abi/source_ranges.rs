//! `ranges_v4`, `ranges_v6`: which clients a service lets in, where it does not let in all:
//! `spec.loadBalancerSourceRanges`. Written by user space, read for the first packet of a connection.

use super::{Kind, MapSpec};
use crate::{family::Family, pod::pod, types::ServiceId};

pod! {
    /// A range of a service's; looked up, a client's address, of which all bits count. The longest prefix would win, but all
    /// say the same.
    #[derive(Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct RangeKey<F>: 12, 24 {
        /// How many bits count, those of the service first: [`RangeKey::SERVICE_BITS`] and those of the range's prefix.
        pub prefix_len: u32,
        /// The service port.
        pub service: ServiceId,
        /// The range's address, or a client's.
        pub addr: F::Addr,
    }

    /// That it is let in, which is all.
    #[derive(Default, PartialEq, Eq, Hash)]
    pub struct Range: 4 {
        /// Zero.
        pub zero: u32,
    }
}

impl<F: Family> RangeKey<F> {
    /// The bits of the service, which always count.
    pub const SERVICE_BITS: u32 = 32;

    /// The key of a client of a service port.
    #[inline(always)]
    pub fn of_client(service: ServiceId, client: F::Addr) -> Self {
        Self::of_range(service, client, Self::address_bits())
    }

    /// The key of a range of a service port, of which so many bits count.
    #[inline(always)]
    pub fn of_range(service: ServiceId, addr: F::Addr, bits: u32) -> Self {
        Self { prefix_len: Self::SERVICE_BITS + bits, service, addr }
    }

    /// How many bits of the address count.
    pub const fn bits(&self) -> u32 {
        self.prefix_len.saturating_sub(Self::SERVICE_BITS)
    }

    /// How many bits an address has.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "32 or 128")]
    pub const fn address_bits() -> u32 {
        size_of::<F::Addr>() as u32 * 8
    }
}

/// Default number of ranges of a family, over all services.
pub const DEFAULT_SIZE: usize = 1 << 14;

/// The map of a family.
pub const fn spec<F: Family>() -> MapSpec {
    MapSpec {
        name: super::of_family::<F>("ranges_v4", "ranges_v6"),
        kind: Kind::LpmTrie,
        key_size: size_of::<RangeKey<F>>(),
        value_size: size_of::<Range>(),
        default_size: DEFAULT_SIZE,
        resizable: true,
    }
}
