//! One address family's maps: what they hold, and the order in which service ports are brought to their plans, so that no
//! packet sees a service without its slots, or a slot without its backend.

use std::collections::{BTreeMap, BTreeSet, HashMap, btree_map::Entry};

use affinity_common::{
    abi::{
        backends::{Backend, BackendKey},
        frontends::{Frontend, FrontendKey},
        source_ranges::RangeKey,
    },
    family::Family,
    types::{BackendId, Port, ServiceId},
};

use litemap::LiteMap;

use super::{
    Fill, ReconcileError,
    addresses::Addresses,
    described::Described,
    digest::Digest,
    ranges::Ranges,
    rows::{anybodys, key_of, range_of},
    runs::Run,
    shared::Shared,
    sweep::Sweeper,
};
use crate::{
    model::ServicePortName,
    plan::{BackendPlan, FamilyPlan, FrontendPlan, PlanFamily, PortPlan, Scope, Scopes},
    tables::{FamilyTables, TableError},
};

/// One address family's maps.
pub(super) struct Side<F: Family> {
    pub tables: FamilyTables<F>,
    /// What `frontends` holds.
    pub frontends: BTreeMap<FrontendKey<F>, Frontend>,
    pub addresses: Addresses<F>,
    /// What `ranges` holds.
    pub ranges: Ranges<F>,
    /// What the maps hold of each service port.
    pub services: BTreeMap<ServiceId, Holding<F>>,
    /// How many entries `backends` has.
    pub backends: usize,
    /// Which service port is to have which frontend; those for outsiders go with the one for anybody.
    pub claims: HashMap<FrontendKey<F>, ServiceId>,
    pub sweeper: Sweeper<F>,
}

/// What the maps hold of a service port. There is one for each, and most hold little: sorted rows instead of trees.
pub(super) struct Holding<F: Family> {
    /// Its frontends.
    pub frontends: LiteMap<FrontendKey<F>, ()>,
    /// Its backends.
    pub backends: LiteMap<At<F>, Held>,
    /// Backends that are distrusted: a second id for an address and port.
    pub strays: BTreeSet<BackendId>,
    /// Its runs of slots: one for each scope in which it has other backends, but for a switch that did not succeed for all
    /// frontends.
    pub runs: Vec<SlotRun>,
}

/// Where a backend is.
pub(super) type At<F> = (<F as Family>::Addr, Port);

/// A backend that has an id.
#[derive(Clone, Copy)]
pub(super) struct Held {
    pub id: BackendId,
    /// What the map holds of it, but for where it is.
    row: Option<Row>,
    /// What goes with it.
    pub described: Described,
}

#[derive(Clone, Copy)]
struct Row {
    flags: u8,
    /// Whether it is nothing that would be written: it is of somewhere else.
    is_wrong: bool,
}

impl Held {
    /// One that the map does not hold yet.
    pub fn new(id: BackendId, described: Described) -> Self {
        Self { id, row: None, described }
    }

    /// Whether the map holds it.
    pub fn is_there(self) -> bool {
        self.row.is_some()
    }

    /// The scopes in which the map holds it as eligible.
    pub fn eligible<F: Family>(self, at: At<F>) -> Scopes {
        self.row(at).as_ref().map(Scopes::of_row::<F>).unwrap_or_default()
    }

    /// Whether the map holds it, and as something that would never be written.
    pub fn is_wrong(self) -> bool {
        self.row.is_some_and(|row| row.is_wrong)
    }

    /// What the map holds of the backend that is there; equal to no plan's where it [is wrong](Self::is_wrong).
    pub fn row<F: Family>(self, (addr, port): At<F>) -> Option<Backend<F>> {
        self.row.map(|Row { flags, is_wrong }| Backend { addr, port, flags, zero: u8::from(is_wrong) })
    }

    /// Notes what the map holds of the backend that is there.
    pub fn note<F: Family>(&mut self, (addr, port): At<F>, row: Backend<F>) {
        let is_wrong = row != Backend { addr, port, flags: row.flags, zero: 0 };
        self.row = Some(Row { flags: row.flags, is_wrong });
    }

