//! What clients send to, who of them that is for, and which endpoints it leads to: by kube-proxy's rules for traffic policies.

use std::{collections::BTreeSet, fmt, net::IpAddr};

use affinity_common::{
    family::Family,
    types::{Port, Proto},
};
use ipnet::IpNet;

use super::Scope;
use crate::model::{FrontendAddress, FrontendKind, Service, ServicePort, ServiceView, TrafficPolicy};

/// An address and port that clients send to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FrontendPlan<F: Family> {
    /// The address.
    pub addr: F::Addr,
    /// The port.
    pub port: Port,
    /// The protocol.
    pub proto: Proto,
    /// Whose packets it is for.
    pub origin: Origin,
    /// Which of the service's addresses it is.
    pub kind: FrontendKind,
    /// Which endpoints it leads to.
    pub scope: Scope,
    /// Whether those who come from outside have a frontend of their own.
    pub parts_outsiders: bool,
    /// Whether only clients of [`FamilyPlan::ranges`](super::FamilyPlan::ranges) are let in.
    pub has_ranges: bool,
    /// Whether the service has this port alone of the address.
    pub port_alone: bool,
}

/// Whose packets a frontend is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// Everybody's who has no frontend of their own.
    Anybody,
    /// Those that come from outside of the cluster.
    Outsiders,
}

/// A range of clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RangePlan<F: Family> {
    /// Its address.
    pub addr: F::Addr,
    /// How many bits of that count.
    pub bits: u8,
}

/// The frontends of a service port that are of a family.
///
/// At cluster IPs, the internal traffic policy decides which endpoints everybody is led to. At all others the external one
/// does; where that is `Local`, those who come from outside are led to the endpoints of this node, while the cluster's own
/// clients are short-circuited to any, as if they had asked for a cluster IP of the policy `Cluster`.
pub(super) fn frontends<F: Family>(view: &ServiceView<'_>, port: &ServicePort) -> Vec<FrontendPlan<F>> {
    let external = view.service.external.as_deref();
    let has_ranges = external.is_some_and(|external| external.source_ranges.restrict::<F>());
    let policy = external.map(|external| external.policy).unwrap_or_default();
    let mut frontends = Vec::new();
    for held in view.frontends(port) {
        let Some(addr) = F::from_ip(held.at.addr) else { continue };
        let frontend = FrontendPlan {
            addr,
            port: held.at.port,
            proto: held.at.proto,
            origin: Origin::Anybody,
            kind: held.kind,
            scope: Scope::Cluster,
            parts_outsiders: false,
            has_ranges: has_ranges && held.kind == FrontendKind::LoadBalancer,
            port_alone: held.port_alone,
        };
        if held.kind == FrontendKind::ClusterIp {
            frontends.push(FrontendPlan { scope: scope_of(view.service.internal_policy), ..frontend });
        } else if policy == TrafficPolicy::Cluster {
            frontends.push(frontend);
        } else {
            frontends.push(FrontendPlan { parts_outsiders: true, ..frontend });
            frontends.push(FrontendPlan { origin: Origin::Outsiders, scope: Scope::Local, ..frontend });
        }
    }
    frontends.sort_unstable();
    frontends
}

const fn scope_of(policy: TrafficPolicy) -> Scope {
    match policy {
        TrafficPolicy::Cluster => Scope::Cluster,
        TrafficPolicy::Local => Scope::Local,
    }
}

/// The ranges of a service that are of a family, where some of these frontends have any.
pub(super) fn ranges<F: Family>(service: &Service, frontends: &[FrontendPlan<F>]) -> Vec<RangePlan<F>> {
    if !frontends.iter().any(|frontend| frontend.has_ranges) {
        return Vec::new();
    }
    let ranges = service.external.iter().flat_map(|external| &external.source_ranges.ranges);
    let of_family = |range: &IpNet| Some(RangePlan { addr: F::from_ip(range.network())?, bits: range.prefix_len() });
    ranges.filter_map(of_family).collect::<BTreeSet<_>>().into_iter().collect()
}

impl<F: Family> FrontendPlan<F> {
    /// Where it is.
    pub fn at(&self) -> FrontendAddress {
        let addr: IpAddr = F::to_ip(&self.addr);
        FrontendAddress { addr, port: self.port, proto: self.proto }
    }
}

/// `192.168.1.5:30080/TCP NodePort outside local alone`: what goes without saying is left out.
impl<F: Family> fmt::Display for FrontendPlan<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.at())?;
        if self.kind != FrontendKind::ClusterIp {
            write!(f, " {}", self.kind)?;
        }
        for (is_so, word) in [
            (self.origin == Origin::Outsiders, "outside"),
            (self.scope == Scope::Local, "local"),
            (self.parts_outsiders, "parts"),
            (self.has_ranges, "ranges"),
            (self.port_alone, "alone"),
        ] {
            if is_so {
                write!(f, " {word}")?;
            }
        }
        Ok(())
    }
}
