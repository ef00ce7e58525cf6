//! An `EndpointSlice` in the model's terms.

use std::sync::Arc;

use affinity_common::abi::services::LABEL_MAX;
use k8s_openapi::api::discovery::v1 as discovery;

use super::{Faults, address, check_name, is_elsewhere, port, proto};
use crate::model::{
    Checked, Endpoint, EndpointSlice, Fault, Hints, ObjectName, Problem, ServiceName, TargetPort, Text, Trigger, shared,
};

pub(super) const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// When the pod or service changed that the slice was made or changed for (`EndpointsLastChangeTriggerTime` in
/// `k8s.io/api/core/v1`): RFC 3339, and absent where the slice's writer does not know.
const TRIGGER_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// A slice; `None` if it is not for a service proxy, or for another one.
pub fn endpoint_slice(name: &ObjectName, object: &discovery::EndpointSlice) -> Option<Checked<EndpointSlice>> {
    if is_elsewhere(&object.metadata) {
        return None;
    }
    let mut faults = Faults::default();
    let label = object.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME_LABEL));
    let field = format!("metadata.labels[{SERVICE_NAME_LABEL}]");
    let Some(service) = label else {
        faults.invalid(field, Fault::Missing);
        return Some(faults.reject(name));
    };
    if let Err(Problem { field, fault }) = check_name(field, service, LABEL_MAX) {
        faults.invalid(field, fault);
        return Some(faults.reject(name));
    }
    let address_type = match object.address_type.as_str() {
        "IPv4" => "IPv4",
        "IPv6" => "IPv6",
        other => {
            faults.invalid("addressType", Fault::AddressType(other.to_owned()));
            return Some(faults.reject(name));
        }
    };
    let slice = EndpointSlice {
        name: name.clone(),
        service: ServiceName { namespace: name.namespace.clone(), name: shared(service) },
        ports: target_ports(object, &mut faults),
        endpoints: endpoints(object, address_type, &mut faults).into_iter().collect(),
    };
    Some(Checked { trigger: trigger(object), ..faults.check(name, slice) })
}

fn trigger(object: &discovery::EndpointSlice) -> Trigger {
    match object.metadata.annotations.as_ref().and_then(|annotations| annotations.get(TRIGGER_ANNOTATION)) {
        None => Trigger::Unknown,
        Some(text) => text.parse().map_or(Trigger::Unreadable, Trigger::At),
    }
}

fn target_ports(object: &discovery::EndpointSlice, faults: &mut Faults) -> Vec<TargetPort> {
    let mut ports = Vec::with_capacity(object.ports.as_ref().map_or(0, Vec::len));
    for (i, given) in object.ports.iter().flatten().enumerate() {
        // No number means all ports, which is for others than service proxies.
        let Some(number) = given.port else { continue };
        match (proto(given.protocol.as_deref()), port(number)) {
            (Err(fault), _) => faults.left_out(format!("ports[{i}].protocol"), fault),
            (_, Err(fault)) => faults.left_out(format!("ports[{i}].port"), fault),
            (Ok(proto), Ok(port)) => {
                ports.push(TargetPort { name: shared(given.name.as_deref().unwrap_or_default()), proto, port });
            }
        }
    }
    ports
}

pub(super) fn endpoints(
    object: &discovery::EndpointSlice,
    address_type: &'static str,
    faults: &mut Faults,
) -> Vec<Endpoint> {
    let mut endpoints = Vec::with_capacity(object.endpoints.len());
    // Neighbours often have the same.
    let mut last_hints: Option<Arc<Hints>> = None;
    for (i, given) in object.endpoints.iter().enumerate() {
        let Some(text) = given.addresses.first() else {
            faults.left_out(format!("endpoints[{i}].addresses"), Fault::Missing);
            continue;
        };
        let address = match address(text) {
            Ok(address) if address.is_ipv4() == (address_type == "IPv4") => address,
            Ok(address) => {
                let fault = Fault::WrongFamily { address, address_type };
                faults.left_out(format!("endpoints[{i}].addresses[0]"), fault);
                continue;
            }
            Err(fault) => {
                faults.left_out(format!("endpoints[{i}].addresses[0]"), fault);
                continue;
            }
        };
        let hints = given.hints.as_ref().and_then(hints).map(|hints| match &last_hints {
            Some(last) if **last == hints => last.clone(),
            _ => Arc::new(hints),
        });
        if hints.is_some() {
            last_hints.clone_from(&hints);
        }
        // What is not given reads as the API says: ready, serving as ready, not terminating.
        let conditions = given.conditions.as_ref();
        let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
        endpoints.push(Endpoint {
            address,
            ready,
            serving: conditions.and_then(|c| c.serving).unwrap_or(ready),
            terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
            node_name: given.node_name.as_deref().map(shared),
            hints,
            target: given.target_ref.as_ref().and_then(|target| target.name.as_deref()).map(Text::from),
        });
    }
    endpoints
}

/// `None` if they say nothing.
fn hints(given: &discovery::EndpointHints) -> Option<Hints> {
    let nodes: Vec<_> = given.for_nodes.iter().flatten().map(|node| node.name.as_str().into()).collect();
    let zones: Vec<_> = given.for_zones.iter().flatten().map(|zone| zone.name.as_str().into()).collect();
    (!nodes.is_empty() || !zones.is_empty()).then_some(Hints { nodes, zones })
}
