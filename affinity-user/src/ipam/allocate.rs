//! Who gets which address: the pure step from pools and services to what their status ought to say.
//!
//! Older services and pools come first. What a service has it keeps, as long as a pool that selects it has the address, or
//! none has it any more. An address that somebody has is nobody else's, also in the run that takes it from its owner: it is
//! free once that is written.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use jiff::Timestamp;
use thiserror::Error;

use super::block::{IpFamily, Range, merged, next};
use super::pool::{LoadBalancerPool, Reservation, Usage};
use super::request::LbService;
use crate::model::{ServiceName, shared};
use crate::selector::ServiceSelector;

/// A pool, as far as giving addresses concerns it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pool {
    /// Its name.
    pub name: String,
    /// When it was made.
    pub created: Option<Timestamp>,
    /// Which services are given its addresses.
    pub selector: ServiceSelector,
    /// Whether no more of them are given.
    pub disabled: bool,
    /// Its addresses: in order, each once.
    pub ranges: Vec<Range>,
    /// What is wrong with its blocks.
    pub faults: Vec<String>,
    /// What is being given of it.
    pub reserved: Vec<(IpAddr, ServiceName)>,
}

impl Pool {
    /// A pool as the API server has it. Of what is wrong with a block it has nothing.
    pub fn read(object: &LoadBalancerPool) -> Self {
        let (mut ranges, mut faults) = (Vec::new(), Vec::new());
        for (index, block) in object.spec.blocks.iter().enumerate() {
            match Range::of(block) {
                Ok(range) => ranges.push(range),
                Err(error) => faults.push(format!("spec.blocks[{index}]: {error}")),
            }
        }
        let reserved = object.status.iter().flat_map(|status| &status.reserved);
        Self {
            name: object.metadata.name.clone().unwrap_or_default(),
            created: object.metadata.creation_timestamp.as_ref().map(|time| time.0),
            selector: object.spec.service_selector.clone().unwrap_or_default(),
            disabled: object.spec.disabled,
            ranges: merged(ranges),
            faults,
            reserved: reserved.filter_map(read_reservation).collect(),
        }
    }

    fn has(&self, address: IpAddr) -> bool {
        let at = self.ranges.partition_point(|range| range.last() < address);
        self.ranges.get(at).is_some_and(|range| range.contains(address))
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.ranges.iter().any(|range| other.ranges.iter().any(|other| range.overlaps(other)))
    }
}

fn read_reservation(reservation: &Reservation) -> Option<(IpAddr, ServiceName)> {
    let name = ServiceName::new(shared(&reservation.namespace), shared(&reservation.name));
    Some((reservation.ip.parse().ok()?, name))
}

/// Why a service has not the addresses that it is to have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Problem {
    /// It asks for something that is no address.
    #[error("{0:?} is asked for, and is no IP address")]
    NotAnAddress(String),
    /// It asks for an address of a family that it has not.
    #[error("{0} is asked for, and the service's ipFamilies have no {family}", family = IpFamily::of(*.0))]
    WrongFamily(IpAddr),
    /// It asks for more addresses of a family than one.
    #[error("{0} is asked for, and another {family} address before it: a service has one a family", family = IpFamily::of(*.0))]
    OneAFamily(IpAddr),
    /// Another service has the address that it asks for.
    #[error("{address} is asked for, and taken by Service {by}")]
    Taken {
        /// The address.
        address: IpAddr,
        /// The service that has it.
        by: ServiceName,
    },
    /// No pool has the address that it asks for.
    #[error("{0} is asked for, and outside every pool")]
    OutsidePools(IpAddr),
    /// The pool of the address that it asks for is for other services.
    #[error("{address} is asked for, and pool {pool} does not select this service")]
    NotSelected {
        /// The address.
        address: IpAddr,
        /// The pool that has it.
        pool: String,
    },
    /// The pool of the address that it asks for gives none.
    #[error("{address} is asked for, and pool {pool} is disabled")]
    Disabled {
        /// The address.
        address: IpAddr,
        /// The pool that has it.
        pool: String,
    },
    /// No pool that gives addresses of a family selects the service.
    #[error("no pool that gives {0} addresses selects this service")]
    NoPool(IpFamily),
    /// All addresses of the pools that select it are taken.
    #[error("no {family} address is free in {}", pools.join(", "))]
    Exhausted {
        /// The family.
        family: IpFamily,
        /// The pools, by name.
        pools: Vec<String>,
    },
}

