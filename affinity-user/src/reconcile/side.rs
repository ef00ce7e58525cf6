//! One address family's maps: what they hold, and the writes that bring them to what a plan says, in an order that
//! never shows a packet a service without its slots, or a slot without its backend.

use std::collections::{BTreeMap, BTreeSet, HashMap, btree_map::Entry};

use affinity_common::{
    abi::{
        backends::{Backend, BackendKey, ELIGIBLE},
        frontends::{Frontend, FrontendKey},
    },
    family::Family,
    types::{BackendId, Port, Seconds, ServiceId},
};

use super::{ReconcileError, runs::Run, shared::Shared, sweep::Sweeper};
use crate::{
    model::{FrontendAddress, ServicePortName},
    plan::{BackendPlan, FamilyPlan, FrontendPlan, PlanFamily, PortPlan},
    tables::{FamilyTables, TableError},
};

/// One address family's maps.
pub(super) struct Side<F: Family> {
    pub tables: FamilyTables<F>,
    /// What `frontends` holds.
    pub frontends: BTreeMap<FrontendKey<F>, Frontend>,
    /// What the maps hold of each service port.
    pub services: BTreeMap<ServiceId, Holding<F>>,
    /// How many entries `backends` has.
    pub backends: usize,
    /// Which service port is to have which frontend.
    claims: HashMap<FrontendKey<F>, ServicePortName>,
    pub sweeper: Sweeper<F>,
}

/// What the maps hold of a service port.
pub(super) struct Holding<F: Family> {
    /// Its frontends.
    pub frontends: BTreeSet<FrontendKey<F>>,
    /// Its backends.
    pub backends: BTreeMap<(F::Addr, Port), Held<F>>,
    /// Backends that are distrusted: a second id for an address and port.
    pub strays: BTreeSet<BackendId>,
    /// Its runs of slots: one, but for a switch that did not succeed for all frontends.
    pub runs: Vec<SlotRun>,
}

/// A backend that has an id.
#[derive(Clone, Copy)]
pub(super) struct Held<F: Family> {
    pub id: BackendId,
    /// What the map holds of it.
    pub row: Option<Backend<F>>,
}

/// A run of slots and what it holds.
pub(super) struct SlotRun {
    pub run: Run,
    pub slots: Vec<BackendId>,
}

impl<F: Family> Default for Holding<F> {
    fn default() -> Self {
        Self { frontends: BTreeSet::new(), backends: BTreeMap::new(), strays: BTreeSet::new(), runs: Vec::new() }
    }
}

impl<F: Family> Holding<F> {
    pub fn is_empty(&self) -> bool {
        self.frontends.is_empty() && self.backends.is_empty() && self.strays.is_empty() && self.runs.is_empty()
    }
}

/// A service port that is to be brought to its plan, or taken out where it has none.
pub(super) struct Job<'a> {
    pub id: ServiceId,
    pub name: Option<&'a ServicePortName>,
    pub plan: Option<&'a PortPlan>,
}

/// What became of a job.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    /// The maps hold what the plan says.
    Done,
    /// It would take something out, and not every source has synced.
    Waits,
    /// Not all of it could be done. What the maps held of it before is still whole.
    Failed(ReconcileError),
}

/// A job under way.
struct Work<'a, F: Family> {
    job: &'a Job<'a>,
    plan: Option<&'a FamilyPlan<F>>,
    /// The frontends that are to be the service port's.
    wanted: BTreeSet<FrontendKey<F>>,
    /// Frontends that another one has.
    conflict: Option<ReconcileError>,
    had_affinity: bool,
    /// The slots that its frontends are to point at.
    run: Run,
    outcome: Outcome,
    /// Whether it got as far as adding anything.
    added: bool,
}

impl<F: Family> Work<'_, F> {
    fn backends(&self) -> &[BackendPlan<F>] {
        self.plan.map_or(&[], |plan| &plan.backends)
    }

    fn is_going_well(&self) -> bool {
        matches!(self.outcome, Outcome::Done)
    }

    fn note(&mut self, result: Result<(), ReconcileError>) {
        if let Err(error) = result
            && self.is_going_well()
        {
            self.outcome = Outcome::Failed(error);
        }
    }
}

fn key_of<F: Family>(FrontendPlan { addr, port, proto }: &FrontendPlan<F>) -> FrontendKey<F> {
    FrontendKey::new(*addr, *port, *proto)
}

fn row_of<F: Family>(backend: &BackendPlan<F>) -> Backend<F> {
    let flags = if backend.eligible { ELIGIBLE } else { 0 };
    Backend { addr: backend.addr, port: backend.port, flags, zero: 0 }
}

