//! What the address families share: ids, slots, and the rows for people.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use affinity_common::{
    abi::{backend_stats::BackendStats, backends::BackendKey, ids::NextIds, slots::Slot},
    types::{BackendId, ServiceId},
};

use super::{
    Clock, Fill, ReconcileError,
    addresses::Filter,
    audit::Differences,
    counts::Counts,
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
    /// What the maps hold: of names, digests.
    services: BTreeMap<ServiceId, Digest>,
    names: BTreeMap<BackendKey, Digest>,
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

    /// Packs what it keeps: see [`super::Reconciler`].
    pub fn pack(&mut self) {
        super::pack(&mut self.services);
        super::pack(&mut self.names);
        self.stats = std::mem::take(&mut self.stats).into_iter().collect();
        self.ids.pack();
    }

    pub fn fills(&self) -> [Fill; 4] {
        let Self { tables, runs, .. } = self;
        [
            Fill::of(&tables.services, self.services.len()),
            Fill::of(&tables.backend_names, self.names.len()),
            Fill::of(&tables.backend_stats, self.stats.len()),
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

    /// Makes the rows that go with backends: their counters, and their pods' names.
    pub fn describe_backends(&mut self, backends: &[(BackendKey, Option<&str>)]) -> Result<(), TableError> {
        let new: Vec<_> = backends.iter().map(|(key, _)| *key).filter(|key| !self.stats.contains(key)).collect();
        let zeroes = vec![BackendStats::default(); new.len()];
        let (count, counted) = self.counts.put_all(&mut self.tables.backend_stats, &new, &zeroes);
        self.stats.extend(new.into_iter().take(count));

        let (mut keys, mut rows) = (Vec::new(), Vec::new());
        let mut forgotten = Ok(());
        for (key, pod) in backends {
            let Some(row) = pod.map(names::encode_backend) else {
                forgotten = forgotten.and(self.forget_name(*key));
                continue;
            };
            if self.names.get(key) != Some(&Digest::of(&[row])) {
                keys.push(*key);
                rows.push(row);
            }
        }
        let (count, named) = self.counts.put_all(&mut self.tables.backend_names, &keys, &rows);
        self.names.extend(keys.into_iter().zip(rows.iter().map(|row| Digest::of(&[*row]))).take(count));
        counted.and(forgotten).and(named)
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
        let digests = |(id, row)| (id, Digest::of(&[row]));
        let services = self.tables.services.entries()?.into_iter().map(digests).collect();
        differences.note(self.tables.services.name(), &self.services, &services);
        self.services = services;
        let names = self.tables.backend_names.entries()?;
        let names = names.into_iter().map(|(key, row)| (key, Digest::of(&[row]))).collect();
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
