//! What the address families share: ids, slots, and the rows for people.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use affinity_common::{
    abi::{
        backend_names::BackendName, backend_stats::BackendStats, backends::BackendKey, ids::NextIds,
        services::ServicePortName as ServiceRow, slots::Slot,
    },
    types::{BackendId, ServiceId},
};

use super::{
    Clock, ReconcileError,
    addresses::Filter,
    audit::Differences,
    counts::Counts,
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
    /// What the maps hold.
    services: BTreeMap<ServiceId, ServiceRow>,
    names: BTreeMap<BackendKey, BackendName>,
    stats: BTreeSet<BackendKey>,
}

impl Shared {
    pub fn new(tables: SharedTables, clock: Clock) -> Self {
        Self {
            ids: Ids::adopt(NextIds::default(), NextIds::default(), BTreeMap::new()),
            runs: Runs::new(tables.slots.capacity()),
            counts: Counts::default(),
            filter: Filter::default(),
            clock,
            services: BTreeMap::new(),
            names: BTreeMap::new(),
            stats: BTreeSet::new(),
            tables,
        }
    }

    pub fn now(&self) -> Instant {
        (self.clock)()
    }

    /// The ids that have a row.
    pub fn services(&self) -> impl Iterator<Item = ServiceId> {
        self.services.keys().copied()
    }

    /// The id of a service port, by which it is on record from now on: the next daemon finds it by its row.
    pub fn service_id(&mut self, name: &ServicePortName) -> Result<ServiceId, ReconcileError> {
        let row = names::encode_service(name).ok_or(ReconcileError::LongName)?;
        let id = self.ids.service(&mut self.tables.ids, &mut self.counts, name)?;
        if self.services.get(&id) != Some(&row) {
            self.counts.put(&mut self.tables.services, &id, &row)?;
            self.services.insert(id, row);
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

    /// Makes the rows that go with a backend: its counter, and its pod's name.
    pub fn describe_backend(&mut self, key: BackendKey, pod: Option<&str>) -> Result<(), TableError> {
        if !self.stats.contains(&key) {
            self.counts.put(&mut self.tables.backend_stats, &key, &BackendStats::default())?;
            self.stats.insert(key);
        }
        match pod.map(names::encode_backend) {
            Some(name) if self.names.get(&key) != Some(&name) => {
                self.counts.put(&mut self.tables.backend_names, &key, &name)?;
                self.names.insert(key, name);
            }
            Some(_) => {}
            None => self.forget_name(key)?,
        }
        Ok(())
    }

    /// The backend is gone: takes out the rows that went with it.
    pub fn forget_backend(&mut self, key: BackendKey) -> Result<(), TableError> {
        if self.stats.contains(&key) {
            self.counts.take(&mut self.tables.backend_stats, &key)?;
            self.stats.remove(&key);
        }
        self.forget_name(key)
    }

    fn forget_name(&mut self, key: BackendKey) -> Result<(), TableError> {
        if self.names.contains_key(&key) {
            self.counts.take(&mut self.tables.backend_names, &key)?;
            self.names.remove(&key);
        }
        Ok(())
    }

    /// Takes out the rows of backends that are none.
    pub fn forget_all_but(&mut self, backends: &BTreeSet<BackendKey>) -> Result<(), TableError> {
        let strays: BTreeSet<_> =
            self.names.keys().chain(&self.stats).filter(|key| !backends.contains(key)).copied().collect();
        strays.into_iter().try_for_each(|key| self.forget_backend(key))
    }

    /// Writes slots in a run that no frontend points at.
    pub fn write_slots(&mut self, slots: &[BackendId]) -> Result<Run, ReconcileError> {
        let run = self.runs.take(slots.len(), self.now())?;
        for (index, backend) in run.slots().zip(slots) {
            if let Err(error) = self.counts.put(&mut self.tables.slots, &index, &Slot { backend: *backend }) {
                self.runs.give_back_unused(run);
                return Err(error.into());
            }
        }
        Ok(run)
    }

    /// What a run of slots holds.
    pub fn read_slots(&self, run: Run) -> Result<Vec<BackendId>, TableError> {
        run.slots().map(|index| Ok(self.tables.slots.get(&index)?.unwrap_or_default().backend)).collect()
    }

    /// Takes over ids: those that rows name, and any that are in use.
    ///
    /// Of several ids for one service port, the one that frontends point at is trusted, else the lowest; the others
    /// are strays.
    pub fn adopt_ids(&mut self, in_use: NextIds, has_frontends: impl Fn(ServiceId) -> bool) -> Result<(), TableError> {
        let recorded = self.tables.ids.get(&ONLY)?.unwrap_or_default();
        let mut services: BTreeMap<ServicePortName, ServiceId> = BTreeMap::new();
        for (&id, row) in &self.services {
            let Some(name) = names::decode_service(row).filter(|_| id != ServiceId::default()) else {
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
        let service = self.services.keys().copied().chain(self.rows_of_backends().map(|key| key.service));
        let backend = self.rows_of_backends().map(|key| key.backend);
        let beyond = NextIds {
            service: service.fold(in_use.service, |beyond, id| beyond.max(after_service(id))),
            backend: backend.fold(in_use.backend, |beyond, id| beyond.max(after_backend(id))),
        };
        self.ids = Ids::adopt(recorded, beyond, services);
        Ok(())
    }

    fn rows_of_backends(&self) -> impl Iterator<Item = &BackendKey> {
        self.names.keys().chain(&self.stats)
    }

    /// Reads the maps anew.
    pub fn refresh(&mut self, differences: &mut Differences) -> Result<(), TableError> {
        self.filter.refresh(&self.tables, differences)?;
        let services = self.tables.services.entries()?.into_iter().collect();
        differences.note(self.tables.services.name(), &self.services, &services);
        self.services = services;
        let names = self.tables.backend_names.entries()?.into_iter().collect();
        differences.note(self.tables.backend_names.name(), &self.names, &names);
        self.names = names;
        // Their values are the datapath's.
        let stats: BTreeSet<_> = self.tables.backend_stats.keys()?.into_iter().collect();
        let present = |keys: &BTreeSet<BackendKey>| keys.iter().map(|key| (*key, ())).collect();
        differences.note(self.tables.backend_stats.name(), &present(&self.stats), &present(&stats));
        self.stats = stats;
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
