//! Objects that may not be what their kind says. No API server stores such a one, but a broken mirror of it may send some, and a
//! list of typed objects fails as a whole.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::core::Status;
use kube::runtime::watcher;
use serde::de::{Deserialize, DeserializeOwned, Deserializer};
use serde_json::Value;

use super::Watched;
use crate::model::{Kind, ObjectName, Problem};
use crate::sources::SourceEvent;
use crate::sources::documents::decode;

/// An object, or why it is none of its kind. What it is called is known in any case.
#[derive(Clone, Debug)]
pub(super) struct Lenient<K> {
    metadata: ObjectMeta,
    object: Result<K, Problem>,
}

impl<'de, K: DeserializeOwned> Deserialize<'de> for Lenient<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let text = |field: &str| value["metadata"][field].as_str().map(ToOwned::to_owned);
        let metadata = ObjectMeta {
            name: text("name"),
            namespace: text("namespace"),
            resource_version: text("resourceVersion"),
            ..ObjectMeta::default()
        };
        Ok(Self { metadata, object: decode(&value) })
    }
}

impl<K: Resource<DynamicType = ()>> Resource for Lenient<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind((): &()) -> Cow<'_, str> {
        K::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        K::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        K::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        K::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl<K: Watched> Watched for Lenient<K> {
    const WATCHED: Kind = K::WATCHED;

    fn select(config: watcher::Config, node: &str) -> watcher::Config {
        K::select(config, node)
    }

    fn version(&self, name: &ObjectName) -> Option<SourceEvent> {
        match &self.object {
            Ok(object) => object.version(name),
            Err(problem) => Some(K::undecodable(name.clone(), problem.clone())),
        }
    }

    fn undecodable(name: ObjectName, problem: Problem) -> SourceEvent {
        K::undecodable(name, problem)
    }
}

/// Whether what came is no object of the kind.
pub(super) fn is_undecodable(error: &watcher::Error) -> bool {
    use watcher::Error::{InitialListFailed, WatchFailed, WatchStartFailed};
    let (InitialListFailed(error) | WatchStartFailed(error) | WatchFailed(error)) = error else { return false };
    match error {
        kube::Error::SerdeError(_) => true,
        // The client takes an event that it can't decode for a status (`Client::request_events`), all of whose fields may be left out.
        kube::Error::Api(status) => **status == Status::default(),
        _ => false,
    }
}
