//! What people should know of a service that is programmed all the same.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use thiserror::Error;

use super::{FrontendAddress, Kind, ServiceName, Subject};

/// Something about a field of a service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Notice {
    /// The service.
    pub service: ServiceName,
    /// The path of the field.
    pub field: String,
    /// What.
    pub matter: Matter,
}

/// What people should know.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Error)]
pub enum Matter {
    /// A process of the node has bound a node port.
    #[error(
        "a process of the node has bound {bound}: what is sent to {frontend} goes to the service, and not to it; end \
         it, or give the service another port"
    )]
    NodePortInUse {
        /// What is the service's.
        frontend: FrontendAddress,
        /// What the process has bound.
        bound: SocketAddr,
    },
    /// An address of a service's is the node's own.
    #[error(
        "{0} is the node's own address: there the service's ports are the service's, and no process of the node is \
         reached by them"
    )]
    NodesOwnAddress(IpAddr),
}

impl Matter {
    /// A word for programs.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::NodePortInUse { .. } => "NodePortInUse",
            Self::NodesOwnAddress(_) => "NodesOwnAddress",
        }
    }
}

impl Notice {
    /// The service, as errors name it.
    pub fn subject(&self) -> Subject {
        Subject::Object(Kind::Service, self.service.clone())
    }

    /// Field and matter.
    pub fn message(&self) -> String {
        format!("{}: {}", self.field, self.matter)
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject(), self.message())
    }
}
