//! A Pod in the model's terms.

use super::{Faults, address};
use crate::{
    model::{Checked, Fault, ObjectName, Pod},
    sources::trimmed,
};

/// Whether the sockets of the pod are connected to backends at once, or its traffic is left to TC.
const SOCKET_LB_ANNOTATION: &str = "affinity.dev/socket-lb";

/// A pod; `None` as long as it is on no node.
pub fn pod(name: &ObjectName, object: &trimmed::Pod) -> Option<Checked<Pod>> {
    let spec = object.spec.as_ref();
    let node = spec.and_then(|spec| spec.node_name.as_deref()).filter(|node| !node.is_empty())?;
    let status = object.status.as_ref();
    let mut faults = Faults::default();
    let mut addresses = Vec::new();
    for (i, given) in status.and_then(|status| status.pod_ips.as_deref()).into_iter().flatten().enumerate() {
        match given.ip.as_deref().ok_or(Fault::Missing).and_then(address) {
            Ok(address) => addresses.push(address),
            Err(fault) => faults.left_out(format!("status.podIPs[{i}].ip"), fault),
        }
    }
    let annotations = object.metadata.annotations.as_ref();
    let socket_lb = match annotations.and_then(|annotations| annotations.get(SOCKET_LB_ANNOTATION)).map(String::as_str)
    {
        None => None,
        Some("on") => Some(true),
        Some("off") => Some(false),
        Some(other) => {
            let fault = Fault::Annotation { value: other.to_owned(), known: "on, off" };
            faults.left_out(format!("metadata.annotations[{SOCKET_LB_ANNOTATION}]"), fault);
            None
        }
    };
    let pod = Pod {
        name: name.clone(),
        uid: object.metadata.uid.as_deref().unwrap_or_default().into(),
        node: node.into(),
        addresses,
        host_network: spec.and_then(|spec| spec.host_network).unwrap_or(false),
        finished: matches!(status.and_then(|status| status.phase.as_deref()), Some("Succeeded" | "Failed")),
        socket_lb,
    };
    Some(faults.check(name, pod))
}
