//! What is told of services and pools: conditions, and events where something is wrong.

use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::allocate::{Outcome, Pool, PoolOutcome};
use super::pool::{LoadBalancerPoolStatus, Reservation};
use crate::model::ServiceName;

/// The most addresses of a pool that are being given at a time: a pool is one object, of bounded size.
const RESERVED_MAX: usize = 256;
/// How many of those that a message is about are named in it.
const NAMED: usize = 5;

/// What a condition says, but for when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// `True` or `False`.
    pub status: &'static str,
    /// A word for programs.
    pub reason: &'static str,
    /// A sentence for people.
    pub message: String,
    /// Whether somebody should be told.
    pub is_warning: bool,
}

impl Verdict {
    fn new(holds: bool, reason: &'static str, message: impl Into<String>, is_warning: bool) -> Self {
        Self { status: if holds { "True" } else { "False" }, reason, message: message.into(), is_warning }
    }

    /// Of a service: whether it has the addresses that it is to have.
    pub fn of_service(outcome: &Outcome) -> Self {
        if let Some(first) = outcome.problems.first() {
            let problems: Vec<String> = outcome.problems.iter().map(ToString::to_string).collect();
            return Self::new(false, first.reason(), problems.join("; "), true);
        }
        let of_pool = |share: &super::allocate::Share| match &share.pool {
            Some(pool) => format!("{} of pool {pool}", share.address),
            None => format!("{}, which is no pool's any more: it is kept", share.address),
        };
        let message = outcome.shares.iter().map(of_pool).collect::<Vec<_>>().join(", ");
        let outside = outcome.shares.iter().any(|share| share.pool.is_none());
        if outside {
            Self::new(true, "OutsidePools", message, true)
        } else {
            Self::new(true, "Assigned", message, false)
        }
    }

    /// Of a pool: `Ready`, `Conflict` and `Outside`.
    pub fn of_pool(pool: &Pool, outcome: &PoolOutcome) -> [(&'static str, Self); 3] {
        let ready = match (&outcome.conflict, pool.faults.is_empty(), pool.disabled) {
            (Some(older), ..) => {
                Self::new(false, "Conflict", format!("pool {older} is older and has some of it"), false)
            }
            (None, false, _) => Self::new(false, "BadBlocks", pool.faults.join("; "), true),
            (None, true, true) => Self::new(false, "Disabled", "no more addresses are given", false),
            (None, true, false) => Self::new(true, "Ready", "addresses are given", false),
        };
        let conflict = match &outcome.conflict {
            Some(older) => {
                let message = format!("overlaps pool {older}, which is older: none of this one's addresses is given");
                Self::new(true, "Overlap", message, true)
            }
            None => Self::new(false, "NoOverlap", "", false),
        };
        let outside = if outcome.outside.is_empty() {
            Self::new(false, "AllInPools", "", false)
        } else {
            let message = format!("no pool has any more what services have: {}", named(&outcome.outside));
            Self::new(true, "PoolShrunk", message, true)
        };
        [("Ready", ready), ("Conflict", conflict), ("Outside", outside)]
    }

    /// The condition, with the time since when it is so.
    pub fn condition(&self, type_: &str, before: &[Condition], generation: Option<i64>) -> Condition {
        let before = before.iter().find(|condition| condition.type_ == type_ && condition.status == self.status);
        Condition {
            type_: type_.to_owned(),
            status: self.status.to_owned(),
            reason: self.reason.to_owned(),
            message: self.message.clone(),
            observed_generation: generation,
            last_transition_time: before.map_or_else(|| Time(Timestamp::now()), |it| it.last_transition_time.clone()),
        }
    }
}

fn named(addresses: &[(IpAddr, ServiceName)]) -> String {
    let texts = addresses.iter().take(NAMED).map(|(address, service)| format!("{address} of {service}"));
    let text = texts.collect::<Vec<_>>().join(", ");
    match addresses.len().saturating_sub(NAMED) {
        0 => text,
        more => format!("{text} and {more} more"),
    }
}

/// A pool's status as it ought to be.
pub fn status(
    pool: &Pool,
    outcome: &PoolOutcome,
    before: &LoadBalancerPoolStatus,
    generation: Option<i64>,
) -> LoadBalancerPoolStatus {
    // What is reserved stays so; of what is to be, as much as there is room for.
    let (known, new): (Vec<_>, Vec<_>) = outcome.reserved.iter().partition(|it| pool.reserved.contains(it));
    let reserved = known.into_iter().chain(new).take(RESERVED_MAX).map(|(ip, name)| Reservation {
        ip: ip.to_string(),
        namespace: name.namespace.to_string(),
        name: name.name.to_string(),
    });
    let verdicts = Verdict::of_pool(pool, outcome);
    LoadBalancerPoolStatus {
        ipv4: outcome.ipv4,
        ipv6: outcome.ipv6,
        reserved: reserved.collect(),
        conditions: verdicts
            .iter()
            .map(|(type_, verdict)| verdict.condition(type_, &before.conditions, generation))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ipam::allocate::{Problem, Share};
    use crate::ipam::block::IpFamily;

    fn ip(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    #[test]
    fn a_service_is_told_what_it_has_or_why_not() {
        let share = |pool: Option<&str>| Share { address: ip(1), pool: pool.map(str::to_owned), is_safe: true };
        for (shares, problems, expected) in [
            (vec![share(Some("p"))], vec![], ("True", "Assigned", "192.0.2.1 of pool p", false)),
            (
                vec![share(None)],
                vec![],
                ("True", "OutsidePools", "192.0.2.1, which is no pool's any more: it is kept", true),
            ),
            (
                vec![],
                vec![Problem::NoPool(IpFamily::V6)],
                ("False", "NoPool", "no pool that gives IPv6 addresses selects this service", true),
            ),
        ] {
            let verdict = Verdict::of_service(&Outcome { shares, problems });
            let told = (verdict.status, verdict.reason, verdict.message.as_str(), verdict.is_warning);
            assert_eq!(told, expected);
        }
    }

    #[test]
    fn a_condition_is_since_its_status_changed() {
        let old = Time(Timestamp::UNIX_EPOCH);
        let verdict = Verdict::new(true, "Ready", "x", false);
        let before = [Condition { last_transition_time: old.clone(), ..verdict.condition("Ready", &[], None) }];
        assert_eq!(verdict.condition("Ready", &before, None).last_transition_time, old);
        let other = Verdict { status: "False", ..verdict };
        assert!(other.condition("Ready", &before, None).last_transition_time > old);
    }

    #[test]
    fn of_much_that_is_to_be_given_a_part_is_reserved() {
        let service = |n: u16| ServiceName::new("default", format!("s{n}"));
        let address = |n: u16| IpAddr::V4((0xC000_0000 + u32::from(n)).into());
        let outcome =
            PoolOutcome { reserved: (0..500).map(|n| (address(n), service(n))).collect(), ..PoolOutcome::default() };
        let pool = Pool { reserved: vec![(address(499), service(499))], ..Pool::default() };
        let status = status(&pool, &outcome, &LoadBalancerPoolStatus::default(), Some(1));
        assert_eq!(status.reserved.len(), RESERVED_MAX);
        assert_eq!(status.reserved[0].name, "s499", "what is reserved already stays so");
    }

    #[test]
    fn few_of_many_are_named() {
        let many: Vec<_> = (0..7).map(|n| (ip(n), ServiceName::new("default", "web"))).collect();
        assert!(named(&many).ends_with("192.0.2.4 of default/web and 2 more"), "{}", named(&many));
    }
}
