//! What the address families share: ids, slots, and the rows for people.

use std::{collections::BTreeMap, time::Instant};

use affinity_common::{
    abi::{backends::BackendKey, ids::NextIds, slots::Slot},
    types::{BackendId, ServiceId},
};

use super::{
    Clock, Fill, ReconcileError,
    addresses::Filter,
    audit::Differences,
    counts::Counts,
    described::{Described, Description, Descriptions},
    digest::Digest,
    ids::Ids,
    runs::{Run, Runs},
};
use crate::{
    model::ServicePortName,
    tables::{ONLY, SharedTables, TableError, names},
};

/// What the address families share.
pub(super) struct Shared {
    pub tables: SharedTables,
    pub ids: Ids,
    pub runs: Runs,
    pub counts: Counts,
    pub filter: Filter,
    clock: Clock,
    /// What goes with backends.
    pub descriptions: Descriptions,
    /// What `services` holds: of names, digests.
    services: BTreeMap<ServiceId, Digest>,
}

impl Shared {
    pub fn new(tables: SharedTables, clock: Clock) -> Self {
        Self {
            ids: Ids::adopt(NextIds::default(), NextIds::default(), BTreeMap::new()),
            runs: Runs::new(tables.slots.capacity()),
            counts: Counts::default(),
            filter: Filter::default(),
            clock,
            descriptions: Descriptions::default(),
            services: BTreeMap::new(),
            tables,
        }
    }

    pub fn now(&self) -> Instant {
        (self.clock)()
    }

    /// Packs what it keeps: see [`super::Reconciler`].
    pub fn pack(&mut self) {
        super::pack(&mut self.services);
        self.ids.pack();
    }

    pub fn fills(&self) -> [Fill; 4] {
        let Self { tables, runs, .. } = self;
        let [names, stats] = self.descriptions.fills(tables);
        [
            Fill::of(&tables.services, self.services.len()),
            names,
            stats,
            Fill::of(&tables.slots, runs.capacity() - runs.free() as usize),
        ]
    }

    /// The ids that have a row.
    pub fn services(&self) -> impl Iterator<Item = ServiceId> {
        self.services.keys().copied()
    }

    /// The id of a service port, by which it is on record from now on: the next daemon finds it by its row.
    pub fn service_id(&mut self, name: &ServicePortName) -> Result<ServiceId, ReconcileError> {
        let row = names::encode_service(name).ok_or(ReconcileError::LongName)?;
        let id = self.ids.service(&mut self.tables.ids, &mut self.counts, name)?;
        let digest = Digest::of(&[row]);
        if self.services.get(&id) != Some(&digest) {
            self.counts.put(&mut self.tables.services, &id, &row)?;
            self.services.insert(id, digest);
        }
        Ok(id)
    }

    /// Nothing of the service port is left.
    pub fn forget_service(&mut self, id: ServiceId, name: Option<&ServicePortName>) -> Result<(), ReconcileError> {
        if self.services.contains_key(&id) {
            self.counts.take(&mut self.tables.services, &id)?;
            self.services.remove(&id);
        }
        if let Some(name) = name {
            self.ids.forget(name);
        }
        Ok(())
    }

    /// Makes what goes with backends: see [`Descriptions::describe`].
    pub fn describe_backends(&mut self, backends: Vec<Description<'_>>) -> Result<(), TableError> {
        self.descriptions.describe(&mut self.tables, &mut self.counts, backends)
    }

    /// The backend is gone: takes out what went with it.
    pub fn forget_backend(&mut self, key: BackendKey, there: &mut Described) -> Result<(), TableError> {
        self.descriptions.forget(&mut self.tables, &mut self.counts, key, there)
    }

    /// The distrusted backend is gone: takes out what went with it.
    pub fn forget_stray(&mut self, key: BackendKey) -> Result<(), TableError> {
        self.descriptions.forget_stray(&mut self.tables, &mut self.counts, key)
    }

