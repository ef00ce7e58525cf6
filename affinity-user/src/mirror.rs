//! Objects of a kind as the API server has them, of each what is read from it: kept up to date by a task of its own.
//!
//! What is known stays where the API server can't be asked. A kind that is not installed is looked for again now and then.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::causes::in_full;
use crate::model::{ObjectName, shared};

/// How often a kind that is not installed, or may not be listed, is looked for.
const LOOK: Duration = Duration::from_secs(30);
/// How long after a first failure it is tried again; it doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(500);
/// The longest wait after a failure.
const RETRY_MAX: Duration = Duration::from_secs(10);

/// What is known of a kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Not what there is.
    #[default]
    Waiting,
    /// The API server does not have the kind, or does not let it be listed.
    Missing,
    /// All there is.
    Ready,
}

/// An object's version, for comparing: `resourceVersion` as a number (KEP-5504 lets clients compare them so).
fn version(metadata: &ObjectMeta) -> u128 {
    metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or_default()
}

/// An object's name; of a cluster's own kinds the namespace is empty.
pub fn name(metadata: &ObjectMeta) -> Option<ObjectName> {
    let namespace = metadata.namespace.as_deref().unwrap_or_default();
    Some(ObjectName::new(shared(namespace), metadata.name.as_deref()?))
}

#[derive(Debug)]
struct State<T> {
    phase: Phase,
    objects: BTreeMap<ObjectName, (u128, T)>,
    /// What has been listed so far, of a list that goes on.
    listing: Option<BTreeMap<ObjectName, (u128, T)>>,
}

impl<T> Default for State<T> {
    fn default() -> Self {
        Self { phase: Phase::default(), objects: BTreeMap::new(), listing: None }
    }
}

/// What is kept of an object, or none where it is left out; what was kept of it before is at hand.
pub type Read<K, T> = fn(&K, Option<&T>) -> Option<T>;

/// Objects of the kind `K`, of each a `T`. It is followed no more when this is dropped.
#[derive(Debug)]
pub struct Mirror<K, T> {
    state: Arc<Mutex<State<T>>>,
    read: Read<K, T>,
    changed: Arc<Notify>,
    task: JoinHandle<()>,
}

impl<K, T> Drop for Mirror<K, T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl<K, T> Mirror<K, T>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
    T: Clone + Send + 'static,
{
    /// Follows objects in a task of the current tokio runtime; `changed` is told whenever something may have.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(api: Api<K>, config: watcher::Config, read: Read<K, T>, changed: &Arc<Notify>) -> Self {
        let state: Arc<Mutex<State<T>>> = Arc::default();
        let task = tokio::spawn(follow(api, config, read, state.clone(), changed.clone()));
        Self { state, read, changed: changed.clone(), task }
    }

    /// How much is known.
    pub fn phase(&self) -> Phase {
        lock(&self.state).phase
    }

    /// All objects, if they are known.
    pub fn all(&self) -> Option<BTreeMap<ObjectName, T>> {
        let state = lock(&self.state);
        let objects = || state.objects.iter().map(|(name, (_, object))| (name.clone(), object.clone())).collect();
        (state.phase == Phase::Ready).then(objects)
    }

    /// One object.
    pub fn get(&self, name: &ObjectName) -> Option<T> {
        lock(&self.state).objects.get(name).map(|(_, object)| object.clone())
    }

    /// Takes an object in that the API server has answered with, before the watch tells of it.
    pub fn put(&self, object: &K) {
        enter(&mut lock(&self.state).objects, self.read, object);
        self.changed.notify_one();
    }

    /// Takes a list of all objects in, which is of the moment, in place of what the watch has told so far.
    pub fn put_all<'a>(&self, objects: impl IntoIterator<Item = &'a K>) {
        let mut state = lock(&self.state);
        let mut all = BTreeMap::new();
        for object in objects {
            if let Some(name) = name(object.meta())
                && let Some(known) = state.objects.remove(&name)
            {
                all.insert(name, known);
            }
            enter(&mut all, self.read, object);
        }
        state.objects = all;
    }
}

/// A mirror of what a selector selects. Where another one comes, what was known stays until that is known.
#[derive(Debug)]
pub struct Selected<K, T> {
    current: Option<(String, Mirror<K, T>)>,
    next: Option<(String, Mirror<K, T>)>,
}

impl<K, T> Default for Selected<K, T> {
    fn default() -> Self {
        Self { current: None, next: None }
    }
}

impl<K, T> Selected<K, T>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
    T: Clone + Send + 'static,
{
    /// Follows what this selector selects, by a mirror that is made if there is none.
    pub fn select(&mut self, selector: &str, make: impl FnOnce() -> Mirror<K, T>) {
        if self.next.as_ref().is_some_and(|(_, mirror)| mirror.phase() == Phase::Ready) {
            self.current = self.next.take();
        }
        if self.current.as_ref().is_some_and(|(known, _)| known == selector) {
            self.next = None;
        } else if self.next.as_ref().is_none_or(|(known, _)| known != selector) {
            self.next = Some((selector.to_owned(), make()));
        }
        if self.current.is_none() {
            self.current = self.next.take();
        }
    }

    /// All objects, if they are known.
    pub fn all(&self) -> Option<BTreeMap<ObjectName, T>> {
        self.current.as_ref()?.1.all()
    }

    /// One object.
    pub fn get(&self, name: &ObjectName) -> Option<T> {
        self.current.as_ref()?.1.get(name)
    }
}

