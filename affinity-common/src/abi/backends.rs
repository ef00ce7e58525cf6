//! `backends_v4`, `backends_v6`: the backends of each service port. Written by user space.
//!
//! A backend id belongs to one service port, or to one pod on all ports of a service that shares its affinity among them, and
//! the key names both: an affinity entry can't lead to another service's backend, whatever it holds.

use super::{Kind, MapSpec};
use crate::pod::pod;
use crate::{
    family::Family,
    types::{BackendId, Port, ServiceId},
};

pod! {
    /// A backend of a service port.
    #[derive(Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct BackendKey: 8 {
        /// The service port.
        pub service: ServiceId,
        /// The backend.
        pub backend: BackendId,
    }

    /// Where it is.
    #[derive(Default, PartialEq, Eq, Hash)]
    pub struct Backend<F>: 8, 20 {
        /// The pod's address.
        pub addr: F::Addr,
        /// The target port.
        pub port: Port,
        /// [`ELIGIBLE`] or 0.
        pub flags: u8,
        /// Zero.
        pub zero: u8,
    }
}

/// The backend takes new sessions and keeps those it has. Without it, it keeps its established flows only.
pub const ELIGIBLE: u8 = 1;

impl<F: Family> Backend<F> {
    /// Whether it takes new sessions and keeps those it has.
    #[inline(always)]
    pub const fn is_eligible(&self) -> bool {
        self.flags & ELIGIBLE != 0
    }
}

/// Default number of backends of a family.
pub const DEFAULT_SIZE: usize = 1 << 17;

/// The map of a family.
pub const fn spec<F: Family>() -> MapSpec {
    MapSpec {
        name: super::of_family::<F>("backends_v4", "backends_v6"),
        kind: Kind::Hash,
        key_size: size_of::<BackendKey>(),
        value_size: size_of::<Backend<F>>(),
        default_size: DEFAULT_SIZE,
        resizable: true,
    }
}
