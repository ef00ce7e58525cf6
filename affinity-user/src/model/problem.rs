//! What can be wrong with an object, and how that is told.

use std::{fmt, net::IpAddr};

use affinity_common::types::Proto;
use serde::{Serialize, Serializer, ser::SerializeStruct};
use thiserror::Error;

use super::{FrontendAddress, PodName, ServiceName, Subject};

/// Something in an object or file that can't be programmed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where: the path of the field, as in `spec.ports[0].port`; for a file the line; empty for the whole.
    pub field: String,
    /// What.
    pub fault: Fault,
}

impl Problem {
    /// A problem of a field.
    pub fn new(field: impl Into<String>, fault: Fault) -> Self {
        Self { field: field.into(), fault }
    }
}

/// What is wrong with a field.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Fault {
    /// A field that has to be there is not.
    #[error("is missing")]
    Missing,
    /// A text that can't be a name.
    #[error("{name:?} is no name: 1 to {max} letters, digits, '-' and '.'")]
    Name {
        /// The text.
        name: String,
        /// The longest that a name may be here, in characters.
        max: usize,
    },
    /// A text that is no IP address.
    #[error("{0:?} is no IP address")]
    NotAnAddress(String),
    /// An address that nothing can be reached by.
    #[error("{0} can't be the address of a service or an endpoint")]
    UnusableAddress(IpAddr),
    /// An address of the other family than the slice's.
    #[error("{address} is not of the slice's addressType {address_type}")]
    WrongFamily {
        /// The address.
        address: IpAddr,
        /// `addressType`.
        address_type: &'static str,
    },
    /// `addressType` is none that a service proxy can use.
    #[error("{0:?} is not supported: IPv4 and IPv6 are")]
    AddressType(String),
    /// A port number out of range.
    #[error("{0} is no port: 1..=65535")]
    Port(i32),
    /// A protocol that Kubernetes has and this proxy has not.
    #[error("{0} is not supported: TCP and UDP are")]
    UnsupportedProtocol(String),
    /// A protocol that Kubernetes does not have.
    #[error("{0:?} is no protocol: TCP and UDP are supported")]
    UnknownProtocol(String),
    /// `sessionAffinity` is none that Kubernetes has.
    #[error("{0:?} is no session affinity: None or ClientIP")]
    UnknownAffinity(String),
    /// A traffic policy that Kubernetes does not have.
    #[error("{0:?} is no traffic policy: Cluster or Local")]
    UnknownPolicy(String),
    /// `type` is none that Kubernetes has.
    #[error("{0:?} is no type of a service: ClusterIP, NodePort, LoadBalancer or ExternalName")]
    UnknownType(String),
    /// `ipMode` is none that Kubernetes has.
    #[error("{0:?} is no IP mode: VIP or Proxy")]
    UnknownIpMode(String),
    /// A text that is no range of addresses.
    #[error("{0:?} is no range of addresses, such as 192.168.0.0/16: nobody is let in by it")]
    NotARange(String),
    /// `timeoutSeconds` out of range.
    #[error("{0} is no timeout: 1..=86400")]
    Timeout(i32),
    /// An annotation of ours with a value that has no meaning.
    #[error("{value:?} is not known: one of {known}")]
    Annotation {
        /// The value.
        value: String,
        /// Those that have a meaning.
        known: &'static str,
    },
    /// Two ports of a service with one name.
    #[error("{0:?} is the name of another {1} port of the service: give each its own")]
    DuplicatePortName(String, Proto),
    /// Two ports of a service with one number.
    #[error("{0}/{1} is another port of the service: remove one")]
    DuplicatePort(u16, Proto),
    /// Another service has the address and port.
    #[error("{frontend} belongs to Service {winner}, which is older: change the address or the port of one of them")]
    Conflict {
        /// The address, port and protocol.
        frontend: FrontendAddress,
        /// The service that has it.
        winner: ServiceName,
    },
    /// An address of a service's is a pod's own.
    #[error(
        "{address} is the own address of Pod {pod}, which would no longer be reached there: the service does not get it"
    )]
    PodsAddress {
        /// The address.
        address: IpAddr,
        /// The pod.
        pod: PodName,
    },
    /// An object that another file has already.
    #[error("{object} is in {first} already: remove one")]
    DuplicateObject {
        /// The object.
        object: String,
        /// The file that has it.
        first: String,
    },
    /// What is there can't be decoded as what it should be.
    #[error("{0}")]
    Undecodable(String),
    /// A file or directory can't be read.
    #[error("can't be read: {0}")]
    Unreadable(String),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.field.is_empty() { self.fault.fmt(f) } else { write!(f, "{}: {}", self.field, self.fault) }
    }
}

/// A problem and what it is of: what the log and `affinity status` show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The object or file.
    pub object: Subject,
    /// What is wrong with it.
    pub problem: Problem,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.problem)
    }
}

/// `{"object": …, "field": …, "message": …}`, all of them text.
impl Serialize for Rejection {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut out = serializer.serialize_struct("Rejection", 3)?;
        out.serialize_field("object", &self.object.to_string())?;
        out.serialize_field("field", &self.problem.field)?;
        out.serialize_field("message", &self.problem.fault.to_string())?;
        out.end()
    }
}
