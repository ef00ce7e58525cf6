//! Where this proxy is, and which endpoints are meant for there.

use super::{Endpoint, Text};

/// Where this proxy is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place<'a> {
    /// The name of its node; empty where it has none.
    pub node: &'a str,
    /// The node's zone, where that is known.
    pub zone: Option<&'a str>,
}

impl Place<'_> {
    /// Whether an endpoint is on this node.
    pub fn has(self, endpoint: &Endpoint) -> bool {
        !self.node.is_empty() && endpoint.node_name.as_deref() == Some(self.node)
    }
}

/// The nodes and zones that an endpoint is meant for: its `hints`, as `trafficDistribution` makes them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// `forNodes`.
    pub nodes: Vec<Text>,
    /// `forZones`.
    pub zones: Vec<Text>,
}

impl Hints {
    /// Whether the node is among them.
    pub fn has_node(&self, place: Place<'_>) -> bool {
        self.nodes.iter().any(|node| **node == *place.node)
    }

    /// Whether the zone is known and among them.
    pub fn has_zone(&self, place: Place<'_>) -> bool {
        place.zone.is_some_and(|zone| self.zones.iter().any(|hinted| **hinted == *zone))
    }
}
