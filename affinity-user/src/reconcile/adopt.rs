//! What the maps hold, read from them: on start to take it over, later to compare it with what was written.

use std::collections::{BTreeMap, BTreeSet};

use affinity_common::{
    abi::{
        backends::{Backend, BackendKey},
        ids::NextIds,
    },
    types::{BackendId, ServiceId},
};
use litemap::Entry;

use super::{
    audit::Differences,
    described::Described,
    digest::Digest,
    runs::Run,
    shared::{Shared, after_backend, after_service},
    side::{Held, Holding, Side, SlotRun},
};
use crate::{plan::PlanFamily, tables::TableError};

/// Whether the maps are taken over or compared.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Nothing is known but what the maps say: the slots that frontends point at are in use.
    Adopt,
    /// It is known which slots are in use.
    Compare,
}

impl<F: PlanFamily> Side<F> {
    /// Reads the maps anew, but for what goes with backends. Ids that are known stay what they are.
    pub fn refresh(
        &mut self,
        shared: &mut Shared,
        purpose: Purpose,
        differences: &mut Differences,
    ) -> Result<(), TableError> {
        let frontends: BTreeMap<_, _> = self.tables.frontends.entries()?.into_iter().collect();
        let backends: BTreeMap<_, _> = self.tables.backends.entries()?.into_iter().collect();
        differences.note(self.tables.frontends.name(), &self.frontends, &frontends);
        differences.note(self.tables.backends.name(), &self.written_backends(&backends), &backends);

        for holding in self.services.values_mut() {
            holding.frontends.clear();
        }
        let mut pointed_at: BTreeSet<(ServiceId, Run)> = BTreeSet::new();
        for (key, value) in &frontends {
            self.services.entry(value.service).or_default().frontends.insert(*key, ());
            pointed_at.insert((value.service, Run { first: value.first_slot, count: value.slot_count }));
        }
        self.frontends = frontends;
        self.addresses.refresh(&*self.tables.addresses, self.frontends.iter(), differences)?;
        self.ranges.refresh(&self.tables.ranges, differences)?;

        if purpose == Purpose::Adopt {
            self.adopt_runs(shared, pointed_at)?;
        } else {
            self.compare_runs(shared, differences)?;
        }
        self.take_over_backends(backends);
        self.services.retain(|_, holding| !holding.is_empty());
        Ok(())
    }

    /// The ids beyond those that the maps hold.
    pub fn ids_in_use(&self) -> NextIds {
        let mut beyond = NextIds::default();
        for service in self.ranges.services() {
            beyond.service = beyond.service.max(after_service(service));
        }
        for (service, holding) in &self.services {
            beyond.service = beyond.service.max(after_service(*service));
            let held = holding.backends.values().map(|held| held.id);
            let slots = holding.runs.iter().flat_map(|there| there.backends.iter().copied());
            for backend in held.chain(slots).chain(holding.strays.iter().copied()) {
                beyond.backend = beyond.backend.max(after_backend(backend));
            }
        }
        beyond
    }

    /// What was written to `backends`; what is known to be there without having been written is as it was found.
    fn written_backends(&self, found: &BTreeMap<BackendKey, Backend<F>>) -> BTreeMap<BackendKey, Backend<F>> {
        let mut written = BTreeMap::new();
        for (&service, holding) in &self.services {
            let mut known: Vec<_> = holding.strays.iter().copied().collect();
            for (at, held) in &holding.backends {
                if held.is_wrong() {
                    known.push(held.id);
                } else {
                    written.extend(held.row(*at).map(|row| (BackendKey { service, backend: held.id }, row)));
                }
            }
            for backend in known {
                let key = BackendKey { service, backend };
                written.extend(found.get(&key).map(|row| (key, *row)));
            }
        }
        written
    }

    fn adopt_runs(&mut self, shared: &mut Shared, runs: BTreeSet<(ServiceId, Run)>) -> Result<(), TableError> {
        for (service, run) in runs.into_iter().filter(|(_, run)| run.count > 0) {
            if !shared.runs.adopt(run) {
                tracing::warn!(%service, ?run, "frontends point at slots that are none, or of another service");
                continue;
            }
            let slots = shared.read_slots(run)?;
            self.services.entry(service).or_default().runs.push(SlotRun::new(run, &slots));
        }
        Ok(())
    }

    fn compare_runs(&mut self, shared: &Shared, differences: &mut Differences) -> Result<(), TableError> {
        for there in self.services.values_mut().flat_map(|holding| &mut holding.runs) {
            let found = shared.read_slots(there.run)?;
            if Digest::of(&found) != there.digest {
                differences.changed(shared.tables.slots.name());
                *there = SlotRun::new(there.run, &found);
            }
        }
        Ok(())
    }

    /// Of several ids for one address and port, the one that is known is trusted, else one that slots name, else the
    /// lowest.
    fn take_over_backends(&mut self, found: BTreeMap<BackendKey, Backend<F>>) {
        self.backends = found.len();
        for holding in self.services.values_mut() {
            holding.strays.clear();
            for (_, held) in &mut holding.backends {
                held.note_gone();
            }
        }
        let mut by_service: BTreeMap<ServiceId, Vec<(BackendId, Backend<F>)>> = BTreeMap::new();
        for (key, row) in found {
            by_service.entry(key.service).or_default().push((key.backend, row));
        }
        for (service, rows) in by_service {
            self.services.entry(service).or_default().take_over(service, rows);
        }
    }
}

impl<F: PlanFamily> Holding<F> {
    fn take_over(&mut self, service: ServiceId, mut rows: Vec<(BackendId, Backend<F>)>) {
        let known: BTreeMap<_, _> = self.backends.iter().map(|(at, held)| (held.id, *at)).collect();
        let in_slots: BTreeSet<_> = self.runs.iter().flat_map(|there| there.backends.iter().copied()).collect();
        rows.sort_by_key(|(id, _)| (!in_slots.contains(id), *id));
        for (id, row) in rows {
            if let Some(at) = known.get(&id)
                && let Some(held) = self.backends.get_mut(at)
            {
                held.note(*at, row);
                continue;
            }
            match self.backends.entry((row.addr, row.port)) {
                Entry::Vacant(entry) if id != BackendId::default() => {
                    entry.insert(Held::new(id, Described::default())).note((row.addr, row.port), row);
                }
                _ => {
                    tracing::warn!(%service, backend = %id, "a second id for a backend: to be taken out");
                    self.strays.insert(id);
                }
            }
        }
    }
}
