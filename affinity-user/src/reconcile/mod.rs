//! Brings the maps to what the plans say, with as few writes as that takes, in an order that no packet can get between.
//!
//! A [`Reconciler`] owns the maps. On start it takes over what they hold: ids, slots, everything. It is told of changes
//! by [`Reconciler::reconcile`], and by [`Reconciler::synced`] that every source was heard out: only from then on
//! anything is taken out. What fails leaves the service port as it was, is named by [`Reconciler::problems`], and is
//! tried again by [`Reconciler::retry`]. [`Reconciler::audit`] compares everything with the maps.

mod addresses;
mod adopt;
mod audit;
mod counts;
mod described;
mod digest;
mod ids;
mod problem;
mod ranges;
mod rows;
mod runs;
mod shared;
mod side;
mod steps;
mod sweep;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};

use affinity_common::{
    family::{V4, V6},
    types::ServiceId,
};

use self::{
    adopt::Purpose,
    problem::Problems,
    shared::Shared,
    side::{Job, Outcome, Side},
};
pub use self::{
    audit::{Difference, Differences},
    counts::Counts,
    problem::{Problem, ReconcileError, Subject},
};
use crate::{
    model::{ServiceName, ServicePortName},
    plan::{Kept, PortPlan, ServicePlan},
    tables::{BoxTable, TableError, Tables},
};

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fill {
    /// The map.
    pub map: String,
    /// How many entries it has; of slots, how many are in use.
    pub used: usize,
    /// How many have room.
    pub capacity: usize,
}

impl Fill {
    fn of<K, V>(table: &BoxTable<K, V>, used: usize) -> Self {
        Self { map: table.name().to_owned(), used, capacity: table.capacity() }
    }

    /// Whether a larger map is due: four fifths are in use.
    pub fn is_high(&self) -> bool {
        self.used.saturating_mul(5) >= self.capacity.saturating_mul(4)
    }
}

/// Where the time comes from: [`Instant::now`] but in tests.
pub type Clock = Box<dyn Fn() -> Instant + Send>;

/// A change of what the maps ought to hold.
#[derive(Clone, Debug)]
pub enum Change {
    /// A service is to be as planned.
    Apply(ServicePlan),
    /// A service is gone.
    Delete(ServiceName),
}

impl Change {
    fn service(&self) -> &ServiceName {
        match self {
            Self::Apply(plan) => &plan.name,
            Self::Delete(name) => name,
        }
    }
}

/// What a call has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Service ports that were looked at and are as planned now, or gone.
    pub programmed: Vec<ServicePortName>,
    /// Service ports that would lose something: they wait until every source has synced.
    pub waiting: Vec<ServicePortName>,
    /// What could not be programmed: see [`Reconciler::problems`].
    pub failed: Vec<Subject>,
    /// How many map entries were written or taken out.
    pub writes: u64,
}

/// What a comparison with the maps has found and done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Where the maps were not as they were written.
    pub differences: Differences,
    /// What was done to bring everything to the plans.
    pub report: Report,
}

/// Brings the maps to what the plans say.
pub struct Reconciler {
    shared: Shared,
    v4: Side<V4>,
    v6: Side<V6>,
    plans: BTreeMap<ServiceName, Kept>,
    /// Services without a plan that stay as they were found: see [`Self::withhold`].
    withheld: BTreeSet<ServiceName>,
    problems: Problems,
    synced: bool,
}

/// A subject with what it needs to become a [`Job`].
struct Task {
    subject: Subject,
    id: ServiceId,
    /// Of a service port that shares its affinity: all that share it, itself too. The oldest of them gives it its name.
    sharing: Vec<ServiceId>,
    /// The plan that it is in, and where in it.
    plan: Option<(Arc<ServicePlan>, usize)>,
}

