//! `addresses_v4`, `addresses_v6`: the addresses that services have, whatever the port. Written by user space; read for
//! what is sent to such an address and is for none of its frontends.

use super::{Kind, MapSpec};
use crate::{family::Family, pod::pod};

pod! {
    /// An address.
    #[derive(Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct AddressKey<F>: 4, 16 {
        /// The service's address.
        pub addr: F::Addr,
    }

    /// That it is there, which is all.
    #[derive(Default, PartialEq, Eq, Hash)]
    pub struct Address: 4 {
        /// Zero.
        pub zero: u32,
    }
}

/// Default number of addresses of a family.
pub const DEFAULT_SIZE: usize = super::frontends::DEFAULT_SIZE;

/// The map of a family.
pub const fn spec<F: Family>() -> MapSpec {
    MapSpec {
        name: super::of_family::<F>("addresses_v4", "addresses_v6"),
        kind: Kind::Hash,
        key_size: size_of::<AddressKey<F>>(),
        value_size: size_of::<Address>(),
        default_size: DEFAULT_SIZE,
        resizable: true,
    }
}