impl Problem {
    /// A condition's reason.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::NotAnAddress(_) | Self::WrongFamily(_) | Self::OneAFamily(_) => "BadRequest",
            Self::Taken { .. } => "AddressTaken",
            Self::OutsidePools(_) => "OutsidePools",
            Self::NotSelected { .. } => "NotSelected",
            Self::Disabled { .. } => "PoolDisabled",
            Self::NoPool(_) => "NoPool",
            Self::Exhausted { .. } => "PoolExhausted",
        }
    }
}

/// An address that a service is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// The address.
    pub address: IpAddr,
    /// The pool that has it; none where it is no pool's any more.
    pub pool: Option<String>,
    /// Whether it may be written into the service's status: it is there, or it is reserved.
    pub is_safe: bool,
}

/// What a service is to have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Its addresses, in the order of its families.
    pub shares: Vec<Share>,
    /// Why it has not all that it is to have.
    pub problems: Vec<Problem>,
}

/// What becomes of a pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolOutcome {
    /// The older pool that has some of its addresses, so that none of this one is given.
    pub conflict: Option<String>,
    /// IPv4 addresses.
    pub ipv4: Usage,
    /// IPv6 addresses.
    pub ipv6: Usage,
    /// What is being given.
    pub reserved: Vec<(IpAddr, ServiceName)>,
    /// Addresses that no pool has any more, of services that this is the first pool of.
    pub outside: Vec<(IpAddr, ServiceName)>,
}

/// What becomes of all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allocation {
    /// The services that this is to see to.
    pub services: BTreeMap<ServiceName, Outcome>,
    /// The pools, by name.
    pub pools: BTreeMap<String, PoolOutcome>,
}

/// Says who gets which address.
pub fn allocate(pools: &[Pool], services: &BTreeMap<ServiceName, LbService>) -> Allocation {
    let mut run = Run::new(pools, services);
    run.keep();
    run.keep_reserved();
    run.grant();
    run.give();
    run.finish()
}

/// A service while addresses are given.
struct Applicant<'a> {
    name: &'a ServiceName,
    service: &'a LbService,
    shares: BTreeMap<IpFamily, Share>,
    problems: Vec<Problem>,
}

impl Applicant<'_> {
    fn asks_for(&self, family: IpFamily) -> bool {
        !self.service.not_addresses.is_empty() || self.service.wanted.iter().any(|ip| IpFamily::of(*ip) == family)
    }

    fn lacks(&self, family: IpFamily) -> bool {
        self.service.families.contains(&family) && !self.shares.contains_key(&family)
    }
}

struct Run<'a> {
    /// The oldest first.
    pools: Vec<&'a Pool>,
    /// For each pool the older one that it overlaps.
    conflicts: Vec<Option<&'a str>>,
    /// For each pool and range of it where the next free address is looked for; none where there is none.
    cursors: Vec<Vec<Option<IpAddr>>>,
    /// The oldest first; those alone that this is to see to.
    applicants: Vec<Applicant<'a>>,
    services: &'a BTreeMap<ServiceName, LbService>,
    owners: BTreeMap<IpAddr, ServiceName>,
    /// What is not in its service's status yet.
    reserved: BTreeSet<(IpAddr, ServiceName)>,
}

impl<'a> Run<'a> {
    fn new(pools: &'a [Pool], services: &'a BTreeMap<ServiceName, LbService>) -> Self {
        let mut pools: Vec<&Pool> = pools.iter().collect();
        pools.sort_by(|a, b| (a.created, &a.name).cmp(&(b.created, &b.name)));
        let mut conflicts: Vec<Option<&str>> = Vec::with_capacity(pools.len());
        for (index, pool) in pools.iter().enumerate() {
            let used = pools[..index].iter().zip(&conflicts).filter(|(_, conflict)| conflict.is_none());
            let older = used.map(|(older, _)| older).find(|older| older.overlaps(pool));
            conflicts.push(older.map(|older| older.name.as_str()));
        }
        let cursors = pools.iter().map(|pool| pool.ranges.iter().map(|range| Some(range.first())).collect()).collect();
        let mut sorted: Vec<_> = services.iter().collect();
        sorted.sort_by_key(|(name, service)| (service.created, *name));
        let mut run = Self {
            pools,
            conflicts,
            cursors,
            applicants: Vec::new(),
            services,
            owners: BTreeMap::new(),
            reserved: BTreeSet::new(),
        };
        for (name, service) in sorted {
            for address in &service.has {
                run.owners.entry(*address).or_insert_with(|| name.clone());
            }
            if run.concerns(service) {
                run.applicants.push(Applicant { name, service, shares: BTreeMap::new(), problems: Vec::new() });
            }
        }
        run
    }

