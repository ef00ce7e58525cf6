//! The steps that bring a service port to its plan. Each fails on its own, and then leaves what packets see whole.

use std::collections::{BTreeMap, BTreeSet};

use affinity_common::{
    abi::{
        backends::{Backend, BackendKey},
        frontends::{Frontend, FrontendKey, OUTSIDERS},
    },
    types::{BackendId, Port, Seconds},
};

use super::{
    ReconcileError,
    described::{Described, Description},
    digest::Digest,
    rows::{anybodys, flags_of, row_of},
    runs::Run,
    shared::Shared,
    side::{Held, ScopeRuns, Side, SlotRun, Work},
};
use crate::{
    plan::{PlanFamily, Scope, Scopes},
    tables::TableError,
};

impl<F: PlanFamily> Side<F> {
    /// Takes out the frontends that the service port is not to have. But for the last call, those are left that another one is
    /// to have, for it to take over, and those for outsiders whom the one for anybody still sends there.
    pub(super) fn take_frontends_out(
        &mut self,
        shared: &mut Shared,
        work: &Work<'_, F>,
        is_last: bool,
    ) -> Result<(), ReconcileError> {
        let Some(holding) = self.services.get_mut(&work.job.id) else { return Ok(()) };
        let claims = &self.claims;
        let is_claimed = |key: &FrontendKey<F>| claims.get(&anybodys(*key)).is_some_and(|id| *id != work.job.id);
        let gone: Vec<_> = holding
            .frontends
            .keys()
            .filter(|key| !work.wanted.contains_key(key))
            .filter(|key| is_last || !is_claimed(key))
            .copied()
            .collect();
        for key in gone {
            let sends_outsiders = |value: &Frontend| value.parts_outsiders();
            let is_needed = key.origin == OUTSIDERS && self.frontends.get(&anybodys(key)).is_some_and(sends_outsiders);
            if is_needed && !is_last {
                continue;
            }
            shared.counts.take(&mut self.tables.frontends, &key)?;
            let alone = self.frontends.remove(&key).is_some_and(|value| value.is_port_alone());
            holding.frontends.remove(&key);
            self.addresses.leave(&mut self.tables.addresses, shared, key.addr, alone)?;
        }
        Ok(())
    }

    /// Puts backends in, writes slots, puts ranges in, and points the frontends at all of that.
    pub(super) fn put_in(&mut self, shared: &mut Shared, work: &mut Work<'_, F>) -> Result<(), ReconcileError> {
        let described = self.put_backends_in(shared, work)?;
        work.runs = self.write_slots(shared, work)?;
        self.ranges.put_in(&mut self.tables.ranges, &mut shared.counts, work.job.id, &work.ranges)?;
        self.switch_frontends(shared, work)?;
        work.conflict.take().map_or(Ok(()), Err)?;
        described.map_err(Into::into)
    }

    /// Puts in the backends that are new, and marks those that become eligible in a scope. Where not all of them find room, none
    /// is left that is new. The inner result is about what goes with a backend for people: it keeps no one from being
    /// served.
    fn put_backends_in(
        &mut self,
        shared: &mut Shared,
        work: &Work<'_, F>,
    ) -> Result<Result<(), TableError>, ReconcileError> {
        let service = work.job.id;
        self.share_ids(shared, work);
        let holding = self.services.entry(service).or_default();
        let unknown: BTreeSet<_> =
            work.backends().iter().map(|b| (b.addr, b.port)).filter(|at| !holding.backends.contains_key(at)).collect();
        let ids = shared.ids.backends(&mut shared.tables.ids, &mut shared.counts, unknown.len())?;
        holding.backends.reserve(unknown.len());
        for (at, id) in unknown.into_iter().zip(ids) {
            holding.backends.insert(at, Held::new(BackendId { id }, Described::default()));
        }

        let capacity = self.tables.backends.capacity();
        let is_new = |held: Option<&Held>| held.is_some_and(|held| !held.is_there());
        let new = work.backends().iter().filter(|b| is_new(holding.backends.get(&(b.addr, b.port)))).count();
        if new > 0 && self.backends + new > capacity {
            return Err(TableError::Full { map: self.tables.backends.name().to_owned(), capacity }.into());
        }

        let (mut described, mut places, mut keys, mut rows) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (&at, held) in &mut holding.backends {
            let Some(backend) = work.backend(at) else { continue };
            let key = BackendKey { service, backend: held.id };
            let there = held.row(at);
            let eligible = held.eligible::<F>(at);
            // Where it is no longer eligible, it is marked when no slot names it any more.
            let row = row_of(backend, backend.eligible.and(eligible));
            let is_right = there == Some(Backend { flags: there.map_or(0, |there| there.flags), ..row });
            described.push(Description { key, pod: backend.target.as_deref(), there: &mut held.described });
            if is_right && backend.eligible.are_within(eligible) {
                continue;
            }
            places.push(at);
            keys.push(key);
            rows.push(row);
        }
        let described = shared.describe_backends(described);
        let (count, done) = shared.counts.put_all(&mut self.tables.backends, &keys, &rows);
        let mut put: Vec<(F::Addr, Port)> = Vec::new();
        for (at, row) in places.into_iter().zip(rows).take(count) {
            if let Some(held) = holding.backends.get_mut(&at) {
                if !held.is_there() {
                    self.backends += 1;
                    put.push(at);
                }
                held.note(at, row);
            }
        }
        if let Err(error) = done {
            for at in put {
                if let Some(held) = holding.backends.get_mut(&at) {
                    let key = BackendKey { service, backend: held.id };
                    if shared.counts.take(&mut self.tables.backends, &key).is_ok() {
                        held.note_gone();
                        self.backends -= 1;
                    }
                }
            }
            return Err(error.into());
        }
        Ok(described)
    }

