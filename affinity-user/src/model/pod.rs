//! A pod, as far as it is a client.

use std::net::IpAddr;

use super::{Kind, ObjectName, PodName, Text, store::Object};

/// A pod that has a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its name.
    pub name: PodName,
    /// `metadata.uid`: another one for another pod of the same name. Empty where none is given.
    pub uid: Text,
    /// Its node.
    pub node: Text,
    /// `status.podIPs`: one a family. Those of its node where it is in the node's network namespace.
    pub addresses: Vec<IpAddr>,
    /// Whether it is in the node's network namespace.
    pub host_network: bool,
    /// Whether all its containers have ended for good: its addresses may be another pod's by now.
    pub finished: bool,
    /// Whether its sockets are served where they are: the annotation `affinity.dev/socket-lb`, `on` or `off`; where it has none
    /// that is as for all pods.
    pub socket_lb: Option<bool>,
}

impl Object for Pod {
    const KIND: Kind = Kind::Pod;

    fn name(&self) -> &ObjectName {
        &self.name
    }
}
