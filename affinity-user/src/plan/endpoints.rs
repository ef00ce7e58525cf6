//! Which endpoints are a service port's backends, and which of those take new sessions: by what their conditions say
//! (KEP-1669), and by where they are and where they are meant for (kube-proxy's `CategorizeEndpoints`).

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, btree_map::Entry};

use affinity_common::{
    family::Family,
    types::{Port, Proto},
};

use super::{BackendPlan, Scope, Scopes};
use crate::model::{Endpoint, EndpointSlice, Place};

/// How good an endpoint is for new sessions; where several are at one address and port, the best one counts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fitness {
    /// Not for new sessions.
    Unfit,
    /// On its way out, but answering: for new sessions where no endpoint is ready.
    LastResort,
    Ready,
}

impl Fitness {
    fn of(endpoint: &Endpoint) -> Self {
        if endpoint.ready {
            Self::Ready
        } else if endpoint.serving && endpoint.terminating {
            Self::LastResort
        } else {
            Self::Unfit
        }
    }
}

/// What decides which endpoints new sessions may go to, beside their conditions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology {
    Any,
    /// They are on this node.
    OnNode,
    /// They are meant for this node.
    ForNode,
    /// They are meant for this node's zone.
    ForZone,
}

impl Topology {
    /// What the scope or else the hints say. Hints are followed if every ready endpoint has some, and some of them are
    /// for here: those for nodes, else those for zones.
    fn of<'a>(scope: Scope, place: Place<'_>, ready: impl Iterator<Item = &'a Endpoint>) -> Self {
        if scope == Scope::Local {
            return Self::OnNode;
        }
        let (mut all_for_nodes, mut any_for_node) = (true, false);
        let (mut all_for_zones, mut any_for_zone) = (true, false);
        for endpoint in ready {
            let Some(hints) = &endpoint.hints else { return Self::Any };
            all_for_nodes &= !hints.nodes.is_empty();
            any_for_node |= hints.has_node(place);
            all_for_zones &= !hints.zones.is_empty();
            any_for_zone |= hints.has_zone(place);
        }
        if all_for_nodes && any_for_node {
            Self::ForNode
        } else if all_for_zones && any_for_zone {
            Self::ForZone
        } else {
            Self::Any
        }
    }

    fn admits(self, endpoint: &Endpoint, place: Place<'_>) -> bool {
        match self {
            Self::Any => true,
            Self::OnNode => place.has(endpoint),
            Self::ForNode => endpoint.hints.as_ref().is_some_and(|hints| hints.has_node(place)),
            Self::ForZone => endpoint.hints.as_ref().is_some_and(|hints| hints.has_zone(place)),
        }
    }
}

/// The backends of the service port of this name and protocol, in order of address and port, and in which of the scopes that
/// are in use there are endpoints that answer though none of the backends may take new sessions.
pub(super) fn backends<'a, F: Family>(
    slices: impl Iterator<Item = &'a EndpointSlice>,
    port_name: &str,
    proto: Proto,
    scopes: Scopes,
    place: Place<'_>,
) -> (Vec<BackendPlan<F>>, Scopes) {
    let slices: Vec<(_, Vec<_>)> = slices.map(|slice| (slice, slice.endpoints.iter().collect())).collect();
    let mut found: BTreeMap<(F::Addr, Port), (Fitness, &Endpoint)> = BTreeMap::new();
    let rank = |(fitness, endpoint): &(Fitness, &Endpoint)| (*fitness, place.has(endpoint));
    for (slice, endpoints) in &slices {
        for target in slice.ports.iter().filter(|port| *port.name == *port_name && port.proto == proto) {
            for endpoint in endpoints {
                let Some(addr) = F::from_ip(endpoint.address) else { continue };
                let candidate = (Fitness::of(endpoint), endpoint);
                match found.entry((addr, target.port)) {
                    Entry::Vacant(entry) => {
                        entry.insert(candidate);
                    }
                    Entry::Occupied(mut entry) if rank(entry.get()) < rank(&candidate) => {
                        entry.insert(candidate);
                    }
                    Entry::Occupied(_) => {}
                }
            }
        }
    }
    let answers = found.values().any(|(fitness, _)| *fitness >= Fitness::LastResort);
    let mut eligible = vec![Scopes::default(); found.len()];
    let mut others = Scopes::default();
    for scope in Scope::ALL.into_iter().filter(|scope| scopes.has(*scope)) {
        let ready = found.values().filter(|(fitness, _)| *fitness == Fitness::Ready).map(|(_, endpoint)| *endpoint);
        let topology = Topology::of(scope, place, ready);
        let admitted = found.values().filter(|(_, endpoint)| topology.admits(endpoint, place));
        // The least that is fit at all: Ready wherever one is ready.
        let needed = admitted.map(|(fitness, _)| *fitness).max().unwrap_or(Fitness::Unfit).max(Fitness::LastResort);
        let is_eligible =
            |(fitness, endpoint): &(Fitness, &Endpoint)| *fitness >= needed && topology.admits(endpoint, place);
        let chosen = eligible.iter_mut().zip(found.values()).filter(|(_, candidate)| is_eligible(candidate));
        let chosen = chosen.map(|(scopes, _)| scopes.insert(scope)).count();
        if chosen == 0 && answers {
            others.insert(scope);
        }
    }
    let backends = found.into_iter().zip(eligible).map(|(((addr, port), (_, endpoint)), eligible)| BackendPlan {
        addr,
        port,
        eligible,
        target: endpoint.target.clone(),
    });
    (backends.collect(), others)
}
