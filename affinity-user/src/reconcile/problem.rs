//! What keeps a service port from being programmed, and when it is tried again.

use std::{
    collections::BTreeMap,
    fmt,
    time::{Duration, Instant},
};

use affinity_common::types::ServiceId;
use thiserror::Error;

use crate::{model::ServicePortName, tables::TableError};

/// Why something could not be programmed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ReconcileError {
    /// A map refused.
    #[error(transparent)]
    Table(#[from] TableError),
    /// There is no room in `slots`.
    #[error("slots has no {needed} free in a row (of {capacity}): raise --map-size slots=N")]
    NoSlots {
        /// How many are needed.
        needed: usize,
        /// How many there are.
        capacity: u32,
    },
    /// Ids have run out.
    #[error("every {of} id was given out: run `affinity cleanup` and start again")]
    NoIds {
        /// Of what.
        of: &'static str,
    },
    /// Another service port has the frontend.
    #[error("{frontend} belongs to {holder}: change the address or port of one of them")]
    Conflict {
        /// The address and port.
        frontend: String,
        /// The service port that has it.
        holder: ServicePortName,
    },
    /// A name that does not fit the map.
    #[error("the name is longer than Kubernetes allows: 63 characters each for namespace, service and port")]
    LongName,
}

impl ReconcileError {
    /// Whether it is for want of room: others that go may make some.
    pub fn is_full(&self) -> bool {
        match self {
            Self::Table(error) => error.is_full(),
            Self::NoSlots { .. } => true,
            Self::NoIds { .. } | Self::Conflict { .. } | Self::LongName => false,
        }
    }
}

/// What is to be programmed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// A service port.
    ServicePort(ServicePortName),
    /// What the maps hold of a service port whose name nobody knows: to be taken out.
    Stray(ServiceId),
    /// What is known of services' addresses, over all of them: their filter, and addresses without a frontend.
    Addresses,
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ServicePort(name) => name.fmt(f),
            Self::Stray(id) => write!(f, "service id {id}, which has no name"),
            Self::Addresses => f.write_str("services' addresses"),
        }
    }
}

/// Something that is not programmed as it ought to be.
#[derive(Clone, Debug)]
pub struct Problem {
    /// What.
    pub subject: Subject,
    /// Why.
    pub error: ReconcileError,
    /// Since when.
    pub since: Instant,
    /// How often it was tried.
    pub attempts: u32,
    /// When it is tried next.
    pub retry_at: Instant,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.error)
    }
}

/// The wait after the first failure; it doubles with each.
const FIRST_WAIT: Duration = Duration::from_millis(200);
/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// The problems that there are.
#[derive(Default)]
pub(super) struct Problems {
    by_subject: BTreeMap<Subject, Problem>,
}

impl Problems {
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.by_subject.values()
    }

    /// When the first of them is to be tried again.
    pub fn next_retry(&self) -> Option<Instant> {
        self.by_subject.values().map(|problem| problem.retry_at).min()
    }

    /// Those that are to be tried again.
    pub fn due(&self, now: Instant) -> impl Iterator<Item = &Subject> {
        self.by_subject.values().filter(move |problem| problem.retry_at <= now).map(|problem| &problem.subject)
    }

    /// Whether there is a problem with it.
    pub fn contains(&self, subject: &Subject) -> bool {
        self.by_subject.contains_key(subject)
    }

    /// It is programmed, or need not be any more.
    pub fn solved(&mut self, subject: &Subject) {
        self.by_subject.remove(subject);
    }

    /// It failed once more.
    pub fn failed(&mut self, subject: Subject, error: ReconcileError, now: Instant) {
        let known = self.by_subject.get(&subject);
        let (since, attempts) = known.map_or((now, 1), |problem| (problem.since, problem.attempts.saturating_add(1)));
        let wait = FIRST_WAIT.saturating_mul(1 << (attempts - 1).min(16)).min(LONGEST_WAIT);
        self.by_subject.insert(subject.clone(), Problem { subject, error, since, attempts, retry_at: now + wait });
    }
}

#[cfg(test)]
mod tests {
    use affinity_common::types::Proto;

    use super::*;
    use crate::model::ServiceName;

    #[test]
    fn a_problem_names_its_object_and_what_to_do() {
        let mut problems = Problems::default();
        let (name, start) = (ServiceName::new("default", "web"), Instant::now());
        let subject = Subject::ServicePort(ServicePortName { service: name, port: "http".into(), proto: Proto::TCP });
        let error = TableError::Full { map: "frontends_v4".into(), capacity: 65_536 };
        problems.failed(subject, error.into(), start);
        assert_eq!(
            problems.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["default/web/http/TCP: frontends_v4 is full (65536): raise --map-size frontends=N"]
        );
    }

    #[test]
    fn waits_double_up_to_the_longest() {
        let (mut problems, now) = (Problems::default(), Instant::now());
        let subject = Subject::Stray(ServiceId { id: 1 });
        let mut waits = Vec::new();
        for _ in 0..40 {
            problems.failed(subject.clone(), ReconcileError::LongName, now);
            waits.push(problems.next_retry().unwrap() - now);
        }
        assert_eq!(waits[..3], [200, 400, 800].map(Duration::from_millis));
        assert_eq!(waits[39], LONGEST_WAIT);
        assert_eq!(problems.due(now + LONGEST_WAIT).collect::<Vec<_>>(), [&subject]);
        problems.solved(&subject);
        assert_eq!(problems.next_retry(), None);
    }
}
