//! `uplinks_v4`, `uplinks_v6`: the interfaces by which the node talks to what is outside of it, other nodes too. Written by
//! user space.

use super::{Kind, MapSpec};
use crate::{family::Family, pod::pod};

pod! {
    /// What is known of an uplink; the key is its index.
    #[derive(Default, PartialEq, Eq, Hash)]
    pub struct Uplink<F>: 12, 24 {
        /// The node's address on it, which packets of others leave by it with; zeroes where it has none of the family.
        pub addr: F::Addr,
        /// The interface's own link-layer address.
        pub mac: [u8; 6],
        /// Zero.
        pub zero: [u8; 2],
    }
}

/// Number of uplinks.
pub const SIZE: usize = 1024;

/// The map of a family.
pub const fn spec<F: Family>() -> MapSpec {
    MapSpec {
        name: super::of_family::<F>("uplinks_v4", "uplinks_v6"),
        kind: Kind::Hash,
        key_size: 4,
        value_size: size_of::<Uplink<F>>(),
        default_size: SIZE,
        resizable: false,
    }
}