impl<F: PlanFamily> Side<F> {
    pub fn new(tables: FamilyTables<F>) -> Self {
        Self {
            tables,
            frontends: BTreeMap::new(),
            services: BTreeMap::new(),
            backends: 0,
            claims: HashMap::new(),
            sweeper: Sweeper::default(),
        }
    }

    /// A plan is out of force: its frontends are free for others.
    pub fn release(&mut self, plan: &PortPlan) {
        for key in plan.family::<F>().frontends.iter().map(key_of) {
            if self.claims.get(&key) == Some(&plan.name) {
                self.claims.remove(&key);
            }
        }
    }

    /// Whether the maps hold nothing of a service port.
    pub fn is_gone(&self, id: ServiceId) -> bool {
        !self.services.contains_key(&id)
    }

    /// Whether a service port has affinity, by what its frontends say.
    pub fn has_affinity(&self, id: ServiceId) -> bool {
        self.services.get(&id).is_some_and(|holding| {
            holding.frontends.iter().any(|key| self.frontends.get(key).is_some_and(Frontend::has_affinity))
        })
    }

    /// Every backend that the map holds.
    pub fn backend_keys(&self) -> impl Iterator<Item = BackendKey> {
        self.services.iter().flat_map(|(&service, holding)| {
            let held = holding.backends.values().filter(|held| held.row.is_some()).map(|held| held.id);
            held.chain(holding.strays.iter().copied()).map(move |backend| BackendKey { service, backend })
        })
    }

