//! A node, as far as it says where this proxy is.

use super::{Kind, ObjectName, Text, store::Object};

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name, in no namespace.
    pub name: ObjectName,
    /// Its label `topology.kubernetes.io/zone`.
    pub zone: Option<Text>,
}

impl Object for Node {
    const KIND: Kind = Kind::Node;

    fn name(&self) -> &ObjectName {
        &self.name
    }
}
