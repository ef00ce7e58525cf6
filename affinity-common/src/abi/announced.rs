//! `announced_v4`, `announced_v6`: the services' addresses that this node answers for on a link, by ARP (RFC 826) or neighbour
//! discovery (RFC 4861), and on which of its uplinks. Written by user space.

use super::{Kind, MapSpec};
use crate::{family::Family, pod::pod, types::Ticks};

pod! {
    /// An address on an uplink.
    #[derive(Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct AnnouncedKey<F>: 8, 20 {
        /// The address.
        pub addr: F::Addr,
        /// The uplink's index.
        pub ifindex: u32,
    }

    /// For how long it is answered for.
    #[derive(Default, PartialEq, Eq, Hash)]
    pub struct Announced: 4 {
        /// From when on it is not, unless user space, which holds the address's Lease, has said so again: another node may have
        /// taken over from one that has lost its daemon.
        pub until: Ticks,
    }
}

/// Default number of addresses of a family, on all uplinks.
pub const DEFAULT_SIZE: usize = 1 << 12;

/// The map of a family.
pub const fn spec<F: Family>() -> MapSpec {
    MapSpec {
        name: super::of_family::<F>("announced_v4", "announced_v6"),
        kind: Kind::Hash,
        key_size: size_of::<AnnouncedKey<F>>(),
        value_size: size_of::<Announced>(),
        default_size: DEFAULT_SIZE,
        resizable: true,
    }
}
