//! `events`: a ring buffer of what the datapath chose, written only while a reader has asked for it.

use super::{Kind, MapSpec};
use crate::pod::pod;
use crate::{
    family::Family,
    types::{BackendId, Port, Proto, ServiceId},
};

pod! {
    /// A backend was chosen for a new connection.
    #[derive(PartialEq, Eq)]
    pub struct Event: 48 {
        /// When, on the coarse monotonic clock in nanoseconds.
        pub at: u64,
        /// The service port.
        pub service: ServiceId,
        /// The backend that was chosen.
        pub backend: BackendId,
        /// The backend that the client had before, or none (0).
        pub previous: BackendId,
        /// The client's port.
        pub client_port: Port,
        /// The frontend's port.
        pub frontend_port: Port,
        /// The protocol.
        pub proto: Proto,
        /// 4 or 6.
        pub version: u8,
        /// The number of a [`crate::reason::Reason`].
        pub reason: u8,
        /// 1 for a client that came in by one of the node's uplinks, else 0.
        pub outside: u8,
        /// The frontend's flags.
        pub frontend_flags: u16,
        /// Zero.
        pub zero: [u8; 2],
        /// The client's address: the family's octets, then zeroes.
        pub client: [u8; 16],
    }
}

impl Event {
    /// The client's address.
    pub fn client_ip(&self) -> core::net::IpAddr {
        use crate::family::{V4, V6};
        if self.version == V4::VERSION {
            V4::to_ip(&V4::from_octets16(&self.client))
        } else {
            V6::to_ip(&V6::from_octets16(&self.client))
        }
    }
}

/// Size of the ring in bytes.
pub const SIZE: usize = 1 << 18;

/// The map.
pub const SPEC: MapSpec =
    MapSpec { name: "events", kind: Kind::RingBuf, key_size: 0, value_size: 0, default_size: SIZE, resizable: false };
