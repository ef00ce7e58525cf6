//! A Node in the model's terms.

use super::{Faults, address};
use crate::{
    model::{Checked, Node, ObjectName},
    sources::trimmed,
};

const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// By which the cluster's autoscaler says that it is about to delete the node (KEP-3836).
const GOING_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// A node. An empty zone is none.
pub fn node(name: &ObjectName, object: &trimmed::Node) -> Checked<Node> {
    let mut faults = Faults::default();
    let labels = object.metadata.labels.as_ref();
    let zone = labels.and_then(|labels| labels.get(ZONE_LABEL)).filter(|zone| !zone.is_empty());
    let zone = zone.map(|zone| zone.as_str().into());
    let mut internal_ips = Vec::new();
    let addresses = object.status.as_ref().and_then(|status| status.addresses.as_deref());
    for (i, given) in addresses.into_iter().flatten().enumerate().filter(|(_, given)| given.kind == "InternalIP") {
        match address(&given.address) {
            Ok(address) => internal_ips.push(address),
            Err(fault) => faults.left_out(format!("status.addresses[{i}].address"), fault),
        }
    }
    let taints = object.spec.as_ref().and_then(|spec| spec.taints.as_deref());
    let mut taints = taints.into_iter().flatten();
    let is_going = object.metadata.deletion_timestamp.is_some() || taints.any(|taint| taint.key == GOING_TAINT);
    faults.check(name, Node { name: name.clone(), zone, internal_ips, is_going })
}
