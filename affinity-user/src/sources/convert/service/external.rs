//! How a Service is reached from outside.

use std::net::IpAddr;

use affinity_common::types::Port;
use k8s_openapi::api::core::v1 as core;

use super::{Faults, ServiceType, address, port};
use crate::{
    model::{External, Fault, ListedAddress, ServicePort, SourceRanges, TrafficPolicy},
    sources::convert::range,
};

/// `None` if it is not. `policy`: `spec.externalTrafficPolicy`.
pub(super) fn external(
    object: &core::Service,
    kind: ServiceType,
    policy: TrafficPolicy,
    ports: &[ServicePort],
    faults: &mut Faults,
) -> Option<External> {
    let empty = core::ServiceSpec::default();
    let spec = object.spec.as_ref().unwrap_or(&empty);
    let ips = external_ips(spec, faults);
    let load_balancer_ips = load_balancer_ips(object.status.as_ref(), faults);
    let source_ranges = source_ranges(spec, faults);
    let is_asked = policy == TrafficPolicy::Local && kind == ServiceType::LoadBalancer;
    let health_check_port = health_check_port(spec, faults).filter(|_| is_asked);
    let is_reached = !ips.is_empty() || !load_balancer_ips.is_empty() || ports.iter().any(|it| it.node_port.is_some());
    let external = External { ips, load_balancer_ips, policy, source_ranges, health_check_port };
    Some(external).filter(|_| is_reached || health_check_port.is_some())
}

fn external_ips(spec: &core::ServiceSpec, faults: &mut Faults) -> Vec<ListedAddress> {
    let mut ips = Vec::new();
    for (i, text) in spec.external_ips.as_deref().unwrap_or_default().iter().enumerate() {
        match address(text) {
            Ok(addr) => add(&mut ips, i, addr),
            Err(fault) => faults.left_out(format!("spec.externalIPs[{i}]"), fault),
        }
    }
    ips
}

/// Those that packets come with. Of a load balancer that is a proxy, packets come with the node's address.
fn load_balancer_ips(status: Option<&core::ServiceStatus>, faults: &mut Faults) -> Vec<ListedAddress> {
    let balancer = status.and_then(|status| status.load_balancer.as_ref());
    let given = balancer.and_then(|balancer| balancer.ingress.as_deref()).unwrap_or_default();
    let mut ips = Vec::new();
    for (i, ingress) in given.iter().enumerate() {
        // One may have a name alone.
        let Some(text) = ingress.ip.as_deref().filter(|text| !text.is_empty()) else { continue };
        let field = |name: &str| format!("status.loadBalancer.ingress[{i}].{name}");
        match ingress.ip_mode.as_deref() {
            None | Some("VIP") => {}
            Some("Proxy") => continue,
            Some(other) => {
                faults.left_out(field("ipMode"), Fault::UnknownIpMode(other.to_owned()));
                continue;
            }
        }
        match address(text) {
            Ok(addr) => add(&mut ips, i, addr),
            Err(fault) => faults.left_out(field("ip"), fault),
        }
    }
    ips
}

fn add(ips: &mut Vec<ListedAddress>, index: usize, addr: IpAddr) {
    if !ips.iter().any(|it| it.addr == addr) {
        ips.push(ListedAddress { index: u16::try_from(index).unwrap_or(u16::MAX), addr });
    }
}

/// A range that is none lets nobody in; the others hold all the same.
fn source_ranges(spec: &core::ServiceSpec, faults: &mut Faults) -> SourceRanges {
    let mut found = SourceRanges::default();
    for (i, text) in spec.load_balancer_source_ranges.as_deref().unwrap_or_default().iter().enumerate() {
        match range(text) {
            Ok(range) => found.ranges.push(range),
            Err(fault) => {
                found.has_faulty = true;
                faults.left_out(format!("spec.loadBalancerSourceRanges[{i}]"), fault);
            }
        }
    }
    found.ranges.sort_unstable();
    found.ranges.dedup();
    found
}

fn health_check_port(spec: &core::ServiceSpec, faults: &mut Faults) -> Option<Port> {
    let number = spec.health_check_node_port.filter(|number| *number != 0)?;
    port(number).map_err(|fault| faults.left_out("spec.healthCheckNodePort", fault)).ok()
}
