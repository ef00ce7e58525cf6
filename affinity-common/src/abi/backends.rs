//! `backends_v4`, `backends_v6`: the backends of each service port. Written by user space.
//!
//! A backend id belongs to one service port, or to one pod on all ports of a service that shares its affinity among them, and
//! the key names both: an affinity entry can't lead to another service's backend, whatever it holds.

use super::{
    Kind, MapSpec,
    frontends::{CLUSTER, LOCAL},
};
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
        /// [`ELIGIBLE`] and its siblings, or 0.
        pub flags: u8,
        /// Zero.
        pub zero: u8,
    }
}

/// The backend takes new sessions of frontends of the scope [`CLUSTER`], and keeps those it has. Where neither this nor
/// [`ELIGIBLE_LOCAL`] is set, it keeps its established flows only.
pub const ELIGIBLE: u8 = 1;

/// The same of frontends of the scope [`LOCAL`].
pub const ELIGIBLE_LOCAL: u8 = 2;

/// That [`ELIGIBLE`] is of one scope alone. Without it, as earlier versions wrote it, it is of whichever scope the service's
/// frontends had.
pub const BY_SCOPE: u8 = 4;

impl<F: Family> Backend<F> {
    /// Whether it takes new sessions of frontends of a scope, and keeps those it has.
    #[inline(always)]
    pub const fn is_eligible(&self, scope: u16) -> bool {
        let wanted = if scope == LOCAL && self.flags & BY_SCOPE != 0 { ELIGIBLE_LOCAL } else { ELIGIBLE };
        self.flags & wanted != 0
    }

    /// Whether it takes new sessions of any frontend.
    #[inline(always)]
    pub const fn is_eligible_anywhere(&self) -> bool {
        self.is_eligible(CLUSTER) || self.is_eligible(LOCAL)
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
