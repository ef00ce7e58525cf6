//! Where objects come from: the [API server](kubernetes) or a [directory of files](directory), as one stream of events.
//!
//! Nothing but this module knows Kubernetes' types. A source never ends by itself: what goes wrong is told by an event,
//! the state that was learned stays, and the source keeps trying.

pub mod convert;
pub mod directory;
mod documents;
pub mod kubernetes;
pub mod trimmed;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
    time::Instant,
};

use jiff::Timestamp;
use kube::runtime::watcher;
use thiserror::Error;

use self::documents::{Contents, Version};
use crate::causes::in_full;
use crate::model::{Checked, EndpointSlice, Kind, Model, Node, ObjectName, Pod, Problem, Service};

/// How many events wait for the daemon before the source waits for it.
const BACKLOG: usize = 1024;

/// What a source has to tell.
#[derive(Debug)]
pub enum SourceEvent {
    /// A list of all objects of a kind begins.
    Init(Kind),
    /// A service is listed, new or changed.
    Service(Checked<Service>),
    /// An `EndpointSlice` is listed, new or changed.
    EndpointSlice(Checked<EndpointSlice>),
    /// A node is listed, new or changed.
    Node(Checked<Node>),
    /// A pod that has a node is listed, new or changed.
    Pod(Checked<Pod>),
    /// An object is gone, or no longer for a service proxy.
    Delete(Kind, ObjectName),
    /// The list is complete: what it did not contain is gone.
    InitDone(Kind),
    /// What is wrong with a file as such, in place of what was told of it before.
    File(PathBuf, Vec<Problem>),
    /// Whether what is known of a kind is up to date.
    Health(Kind, Health),
}

/// An event and when it came, before it waited for anybody.
#[derive(Debug)]
pub struct Received {
    /// When.
    pub at: Instant,
    /// What.
    pub event: SourceEvent,
}

impl Received {
    fn now(event: SourceEvent) -> Self {
        Self { at: Instant::now(), event }
    }
}

/// Whether a source is up to date.
#[derive(Debug)]
pub enum Health {
    /// It follows changes.
    Fresh,
    /// It can't: what is known is of `since`, and is kept.
    Stale {
        /// When the source was known to be up to date for the last time, or was started.
        since: Timestamp,
        /// Why it is not.
        error: SourceError,
    },
}

/// Why a source can't be read.
#[derive(Debug, Error)]
pub enum SourceError {
    /// The kubeconfig file can't be used.
    #[error("kubeconfig {path}: {}", in_full(source))]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<kube::config::KubeconfigError>,
    },
    /// Neither a kubeconfig nor a service account of a cluster was found.
    #[error("no cluster to talk to: give --kubeconfig FILE or --api-server URL, or run as a pod (tried {tried})")]
    NoCluster {
        /// Where it was looked for.
        tried: kubernetes::access::Tried,
    },
    /// No client can be made of the configuration.
    #[error("{url}: {}", in_full(source))]
    Client {
        /// The API server.
        url: String,
        /// What is wrong.
        source: Box<kube::Error>,
    },
    /// The API server can't be reached, or refuses.
    #[error("{url}: {}", in_full(source))]
    Watch {
        /// The API server.
        url: String,
        /// What it said.
        source: Box<watcher::Error>,
    },
    /// The API server has not answered for some time.
    #[error("{url}: no list after {after:?}; still waiting")]
    Slow {
        /// The API server.
        url: String,
        /// For how long.
        after: Duration,
    },
    /// A list ended before it was complete.
    #[error("{url}: a list broke off")]
    ListBrokeOff {
        /// The API server.
        url: String,
    },
    /// A watch ended that should not.
    #[error("{url}: the watch ended")]
    WatchEnded {
        /// The API server.
        url: String,
    },
    /// The directory can't be read.
    #[error("directory {path}: {source}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: Arc<std::io::Error>,
    },
}

impl SourceError {
    /// Whether the API server refuses to list a kind. Of one that is away, or about to come, nothing is known yet.
    fn says_no(&self) -> bool {
        let Self::Watch { source, .. } = self else { return false };
        let refused = match &**source {
            watcher::Error::InitialListFailed(kube::Error::Api(status))
            | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => Some(status.code),
            _ => None,
        };
        refused.is_some_and(|code| !matches!(code, 429 | 503))
    }
}

impl SourceEvent {
    /// The kind of object that it is about; `None` for a file.
    pub fn kind(&self) -> Option<Kind> {
        match self {
            Self::Init(kind) | Self::Delete(kind, _) | Self::InitDone(kind) | Self::Health(kind, _) => Some(*kind),
            Self::Service(_) => Some(Kind::Service),
            Self::EndpointSlice(_) => Some(Kind::EndpointSlice),
            Self::Node(_) => Some(Kind::Node),
            Self::Pod(_) => Some(Kind::Pod),
            Self::File(..) => None,
        }
    }

    /// Lets the event take effect. What is about the source itself is handed back.
    pub fn enter(self, model: &mut Model) -> Option<(Kind, Health)> {
        match self {
            Self::Init(kind) => model.begin(kind),
            Self::Service(version) => model.apply_service(version),
            Self::EndpointSlice(version) => model.apply_slice(version),
            Self::Node(version) => model.apply_node(version),
            Self::Pod(version) => model.apply_pod(version),
            Self::Delete(kind, name) => model.delete(kind, &name),
            Self::InitDone(kind) => model.finish(kind),
            Self::File(path, problems) => model.report_file(&path, problems),
            Self::Health(kind, health) => {
                if let Health::Stale { error, .. } = &health
                    && error.says_no()
                {
                    model.give_up(kind);
                }
                return Some((kind, health));
            }
        }
        None
    }
}

/// The objects of a YAML text as a complete list of them: for tests, and for tools that work without a daemon.
pub fn list_of(yaml: &str) -> Vec<SourceEvent> {
    let path = Path::new("text.yaml");
    let Contents { objects, problems } = Contents::parse(path, yaml);
    let init = Kind::ALL.map(SourceEvent::Init);
    let done = Kind::ALL.map(SourceEvent::InitDone);
    let objects = objects.into_iter().map(SourceEvent::from);
    init.into_iter().chain(objects).chain(done).chain([SourceEvent::File(path.to_owned(), problems)]).collect()
}

impl From<Version> for SourceEvent {
    fn from(version: Version) -> Self {
        match version {
            Version::Service(version) => Self::Service(version),
            Version::EndpointSlice(version) => Self::EndpointSlice(version),
            Version::Node(version) => Self::Node(version),
            Version::Pod(version) => Self::Pod(version),
        }
    }
}
