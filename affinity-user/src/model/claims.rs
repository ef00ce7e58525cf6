//! Which service has which address and port: of two that want the same, the older.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    net::{IpAddr, SocketAddr},
};

use affinity_common::types::{Port, Proto};
use jiff::Timestamp;

use super::{Service, ServiceName};

/// An address, port and protocol that a service is reached by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendAddress {
    /// The address.
    pub addr: IpAddr,
    /// The port.
    pub port: Port,
    /// The protocol.
    pub proto: Proto,
}

impl fmt::Display for FrontendAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", SocketAddr::new(self.addr, self.port.get()), self.proto)
    }
}

/// One service's claim. The least one wins: the older, then the one whose name comes first.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    /// A service of unknown age is younger than any other.
    ageless: bool,
    created: Option<Timestamp>,
    service: ServiceName,
    /// The port's index in the service's `spec.ports`.
    port: usize,
}

/// A service that wanted an address and port and did not get it, or now has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Contest {
    pub frontend: FrontendAddress,
    pub loser: ServiceName,
    /// The index of the port in the loser's `spec.ports`.
    pub port: usize,
    pub winner: ServiceName,
}

#[derive(Default)]
pub(super) struct Claims {
    by_frontend: HashMap<FrontendAddress, Vec<Claim>>,
    contested: BTreeSet<FrontendAddress>,
}

/// What a change of claims led to.
#[derive(Default)]
pub(super) struct Outcome {
    /// Services that won or lost an address and port.
    pub touched: BTreeSet<ServiceName>,
    /// Contests that are new, or have another winner.
    pub lost: Vec<Contest>,
    /// Services that no longer contest what they did contest.
    pub settled: BTreeSet<ServiceName>,
}

impl Claims {
    /// Replaces the claims of a service's old version by those of the new one.
    pub fn replace(&mut self, old: Option<&Service>, new: Option<&Service>) -> Outcome {
        let before: BTreeSet<_> = old.into_iter().flat_map(claims_of).collect();
        let after: BTreeSet<_> = new.into_iter().flat_map(claims_of).collect();
        let mut outcome = Outcome::default();
        let changed: BTreeSet<_> = before.symmetric_difference(&after).map(|(frontend, _)| *frontend).collect();
        for frontend in changed {
            let claims = self.by_frontend.entry(frontend).or_default();
            let was: Vec<_> = contests(frontend, claims).collect();
            let had = claims.first().map(|claim| claim.service.clone());
            claims.retain(|claim| !before.contains(&(frontend, claim.clone())));
            claims.reserve_exact(1);
            claims.extend(after.iter().filter(|(wanted, _)| *wanted == frontend).map(|(_, claim)| claim.clone()));
            claims.sort();

            let has = claims.first().map(|claim| claim.service.clone());
            if had != has {
                outcome.touched.extend(had.into_iter().chain(has));
            }
            let is: Vec<_> = contests(frontend, claims).collect();
            outcome.settled.extend(
                was.iter().filter(|w| !is.iter().any(|i| i.loser == w.loser)).map(|contest| contest.loser.clone()),
            );
            if is.is_empty() {
                self.contested.remove(&frontend)
            } else {
                self.contested.insert(frontend)
            };
            outcome.lost.extend(is.into_iter().filter(|contest| !was.contains(contest)));
            if claims.is_empty() {
                self.by_frontend.remove(&frontend);
            }
        }
        outcome
    }

    /// Whether the service has the address and port.
    pub fn holds(&self, service: &ServiceName, frontend: &FrontendAddress) -> bool {
        self.by_frontend.get(frontend).and_then(|claims| claims.first()).is_some_and(|claim| claim.service == *service)
    }

    /// Every claim that lost.
    pub fn contests(&self) -> impl Iterator<Item = Contest> {
        self.contested
            .iter()
            .filter_map(|frontend| Some((frontend, self.by_frontend.get(frontend)?)))
            .flat_map(|(frontend, claims)| contests(*frontend, claims))
    }
}

fn contests(frontend: FrontendAddress, claims: &[Claim]) -> impl Iterator<Item = Contest> {
    let winner = claims.first();
    claims.iter().skip(1).filter_map(move |claim| {
        Some(Contest { frontend, loser: claim.service.clone(), port: claim.port, winner: winner?.service.clone() })
    })
}

fn claims_of(service: &Service) -> impl Iterator<Item = (FrontendAddress, Claim)> {
    service.ports.iter().flat_map(move |port| {
        service.cluster_ips.iter().map(move |addr| {
            let claim = Claim {
                ageless: service.created.is_none(),
                created: service.created,
                service: service.name.clone(),
                port: port.index,
            };
            (FrontendAddress { addr: *addr, port: port.port, proto: port.proto }, claim)
        })
    })
}