    /// Whether this is to see to a service: not where there is no pool, and not where somebody else has given it addresses.
    fn concerns(&self, service: &LbService) -> bool {
        if !service.is_ours {
            return false;
        }
        let is_known =
            service.condition.is_some() || service.has.iter().any(|address| self.pool_of(*address).is_some());
        is_known || service.has.is_empty() && !self.pools.is_empty()
    }

    /// The pool that has an address, of those that are used.
    fn pool_of(&self, address: IpAddr) -> Option<usize> {
        (0..self.pools.len()).find(|pool| self.conflicts[*pool].is_none() && self.pools[*pool].has(address))
    }

    fn selects(&self, pool: usize, applicant: usize) -> bool {
        let Applicant { name, service, .. } = &self.applicants[applicant];
        self.pools[pool].selector.matches(name, &service.labels)
    }

    fn is_owner(&self, address: IpAddr, applicant: usize) -> bool {
        self.owners.get(&address).is_some_and(|owner| owner == self.applicants[applicant].name)
    }

    fn share(&mut self, applicant: usize, address: IpAddr, pool: Option<usize>, is_safe: bool) {
        let pool = pool.map(|pool| self.pools[pool].name.clone());
        let applicant = &mut self.applicants[applicant];
        applicant.shares.insert(IpFamily::of(address), Share { address, pool, is_safe });
        self.owners.insert(address, applicant.name.clone());
        if !is_safe {
            self.reserved.insert((address, applicant.name.clone()));
        }
    }

    /// What services have already.
    fn keep(&mut self) {
        for applicant in 0..self.applicants.len() {
            let service = self.applicants[applicant].service;
            // Of several of a family the one that it asks for.
            let (wanted, others): (Vec<IpAddr>, Vec<IpAddr>) =
                service.has.iter().partition(|address| service.wanted.contains(address));
            for address in wanted.into_iter().chain(others) {
                if !self.applicants[applicant].lacks(IpFamily::of(address)) || !self.is_owner(address, applicant) {
                    continue;
                }
                let pool = self.pool_of(address);
                if pool.is_none_or(|pool| self.selects(pool, applicant)) {
                    self.share(applicant, address, pool, true);
                }
            }
        }
    }

    /// What was about to be given.
    fn keep_reserved(&mut self) {
        let numbers: BTreeMap<&ServiceName, usize> =
            self.applicants.iter().enumerate().map(|(number, applicant)| (applicant.name, number)).collect();
        for pool in 0..self.pools.len() {
            if self.conflicts[pool].is_some() {
                continue;
            }
            for (address, name) in &self.pools[pool].reserved {
                if self.owners.contains_key(address) || !self.pools[pool].has(*address) {
                    continue;
                }
                let Some(applicant) = numbers.get(name).copied() else {
                    if !self.services.contains_key(name) {
                        // Whoever has reserved it has seen a service that is not seen here yet.
                        self.owners.insert(*address, name.clone());
                        self.reserved.insert((*address, name.clone()));
                    }
                    continue;
                };
                let family = IpFamily::of(*address);
                let Applicant { service, .. } = &self.applicants[applicant];
                let is_wanted = service.wanted.contains(address) || !self.applicants[applicant].asks_for(family);
                let replaces = service.wanted.contains(address) && service.families.contains(&family);
                if is_wanted && (replaces || self.applicants[applicant].lacks(family)) && self.selects(pool, applicant)
                {
                    self.share(applicant, *address, Some(pool), true);
                    self.reserved.insert((*address, name.clone()));
                }
            }
        }
    }

    /// What services ask for.
    fn grant(&mut self) {
        for applicant in 0..self.applicants.len() {
            let service = self.applicants[applicant].service;
            let faults = service.not_addresses.iter().cloned().map(Problem::NotAnAddress);
            self.applicants[applicant].problems.extend(faults);
            let mut families = BTreeSet::new();
            for address in &service.wanted {
                let problem = if families.insert(IpFamily::of(*address)) {
                    self.grant_one(applicant, *address).err()
                } else {
                    Some(Problem::OneAFamily(*address))
                };
                self.applicants[applicant].problems.extend(problem);
            }
        }
    }

    fn grant_one(&mut self, applicant: usize, address: IpAddr) -> Result<(), Problem> {
        let family = IpFamily::of(address);
        let Applicant { name, service, shares, .. } = &self.applicants[applicant];
        if !service.families.contains(&family) {
            return Err(Problem::WrongFamily(address));
        }
        if shares.get(&family).is_some_and(|share| share.address == address) {
            return Ok(());
        }
        if let Some(by) = self.owners.get(&address)
            && by != *name
        {
            return Err(Problem::Taken { address, by: by.clone() });
        }
        let Some(pool) = self.pool_of(address) else { return Err(Problem::OutsidePools(address)) };
        let named = || self.pools[pool].name.clone();
        if !self.selects(pool, applicant) {
            return Err(Problem::NotSelected { address, pool: named() });
        }
        if self.pools[pool].disabled {
            return Err(Problem::Disabled { address, pool: named() });
        }
        self.share(applicant, address, Some(pool), false);
        Ok(())
    }

