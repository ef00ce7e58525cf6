//! Which service has which address and port: of two that want the same, the older.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
};

use jiff::Timestamp;

use super::{FrontendAddress, Service, ServiceName, frontend::Source};

/// One service's claim. The least one wins: the older, then the one whose name comes first.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    /// A service of unknown age is younger than any other.
    ageless: bool,
    created: Option<Timestamp>,
    service: ServiceName,
    /// What of the service says so.
    source: Source,
}

/// A service that wanted an address and port and did not get it, or now has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Contest {
    pub frontend: FrontendAddress,
    pub loser: ServiceName,
    /// What of the loser says that it wants it.
    pub source: Source,
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
    /// Replaces the claims of a service's old version by those of the new one; each with the addresses that node ports
    /// have then.
    pub fn replace(&mut self, old: Option<Claimant<'_>>, new: Option<Claimant<'_>>) -> Outcome {
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

    /// Whether the service has the address and port, by what of it says so.
    pub fn holds(&self, service: &ServiceName, frontend: &FrontendAddress, source: Source) -> bool {
        let first = self.by_frontend.get(frontend).and_then(|claims| claims.first());
        first.is_some_and(|claim| claim.service == *service && claim.source == source)
    }

    /// Every claim that lost.
    pub fn contests(&self) -> impl Iterator<Item = Contest> {
        self.contested
            .iter()
            .filter_map(|frontend| Some((frontend, self.by_frontend.get(frontend)?)))
            .flat_map(|(frontend, claims)| contests(*frontend, claims))
    }
}

/// A service that says the same twice, of one port, contests nothing.
fn contests(frontend: FrontendAddress, claims: &[Claim]) -> impl Iterator<Item = Contest> {
    let winner = claims.first();
    claims.iter().skip(1).filter_map(move |claim| {
        let winner =
            winner.filter(|winner| winner.service != claim.service || winner.source.port != claim.source.port)?;
        let (loser, source) = (claim.service.clone(), claim.source);
        Some(Contest { frontend, loser, source, winner: winner.service.clone() })
    })
}

/// A service, and the addresses that node ports have.
pub(super) type Claimant<'a> = (&'a Service, &'a BTreeSet<IpAddr>);

fn claims_of((service, node_ports): Claimant<'_>) -> impl Iterator<Item = (FrontendAddress, Claim)> {
    service.ports.iter().flat_map(move |port| {
        service.frontends(port, node_ports).map(move |(frontend, source)| {
            let claim = Claim {
                ageless: service.created.is_none(),
                created: service.created,
                service: service.name.clone(),
                source,
            };
            (frontend, claim)
        })
    })
}
