//! The steps that bring a service port to its plan. Each fails on its own, and then leaves what packets see whole.

use std::collections::{BTreeMap, BTreeSet};

use affinity_common::{
    abi::{
        backends::{Backend, BackendKey, ELIGIBLE},
        frontends::{Frontend, FrontendKey, OTHERS},
    },
    family::Family,
    types::{BackendId, Port, Seconds},
};

use super::{
    ReconcileError,
    described::{Described, Description},
    digest::Digest,
    runs::Run,
    shared::Shared,
    side::{Held, Side, SlotRun, Work},
};
use crate::{
    plan::{BackendPlan, PlanFamily, PortPlan},
    tables::TableError,
};

fn row_of<F: Family>(backend: &BackendPlan<F>) -> Backend<F> {
    let flags = if backend.eligible { ELIGIBLE } else { 0 };
    Backend { addr: backend.addr, port: backend.port, flags, zero: 0 }
}

impl<F: PlanFamily> Side<F> {
    /// Takes out the frontends that the service port is not to have; those that another one is to have are left for it
    /// to take over, but for the last call.
    pub(super) fn take_frontends_out(
        &mut self,
        shared: &mut Shared,
        work: &Work<'_, F>,
        also_claimed: bool,
    ) -> Result<(), ReconcileError> {
        let Some(holding) = self.services.get_mut(&work.job.id) else { return Ok(()) };
        let claims = &self.claims;
        let is_claimed = |key: &FrontendKey<F>| claims.get(key).is_some_and(|id| *id != work.job.id);
        let gone: Vec<_> = holding
            .frontends
            .keys()
            .filter(|key| !work.wanted.contains(key))
            .filter(|key| also_claimed || !is_claimed(key))
            .copied()
            .collect();
        for key in gone {
            shared.counts.take(&mut self.tables.frontends, &key)?;
            self.frontends.remove(&key);
            holding.frontends.remove(&key);
            self.addresses.leave(&mut self.tables.addresses, shared, key.addr)?;
        }
        Ok(())
    }

    /// Puts backends in, writes slots, and points the frontends at them.
    pub(super) fn put_in(&mut self, shared: &mut Shared, work: &mut Work<'_, F>) -> Result<(), ReconcileError> {
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
            let row = row_of(backend);
            let is_right = [row, Backend { flags: ELIGIBLE, ..row }].map(Some).contains(&held.row(at));
            described.push(Description { key, pod: backend.target.as_deref(), there: &mut held.described });
            // One that is no longer eligible is marked when no slot names it any more.
            if is_right {
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

    /// Points the frontends at the service port and its slots. One that fails keeps none of the others.
    fn switch_frontends(&mut self, shared: &mut Shared, work: &Work<'_, F>) -> Result<(), ReconcileError> {
        let (service, Some(plan)) = (work.job.id, work.job.plan) else { return Ok(()) };
        let value = Frontend {
            service,
            affinity: work.job.affinity(),
            seed: plan.seed,
            first_slot: work.run.first,
            slot_count: work.run.count,
            timeout: plan.affinity.unwrap_or(Seconds::new(0)),
            scope: plan.scope.number(),
            flags: if plan.family::<F>().others { OTHERS } else { 0 },
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

    /// Writes a frontend; a new one's address first.
    fn put_frontend(&mut self, shared: &mut Shared, key: &FrontendKey<F>, value: &Frontend) -> Result<(), TableError> {
        let is_new = !self.frontends.contains_key(key);
        if is_new {
            let capacity = self.tables.frontends.capacity();
            if self.frontends.len() >= capacity {
                return Err(TableError::Full { map: self.tables.frontends.name().to_owned(), capacity });
            }
            self.addresses.arrive(&mut self.tables.addresses, shared, key.addr)?;
        }
        let put = shared.counts.put(&mut self.tables.frontends, key, value);
        if is_new && put.is_err() {
            // It stays known to be unused, where it can't be taken out.
            let _ = self.addresses.leave(&mut self.tables.addresses, shared, key.addr);
        }
        put
    }

    /// Takes out the backends that the plan has not, marks those that are no longer eligible, and frees the slots that no
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
        let pointed_at: BTreeSet<_> = holding
            .frontends
            .keys()
            .filter_map(|key| self.frontends.get(key))
            .map(|value| Run { first: value.first_slot, count: value.slot_count })
            .collect();
        let in_use: BTreeSet<_> = holding
            .runs
            .iter()
            .filter(|there| pointed_at.contains(&there.run))
            .flat_map(|there| there.backends.iter().copied())
            .collect();
        let planned: BTreeMap<_, _> = work.backends().iter().map(|b| ((b.addr, b.port), row_of(b))).collect();

        let mut removed = BTreeSet::new();
        for (at, held) in &mut holding.backends {
            if in_use.contains(&held.id) && planned.get(at).is_none_or(|row| !row.is_eligible_anywhere()) {
                continue;
            }
            let key = BackendKey { service, backend: held.id };
            match (planned.get(at), held.row(*at)) {
                (None, row) => {
                    if row.is_some() {
                        shared.counts.take(&mut self.tables.backends, &key)?;
                        held.note_gone();
                        self.backends -= 1;
                    }
                    shared.forget_backend(key, &mut held.described)?;
                    removed.insert(*at);
                }
                (Some(planned), Some(row)) if row != *planned && !planned.is_eligible_anywhere() => {
                    shared.counts.put(&mut self.tables.backends, &key, planned)?;
                    held.note(*at, *planned);
                }
                (Some(_), _) => {}
            }
        }
        if !removed.is_empty() {
            holding.backends.retain(|at, _| !removed.contains(at));
        }
        while synced && let Some(&backend) = holding.strays.first() {
            let key = BackendKey { service, backend };
            if in_use.contains(&backend) {
                break;
            }
            shared.counts.take(&mut self.tables.backends, &key)?;
            self.backends -= 1;
            holding.strays.remove(&backend);
            shared.forget_stray(key)?;
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
}