impl Task {
    fn job(&self) -> Job<'_> {
        Job {
            id: self.id,
            sharing: &self.sharing,
            name: match &self.subject {
                Subject::ServicePort(name) => Some(name),
                Subject::Stray(_) | Subject::Addresses => None,
            },
            plan: self.plan.as_ref().and_then(|(plan, index)| plan.ports.get(*index)),
        }
    }
}

impl Reconciler {
    /// Takes over the maps, with all that is in them. Writes nothing.
    pub fn open(tables: Tables, clock: Clock) -> Result<Self, TableError> {
        let Tables { v4, v6, shared } = tables;
        let mut shared = Shared::new(shared, clock);
        let (mut v4, mut v6) = (Side::new(v4), Side::new(v6));
        let mut found = Differences::default();
        shared.refresh(&mut found)?;
        v4.refresh(&mut shared, Purpose::Adopt, &mut found)?;
        v6.refresh(&mut shared, Purpose::Adopt, &mut found)?;
        refresh_descriptions(&mut shared, &mut v4, &mut v6, &mut found)?;
        let (mut in_use, others) = (v4.ids_in_use(), v6.ids_in_use());
        in_use.service = in_use.service.max(others.service);
        in_use.backend = in_use.backend.max(others.backend);
        shared.filter.adopt(v4.addresses.places().chain(v6.addresses.places()));
        shared.adopt_ids(in_use, |id| has_frontends(&v4, id) || has_frontends(&v6, id))?;
        tracing::info!(services = shared.ids.services().count(), entries = found.total(), "took over the maps");
        let (plans, withheld, problems) = Default::default();
        Ok(Self { shared, v4, v6, plans, withheld, problems, synced: false })
    }

    /// Takes changes into the plans and brings the maps to them. What is due for another attempt gets it too.
    pub fn reconcile(&mut self, changes: impl IntoIterator<Item = Change>) -> Report {
        let mut subjects: BTreeSet<_> = self.take_changes(changes).into_iter().collect();
        subjects.extend(self.problems.due(self.shared.now()).cloned());
        self.bring_about(subjects)
    }

    /// Says of which services nothing good is known, so that none can be planned: what the maps hold of them from an
    /// earlier time stays. What they held of those that were withheld before, and are not now, is taken out.
    pub fn withhold(&mut self, is_withheld: impl Fn(&ServiceName) -> bool) -> Report {
        let held = self.shared.ids.services().map(|(name, _)| &name.service);
        let withheld = held.filter(|name| is_withheld(name)).cloned().collect();
        let before = std::mem::replace(&mut self.withheld, withheld);
        if !self.synced {
            return Report::default();
        }
        let names = self.shared.ids.services().map(|(name, _)| name);
        let freed = names.filter(|name| before.contains(&name.service) && !self.stays(name));
        self.bring_about(freed.cloned().map(Subject::ServicePort).collect())
    }

    /// Whether a service port that no plan names is to stay.
    fn stays(&self, name: &ServicePortName) -> bool {
        self.withheld.contains(&name.service) && !self.plans.contains_key(&name.service)
    }

    /// Every source was heard out, and this is the last of what they had to say: takes it into the plans, and brings the maps
    /// to all of them by one pass. See [`Self::synced`].
    pub fn sync(&mut self, changes: impl IntoIterator<Item = Change>) -> Report {
        self.take_changes(changes);
        self.synced()
    }

    /// Every source was heard out: from now on what no plan wants is taken out. Later calls do nothing.
    pub fn synced(&mut self) -> Report {
        if self.synced {
            return Report::default();
        }
        self.synced = true;
        let before = self.shared.counts;
        let report = self.bring_about(self.everything());
        self.forget_stray_rows();
        self.settle_addresses();
        let now = self.shared.now();
        self.v4.sweeper.look_through(now);
        self.v6.sweeper.look_through(now);
        self.pack();
        let (written, removed) =
            (self.shared.counts.written - before.written, self.shared.counts.removed - before.removed);
        tracing::info!(written, removed, failed = report.failed.len(), "brought the maps to what every source wants");
        report
    }