fn lock<T>(state: &Mutex<State<T>>) -> MutexGuard<'_, State<T>> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes an object in, unless a newer version of it is known.
fn enter<K: Resource<DynamicType = ()>, T>(
    objects: &mut BTreeMap<ObjectName, (u128, T)>,
    read: Read<K, T>,
    object: &K,
) {
    let Some(name) = name(object.meta()) else { return };
    let version = version(object.meta());
    let known = objects.get(&name);
    if known.is_some_and(|(known, _)| version < *known) {
        return;
    }
    match read(object, known.map(|(_, known)| known)) {
        Some(kept) => objects.insert(name, (version, kept)),
        None => objects.remove(&name),
    };
}

async fn follow<K, T>(
    api: Api<K>,
    config: watcher::Config,
    read: Read<K, T>,
    state: Arc<Mutex<State<T>>>,
    changed: Arc<Notify>,
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
    T: Clone + Send + 'static,
{
    let kind = K::kind(&());
    let mut events = std::pin::pin!(watcher(api, config));
    let mut retry = RETRY_MIN;
    let mut told = None;
    while let Some(event) = events.next().await {
        let mut wait = None;
        {
            let mut state = lock(&state);
            match event {
                Ok(event) => {
                    retry = RETRY_MIN;
                    take(&mut state, read, event);
                }
                Err(error) => {
                    let code = refusal(&error);
                    let is_refused = matches!(code, Some(403 | 404));
                    if is_refused {
                        *state = State { phase: Phase::Missing, ..State::default() };
                    }
                    if told != Some(code) {
                        if code == Some(404) {
                            tracing::info!(%kind, "is not installed in the cluster: nothing is done about it");
                        } else {
                            tracing::warn!(%kind, error = in_full(&error), "can't be followed");
                        }
                    }
                    told = Some(code);
                    wait = Some(if is_refused { LOOK } else { retry });
                    retry = (retry * 2).min(RETRY_MAX);
                }
            }
            if state.phase == Phase::Ready && wait.is_none() {
                told = None;
            }
        }
        changed.notify_one();
        if let Some(wait) = wait {
            tokio::time::sleep(wait).await;
        }
    }
}

fn take<K: Resource<DynamicType = ()>, T: Clone>(state: &mut State<T>, read: Read<K, T>, event: Event<K>) {
    match event {
        Event::Init => state.listing = Some(BTreeMap::new()),
        Event::InitApply(object) => {
            let known = name(object.meta()).and_then(|name| Some((state.objects.get(&name).cloned()?, name)));
            if let Some(listing) = &mut state.listing {
                if let Some((known, name)) = known {
                    listing.insert(name, known);
                }
                enter(listing, read, &object);
            }
        }
        Event::InitDone => {
            state.objects = state.listing.take().unwrap_or_default();
            state.phase = Phase::Ready;
        }
        Event::Apply(object) => enter(&mut state.objects, read, &object),
        Event::Delete(object) => {
            if let Some(name) = name(object.meta()) {
                state.objects.remove(&name);
            }
        }
    }
}

/// The HTTP status by which the API server refuses to list or to watch.
fn refusal(error: &watcher::Error) -> Option<u16> {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => Some(status.code),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;

    use super::*;

    fn object(name: &str, version: u32) -> ConfigMap {
        let mut object = ConfigMap::default();
        object.metadata.name = Some(name.to_owned());
        object.metadata.resource_version = Some(version.to_string());
        object
    }

    /// The version, and how many versions were seen before.
    #[expect(clippy::unnecessary_wraps, reason = "what is read may be left out")]
    fn read(object: &ConfigMap, known: Option<&(u128, u32)>) -> Option<(u128, u32)> {
        Some((version(&object.metadata), known.map_or(0, |(_, seen)| seen + 1)))
    }

    fn objects(state: &State<(u128, u32)>) -> Vec<(String, u128, u32)> {
        state.objects.iter().map(|(name, (_, (version, seen)))| (name.name.to_string(), *version, *seen)).collect()
    }

    #[test]
    fn a_list_takes_the_place_of_what_was_known_when_it_is_complete() {
        let mut state = State::default();
        take(&mut state, read, Event::Init);
        take(&mut state, read, Event::InitApply(object("a", 1)));
        assert_eq!((state.phase, state.objects.len()), (Phase::Waiting, 0));
        take(&mut state, read, Event::InitDone);
        take(&mut state, read, Event::Apply(object("b", 2)));
        take(&mut state, read, Event::Init);
        take(&mut state, read, Event::InitApply(object("b", 2)));
        assert_eq!(objects(&state), [("a".into(), 1, 0), ("b".into(), 2, 0)]);
        take(&mut state, read, Event::InitDone);
        assert_eq!((state.phase, objects(&state)), (Phase::Ready, vec![("b".into(), 2, 1)]));
    }

    #[test]
    fn an_older_version_changes_nothing() {
        let mut state = State::default();
        take(&mut state, read, Event::Apply(object("a", 10)));
        take(&mut state, read, Event::Apply(object("a", 9)));
        assert_eq!(objects(&state), [("a".into(), 10, 0)]);
        take(&mut state, read, Event::Delete(object("a", 11)));
        assert!(objects(&state).is_empty());
    }
}
