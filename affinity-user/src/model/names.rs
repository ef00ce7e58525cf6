//! What objects and service ports are called.

use std::{cmp::Ordering, fmt, path::PathBuf};

use affinity_common::types::Proto;

use super::Text;

/// The name of an object. In the order of namespaces, then of names.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ObjectName {
    /// The namespace; empty for an object that is in none.
    pub namespace: Text,
    /// The name in it.
    pub name: Text,
}

/// The name of a Service.
pub type ServiceName = ObjectName;

/// The name of an `EndpointSlice`.
pub type SliceName = ObjectName;

/// The name of a Pod.
pub type PodName = ObjectName;

impl ObjectName {
    /// The name of an object.
    pub fn new(namespace: impl Into<Text>, name: impl Into<Text>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl Ord for ObjectName {
    /// What is looked for among many has mostly the namespace of what it is compared with, and namespaces are kept once.
    fn cmp(&self, other: &Self) -> Ordering {
        let namespaces = if Text::ptr_eq(&self.namespace, &other.namespace) {
            Ordering::Equal
        } else {
            self.namespace.cmp(&other.namespace)
        };
        namespaces.then_with(|| self.name.cmp(&other.name))
    }
}

impl PartialOrd for ObjectName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() { f.write_str(&self.name) } else { write!(f, "{}/{}", self.namespace, self.name) }
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The name of a service port: what affinity's scope is, and what has a service id.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServicePortName {
    /// The service.
    pub service: ServiceName,
    /// The port's name; empty where it has none.
    pub port: Text,
    /// The port's protocol.
    pub proto: Proto,
}

impl fmt::Display for ServicePortName {
    /// `namespace/name/port/proto`: what the hash of a service port is made of, so it must stay as it is.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.service, self.port, self.proto)
    }
}

impl fmt::Debug for ServicePortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The kinds of object that the model is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `v1` `Service`.
    Service,
    /// `discovery.k8s.io/v1` `EndpointSlice`.
    EndpointSlice,
    /// `v1` `Node`: the one that this runs on.
    Node,
    /// `v1` `Pod`: those on this node.
    Pod,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::Service, Self::EndpointSlice, Self::Node, Self::Pod];

    /// Whether services can't be served without it. Of the others it is enough to know that they can't be had: without
    /// its Node a proxy knows no zone, without its Pods of none that is to be left out.
    pub const fn is_essential(self) -> bool {
        matches!(self, Self::Service | Self::EndpointSlice)
    }

    /// Whether its objects are in namespaces.
    pub const fn is_namespaced(self) -> bool {
        !matches!(self, Self::Node)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::Pod => "Pod",
        })
    }
}

/// What an error is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// An object.
    Object(Kind, ObjectName),
    /// A file of a directory source.
    File(PathBuf),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Object(kind, name) => write!(f, "{kind} {name}"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}
