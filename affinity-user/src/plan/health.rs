//! What load balancers are told of a service's endpoints on this node.

use std::collections::BTreeSet;

use affinity_common::types::Port;

use crate::model::ServiceView;

/// What load balancers are told, by which they choose nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// Where they ask: `spec.healthCheckNodePort`.
    pub port: Port,
    /// How many ready endpoints are on this node, by their addresses: of the family that has more.
    pub local_endpoints: u32,
}

/// The health check of a service that is to have one: as in kube-proxy, serving endpoints that terminate do not count.
pub(super) fn health_check(view: &ServiceView<'_>) -> Option<HealthCheck> {
    let port = view.service.external.as_ref()?.health_check_port?;
    let slices = view.slices().filter(|slice| !slice.ports.is_empty());
    let endpoints = slices.flat_map(|slice| slice.endpoints.iter());
    let local: BTreeSet<_> = endpoints
        .filter(|endpoint| endpoint.ready && view.place.has(endpoint))
        .map(|endpoint| endpoint.address)
        .collect();
    let v4 = local.iter().filter(|addr| addr.is_ipv4()).count();
    let local_endpoints = u32::try_from(v4.max(local.len() - v4)).unwrap_or(u32::MAX);
    Some(HealthCheck { port, local_endpoints })
}
