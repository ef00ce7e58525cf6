//! `frontends_v4`, `frontends_v6`: an address and port that a service is reached by, to the service port behind it.
//! Written by user space, read for every packet.

use super::{Kind, MapSpec};
use crate::pod::pod;
use crate::{
    family::Family,
    types::{Port, Proto, Seconds, ServiceId},
};

pod! {
    /// Where a client sends to.
    #[derive(Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct FrontendKey<F>: 8, 20 {
        /// The service's address.
        pub addr: F::Addr,
        /// The service's port.
        pub port: Port,
        /// Its protocol.
        pub proto: Proto,
        /// Who it is for: [`ANYBODY`] or [`OUTSIDERS`].
        pub origin: u8,
    }

    /// The service port behind it. One update of this value switches the service to other slots.
    #[derive(Default, PartialEq, Eq, Hash)]
    pub struct Frontend: 28 {
        /// The service port.
        pub service: ServiceId,
        /// The service port by whose name clients' affinity entries go: itself, or the same one for all ports of a service
        /// that keeps its clients on one pod over all of them. Those have the same backend ids for the same pods.
        pub affinity: ServiceId,
        /// What makes the service's choices its own: a hash of its name, so the same on every node.
        pub seed: u32,
        /// Index of its first slot in `slots`.
        pub first_slot: u32,
        /// How many slots it has; 0 where it has no eligible backend.
        pub slot_count: u32,
        /// `sessionAffinityConfig.clientIP.timeoutSeconds`, or 0 for `sessionAffinity: None`.
        pub timeout: Seconds,
        /// Which set of backends this frontend sees, [`CLUSTER`] or [`LOCAL`]: a part of the affinity entry's key.
        pub scope: u16,
        /// [`OTHERS`] and its siblings, or 0.
        pub flags: u16,
    }
}

/// The scope of a frontend that leads to all of the service's endpoints that the node's topology allows.
pub const CLUSTER: u16 = 0;

/// The scope of one that leads to those on this node.
pub const LOCAL: u16 = 1;

/// The service has endpoints that answer, though none in the frontend's scope: what finds no backend is dropped, as by
/// kube-proxy, where it would be refused.
pub const OTHERS: u16 = 1;

/// Who comes from outside of the cluster has a frontend of its own, by the same address and port with [`OUTSIDERS`] in the key:
/// the service's external traffic policy keeps it to endpoints of this node, where the cluster's own clients may go to any.
pub const PARTS_OUTSIDERS: u16 = 2;

/// Only clients whose addresses `ranges_*` has for the service are let in.
pub const HAS_RANGES: u16 = 4;

/// Of the address, the service has this port alone: it is the node's own, or an endpoint's. `addresses` does not have it for
/// this frontend's sake.
pub const PORT_ALONE: u16 = 8;

/// The bits of [`Frontend::flags`] that say, for people, which of a service's addresses this is: [`CLUSTER_IP`] or one of its
/// siblings.
pub const KIND: u16 = 0x300;

/// One of its cluster IPs.
pub const CLUSTER_IP: u16 = 0;

/// One of its external IPs.
pub const EXTERNAL_IP: u16 = 0x100;

/// One of its load balancer's.
pub const LOAD_BALANCER: u16 = 0x200;

/// One of the node's own, for a node port.
pub const NODE_PORT: u16 = 0x300;

/// [`FrontendKey::origin`]: whoever asks.
pub const ANYBODY: u8 = 0;

/// [`FrontendKey::origin`]: who comes in by one of the node's uplinks.
pub const OUTSIDERS: u8 = 1;

impl<F: Family> FrontendKey<F> {
    /// The key of an address, port and protocol.
    #[inline(always)]
    pub fn new(addr: F::Addr, port: Port, proto: Proto) -> Self {
        Self { addr, port, proto, origin: ANYBODY }
    }

    /// The key of the same address, port and protocol for those who come from outside.
    #[inline(always)]
    #[must_use]
    pub fn for_outsiders(self) -> Self {
        Self { origin: OUTSIDERS, ..self }
    }
}

impl Frontend {
    /// Whether clients are kept on their backends.
    #[inline(always)]
    pub const fn has_affinity(&self) -> bool {
        self.timeout.secs != 0
    }

    /// Whether there are endpoints that answer outside of its scope.
    #[inline(always)]
    pub const fn has_others(&self) -> bool {
        self.flags & OTHERS != 0
    }

    /// Whether those who come from outside have a frontend of their own.
    #[inline(always)]
    pub const fn parts_outsiders(&self) -> bool {
        self.flags & PARTS_OUTSIDERS != 0
    }

    /// Whether the service has this port alone of the address.
    #[inline(always)]
    pub const fn is_port_alone(&self) -> bool {
        self.flags & PORT_ALONE != 0
    }

    /// Whether it lets in some clients only.
    #[inline(always)]
    pub const fn has_ranges(&self) -> bool {
        self.flags & HAS_RANGES != 0
    }
}

/// Default number of frontends of a family.
pub const DEFAULT_SIZE: usize = 1 << 16;

/// The map of a family.
pub const fn spec<F: Family>() -> MapSpec {
    MapSpec {
        name: super::of_family::<F>("frontends_v4", "frontends_v6"),
        kind: Kind::Hash,
        key_size: size_of::<FrontendKey<F>>(),
        value_size: size_of::<Frontend>(),
        default_size: DEFAULT_SIZE,
        resizable: true,
    }
}