    /// Trees that were filled in order are half empty.
    fn pack(&mut self) {
        pack(&mut self.plans);
        self.shared.pack();
        self.v4.pack();
        self.v6.pack();
    }

    /// How full the maps are that programming fills. (Those of the datapath evict what is oldest.)
    pub fn fills(&self) -> Vec<Fill> {
        self.v4.fills().into_iter().chain(self.v6.fills()).chain(self.shared.fills()).collect()
    }

    /// Whether every source was heard out.
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// When [`Self::retry`] has something to do.
    pub fn next_retry(&self) -> Option<Instant> {
        self.problems.next_retry()
    }

    /// Tries again what is due.
    pub fn retry(&mut self) -> Report {
        self.reconcile([])
    }

    /// Compares everything with the maps and repairs what differs.
    pub fn audit(&mut self) -> Result<Audit, ReconcileError> {
        let mut differences = Differences::default();
        self.shared.refresh(&mut differences)?;
        self.v4.refresh(&mut self.shared, Purpose::Compare, &mut differences)?;
        self.v6.refresh(&mut self.shared, Purpose::Compare, &mut differences)?;
        refresh_descriptions(&mut self.shared, &mut self.v4, &mut self.v6, &mut differences)?;
        self.shared.filter.adopt(self.v4.addresses.places().chain(self.v6.addresses.places()));
        self.shared.repair_ids(&mut differences)?;
        if !differences.is_empty() {
            tracing::warn!(%differences, "the maps are not as they were written: repairing them");
            self.shared.counts.differences += differences.total() as u64;
        }
        let report = self.bring_about(self.everything());
        if self.synced {
            self.forget_stray_rows();
        }
        self.settle_addresses();
        Ok(Audit { differences, report })
    }

    /// When [`Self::sweep_affinity`] has something to do.
    pub fn next_sweep(&self) -> Option<Instant> {
        let now = self.shared.now();
        let (v4, v6) = (self.v4.sweeper.next(now), self.v6.sweeper.next(now));
        v4.into_iter().chain(v6).min().filter(|_| self.synced)
    }

    /// Takes out affinity entries of service ports that have none any more, up to `limit` of each family.
    pub fn sweep_affinity(&mut self, limit: usize) -> Result<(), TableError> {
        if !self.synced {
            return Ok(());
        }
        sweep(&mut self.v4, &mut self.shared, limit)?;
        sweep(&mut self.v6, &mut self.shared, limit)
    }

