//! Who does what one alone is to do: elections by Leases (`coordination.k8s.io/v1`), as Kubernetes' own components hold them.
//!
//! Every write is guarded by the Lease's version, so of two who try one gets it. That a holder has gone is told by its Lease
//! not having changed for its duration by the own clock: clocks of different nodes are not compared. A holder that can't
//! renew counts itself out after two thirds of the duration, before anybody else may count it out.
//!
//! [`elector`] is the pure part, for any number of Leases; [`Election`] carries it out. Crates for this follow one Lease each
//! by asking again and again; here a watch tells of all of them, so that what one gives up another has within a second.

pub mod elector;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::{StreamExt as _, stream};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::Api;
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::runtime::watcher;
use tokio::sync::Notify;

use crate::causes::in_full;
use crate::mirror::Mirror;
pub use elector::{Claim, Elector, Step, Timing, View};

/// The label of Leases of this project; its value is what they are for.
pub const LABEL: &str = "affinity.dev/lease";
/// How many requests are under way at once.
const AT_ONCE: usize = 16;
/// How long Leases are given up for, at the end.
const RESIGN: Duration = Duration::from_secs(2);

/// The elections that one node takes part in, for one purpose.
#[derive(Debug)]
pub struct Election {
    /// The value of [`LABEL`].
    purpose: &'static str,
    api: Api<Lease>,
    mirror: Mirror<Lease, View>,
    elector: Mutex<Elector>,
    /// Told of Leases that have changed, and of what is wanted.
    wake: Arc<Notify>,
}

/// What has come of a step.
enum Done {
    /// The Lease is as it was asked for.
    Written(Box<Lease>),
    /// It is gone.
    Gone,
    /// Another has been first.
    Lost,
    /// It is not known.
    Failed(kube::Error),
}