    /// Of service ports that share affinity, all have one id for a pod: the oldest that any of them has for its address. What
    /// one has had instead goes, like any second id, as soon as no slot names it.
    ///
    /// Where a pod has several target ports for one service port, its first one stands for it.
    fn share_ids(&mut self, shared: &mut Shared, work: &Work<'_, F>) {
        let mut oldest: BTreeMap<F::Addr, BackendId> = BTreeMap::new();
        let held = work.job.sharing.iter().filter_map(|service| self.services.get(service));
        for (&(addr, _), held) in held.flat_map(|holding| &holding.backends) {
            let id = oldest.entry(addr).or_insert(held.id);
            *id = held.id.min(*id);
        }
        if oldest.is_empty() {
            return;
        }
        let service = work.job.id;
        let holding = self.services.entry(service).or_default();
        let mut taken: BTreeSet<_> = holding.backends.values().map(|held| held.id).collect();
        taken.extend(&holding.strays);
        let mut before = None;
        for backend in work.backends() {
            if before.replace(backend.addr) == Some(backend.addr) {
                continue;
            }
            // Where the service port has given it to something else, that stays.
            let Some(&id) = oldest.get(&backend.addr).filter(|id| taken.insert(**id)) else { continue };
            let oldest = Held::new(id, shared.descriptions.trust(BackendKey { service, backend: id }));
            let Some(own) = holding.backends.insert((backend.addr, backend.port), oldest) else { continue };
            shared.descriptions.distrust(BackendKey { service, backend: own.id }, own.described);
            if own.is_there() {
                holding.strays.insert(own.id);
            }
        }
    }

    /// The runs of slots that hold what the plan says: those that there are, or new ones.
    fn write_slots(&mut self, shared: &mut Shared, work: &Work<'_, F>) -> Result<ScopeRuns, ReconcileError> {
        let (mut runs, scopes) = (ScopeRuns::default(), work.scopes());
        for scope in Scope::ALL.into_iter().filter(|scope| scopes.has(*scope)) {
            *runs.of_mut(scope) = self.write_run(shared, work, scope)?;
        }
        Ok(runs)
    }

    /// The run of a scope. Another scope's that holds the same is as good.
    fn write_run(&mut self, shared: &mut Shared, work: &Work<'_, F>, scope: Scope) -> Result<Run, ReconcileError> {
        let holding = self.services.entry(work.job.id).or_default();
        let ids: Vec<_> = work
            .backends()
            .iter()
            .map(|b| holding.backends.get(&(b.addr, b.port)).map(|held| held.id).unwrap_or_default())
            .collect();
        let indices = work.job.plan.map(|plan| plan.slots::<F>(scope)).unwrap_or_default();
        let slots: Vec<_> = indices.into_iter().filter_map(|index| ids.get(index as usize).copied()).collect();
        if slots.is_empty() {
            return Ok(Run::default());
        }
        let digest = Digest::of(&slots);
        let is_same = |there: &&SlotRun| there.run.count as usize == slots.len() && there.digest == digest;
        if let Some(there) = holding.runs.iter().find(is_same) {
            return Ok(there.run);
        }
        let run = shared.write_slots(&slots)?;
        holding.runs.reserve_exact(1);
        holding.runs.push(SlotRun::new(run, &slots));
        Ok(run)
    }