    /// Notes that the map does not hold it.
    pub fn note_gone(&mut self) {
        self.row = None;
    }
}

/// A run of slots and what it holds: as a digest, for the slots themselves are many.
pub(super) struct SlotRun {
    pub run: Run,
    /// Of its slots.
    pub digest: Digest,
    /// The backends that its slots name, each once.
    pub backends: Box<[BackendId]>,
}

impl SlotRun {
    pub fn new(run: Run, slots: &[BackendId]) -> Self {
        let mut backends = slots.to_vec();
        backends.sort_unstable();
        backends.dedup();
        // Anew: a long row that is cut would leave a hole where little finds room.
        Self { run, digest: Digest::of(slots), backends: backends.iter().copied().collect() }
    }
}

impl<F: Family> Default for Holding<F> {
    fn default() -> Self {
        Self { frontends: LiteMap::new(), backends: LiteMap::new(), strays: BTreeSet::new(), runs: Vec::new() }
    }
}

impl<F: Family> Holding<F> {
    /// Gives back the room that nothing is in.
    pub fn pack(&mut self) {
        self.frontends = std::mem::take(&mut self.frontends).into_iter().collect();
        self.backends = std::mem::take(&mut self.backends).into_iter().collect();
    }

    pub fn is_empty(&self) -> bool {
        self.frontends.is_empty() && self.backends.is_empty() && self.strays.is_empty() && self.runs.is_empty()
    }
}

/// A service port that is to be brought to its plan, or taken out where it has none.
pub(super) struct Job<'a> {
    pub id: ServiceId,
    /// The service ports that share affinity with it, itself too; empty if it shares none.
    pub sharing: &'a [ServiceId],
    pub name: Option<&'a ServicePortName>,
    pub plan: Option<&'a PortPlan>,
}

impl Job<'_> {
    /// The service port that its clients' affinity goes by: the oldest of those that share it, which no port that comes
    /// takes over. Where that one goes, the service's clients start afresh.
    pub fn affinity(&self) -> ServiceId {
        self.sharing.iter().min().copied().unwrap_or(self.id)
    }
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
pub(super) struct Work<'a, F: Family> {
    pub job: &'a Job<'a>,
    plan: Option<&'a FamilyPlan<F>>,
    /// The frontends that are to be the service port's.
    pub wanted: BTreeMap<FrontendKey<F>, &'a FrontendPlan<F>>,
    /// The ranges that are.
    pub ranges: BTreeSet<RangeKey<F>>,
    /// Frontends that another one has.
    pub conflict: Option<ReconcileError>,
    pub had_affinity: bool,
    /// The slots that its frontends of each scope are to point at.
    pub runs: ScopeRuns,
    outcome: Outcome,
    /// Whether it got as far as adding anything.
    pub added: bool,
}

/// A run of slots for each scope; none where nothing is to point at one.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ScopeRuns {
    pub cluster: Run,
    pub local: Run,
}

impl ScopeRuns {
    pub fn of(&self, scope: Scope) -> Run {
        match scope {
            Scope::Cluster => self.cluster,
            Scope::Local => self.local,
        }
    }

    pub fn of_mut(&mut self, scope: Scope) -> &mut Run {
        match scope {
            Scope::Cluster => &mut self.cluster,
            Scope::Local => &mut self.local,
        }
    }

    pub fn contain(&self, run: Run) -> bool {
        Scope::ALL.into_iter().any(|scope| self.of(scope) == run)
    }
}