    /// What is not as planned.
    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.problems.iter()
    }

    /// What was done since the start.
    pub fn counts(&self) -> Counts {
        self.shared.counts
    }

    /// Takes changes into the plans; returns what they touch.
    fn take_changes(&mut self, changes: impl IntoIterator<Item = Change>) -> Vec<Subject> {
        let mut subjects = Vec::new();
        let mut touched = |plan: &ServicePlan| {
            subjects.extend(plan.ports.iter().map(|port| Subject::ServicePort(port.name.clone())));
        };
        for change in changes {
            if let Some(old) = self.plans.remove(change.service()) {
                let old = old.unpack(change.service());
                touched(&old);
                for port in &old.ports {
                    // Without an id it has claimed nothing.
                    if let Some(id) = self.shared.ids.get(&port.name) {
                        self.v4.release(id, port);
                        self.v6.release(id, port);
                    }
                }
            }
            if let Change::Apply(plan) = change {
                touched(&plan);
                self.plans.insert(plan.name.clone(), Kept::pack(&plan));
            }
        }
        subjects
    }

    /// All that is planned, and what else the maps hold, if that is to go.
    fn everything(&self) -> BTreeSet<Subject> {
        let planned = self.plans.iter().flat_map(|(name, plan)| plan.port_names(name));
        let mut subjects: BTreeSet<_> = planned.map(Subject::ServicePort).collect();
        if self.synced {
            let mut known = BTreeSet::new();
            for (name, id) in self.shared.ids.services() {
                known.insert(id);
                if !self.stays(name) {
                    subjects.insert(Subject::ServicePort(name.clone()));
                }
            }
            let held = self.v4.services().chain(self.v6.services());
            let found = held.chain(self.shared.services());
            subjects.extend(found.filter(|id| !known.contains(id)).map(Subject::Stray));
        }
        subjects
    }

    fn bring_about(&mut self, subjects: BTreeSet<Subject>) -> Report {
        let before = self.shared.counts;
        self.shared.counts.retries += subjects.iter().filter(|subject| self.problems.contains(subject)).count() as u64;
        let mut outcomes = self.attempt(subjects);
        let full: BTreeSet<_> = outcomes
            .iter()
            .filter(|(_, outcome)| matches!(outcome, Outcome::Failed(error) if error.is_full()))
            .map(|(subject, _)| subject.clone())
            .collect();
        if !full.is_empty() && self.shared.counts.removed > before.removed {
            // What has gone since has made room.
            outcomes.extend(self.attempt(full));
        }

        let mut report = Report::default();
        let now = self.shared.now();
        for (subject, outcome) in outcomes {
            match (outcome, subject) {
                (Outcome::Failed(error), subject) => {
                    self.shared.counts.failures += 1;
                    self.problems.failed(subject.clone(), error, now);
                    report.failed.push(subject);
                }
                (outcome, subject) => {
                    self.problems.solved(&subject);
                    match (outcome, subject) {
                        (Outcome::Waits, Subject::ServicePort(name)) => report.waiting.push(name),
                        (_, Subject::ServicePort(name)) => report.programmed.push(name),
                        (_, Subject::Stray(_) | Subject::Addresses) => {}
                    }
                }
            }
        }
        let after = self.shared.counts;
        report.writes = after.written + after.removed - before.written - before.removed;
        report
    }

    fn attempt(&mut self, subjects: BTreeSet<Subject>) -> BTreeMap<Subject, Outcome> {
        let (mut outcomes, mut tasks) = (Vec::new(), Vec::new());
        // The ports of a service come one after the other.
        let mut last = None;
        for subject in subjects {
            let outcome = match self.task(&subject, &mut last) {
                Ok(Some(task)) => {
                    tasks.push(task);
                    continue;
                }
                Ok(None) => Outcome::Done,
                Err(error) => Outcome::Failed(error),
            };
            outcomes.push((subject, outcome));
        }
        let jobs: Vec<_> = tasks.iter().map(Task::job).collect();
        let mut results = self.v4.run(&mut self.shared, &jobs, self.synced);
        let others = self.v6.run(&mut self.shared, &jobs, self.synced);
        for (result, other) in results.iter_mut().zip(others) {
            if matches!(result, Outcome::Done) || matches!(other, Outcome::Failed(_)) {
                *result = other;
            }
        }
        for (task, mut outcome) in tasks.into_iter().zip(results) {
            if task.plan.is_none()
                && matches!(outcome, Outcome::Done)
                && let Err(error) = self.forget(&task)
            {
                outcome = Outcome::Failed(error);
            }
            outcomes.push((task.subject, outcome));
        }
        // Built at once, for there can be many.
        outcomes.into_iter().collect()
    }

    /// What is to be done about a subject; `None` if nothing: it is not planned, and the maps hold nothing of it.
    fn task(&mut self, subject: &Subject, last: &mut Option<Arc<ServicePlan>>) -> Result<Option<Task>, ReconcileError> {
        let name = match subject {
            Subject::ServicePort(name) => name,
            Subject::Stray(id) => {
                return Ok(Some(Task { subject: subject.clone(), id: *id, sharing: Vec::new(), plan: None }));
            }
            Subject::Addresses => {
                self.try_settle_addresses()?;
                return Ok(None);
            }
        };
        let has_frontends = |port: &PortPlan| !port.v4.frontends.is_empty() || !port.v6.frontends.is_empty();
        if last.as_ref().is_none_or(|plan| plan.name != name.service) {
            *last = self.plans.get(&name.service).map(|plan| Arc::new(plan.unpack(&name.service)));
        }
        let plan = last.as_ref().and_then(|plan| {
            let index = plan.ports.iter().position(|port| port.name == *name && has_frontends(port))?;
            Some((plan.clone(), index))
        });
        let id = match &plan {
            Some(_) => Some(self.shared.service_id(name)?),
            None => self.shared.ids.get(name),
        };
        let sharing = match &plan {
            Some((plan, index)) if plan.ports[*index].shares_affinity => {
                plan.ports.iter().filter_map(|port| self.shared.ids.get(&port.name)).collect()
            }
            _ => Vec::new(),
        };
        Ok(id.map(|id| Task { subject: subject.clone(), id, sharing, plan }))
    }

    /// Takes out the last of a service port of which nothing else is left.
    fn forget(&mut self, task: &Task) -> Result<(), ReconcileError> {
        if self.v4.is_gone(task.id) && self.v6.is_gone(task.id) {
            self.shared.forget_service(task.id, task.job().name)?;
        }
        Ok(())
    }

    /// Takes out names and counters of backends that are none.
    fn forget_stray_rows(&mut self) {
        let backends = self.v4.strays().chain(self.v6.strays()).collect();
        let Self { shared, v4, v6, .. } = self;
        let forgotten = v4.forget_missing(shared).and_then(|()| v6.forget_missing(shared));
        let Shared { descriptions, tables, counts, .. } = shared;
        if let Err(error) = forgotten.and_then(|()| descriptions.forget_all_but(tables, counts, &backends)) {
            tracing::warn!(%error, "names and counters of backends that are gone stay until the next comparison");
        }
    }

    /// Brings the addresses and their filter to the frontends that there are. What fails is tried again.
    fn settle_addresses(&mut self) {
        match self.try_settle_addresses() {
            Ok(()) => self.problems.solved(&Subject::Addresses),
            Err(error) => self.problems.failed(Subject::Addresses, error.into(), self.shared.now()),
        }
    }

    fn try_settle_addresses(&mut self) -> Result<(), TableError> {
        let settled = self.v4.settle_addresses(&mut self.shared, self.synced);
        let settled = settled.and(self.v6.settle_addresses(&mut self.shared, self.synced));
        let Shared { filter, tables, counts, .. } = &mut self.shared;
        settled.and(filter.settle(tables, counts))
    }
}

