//! What goes with backends for people: counters, which the datapath counts in, and their pods' names.
//!
//! What the maps hold of it is noted with each backend; of those that no [`Side`](super::side::Side) trusts, here.

use std::collections::{BTreeMap, BTreeSet};

use affinity_common::abi::{backend_names::BackendName, backend_stats::BackendStats, backends::BackendKey};

use super::{Fill, audit::Differences, counts::Counts, digest::Digest};
use crate::tables::{BoxTable, SharedTables, TableError, names};

/// What the maps hold of a backend beside where it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Described {
    /// Of its pod's name.
    name: Option<Digest>,
    /// Whether it has counters.
    is_counted: bool,
}

/// What a backend is to be described by.
pub(super) struct Description<'a> {
    pub key: BackendKey,
    /// The name of its pod, where there is one.
    pub pod: Option<&'a str>,
    /// What the maps hold.
    pub there: &'a mut Described,
}

/// The maps of what goes with backends.
#[derive(Default)]
pub(super) struct Descriptions {
    /// Those of backends that are distrusted, and those of none.
    strays: BTreeMap<BackendKey, Described>,
    /// How many names there are, strays' too.
    names: usize,
    /// How many counters.
    stats: usize,
}

impl Descriptions {
    pub fn fills(&self, tables: &SharedTables) -> [Fill; 2] {
        [Fill::of(&tables.backend_names, self.names), Fill::of(&tables.backend_stats, self.stats)]
    }

    /// The keys of those whose backends no one trusts.
    pub fn strays(&self) -> impl Iterator<Item = &BackendKey> {
        self.strays.keys()
    }

    /// What the maps hold of a backend that is trusted from now on.
    pub fn trust(&mut self, key: BackendKey) -> Described {
        self.strays.remove(&key).unwrap_or_default()
    }

    /// A backend is trusted no more.
    pub fn distrust(&mut self, key: BackendKey, there: Described) {
        if there != Described::default() {
            self.strays.insert(key, there);
        }
    }

    /// Makes counters and names of backends, where they are not there.
    pub fn describe(
        &mut self,
        tables: &mut SharedTables,
        counts: &mut Counts,
        mut backends: Vec<Description<'_>>,
    ) -> Result<(), TableError> {
        let mut new: Vec<_> = backends.iter_mut().filter(|backend| !backend.there.is_counted).collect();
        let keys: Vec<_> = new.iter().map(|backend| backend.key).collect();
        let (count, counted) =
            counts.put_all(&mut tables.backend_stats, &keys, &vec![BackendStats::default(); keys.len()]);
        self.stats += count;
        new.iter_mut().take(count).for_each(|backend| backend.there.is_counted = true);

        let (mut named, mut keys, mut rows) = (Vec::new(), Vec::new(), Vec::new());
        let mut forgotten = Ok(());
        for Description { key, pod, there } in backends {
            let Some(row) = pod.map(names::encode_backend) else {
                forgotten = forgotten.and(self.forget_name(&mut tables.backend_names, counts, key, there));
                continue;
            };
            let digest = Digest::of(&[row]);
            if there.name != Some(digest) {
                keys.push(key);
                rows.push(row);
                named.push((there, digest));
            }
        }
        let (count, put) = counts.put_all(&mut tables.backend_names, &keys, &rows);
        for (there, digest) in named.into_iter().take(count) {
            self.names += usize::from(there.name.replace(digest).is_none());
        }
        counted.and(forgotten).and(put)
    }

    /// The backend is gone: takes out what went with it.
    pub fn forget(
        &mut self,
        tables: &mut SharedTables,
        counts: &mut Counts,
        key: BackendKey,
        there: &mut Described,
    ) -> Result<(), TableError> {
        if there.is_counted {
            counts.take(&mut tables.backend_stats, &key)?;
            there.is_counted = false;
            self.stats -= 1;
        }
        self.forget_name(&mut tables.backend_names, counts, key, there)
    }

    fn forget_name(
        &mut self,
        table: &mut BoxTable<BackendKey, BackendName>,
        counts: &mut Counts,
        key: BackendKey,
        there: &mut Described,
    ) -> Result<(), TableError> {
        if there.name.is_some() {
            counts.take(table, &key)?;
            there.name = None;
            self.names -= 1;
        }
        Ok(())
    }

    /// The distrusted backend is gone: takes out what went with it.
    pub fn forget_stray(
        &mut self,
        tables: &mut SharedTables,
        counts: &mut Counts,
        key: BackendKey,
    ) -> Result<(), TableError> {
        let Some(mut there) = self.strays.remove(&key) else { return Ok(()) };
        let done = self.forget(tables, counts, key, &mut there);
        if done.is_err() {
            self.strays.insert(key, there);
        }
        done
    }

    /// Takes out what goes with no backend at all; `backends` are the distrusted ones that there are.
    pub fn forget_all_but(
        &mut self,
        tables: &mut SharedTables,
        counts: &mut Counts,
        backends: &BTreeSet<BackendKey>,
    ) -> Result<(), TableError> {
        let gone: Vec<_> = self.strays.keys().filter(|key| !backends.contains(key)).copied().collect();
        gone.into_iter().try_for_each(|key| self.forget_stray(tables, counts, key))
    }

    /// Reads the maps anew. `trusted` is what was written of each backend that is trusted, and becomes what is found.
    pub fn refresh(
        &mut self,
        tables: &SharedTables,
        mut trusted: BTreeMap<BackendKey, &mut Described>,
        differences: &mut Differences,
    ) -> Result<(), TableError> {
        let names = tables.backend_names.entries()?;
        let names: BTreeMap<_, _> = names.into_iter().map(|(key, row)| (key, Digest::of(&[row]))).collect();
        // Their values are the datapath's.
        let stats: BTreeSet<_> = tables.backend_stats.keys()?.into_iter().collect();

        let (mut written_names, mut written_stats) = (BTreeMap::new(), BTreeSet::new());
        let strays = self.strays.iter().map(|(key, there)| (*key, *there));
        for (key, there) in trusted.iter().map(|(key, there)| (*key, **there)).chain(strays) {
            written_names.extend(there.name.map(|digest| (key, digest)));
            written_stats.extend(there.is_counted.then_some(key));
        }
        differences.note(tables.backend_names.name(), &written_names, &names);
        let present = |keys: &BTreeSet<BackendKey>| keys.iter().map(|key| (*key, ())).collect();
        differences.note(tables.backend_stats.name(), &present(&written_stats), &present(&stats));

        for there in trusted.values_mut() {
            **there = Described::default();
        }
        *self = Self { strays: BTreeMap::new(), names: names.len(), stats: stats.len() };
        for key in stats {
            self.there(&mut trusted, key).is_counted = true;
        }
        for (key, digest) in names {
            self.there(&mut trusted, key).name = Some(digest);
        }
        Ok(())
    }

    fn there<'a>(
        &'a mut self,
        trusted: &'a mut BTreeMap<BackendKey, &mut Described>,
        key: BackendKey,
    ) -> &'a mut Described {
        match trusted.get_mut(&key) {
            Some(there) => there,
            None => self.strays.entry(key).or_default(),
        }
    }
}
