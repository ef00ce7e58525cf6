//! A Node in the model's terms.

use super::Faults;
use crate::{
    model::{Checked, Node, ObjectName},
    sources::trimmed,
};

const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// A node. An empty zone is none.
pub fn node(name: &ObjectName, object: &trimmed::Node) -> Checked<Node> {
    let labels = object.metadata.labels.as_ref();
    let zone = labels.and_then(|labels| labels.get(ZONE_LABEL)).filter(|zone| !zone.is_empty());
    let zone = zone.map(|zone| zone.as_str().into());
    Faults::default().check(name, Node { name: name.clone(), zone })
}
