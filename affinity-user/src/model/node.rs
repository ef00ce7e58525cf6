//! A node, as far as it says where this proxy is.

use std::net::IpAddr;

use super::{Kind, ObjectName, Text, store::Object};

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name, in no namespace.
    pub name: ObjectName,
    /// Its label `topology.kubernetes.io/zone`.
    pub zone: Option<Text>,
    /// Its addresses of type `InternalIP`, in their order.
    pub internal_ips: Vec<IpAddr>,
    /// Whether it is about to go: it is being deleted, or the cluster's autoscaler has marked it (KEP-3836).
    pub is_going: bool,
}

impl Object for Node {
    const KIND: Kind = Kind::Node;

    fn name(&self) -> &ObjectName {
        &self.name
    }
}