impl<F: Family> Work<'_, F> {
    /// The scopes of the frontends that are to be there.
    pub fn scopes(&self) -> Scopes {
        self.wanted.values().map(|frontend| frontend.scope).collect()
    }

    /// The scopes in which there are endpoints that answer, though no backend.
    pub fn others(&self) -> Scopes {
        self.plan.map(|plan| plan.others).unwrap_or_default()
    }

    pub fn backends(&self) -> &[BackendPlan<F>] {
        self.plan.map_or(&[], |plan| &plan.backends)
    }

    /// The backend that is to be there.
    pub fn backend(&self, at: At<F>) -> Option<&BackendPlan<F>> {
        let backends = self.backends();
        backends.get(backends.binary_search_by_key(&at, |backend| (backend.addr, backend.port)).ok()?)
    }

    pub fn is_going_well(&self) -> bool {
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

impl<F: PlanFamily> Side<F> {
    pub fn new(tables: FamilyTables<F>) -> Self {
        Self {
            tables,
            frontends: BTreeMap::new(),
            addresses: Addresses::default(),
            ranges: Ranges::default(),
            services: BTreeMap::new(),
            backends: 0,
            claims: HashMap::new(),
            sweeper: Sweeper::default(),
        }
    }

    /// Packs what it keeps: see [`super::Reconciler`].
    pub fn pack(&mut self) {
        super::pack(&mut self.frontends);
        super::pack(&mut self.services);
        self.services.values_mut().for_each(Holding::pack);
        self.addresses.pack();
    }

    pub fn fills(&self) -> [Fill; 4] {
        let Self { tables, .. } = self;
        [
            Fill::of(&tables.frontends, self.frontends.len()),
            Fill::of(&tables.addresses, self.addresses.len()),
            Fill::of(&tables.backends, self.backends),
            self.ranges.fill(&tables.ranges),
        ]
    }

    /// The plan of a service port is out of force: its frontends are free for others.
    pub fn release(&mut self, id: ServiceId, plan: &PortPlan) {
        for key in plan.family::<F>().frontends.iter().map(key_of).map(anybodys) {
            if self.claims.get(&key) == Some(&id) {
                self.claims.remove(&key);
            }
        }
    }

    /// Brings the addresses to the frontends that there are. `synced`: whether those that have none may go.
    pub fn settle_addresses(&mut self, shared: &mut Shared, synced: bool) -> Result<(), TableError> {
        self.addresses.add_missing(&mut self.tables.addresses, shared, self.frontends.iter())?;
        if synced { self.addresses.take_unused_out(&mut self.tables.addresses, shared) } else { Ok(()) }
    }

    /// Whether the maps hold nothing of a service port.
    pub fn is_gone(&self, id: ServiceId) -> bool {
        !self.services.contains_key(&id) && !self.ranges.has(id)
    }

    /// The service ports that the maps hold something of.
    pub fn services(&self) -> impl Iterator<Item = ServiceId> {
        self.services.keys().copied().chain(self.ranges.services())
    }

    /// Whether a service port has affinity, by what its frontends say.
    pub fn has_affinity(&self, id: ServiceId) -> bool {
        self.services.get(&id).is_some_and(|holding| {
            holding.frontends.keys().any(|key| self.frontends.get(key).is_some_and(Frontend::has_affinity))
        })
    }

    /// What goes with the backends that are trusted.
    pub fn described(&mut self) -> impl Iterator<Item = (BackendKey, &mut Described)> {
        self.services.iter_mut().flat_map(|(&service, holding)| {
            let backends = holding.backends.iter_mut().map(|(_, held)| held);
            backends.map(move |held| (BackendKey { service, backend: held.id }, &mut held.described))
        })
    }

    /// The backends that are distrusted.
    pub fn strays(&self) -> impl Iterator<Item = BackendKey> {
        self.services
            .iter()
            .flat_map(|(&service, holding)| holding.strays.iter().map(move |&backend| BackendKey { service, backend }))
    }

    /// Takes out what goes with backends that the map does not hold.
    pub fn forget_missing(&mut self, shared: &mut Shared) -> Result<(), TableError> {
        for (&service, holding) in &mut self.services {
            for (_, held) in holding.backends.iter_mut().filter(|(_, held)| !held.is_there()) {
                shared.forget_backend(BackendKey { service, backend: held.id }, &mut held.described)?;
            }
        }
        Ok(())
    }

    /// Brings service ports to their plans. `synced`: whether what no plan wants may go.
    ///
    /// The order is that frontends which go are taken out, backends and ranges are put in, frontends are updated, and backends
    /// and ranges are taken out. Each step is done for a service port only if the ones before have succeeded for it.
    pub fn run(&mut self, shared: &mut Shared, jobs: &[Job<'_>], synced: bool) -> Vec<Outcome> {
        if synced && let Err(error) = self.addresses.take_unused_out(&mut self.tables.addresses, shared) {
            tracing::warn!(%error, "an address without services stays until the next attempt");
        }
        let mut works: Vec<_> = jobs.iter().map(|job| self.begin(shared, job, synced)).collect();
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
            if work.is_going_well() {
                let Self { tables, ranges, .. } = self;
                let result = ranges.take_out(&mut tables.ranges, &mut shared.counts, work.job.id, &work.ranges);
                work.note(result);
            }
            self.end(shared, work);
        }
        works.into_iter().map(|work| work.outcome).collect()
    }

    fn begin<'a>(&mut self, shared: &Shared, job: &'a Job<'a>, synced: bool) -> Work<'a, F> {
        let mut work = Work {
            job,
            // Of a family that it has not, there is nothing to be done.
            plan: job
                .plan
                .map(PortPlan::family::<F>)
                .filter(|plan| !plan.frontends.is_empty() || !self.is_gone(job.id)),
            wanted: BTreeMap::new(),
            ranges: BTreeSet::new(),
            conflict: None,
            had_affinity: self.has_affinity(job.id),
            runs: ScopeRuns::default(),
            outcome: Outcome::Done,
            added: false,
        };
        work.ranges = work.plan.iter().flat_map(|plan| &plan.ranges).map(|range| range_of(job.id, range)).collect();
        for frontend in work.plan.iter().flat_map(|plan| &plan.frontends) {
            let key = key_of(frontend);
            let holder = self.claims.entry(anybodys(key)).or_insert(job.id);
            if *holder != job.id
                && let Some(other) = shared.ids.name(*holder)
            {
                let frontend = frontend.at().to_string();
                work.conflict = Some(ReconcileError::Conflict { frontend, holder: other.clone() });
            } else {
                *holder = job.id;
                work.wanted.insert(key, frontend);
            }
        }
        if !synced && self.takes_out(&work) {
            work.outcome = Outcome::Waits;
        }
        work
    }

    /// The scopes that the frontends of a service port have in the maps.
    fn scopes_in_use(&self, holding: &Holding<F>) -> Scopes {
        let values = holding.frontends.keys().filter_map(|key| self.frontends.get(key));
        values.fold(Scopes::default(), |scopes, value| scopes.and(Scopes::of_number(value.scope)))
    }

    /// Whether it would take anything out that the maps hold: a frontend, a range, a backend, or a backend's eligibility in a
    /// scope that frontends have.
    fn takes_out(&self, work: &Work<'_, F>) -> bool {
        let takes_another_ones = work.wanted.keys().any(|key| {
            self.frontends.get(key).is_some_and(|value| value.service != work.job.id && !self.is_gone(value.service))
        });
        let takes_ranges = self.ranges.has_others(work.job.id, &work.ranges);
        let Some(holding) = self.services.get(&work.job.id) else { return takes_another_ones || takes_ranges };
        let planned: HashMap<_, _> = work.backends().iter().map(|b| ((b.addr, b.port), b.eligible)).collect();
        let in_use = self.scopes_in_use(holding);
        takes_another_ones
            || takes_ranges
            || holding.frontends.keys().any(|key| !work.wanted.contains_key(key))
            || holding.backends.iter().any(|(at, held)| match planned.get(at) {
                None => held.is_there(),
                Some(eligible) => held.eligible::<F>(*at).lost(*eligible, in_use).any(),
            })
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