impl Election {
    /// Takes part in elections under a name, by Leases that have the purpose for a label.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(api: Api<Lease>, purpose: &'static str, identity: &str, timing: Timing) -> Self {
        let wake = Arc::new(Notify::new());
        let config = watcher::Config::default().labels(&format!("{LABEL}={purpose}"));
        let mirror = Mirror::start(api.clone(), config, View::read, &wake);
        Self { purpose, api, mirror, elector: Mutex::new(Elector::new(identity, timing)), wake }
    }

    fn elector(&self) -> MutexGuard<'_, Elector> {
        self.elector.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The Leases that are to be held, by name, and of which others it is known that nobody is to hold them any more.
    pub fn want(&self, claims: BTreeMap<String, Claim>, is_needed: impl Fn(&str) -> bool) {
        self.elector().want(claims, is_needed, Instant::now());
        self.wake.notify_one();
    }

    /// The Leases that are held at this moment.
    pub fn held(&self) -> BTreeSet<String> {
        self.elector().held(Instant::now())
    }

    /// Whether a Lease is held at this moment.
    pub fn holds(&self, name: &str) -> bool {
        self.elector().holds(name, Instant::now())
    }

    /// All Leases of the purpose, if they are known.
    pub fn leases(&self) -> Option<BTreeMap<String, View>> {
        let all = self.mirror.all()?;
        Some(all.into_iter().map(|(name, view)| (name.name.to_string(), view)).collect())
    }

    /// Goes on until it is dropped. `changed` is called where something else is held than before.
    pub async fn run(&self, changed: impl Fn()) {
        let mut before = BTreeSet::new();
        loop {
            let mut next = Instant::now() + Duration::from_secs(1);
            if let Some(leases) = self.leases() {
                let steps = self.elector().steps(&leases, Instant::now());
                self.carry_out(steps, &leases).await;
                next = self.elector().next(&leases, Instant::now());
            }
            let held = self.held();
            if held != before {
                before = held;
                changed();
            }
            tokio::select! {
                () = tokio::time::sleep_until(next.into()) => {}
                () = self.wake.notified() => {}
            }
        }
    }

    /// Gives up everything that is held, so that others need not wait until it is over; not for longer than a moment.
    pub async fn resign(&self) {
        let steps = self.elector().resign();
        let leases = self.leases().unwrap_or_default();
        if tokio::time::timeout(RESIGN, self.carry_out(steps, &leases)).await.is_err() {
            tracing::warn!("not all Leases were given up in time: others have what they are for when they are over");
        }
    }

    /// Deletes Leases that nobody needs, nor has written to for so long: those whose holder did not live to do so.
    pub async fn sweep(&self, is_needed: impl Fn(&str) -> bool, unused: Duration) {
        for (name, view) in self.leases().unwrap_or_default() {
            if is_needed(&name) || view.seen.elapsed() < unused {
                continue;
            }
            let guard = Preconditions { resource_version: Some(view.version), uid: None };
            let deleted = self.api.delete(&name, &DeleteParams::default().preconditions(guard)).await;
            if let Err(error) = deleted {
                tracing::debug!(lease = name, error = in_full(&error), "a Lease that nobody needs is not deleted");
            }
        }
    }

    async fn carry_out(&self, steps: Vec<Step>, leases: &BTreeMap<String, View>) {
        let work = stream::iter(steps.into_iter().map(|step| async {
            let started = Instant::now();
            let done = self.write(&step, leases.get(step.name())).await;
            (step, started, done)
        }));
        let mut work = std::pin::pin!(work.buffer_unordered(AT_ONCE));
        while let Some((step, started, done)) = work.next().await {
            match done {
                Done::Written(lease) => {
                    self.mirror.put(&lease);
                    self.elector().done(&step, lease.metadata.resource_version.as_deref(), started);
                }
                Done::Gone => self.elector().done(&step, None, started),
                Done::Lost => self.elector().lost(&step, started),
                Done::Failed(error) => {
                    let (lease, error) = (step.name(), in_full(&error));
                    tracing::warn!(lease, error, "a Lease can't be written");
                    self.elector().failed(&step, started);
                }
            }
        }
    }

    async fn write(&self, step: &Step, view: Option<&View>) -> Done {
        match self.request(step, view).await {
            Ok(done) => done,
            Err(kube::Error::Api(status)) if status.is_not_found() => match step {
                Step::Release { .. } => Done::Gone,
                Step::Acquire { .. } | Step::Renew { .. } => Done::Lost,
            },
            // The answer to an earlier write may have been lost on its way: then it is still held.
            Err(kube::Error::Api(status)) if status.code == 409 => match (step, self.api.get(step.name()).await) {
                (Step::Renew { .. }, Ok(lease)) if self.elector().is_own(&lease) => Done::Written(Box::new(lease)),
                (_, Ok(lease)) => {
                    self.mirror.put(&lease);
                    Done::Lost
                }
                (_, Err(_)) => Done::Lost,
            },
            Err(error) => Done::Failed(error),
        }
    }

    async fn request(&self, step: &Step, view: Option<&View>) -> kube::Result<Done> {
        let params = PostParams::default();
        let mut lease = Lease::default();
        lease.metadata.name = Some(step.name().to_owned());
        lease.metadata.labels = Some(
            [(LABEL, self.purpose), ("app.kubernetes.io/managed-by", "affinity")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
        );
        let now = Timestamp::now();
        let timing = self.elector().timing();
        let duration = i32::try_from(timing.duration.as_secs()).unwrap_or(i32::MAX).max(1);
        let identity = self.elector().identity().to_owned();
        let written = match step {
            Step::Acquire { claim, .. } => {
                let before = view.map_or(0, |view| view.transitions);
                let is_own = view.is_some_and(|view| view.holder.as_deref() == Some(&identity));
                lease.metadata.annotations = Some(claim.annotations.clone());
                lease.spec = Some(LeaseSpec {
                    acquire_time: Some(MicroTime(
                        view.filter(|_| is_own).and_then(|view| view.acquired).unwrap_or(now),
                    )),
                    lease_transitions: Some(if view.is_none() || is_own { before } else { before + 1 }),
                    holder_identity: Some(identity),
                    lease_duration_seconds: Some(duration),
                    renew_time: Some(MicroTime(now)),
                    ..LeaseSpec::default()
                });
                match view {
                    None => self.api.create(&params, &lease).await?,
                    Some(view) => {
                        lease.metadata.resource_version = Some(view.version.clone());
                        self.api.replace(step.name(), &params, &lease).await?
                    }
                }
            }
            Step::Renew { version, claim, .. } => {
                lease.metadata.resource_version = Some(version.clone());
                lease.metadata.annotations = Some(claim.annotations.clone());
                lease.spec = Some(LeaseSpec {
                    acquire_time: view.and_then(|view| view.acquired).map(MicroTime),
                    lease_transitions: view.map(|view| view.transitions),
                    holder_identity: Some(identity),
                    lease_duration_seconds: Some(duration),
                    renew_time: Some(MicroTime(now)),
                    ..LeaseSpec::default()
                });
                self.api.replace(step.name(), &params, &lease).await?
            }
            Step::Release { version, is_needed: true, .. } => {
                lease.metadata.resource_version = Some(version.clone());
                lease.metadata.annotations = view.map(|view| view.annotations.clone());
                lease.spec = Some(LeaseSpec {
                    lease_transitions: view.map(|view| view.transitions),
                    lease_duration_seconds: Some(duration),
                    renew_time: Some(MicroTime(now)),
                    ..LeaseSpec::default()
                });
                self.api.replace(step.name(), &params, &lease).await?
            }
            Step::Release { version, is_needed: false, .. } => {
                let guard = Preconditions { resource_version: Some(version.clone()), uid: None };
                self.api.delete(step.name(), &DeleteParams::default().preconditions(guard)).await?;
                return Ok(Done::Gone);
            }
        };
        Ok(Done::Written(Box::new(written)))
    }
}
