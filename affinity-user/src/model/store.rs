//! The objects of one kind: their last good state, and what a relist does to them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{Kind, ObjectName, Problem, Trigger};

/// An object of the model.
pub trait Object: Eq {
    /// What kind of object it is.
    const KIND: Kind;

    /// Its name.
    fn name(&self) -> &ObjectName;
}

/// A version of an object after validation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked<T> {
    /// Its name.
    pub name: ObjectName,
    /// What of it can be programmed; `None` if nothing.
    pub object: Option<Arc<T>>,
    /// Whether `object` is to replace an earlier good version, in spite of the problems. If not, it is used only
    /// where there is no good version.
    pub replaces: bool,
    /// What is wrong with it.
    pub problems: Vec<Problem>,
    /// When that happened which the version answers.
    pub trigger: Trigger,
}

impl<T: Object> Checked<T> {
    /// A version without fault.
    pub fn good(object: T) -> Self {
        Self {
            name: object.name().clone(),
            object: Some(Arc::new(object)),
            replaces: true,
            problems: Vec::new(),
            trigger: Trigger::Unknown,
        }
    }

    /// A version of which nothing can be programmed.
    pub fn rejected(name: ObjectName, problem: Problem) -> Self {
        Self { name, object: None, replaces: false, problems: vec![problem], trigger: Trigger::Unknown }
    }
}

struct Entry<T> {
    object: Option<Arc<T>>,
    /// Whether `object` is what could be saved of a version that should not replace a good one.
    makeshift: bool,
    /// The relist that has seen it last.
    seen: u64,
}

/// What became of an object.
pub(super) struct Transition<T> {
    pub name: ObjectName,
    pub old: Option<Arc<T>>,
    pub new: Option<Arc<T>>,
    /// The problems, where they changed.
    pub problems: Option<Vec<Problem>>,
    /// When that happened which the change answers.
    pub trigger: Trigger,
}

impl<T: Object> Transition<T> {
    fn happened(&self) -> bool {
        self.old != self.new || self.problems.is_some()
    }
}

pub(super) struct Store<T> {
    entries: BTreeMap<ObjectName, Entry<T>>,
    /// While a relist runs, what it found changed. What it found as it was is only marked as seen, so that a relist
    /// needs no memory for it.
    relist: Option<BTreeMap<ObjectName, Checked<T>>>,
    /// The problems of those that have some: few among many.
    faulty: BTreeMap<ObjectName, Vec<Problem>>,
    relists: u64,
    synced: bool,
}

impl<T> Default for Store<T> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), relist: None, faulty: BTreeMap::new(), relists: 0, synced: false }
    }
}

impl<T: Object> Store<T> {
    /// A relist starts. One that was under way is forgotten, as far as it got.
    pub fn begin(&mut self) {
        self.relists += 1;
        self.relist = Some(BTreeMap::new());
    }

    /// Takes a version: into the relist while one runs, else into effect.
    pub fn apply(&mut self, version: Checked<T>) -> Option<Transition<T>> {
        let Some(found) = &mut self.relist else { return self.commit(version) };
        if let Some(entry) = self.entries.get_mut(&version.name) {
            entry.seen = self.relists;
            if !entry.makeshift
                && version.replaces
                && entry.object == version.object
                && problems_of(&self.faulty, &version.name) == version.problems
            {
                found.remove(&version.name);
                return None;
            }
        }
        found.insert(version.name.clone(), version);
        None
    }

    /// Removes an object; at once, also while a relist runs.
    pub fn delete(&mut self, name: &ObjectName) -> Option<Transition<T>> {
        if let Some(found) = &mut self.relist {
            found.remove(name);
        }
        let entry = self.entries.remove(name)?;
        let problems = self.faulty.remove(name).map(|_| Vec::new());
        let gone = Transition { name: name.clone(), old: entry.object, new: None, problems, trigger: Trigger::Unknown };
        gone.happened().then_some(gone)
    }

    /// The relist is complete: it takes effect, and what it did not see is deleted.
    pub fn finish(&mut self) -> Vec<Transition<T>> {
        let Some(found) = self.relist.take() else { return Vec::new() };
        self.synced = true;
        let gone: BTreeSet<_> = self
            .entries
            .iter()
            .filter(|(name, entry)| entry.seen != self.relists && !found.contains_key(*name))
            .map(|(name, _)| name.clone())
            .collect();
        let deleted: Vec<_> = gone.iter().filter_map(|name| self.delete(name)).collect();
        let changed = found.into_values().filter_map(|version| self.commit(version));
        let transitions = deleted.into_iter().chain(changed).collect();
        // Those that came in order have left every node of the tree half full.
        self.entries = std::mem::take(&mut self.entries).into_iter().collect();
        transitions
    }

    fn commit(&mut self, version: Checked<T>) -> Option<Transition<T>> {
        let Checked { name, object, replaces, problems, trigger } = version;
        let entry =
            self.entries.entry(name.clone()).or_insert_with(|| Entry { object: None, makeshift: true, seen: 0 });
        entry.seen = self.relists;
        let old = entry.object.clone();
        if replaces || entry.makeshift && object.is_some() {
            entry.object = object;
            entry.makeshift = !replaces;
        }
        let changed = problems_of(&self.faulty, &name) != problems;
        if problems.is_empty() {
            self.faulty.remove(&name);
        } else {
            self.faulty.insert(name.clone(), problems.clone());
        }
        let done = Transition { name, old, new: entry.object.clone(), problems: changed.then_some(problems), trigger };
        done.happened().then_some(done)
    }

    pub fn get(&self, name: &ObjectName) -> Option<&Arc<T>> {
        self.entries.get(name)?.object.as_ref()
    }

    /// Whether there is such an object, good or not.
    pub fn has(&self, name: &ObjectName) -> bool {
        self.entries.contains_key(name)
    }

    /// Whether there is such an object, and nothing of it can be programmed.
    pub fn is_withheld(&self, name: &ObjectName) -> bool {
        self.entries.get(name).is_some_and(|entry| entry.object.is_none())
    }

    pub fn is_synced(&self) -> bool {
        self.synced
    }

    pub fn objects(&self) -> impl Iterator<Item = &Arc<T>> {
        self.entries.values().filter_map(|entry| entry.object.as_ref())
    }

    pub fn problems(&self) -> impl Iterator<Item = (&ObjectName, &Problem)> {
        self.faulty.iter().flat_map(|(name, problems)| problems.iter().map(move |problem| (name, problem)))
    }
}

fn problems_of<'a>(faulty: &'a BTreeMap<ObjectName, Vec<Problem>>, name: &ObjectName) -> &'a [Problem] {
    faulty.get(name).map(Vec::as_slice).unwrap_or_default()
}
