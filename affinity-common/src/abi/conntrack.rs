//! `conntrack_v4`, `conntrack_v6`: the connections that are translated, an entry a direction. Written by the datapath.

use super::{Kind, MapSpec};
use crate::pod::pod;
use crate::{
    family::Family,
    types::{BackendId, Port, Proto, Seconds, ServiceId, Ticks},
};

pod! {
    /// A connection in one direction.
    #[derive(Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct ConntrackKey<F>: 16, 40 {
        /// The client's address.
        pub client: F::Addr,
        /// The other side as this direction's packets name it: the frontend's address, or the backend's.
        pub peer: F::Addr,
        /// The client's port.
        pub client_port: Port,
        /// The other side's port.
        pub peer_port: Port,
        /// The protocol.
        pub proto: Proto,
        /// [`FORWARD`], [`REVERSE`] or [`SNAT_REPLY`].
        pub direction: u8,
        /// Zero.
        pub zero: [u8; 2],
    }

    /// What its packets are rewritten to, and what is known of it.
    #[derive(Default, PartialEq, Eq)]
    pub struct Conntrack<F>: 32, 44 {
        /// Packets seen in this direction; wraps.
        pub packets: u32,
        /// The service port.
        pub service: ServiceId,
        /// The backend.
        pub backend: BackendId,
        /// When the flow's last packet was seen, in either direction to within a second.
        pub last_seen: Ticks,
        /// When the flow's affinity entry and its other direction are to be looked after again.
        pub due: Ticks,
        /// The port that this direction is translated to: the backend's forward, the frontend's in reverse.
        pub port: Port,
        /// The port that the client's end is translated to: what the backend sees forward, the client's own in reverse.
        pub client_port: Port,
        /// What was seen of the connection, in both directions: [`REPLIED`] and its siblings.
        pub seen: u8,
        /// What else is to be known of its ends: [`BOTH_ENDS`], [`OUTSIDE`] or 0.
        pub ends: u8,
        /// The node's own port that the client's packets leave by to a backend elsewhere, in the entry of the way back; 0 where
        /// they have none (yet). It is theirs for as long as the entry of the answers to it ([`SNAT_REPLY`]) says so.
        pub snat_port: Port,
        /// The address that this direction is translated to: the backend's forward, the frontend's in reverse.
        pub addr: F::Addr,
    }
}

/// [`ConntrackKey::direction`] of packets from the client.
pub const FORWARD: u8 = 0;
/// [`ConntrackKey::direction`] of packets to the client.
pub const REVERSE: u8 = 1;
/// [`ConntrackKey::direction`] of the answers to packets that have left the node as its own, with its address and a port of a
/// range of its own ([`Conntrack::snat_port`]), where they come in: their destination becomes the client again. The key's client
/// is the node, by the address and port that the backend has seen.
pub const SNAT_REPLY: u8 = 3;

/// In [`Conntrack::ends`]: the client's end is translated too. It has another port where its own is taken by another
/// connection to the same backend; and the other side's address where it is its own backend (hairpin).
pub const BOTH_ENDS: u8 = 1;

/// In [`Conntrack::ends`]: the client has come in by one of the node's uplinks. Where its packets leave the node again, they
/// do so as the node's own.
pub const OUTSIDE: u8 = 2;

/// In [`Conntrack::seen`]: the backend has answered.
pub const REPLIED: u8 = 1;
/// In [`Conntrack::seen`]: the client has sent its FIN.
pub const CLIENT_FIN: u8 = 2;
/// In [`Conntrack::seen`]: the backend has sent its FIN.
pub const BACKEND_FIN: u8 = 4;
/// In [`Conntrack::seen`]: either side has reset the connection.
pub const RESET: u8 = 8;
/// In [`Conntrack::seen`]: answered, and still alive a second after its first packet. What UDP asks once and is answered once is
/// forgotten earlier, as in `nf_conntrack` (kernel commit d535c8a69c19, where it takes two seconds).
pub const STREAM: u8 = 16;
/// In [`Conntrack::seen`]: the client has sent its SYN.
pub const OPENED: u8 = 32;

impl<F: Family> ConntrackKey<F> {
    /// The key of packets from the client to the frontend.
    #[inline(always)]
    pub fn forward(client: F::Addr, client_port: Port, frontend: F::Addr, frontend_port: Port, proto: Proto) -> Self {
        Self { client, peer: frontend, client_port, peer_port: frontend_port, proto, direction: FORWARD, zero: [0; 2] }
    }

