//! Which endpoints are a service port's backends, and which of those take new sessions (KEP-1669).

use std::collections::{BTreeMap, btree_map::Entry};

use affinity_common::{
    family::Family,
    types::{Port, Proto},
};

use super::BackendPlan;
use crate::model::{Endpoint, EndpointSlice};

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

/// The backends of the service port of this name and protocol, in order of address and port.
pub(super) fn backends<'a, F: Family>(
    slices: impl Iterator<Item = &'a EndpointSlice>,
    port_name: &str,
    proto: Proto,
) -> Vec<BackendPlan<F>> {
    let mut found: BTreeMap<(F::Addr, Port), (Fitness, &Endpoint)> = BTreeMap::new();
    for slice in slices {
        for target in slice.ports.iter().filter(|port| *port.name == *port_name && port.proto == proto) {
            for endpoint in &slice.endpoints {
                let Some(addr) = F::from_ip(endpoint.address) else { continue };
                let candidate = (Fitness::of(endpoint), endpoint);
                match found.entry((addr, target.port)) {
                    Entry::Vacant(entry) => {
                        entry.insert(candidate);
                    }
                    Entry::Occupied(mut entry) if entry.get().0 < candidate.0 => {
                        entry.insert(candidate);
                    }
                    Entry::Occupied(_) => {}
                }
            }
        }
    }
    // The least that is fit at all: Ready wherever one is ready.
    let needed = found.values().map(|(fitness, _)| *fitness).max().unwrap_or(Fitness::Unfit).max(Fitness::LastResort);
    found
        .into_iter()
        .map(|((addr, port), (fitness, endpoint))| BackendPlan {
            addr,
            port,
            eligible: fitness >= needed,
            target: endpoint.target.clone(),
        })
        .collect()
}
