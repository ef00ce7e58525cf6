//! What maps hold for what is planned.

use affinity_common::{
    abi::{
        backends::{BY_SCOPE, Backend, ELIGIBLE, ELIGIBLE_LOCAL},
        frontends::{
            ANYBODY, CLUSTER_IP, EXTERNAL_IP, FrontendKey, HAS_RANGES, LOAD_BALANCER, NODE_PORT, OTHERS,
            PARTS_OUTSIDERS, PORT_ALONE,
        },
        source_ranges::RangeKey,
    },
    family::Family,
    types::ServiceId,
};

use crate::{
    model::FrontendKind,
    plan::{BackendPlan, FrontendPlan, Origin, RangePlan, Scopes},
};

/// The key of a frontend.
pub(super) fn key_of<F: Family>(FrontendPlan { addr, port, proto, origin, .. }: &FrontendPlan<F>) -> FrontendKey<F> {
    let key = FrontendKey::new(*addr, *port, *proto);
    match origin {
        Origin::Anybody => key,
        Origin::Outsiders => key.for_outsiders(),
    }
}

/// The key of the frontend for anybody where this one is, or that of this one: a service port has both or neither.
pub(super) fn anybodys<F: Family>(key: FrontendKey<F>) -> FrontendKey<F> {
    FrontendKey { origin: ANYBODY, ..key }
}

/// The flags of a frontend; `others`: the scopes in which there are endpoints that answer, though no backend.
pub(super) fn flags_of<F: Family>(frontend: &FrontendPlan<F>, others: Scopes) -> u16 {
    let kind = match frontend.kind {
        FrontendKind::ClusterIp => CLUSTER_IP,
        FrontendKind::ExternalIp => EXTERNAL_IP,
        FrontendKind::LoadBalancer => LOAD_BALANCER,
        FrontendKind::NodePort => NODE_PORT,
    };
    let flags = [
        (others.has(frontend.scope), OTHERS),
        (frontend.parts_outsiders, PARTS_OUTSIDERS),
        (frontend.has_ranges, HAS_RANGES),
        (frontend.port_alone, PORT_ALONE),
    ];
    flags.into_iter().filter(|(is_set, _)| *is_set).fold(kind, |flags, (_, flag)| flags | flag)
}

/// The row of a backend that is eligible in these scopes.
pub(super) fn row_of<F: Family>(backend: &BackendPlan<F>, eligible: Scopes) -> Backend<F> {
    let flags = [(true, BY_SCOPE), (eligible.cluster, ELIGIBLE), (eligible.local, ELIGIBLE_LOCAL)];
    Backend { addr: backend.addr, port: backend.port, flags: crate::packed::flags(flags), zero: 0 }
}

/// The key of a range of a service port.
pub(super) fn range_of<F: Family>(service: ServiceId, RangePlan { addr, bits }: &RangePlan<F>) -> RangeKey<F> {
    RangeKey::of_range(service, *addr, u32::from(*bits))
}