    /// Writes slots in a run that no frontend points at.
    pub fn write_slots(&mut self, slots: &[BackendId]) -> Result<Run, ReconcileError> {
        let run = self.runs.take(slots.len(), self.now())?;
        let indices: Vec<u32> = run.slots().collect();
        let rows: Vec<Slot> = slots.iter().map(|backend| Slot { backend: *backend }).collect();
        let (_, done) = self.counts.put_all(&mut self.tables.slots, &indices, &rows);
        if let Err(error) = done {
            self.runs.give_back_unused(run);
            return Err(error.into());
        }
        Ok(run)
    }

    /// What a run of slots holds.
    pub fn read_slots(&self, run: Run) -> Result<Vec<BackendId>, TableError> {
        let indices: Vec<u32> = run.slots().collect();
        let rows = self.tables.slots.get_all(&indices)?;
        Ok(rows.into_iter().map(|row| row.unwrap_or_default().backend).collect())
    }

    /// Takes over ids: those that rows name, and any that are in use.
    ///
    /// Of several ids for one service port, the one that frontends point at is trusted, else the lowest; the others
    /// are strays.
    pub fn adopt_ids(&mut self, in_use: NextIds, has_frontends: impl Fn(ServiceId) -> bool) -> Result<(), TableError> {
        let recorded = self.tables.ids.get(&ONLY)?.unwrap_or_default();
        let mut services: BTreeMap<ServicePortName, ServiceId> = BTreeMap::new();
        for (id, row) in self.tables.services.entries()? {
            let Some(name) = names::decode_service(&row).filter(|_| id != ServiceId::default()) else {
                tracing::warn!(%id, "a service id without a name: to be taken out");
                continue;
            };
            match services.get(&name) {
                Some(trusted) if has_frontends(*trusted) || !has_frontends(id) => {
                    tracing::warn!(%name, %trusted, distrusted = %id, "a second id for a service port: to be taken out");
                }
                earlier => {
                    if let Some(distrusted) = earlier {
                        tracing::warn!(%name, trusted = %id, %distrusted, "a second id for a service port: to be taken out");
                    }
                    services.insert(name, id);
                }
            }
        }
        let service = self.services.keys().copied().chain(self.descriptions.strays().map(|key| key.service));
        let backend = self.descriptions.strays().map(|key| key.backend);
        let beyond = NextIds {
            service: service.fold(in_use.service, |beyond, id| beyond.max(after_service(id))),
            backend: backend.fold(in_use.backend, |beyond, id| beyond.max(after_backend(id))),
        };
        self.ids = Ids::adopt(recorded, beyond, services);
        Ok(())
    }

    /// Reads the maps anew, but for what goes with backends: see [`Descriptions::refresh`].
    pub fn refresh(&mut self, differences: &mut Differences) -> Result<(), TableError> {
        self.filter.refresh(&self.tables, differences)?;
        let digests = |(id, row)| (id, Digest::of(&[row]));
        let services = self.tables.services.entries()?.into_iter().map(digests).collect();
        differences.note(self.tables.services.name(), &self.services, &services);
        self.services = services;
        Ok(())
    }

    /// Puts the record of ids right, where it is not what was written.
    pub fn repair_ids(&mut self, differences: &mut Differences) -> Result<(), ReconcileError> {
        let found = self.tables.ids.get(&ONLY)?.unwrap_or_default();
        if self.ids.repair(&mut self.tables.ids, &mut self.counts, found)? {
            differences.changed(self.tables.ids.name());
        }
        Ok(())
    }
}

/// The least id beyond one. Ids that are all used up stay so.
pub(super) fn after_service(id: ServiceId) -> ServiceId {
    ServiceId { id: id.id.saturating_add(1) }
}

/// The least id beyond one. Ids that are all used up stay so.
pub(super) fn after_backend(id: BackendId) -> BackendId {
    BackendId { id: id.id.saturating_add(1) }
}