    /// Brings service ports to their plans. `synced`: whether what no plan wants may go.
    ///
    /// The order is that frontends which go are taken out, backends are put in, frontends are updated, and backends
    /// are taken out. Each step is done for a service port only if the ones before have succeeded for it.
    pub fn run(&mut self, shared: &mut Shared, jobs: &[Job<'_>], synced: bool) -> Vec<Outcome> {
        let mut works: Vec<_> = jobs.iter().map(|job| self.begin(job, synced)).collect();
        for work in works.iter_mut().filter(|work| work.is_going_well()) {
            let result = self.take_frontends_out(shared, work, false);
            work.note(result);
        }
        for work in works.iter_mut().filter(|work| work.is_going_well() && work.plan.is_some()) {
            work.added = true;
            let result = self.put_in(shared, work);
            work.note(result);
        }
        for work in &mut works {
            if work.is_going_well() {
                let result = self.take_frontends_out(shared, work, true);
                work.note(result);
            }
            let result = self.take_backends_out(shared, work, synced);
            work.note(result);
            self.end(shared, work);
        }
        works.into_iter().map(|work| work.outcome).collect()
    }

    fn begin<'a>(&mut self, job: &'a Job<'a>, synced: bool) -> Work<'a, F> {
        let mut work = Work {
            job,
            plan: job.plan.map(PortPlan::family::<F>),
            wanted: BTreeSet::new(),
            conflict: None,
            had_affinity: self.has_affinity(job.id),
            run: Run::default(),
            outcome: Outcome::Done,
            added: false,
        };
        if let (Some(plan), Some(name)) = (work.plan, job.name) {
            for key in plan.frontends.iter().map(key_of) {
                let holder = self.claims.entry(key).or_insert_with(|| name.clone());
                if holder == name {
                    work.wanted.insert(key);
                } else {
                    let frontend = FrontendAddress { addr: F::to_ip(&key.addr), port: key.port, proto: key.proto };
                    let frontend = frontend.to_string();
                    work.conflict = Some(ReconcileError::Conflict { frontend, holder: holder.clone() });
                }
            }
        }
        if !synced && self.takes_out(&work) {
            work.outcome = Outcome::Waits;
        }
        work
    }

    /// Whether it would take anything out that the maps hold: a frontend, a backend, or a backend's eligibility.
    fn takes_out(&self, work: &Work<'_, F>) -> bool {
        let takes_another_ones = work.wanted.iter().any(|key| {
            self.frontends.get(key).is_some_and(|value| value.service != work.job.id && !self.is_gone(value.service))
        });
        let Some(holding) = self.services.get(&work.job.id) else { return takes_another_ones };
        let planned: HashMap<_, _> = work.backends().iter().map(|b| ((b.addr, b.port), b.eligible)).collect();
        takes_another_ones
            || holding.frontends.iter().any(|key| !work.wanted.contains(key))
            || holding.backends.iter().any(|(at, held)| match (held.row, planned.get(at)) {
                (None, _) => false,
                (Some(_), None) => true,
                (Some(row), Some(eligible)) => row.is_eligible() && !eligible,
            })
    }

    /// Takes out the frontends that the service port is not to have; those that another one is to have are left for it
    /// to take over, but for the last call.
    fn take_frontends_out(
        &mut self,
        shared: &mut Shared,
        work: &Work<'_, F>,
        also_claimed: bool,
    ) -> Result<(), ReconcileError> {
        let Some(holding) = self.services.get_mut(&work.job.id) else { return Ok(()) };
        let claims = &self.claims;
        let is_claimed = |key: &FrontendKey<F>| claims.get(key).is_some_and(|name| Some(name) != work.job.name);
        let gone: Vec<_> = holding
            .frontends
            .difference(&work.wanted)
            .filter(|key| also_claimed || !is_claimed(key))
            .copied()
            .collect();
        for key in gone {
            shared.counts.take(&mut self.tables.frontends, &key)?;
            self.frontends.remove(&key);
            holding.frontends.remove(&key);
        }
        Ok(())
    }

    /// Puts backends in, writes slots, and points the frontends at them.
    fn put_in(&mut self, shared: &mut Shared, work: &mut Work<'_, F>) -> Result<(), ReconcileError> {
        let described = self.put_backends_in(shared, work)?;
        work.run = self.write_slots(shared, work)?;
        self.switch_frontends(shared, work)?;
        work.conflict.take().map_or(Ok(()), Err)?;
        described.map_err(Into::into)
    }

    /// Puts in the backends that are new, and marks those that become eligible. Where not all of them find room, none
    /// is left that is new. The inner result is about what goes with a backend for people: it keeps no one from being
    /// served.
    fn put_backends_in(
        &mut self,
        shared: &mut Shared,
        work: &Work<'_, F>,
    ) -> Result<Result<(), TableError>, ReconcileError> {
        let service = work.job.id;
        let holding = self.services.entry(service).or_default();
        let unknown: BTreeSet<_> =
            work.backends().iter().map(|b| (b.addr, b.port)).filter(|at| !holding.backends.contains_key(at)).collect();
        let ids = shared.ids.backends(&mut shared.tables.ids, &mut shared.counts, unknown.len())?;
        for (at, id) in unknown.into_iter().zip(ids) {
            holding.backends.insert(at, Held { id: BackendId { id }, row: None });
        }

        let capacity = self.tables.backends.capacity();
        let is_new = |held: Option<&Held<F>>| held.is_some_and(|held| held.row.is_none());
        let new = work.backends().iter().filter(|b| is_new(holding.backends.get(&(b.addr, b.port)))).count();
        if new > 0 && self.backends + new > capacity {
            return Err(TableError::Full { map: self.tables.backends.name().to_owned(), capacity }.into());
        }

        let mut described = Ok(());
        let mut put: Vec<(F::Addr, Port)> = Vec::new();
        for backend in work.backends() {
            let at = (backend.addr, backend.port);
            let Some(held) = holding.backends.get_mut(&at) else { continue };
            let key = BackendKey { service, backend: held.id };
            described = described.and(shared.describe_backend(key, backend.target.as_deref()));
            let row = row_of(backend);
            // One that is no longer eligible is marked when no slot names it any more.
            if held.row == Some(row) || held.row == Some(Backend { flags: ELIGIBLE, ..row }) {
                continue;
            }
            if let Err(error) = shared.counts.put(&mut self.tables.backends, &key, &row) {
                for at in put {
                    if let Some(held) = holding.backends.get_mut(&at) {
                        let key = BackendKey { service, backend: held.id };
                        if shared.counts.take(&mut self.tables.backends, &key).is_ok() {
                            held.row = None;
                            self.backends -= 1;
                        }
                    }
                }
                return Err(error.into());
            }
            if held.row.replace(row).is_none() {
                self.backends += 1;
                put.push(at);
            }
        }
        Ok(described)
    }

    /// The run of slots that holds what the plan says: the one there is, or a new one.
    fn write_slots(&mut self, shared: &mut Shared, work: &Work<'_, F>) -> Result<Run, ReconcileError> {
        let holding = self.services.entry(work.job.id).or_default();
        let ids: Vec<_> = work
            .backends()
            .iter()
            .map(|b| holding.backends.get(&(b.addr, b.port)).map(|held| held.id).unwrap_or_default())
            .collect();
        let indices = work.job.plan.map(PortPlan::slots::<F>).unwrap_or_default();
        let slots: Vec<_> = indices.into_iter().filter_map(|index| ids.get(index as usize).copied()).collect();
        if slots.is_empty() {
            return Ok(Run::default());
        }
        if let Some(there) = holding.runs.iter().find(|there| there.slots == slots) {
            return Ok(there.run);
        }
        let run = shared.write_slots(&slots)?;
        holding.runs.push(SlotRun { run, slots });
        Ok(run)
    }

    /// Points the frontends at the service port and its slots. One that fails keeps none of the others.
    fn switch_frontends(&mut self, shared: &mut Shared, work: &Work<'_, F>) -> Result<(), ReconcileError> {
        let (service, Some(plan)) = (work.job.id, work.job.plan) else { return Ok(()) };
        let value = Frontend {
            service,
            seed: plan.seed,
            first_slot: work.run.first,
            slot_count: work.run.count,
            timeout: plan.affinity.unwrap_or(Seconds::new(0)),
            scope: 0,
        };
        if value.has_affinity() && !work.had_affinity {
            // What is left of a time when it had affinity must not come back to life.
            let Self { tables, sweeper, .. } = self;
            sweeper.sweep_service(&mut tables.affinity, &mut shared.counts, service)?;
        }
        let mut result = Ok(());
        // Those that are in place first: a new one may find no room.
        let (there, new): (Vec<_>, Vec<_>) = work.wanted.iter().partition(|key| self.frontends.contains_key(key));
        for key in there.into_iter().chain(new) {
            if self.frontends.get(key) == Some(&value) {
                continue;
            }
            if let Err(error) = shared.counts.put(&mut self.tables.frontends, key, &value) {
                result = result.and(Err(error.into()));
                continue;
            }
            if let Some(previous) = self.frontends.insert(*key, value)
                && let Some(holding) = self.services.get_mut(&previous.service)
            {
                holding.frontends.remove(key);
            }
            self.services.entry(service).or_default().frontends.insert(*key);
        }
        result
    }

    /// Takes out the backends that the plan has not, marks those that are no longer eligible, and frees the slots that no
    /// frontend points at. Where the plan could not be put in, what the frontends still point at stays as it is, and
    /// what an attempt with another plan has left is taken out.
    fn take_backends_out(
        &mut self,
        shared: &mut Shared,
        work: &Work<'_, F>,
        synced: bool,
    ) -> Result<(), ReconcileError> {
        if !work.is_going_well() && !work.added {
            return Ok(());
        }
        let service = work.job.id;
        let Some(holding) = self.services.get_mut(&service) else { return Ok(()) };
        let pointed_at: BTreeSet<_> = holding
            .frontends
            .iter()
            .filter_map(|key| self.frontends.get(key))
            .map(|value| Run { first: value.first_slot, count: value.slot_count })
            .collect();
        let in_use: BTreeSet<_> = holding
            .runs
            .iter()
            .filter(|there| pointed_at.contains(&there.run))
            .flat_map(|there| there.slots.iter().copied())
            .collect();
        let planned: BTreeMap<_, _> = work.backends().iter().map(|b| ((b.addr, b.port), row_of(b))).collect();

        let mut removed: Vec<(F::Addr, Port)> = Vec::new();
        for (at, held) in &mut holding.backends {
            if in_use.contains(&held.id) && planned.get(at).is_none_or(|row| !row.is_eligible()) {
                continue;
            }
            let key = BackendKey { service, backend: held.id };
            match (planned.get(at), held.row) {
                (None, row) => {
                    if row.is_some() {
                        shared.counts.take(&mut self.tables.backends, &key)?;
                        held.row = None;
                        self.backends -= 1;
                    }
                    shared.forget_backend(key)?;
                    removed.push(*at);
                }
                (Some(planned), Some(row)) if row != *planned && !planned.is_eligible() => {
                    shared.counts.put(&mut self.tables.backends, &key, planned)?;
                    held.row = Some(*planned);
                }
                (Some(_), _) => {}
            }
        }
        for at in removed {
            holding.backends.remove(&at);
        }
        while synced && let Some(&backend) = holding.strays.first() {
            let key = BackendKey { service, backend };
            if in_use.contains(&backend) {
                break;
            }
            shared.counts.take(&mut self.tables.backends, &key)?;
            self.backends -= 1;
            holding.strays.remove(&backend);
            shared.forget_backend(key)?;
        }

        let now = shared.now();
        holding.runs.retain(|there| {
            let stays = pointed_at.contains(&there.run) || !work.is_going_well() && there.run == work.run;
            if !stays {
                shared.runs.give_back(there.run, now);
            }
            stays
        });
        Ok(())
    }

    fn end(&mut self, shared: &Shared, work: &Work<'_, F>) {
        let service = work.job.id;
        if work.had_affinity && !self.has_affinity(service) {
            self.sweeper.switched_off(service, shared.now());
        }
        if let Entry::Occupied(entry) = self.services.entry(service)
            && entry.get().is_empty()
        {
            entry.remove();
        }
    }
}