/// Reads anew what goes with backends.
fn refresh_descriptions(
    shared: &mut Shared,
    v4: &mut Side<V4>,
    v6: &mut Side<V6>,
    differences: &mut Differences,
) -> Result<(), TableError> {
    let trusted = v4.described().chain(v6.described()).collect();
    shared.descriptions.refresh(&shared.tables, trusted, differences)
}

/// Makes a tree anew, with full nodes.
fn pack<K: Ord, V>(tree: &mut BTreeMap<K, V>) {
    *tree = std::mem::take(tree).into_iter().collect();
}

fn has_frontends<F: affinity_common::family::Family>(side: &Side<F>, id: ServiceId) -> bool {
    side.services.get(&id).is_some_and(|holding| !holding.frontends.is_empty())
}

fn sweep<F: crate::plan::PlanFamily>(side: &mut Side<F>, shared: &mut Shared, limit: usize) -> Result<(), TableError> {
    let now = shared.now();
    let Side { tables, frontends, sweeper, .. } = side;
    if sweeper.next(now).is_none_or(|due| due > now) {
        return Ok(());
    }
    let with_affinity: BTreeSet<_> =
        frontends.values().filter(|value| value.has_affinity()).map(|value| value.affinity).collect();
    sweeper.sweep(&mut tables.affinity, &mut shared.counts, limit, now, |id| with_affinity.contains(&id))
}
