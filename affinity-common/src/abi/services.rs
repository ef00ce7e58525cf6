//! `services`: what each service id stands for, for people and for the next daemon. Of user space alone.

use super::{Kind, MapSpec};
use crate::pod::pod;
use crate::types::Proto;

/// The longest name of a namespace, a service or a port: a DNS label (RFC 1123).
pub const LABEL_MAX: usize = 63;

pod! {
    /// A service port's name.
    #[derive(PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct ServicePortName: 192 {
        /// The namespace; zeroes after it.
        pub namespace: [u8; LABEL_MAX],
        /// The service's name; zeroes after it.
        pub name: [u8; LABEL_MAX],
        /// The port's name, empty where it has none; zeroes after it.
        pub port_name: [u8; LABEL_MAX],
        /// The protocol.
        pub proto: Proto,
        /// Zero.
        pub zero: [u8; 2],
    }
}

/// Default number of service ports.
pub const DEFAULT_SIZE: usize = super::frontends::DEFAULT_SIZE;

/// The map; its key is a [`crate::types::ServiceId`].
pub const SPEC: MapSpec = MapSpec {
    name: "services",
    kind: Kind::Hash,
    key_size: 4,
    value_size: size_of::<ServicePortName>(),
    default_size: DEFAULT_SIZE,
    resizable: true,
};