    /// The key of packets from the backend to the client.
    #[inline(always)]
    pub fn reverse(client: F::Addr, client_port: Port, backend: F::Addr, backend_port: Port, proto: Proto) -> Self {
        Self { client, peer: backend, client_port, peer_port: backend_port, proto, direction: REVERSE, zero: [0; 2] }
    }

    /// Makes it the key of the same client's packets to a frontend. In place, as the datapath's stack is small.
    #[inline(always)]
    pub fn turn_forward(&mut self, client_port: Port, frontend: F::Addr, frontend_port: Port) {
        (self.client_port, self.peer, self.peer_port, self.direction) = (client_port, frontend, frontend_port, FORWARD);
    }

    /// Makes it the key of packets from a backend to the same client. In place, as the datapath's stack is small.
    #[inline(always)]
    pub fn turn_reverse(&mut self, client_port: Port, backend: F::Addr, backend_port: Port) {
        (self.client_port, self.peer, self.peer_port, self.direction) = (client_port, backend, backend_port, REVERSE);
    }

    /// The key of the answers to packets that have left as the node's own, by its address and port: [`SNAT_REPLY`].
    #[inline(always)]
    pub fn snat_reply(node: F::Addr, node_port: Port, backend: F::Addr, backend_port: Port, proto: Proto) -> Self {
        Self { direction: SNAT_REPLY, ..Self::reverse(node, node_port, backend, backend_port, proto) }
    }

    /// Makes it the key of the answers to what the same backend is sent as the node's own. In place, as the datapath's stack is
    /// small.
    #[inline(always)]
    pub fn turn_snat_reply(&mut self, node: F::Addr, node_port: Port) {
        (self.client, self.client_port, self.direction) = (node, node_port, SNAT_REPLY);
    }
}

impl<F: Family> Conntrack<F> {
    /// Whether packets are translated to this address and port.
    #[inline(always)]
    pub fn leads_to(&self, addr: &F::Addr, port: Port) -> bool {
        self.addr == *addr && self.port == port
    }

    /// Whether packets are translated to the same ends.
    #[inline(always)]
    pub fn leads_as(&self, other: &Self) -> bool {
        self.leads_to(&other.addr, other.port) && self.client_port == other.client_port
    }

    /// Whether more than the other side's end is translated.
    #[inline(always)]
    pub const fn has_both_ends(&self) -> bool {
        self.ends & BOTH_ENDS != 0
    }

    /// Whether the client has come in by one of the node's uplinks.
    #[inline(always)]
    pub const fn is_from_outside(&self) -> bool {
        self.ends & OUTSIDE != 0
    }

    /// Whether a packet of this end's goes straight back to it (hairpin): that of a pod of the node that is its own backend. One
    /// that has come in by an uplink leaves as the node's own, as to any other backend elsewhere.
    #[inline(always)]
    pub fn is_hairpin(&self, src: &F::Addr) -> bool {
        self.addr == *src && !self.is_from_outside()
    }

    /// Whether nothing was seen of it for its lifetime.
    #[inline(always)]
    pub fn has_expired(&self, lifetime: Seconds, now: Ticks) -> bool {
        self.last_seen.until(now) >= lifetime.ticks()
    }

    /// Whether it was opened by a SYN that nobody has answered.
    #[inline(always)]
    pub const fn is_unanswered(&self) -> bool {
        self.seen & (OPENED | REPLIED) == OPENED
    }

    /// Whether both sides have closed it, or one has reset it: what may still come is of no weight, and a new
    /// connection may have its place, as in `nf_conntrack`.
    #[inline(always)]
    pub const fn is_over(&self) -> bool {
        self.seen & RESET != 0 || self.seen & (CLIENT_FIN | BACKEND_FIN) == CLIENT_FIN | BACKEND_FIN
    }
}

/// Default number of entries of a family: two a connection.
pub const DEFAULT_SIZE: usize = 1 << 18;

/// The map of a family.
pub const fn spec<F: Family>() -> MapSpec {
    MapSpec {
        name: super::of_family::<F>("conntrack_v4", "conntrack_v6"),
        kind: Kind::LruHash,
        key_size: size_of::<ConntrackKey<F>>(),
        value_size: size_of::<Conntrack<F>>(),
        default_size: DEFAULT_SIZE,
        resizable: true,
    }
}