    /// The first free address for whoever has none and asks for none.
    fn give(&mut self) {
        for applicant in 0..self.applicants.len() {
            for family in self.applicants[applicant].service.families.clone() {
                let it = &self.applicants[applicant];
                if !it.lacks(family) || it.asks_for(family) {
                    continue;
                }
                let pools: Vec<usize> = (0..self.pools.len())
                    .filter(|pool| self.conflicts[*pool].is_none() && !self.pools[*pool].disabled)
                    .filter(|pool| self.pools[*pool].ranges.iter().any(|range| range.family() == family))
                    .filter(|pool| self.selects(*pool, applicant))
                    .collect();
                match pools.iter().find_map(|pool| Some((*pool, self.free(*pool, family)?))) {
                    Some((pool, address)) => self.share(applicant, address, Some(pool), false),
                    None if pools.is_empty() => self.applicants[applicant].problems.push(Problem::NoPool(family)),
                    None => {
                        let pools = pools.iter().map(|pool| self.pools[*pool].name.clone()).collect();
                        self.applicants[applicant].problems.push(Problem::Exhausted { family, pools });
                    }
                }
            }
        }
    }

    /// The lowest free address of a pool. Nothing becomes free while addresses are given, so each is looked at once.
    fn free(&mut self, pool: usize, family: IpFamily) -> Option<IpAddr> {
        for (range, cursor) in self.pools[pool].ranges.iter().zip(&mut self.cursors[pool]) {
            if range.family() != family {
                continue;
            }
            while let Some(address) = *cursor {
                *cursor = next(address).filter(|next| range.contains(*next));
                if !self.owners.contains_key(&address) {
                    return Some(address);
                }
            }
        }
        None
    }

    fn finish(self) -> Allocation {
        let mut pools: BTreeMap<String, PoolOutcome> = BTreeMap::new();
        for (index, pool) in self.pools.iter().enumerate() {
            let outcome = PoolOutcome {
                conflict: self.conflicts[index].map(str::to_owned),
                ipv4: usage(pool, IpFamily::V4, &self.owners),
                ipv6: usage(pool, IpFamily::V6, &self.owners),
                ..PoolOutcome::default()
            };
            pools.insert(pool.name.clone(), outcome);
        }
        for (address, name) in &self.reserved {
            let pool = self.pool_of(*address).map(|pool| &self.pools[pool].name);
            if let Some(outcome) = pool.and_then(|pool| pools.get_mut(pool)) {
                outcome.reserved.push((*address, name.clone()));
            }
        }
        for applicant in 0..self.applicants.len() {
            let outside = self.applicants[applicant].shares.values().filter(|share| share.pool.is_none());
            for Share { address, .. } in outside {
                let first = (0..self.pools.len()).find(|pool| self.selects(*pool, applicant));
                if let Some(outcome) = first.and_then(|pool| pools.get_mut(&self.pools[pool].name)) {
                    outcome.outside.push((*address, self.applicants[applicant].name.clone()));
                }
            }
        }
        let services = self.applicants.into_iter().map(|mut applicant| {
            let shares: Vec<Share> =
                applicant.service.families.iter().filter_map(|family| applicant.shares.remove(family)).collect();
            if !shares.is_empty() && !applicant.service.needs_all_families {
                // One family is enough.
                applicant.problems.retain(|it| !matches!(it, Problem::NoPool(_) | Problem::Exhausted { .. }));
            }
            (applicant.name.clone(), Outcome { shares, problems: applicant.problems })
        });
        Allocation { services: services.collect(), pools }
    }
}

fn usage(pool: &Pool, family: IpFamily, owners: &BTreeMap<IpAddr, ServiceName>) -> Usage {
    let ranges = || pool.ranges.iter().filter(|range| range.family() == family);
    let total = ranges().fold(0_u128, |sum, range| sum.saturating_add(range.size()));
    let used: usize = ranges().map(|range| owners.range(range.first()..=range.last()).count()).sum();
    let saturate = |number: u128| i64::try_from(number).unwrap_or(i64::MAX);
    Usage {
        total: saturate(total),
        used: saturate(used as u128),
        available: saturate(total.saturating_sub(used as u128)),
    }
}
