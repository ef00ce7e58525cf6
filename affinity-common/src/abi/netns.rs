//! `netns_v4`, `netns_v6`: who the sockets of a network namespace are. Written by user space, which looks into the
//! namespaces; read where a socket is translated.

use super::{Kind, MapSpec};
use crate::{family::Family, pod::pod};

pod! {
    /// A network namespace of the node.
    #[derive(Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct NetnsKey: 8 {
        /// Its cookie (`SO_NETNS_COOKIE`, `bpf_get_netns_cookie`), which no other one gets before the node's next boot.
        pub cookie: u64,
    }

    /// The client that its sockets are.
    #[derive(Default, PartialEq, Eq, Hash)]
    pub struct NetnsClient<F>: 8, 20 {
        /// The address that backends see.
        pub addr: F::Addr,
        /// [`TC_ONLY`], [`NODE`] or 0.
        pub flags: u32,
    }
}

/// In [`NetnsClient::flags`]: the namespace's sockets are left to TC, which sees each packet's own source. It has several
/// addresses, so no one identity, or is not to be served by sockets.
pub const TC_ONLY: u32 = 1;

/// In [`NetnsClient::flags`]: the namespace is the node's own, whose packets TC does not see where they leave.
pub const NODE: u32 = 2;

impl<F: Family> NetnsClient<F> {
    /// Whether it is the node's own.
    #[inline(always)]
    pub const fn is_node(&self) -> bool {
        self.flags & NODE != 0
    }

    /// Whether the namespace's sockets are left to TC.
    #[inline(always)]
    pub const fn is_tc_only(&self) -> bool {
        self.flags & TC_ONLY != 0
    }
}

/// Default number of namespaces.
pub const DEFAULT_SIZE: usize = 8192;

/// The map of a family.
pub const fn spec<F: Family>() -> MapSpec {
    MapSpec {
        name: super::of_family::<F>("netns_v4", "netns_v6"),
        kind: Kind::LruHash,
        key_size: size_of::<NetnsKey>(),
        value_size: size_of::<NetnsClient<F>>(),
        default_size: DEFAULT_SIZE,
        resizable: true,
    }
}