    /// Points the frontends at the service port and its slots. One that fails keeps none of the others, but that outsiders are
    /// not sent to a frontend of their own that is not there.
    fn switch_frontends(&mut self, shared: &mut Shared, work: &Work<'_, F>) -> Result<(), ReconcileError> {
        let (service, Some(plan)) = (work.job.id, work.job.plan) else { return Ok(()) };
        let usual = Frontend {
            service,
            affinity: work.job.affinity(),
            seed: plan.seed,
            timeout: plan.affinity.unwrap_or(Seconds::new(0)),
            ..Frontend::default()
        };
        if usual.has_affinity() && !work.had_affinity {
            // What is left of a time when it had affinity must not come back to life.
            let Self { tables, sweeper, .. } = self;
            sweeper.sweep_service(&mut tables.affinity, &mut shared.counts, service)?;
        }
        let mut result = Ok(());
        // Those that are in place first: a new one may find no room. But outsiders' own before those that send them there.
        let mut wanted: Vec<_> = work.wanted.iter().collect();
        wanted.sort_by_key(|(key, _)| (key.origin != OUTSIDERS, !self.frontends.contains_key(key)));
        for (key, frontend) in wanted {
            let run = work.runs.of(frontend.scope);
            let value = Frontend {
                first_slot: run.first,
                slot_count: run.count,
                scope: frontend.scope.number(),
                flags: flags_of(frontend, work.others()),
                ..usual
            };
            let outsiders = self.frontends.get(&key.for_outsiders()).map(|value| value.service);
            if self.frontends.get(key) == Some(&value) || frontend.parts_outsiders && outsiders != Some(service) {
                continue;
            }
            if let Err(error) = self.put_frontend(shared, key, &value) {
                result = result.and(Err(error.into()));
                continue;
            }
            if let Some(previous) = self.frontends.insert(*key, value) {
                if let Some(holding) = self.services.get_mut(&previous.service) {
                    holding.frontends.remove(key);
                }
                if previous.has_affinity() && previous.affinity != value.affinity {
                    self.sweeper.look_through(shared.now());
                }
            }
            self.services.entry(service).or_default().frontends.insert(*key, ());
        }
        result
    }

    /// Writes a frontend; its address first, where that is new or is the frontend's in another way than it was.
    fn put_frontend(&mut self, shared: &mut Shared, key: &FrontendKey<F>, value: &Frontend) -> Result<(), TableError> {
        let (was, is) = (self.frontends.get(key).map(Frontend::is_port_alone), value.is_port_alone());
        if was.is_none() {
            let capacity = self.tables.frontends.capacity();
            if self.frontends.len() >= capacity {
                return Err(TableError::Full { map: self.tables.frontends.name().to_owned(), capacity });
            }
        }
        if was == Some(is) {
            return shared.counts.put(&mut self.tables.frontends, key, value);
        }
        self.addresses.arrive(&mut self.tables.addresses, shared, key.addr, is)?;
        let put = shared.counts.put(&mut self.tables.frontends, key, value);
        if let Some(gone) = if put.is_ok() { was } else { Some(is) } {
            // It stays known to be unused, where it can't be taken out.
            let _ = self.addresses.leave(&mut self.tables.addresses, shared, key.addr, gone);
        }
        put
    }

    /// Takes out the backends that the plan has not, marks those that are no longer eligible in a scope, and frees the slots that no
    /// frontend points at. Where the plan could not be put in, what the frontends still point at stays as it is, and
    /// what an attempt with another plan has left is taken out.
    pub(super) fn take_backends_out(
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
        let mut pointed_at: BTreeMap<Run, Scopes> = BTreeMap::new();
        for value in holding.frontends.keys().filter_map(|key| self.frontends.get(key)) {
            let scopes = pointed_at.entry(Run { first: value.first_slot, count: value.slot_count }).or_default();
            *scopes = scopes.and(Scopes::of_number(value.scope));
        }
        let mut in_use: BTreeMap<BackendId, Scopes> = BTreeMap::new();
        for there in &holding.runs {
            let Some(scopes) = pointed_at.get(&there.run) else { continue };
            for backend in &there.backends {
                let all = in_use.entry(*backend).or_default();
                *all = all.and(*scopes);
            }
        }

        let mut removed = BTreeSet::new();
        for (at, held) in &mut holding.backends {
            let key = BackendKey { service, backend: held.id };
            let in_use = in_use.get(&held.id).copied().unwrap_or_default();
            let Some(backend) = work.backend(*at) else {
                if in_use.any() {
                    continue;
                }
                if held.is_there() {
                    shared.counts.take(&mut self.tables.backends, &key)?;
                    held.note_gone();
                    self.backends -= 1;
                }
                shared.forget_backend(key, &mut held.described)?;
                removed.insert(*at);
                continue;
            };
            let (planned, eligible) = (row_of(backend, backend.eligible), held.eligible::<F>(*at));
            let takes_away = backend.eligible.are_within(eligible) && !eligible.lost(backend.eligible, in_use).any();
            if takes_away && held.row(*at).is_some_and(|row| row != planned) {
                shared.counts.put(&mut self.tables.backends, &key, &planned)?;
                held.note(*at, planned);
            }
        }
        if !removed.is_empty() {
            holding.backends.retain(|at, _| !removed.contains(at));
        }
        while synced && let Some(&backend) = holding.strays.first() {
            let key = BackendKey { service, backend };
            if in_use.contains_key(&backend) {
                break;
            }
            shared.counts.take(&mut self.tables.backends, &key)?;
            self.backends -= 1;
            holding.strays.remove(&backend);
            shared.forget_stray(key)?;
        }

        let now = shared.now();
        holding.runs.retain(|there| {
            let stays = pointed_at.contains_key(&there.run) || !work.is_going_well() && work.runs.contain(there.run);
            if !stays {
                shared.runs.give_back(there.run, now);
            }
            stays
        });
        Ok(())
    }
}
