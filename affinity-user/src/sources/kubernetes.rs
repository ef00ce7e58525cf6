//! The API server as a source: Services, `EndpointSlice`s, this node's Node and its Pods, listed once and then watched.
//!
//! A watch that ends or breaks is taken up where it was. Where that can't be done, at once or at all, the
//! state is told to be stale, and everything is listed anew as soon as the API server answers, with a configuration
//! that is read anew: what was deleted meanwhile, or another cluster's state behind the same address, is found so.
//!
//! Each kind is followed on its own: one that may not be listed, or is not answered, holds up no other.

pub mod access;
pub mod events;
mod lenient;
#[cfg(test)]
mod tests;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use kube::{
    Api, Client, Config, Resource,
    client::ClientBuilder,
    config::{KubeConfigOptions, Kubeconfig},
    runtime::watcher::{self, Event, watcher},
};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tower::limit::RateLimitLayer;

use access::Places;
use lenient::{Lenient, is_undecodable};

use super::{BACKLOG, Health, Received, SourceError, SourceEvent, convert, trimmed};
use crate::model::{Checked, Kind, ObjectName, Problem};

/// How long a new connection may take until it stalls or fails: over the 30 s that it gets.
const TAKEN_UP: Duration = Duration::from_secs(45);
/// How many requests a second a kind is followed by at most: pages of a long list need some, a watch that is ended again and again as
/// soon as it begins needs no more.
const REQUESTS: u64 = 20;

/// Where the API server is, and how to talk to it.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it is.
    pub access: Access,
    /// How all objects are listed.
    pub listing: Listing,
    /// How long to wait after a first failure. It doubles with each further one, up to `retry_max`.
    pub retry_min: Duration,
    /// How long to wait at most.
    pub retry_max: Duration,
    /// How long the API server may say nothing. A watch gets a bookmark every minute, so one that gets none stalls.
    pub silence_max: Duration,
    /// How long the first list of a kind that is [not essential](Kind::is_essential) may take before it is told not to be
    /// had for now.
    pub patience: Duration,
}

/// Where the API server is.
#[derive(Clone)]
pub enum Access {
    /// By `KUBECONFIG` or `~/.kube/config`, else by the service account of the pod that this runs in: see [`access`].
    Infer(Places),
    /// By this kubeconfig's current context.
    Kubeconfig(PathBuf),
    /// By a client that was made elsewhere.
    Client {
        /// The client.
        client: Client,
        /// What errors call the API server.
        url: String,
    },
}

/// How all objects are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listing {
    /// As a stream, object by object: the cheapest for both sides. Falls back to pages where the API server refuses it
    /// (the feature gate `WatchList`, on by default since Kubernetes 1.34).
    Stream,
    /// In pages of 500.
    Pages,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            access: Access::Infer(Places::default()),
            listing: Listing::Stream,
            retry_min: Duration::from_millis(200),
            retry_max: Duration::from_secs(10),
            silence_max: Duration::from_mins(2),
            patience: Duration::from_secs(5),
        }
    }
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Infer(places) => f.debug_tuple("Infer").field(places).finish(),
            Self::Kubeconfig(path) => f.debug_tuple("Kubeconfig").field(path).finish(),
            Self::Client { url, .. } => f.debug_struct("Client").field("url", url).finish_non_exhaustive(),
        }
    }
}

/// Finds out whether there is a configuration to reach an API server by. Talks to nobody.
///
/// # Errors
/// Where there is none, or none that can be used.
pub async fn check(options: &Options) -> Result<(), SourceError> {
    connect(options).await.map(|_| ())
}

/// Follows the API server as the node of this name, in tasks of the current tokio runtime, until the receiver is dropped.
///
/// # Panics
/// Outside a tokio runtime.
pub fn watch(options: &Options, node: &str) -> mpsc::Receiver<Received> {
    let (sender, receiver) = mpsc::channel(BACKLOG);
    follow::<core::Service>(options, node, &sender);
    follow::<discovery::EndpointSlice>(options, node, &sender);
    follow::<trimmed::Node>(options, node, &sender);
    follow::<trimmed::Pod>(options, node, &sender);
    receiver
}

/// A kind of object that is watched.
trait Watched: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static {
    const WATCHED: Kind;

    /// What selects, on the API server's side, those that concern the node of this name.
    fn select(config: watcher::Config, node: &str) -> watcher::Config;

    /// The event of a version; `None` if the object is not for this service proxy.
    fn version(&self, name: &ObjectName) -> Option<SourceEvent>;

    /// The event of a version that is none of the kind.
    fn undecodable(name: ObjectName, problem: Problem) -> SourceEvent;
}

impl Watched for core::Service {
    const WATCHED: Kind = Kind::Service;

    fn select(config: watcher::Config, _: &str) -> watcher::Config {
        config.labels(convert::LABEL_SELECTOR)
    }

    fn version(&self, name: &ObjectName) -> Option<SourceEvent> {
        convert::service(name, self).map(SourceEvent::Service)
    }

    fn undecodable(name: ObjectName, problem: Problem) -> SourceEvent {
        SourceEvent::Service(Checked::rejected(name, problem))
    }
}

impl Watched for discovery::EndpointSlice {
    const WATCHED: Kind = Kind::EndpointSlice;

    fn select(config: watcher::Config, _: &str) -> watcher::Config {
        config.labels(convert::LABEL_SELECTOR)
    }

    fn version(&self, name: &ObjectName) -> Option<SourceEvent> {
        convert::endpoint_slice(name, self).map(SourceEvent::EndpointSlice)
    }

    fn undecodable(name: ObjectName, problem: Problem) -> SourceEvent {
        SourceEvent::EndpointSlice(Checked::rejected(name, problem))
    }
}

impl Watched for trimmed::Node {
    const WATCHED: Kind = Kind::Node;

    fn select(config: watcher::Config, node: &str) -> watcher::Config {
        config.fields(&format!("metadata.name={node}"))
    }

    fn version(&self, name: &ObjectName) -> Option<SourceEvent> {
        Some(SourceEvent::Node(convert::node(name, self)))
    }

    fn undecodable(name: ObjectName, problem: Problem) -> SourceEvent {
        SourceEvent::Node(Checked::rejected(name, problem))
    }
}

impl Watched for trimmed::Pod {
    const WATCHED: Kind = Kind::Pod;

    fn select(config: watcher::Config, node: &str) -> watcher::Config {
        config.fields(&format!("spec.nodeName={node}"))
    }

    fn version(&self, name: &ObjectName) -> Option<SourceEvent> {
        convert::pod(name, self).map(SourceEvent::Pod)
    }

    fn undecodable(name: ObjectName, problem: Problem) -> SourceEvent {
        SourceEvent::Pod(Checked::rejected(name, problem))
    }
}

/// Nobody listens any more.
struct Closed;

/// Why a watch is over.
enum End {
    Closed,
    /// It failed; it was up to date until then.
    Failed(Timestamp, SourceError),
    /// The API server does not list as a stream.
    NoStream,
    /// Something came that is no object of the kind.
    Undecodable(watcher::Error),
}

impl From<Closed> for End {
    fn from(_: Closed) -> Self {
        Self::Closed
    }
}

/// Follows one kind of object.
struct Follower {
    options: Options,
    node: String,
    sender: mpsc::Sender<Received>,
    retry: Retry,
    kind: Kind,
    /// Since when the state may be stale; `None` while it is fresh.
    stale_since: Option<Timestamp>,
    /// Whether all of them were listed once.
    listed: bool,
    /// Whether objects are taken as what comes.
    lenient: bool,
}

/// Follows a kind of object in a task of its own.
fn follow<K: Watched>(options: &Options, node: &str, sender: &mpsc::Sender<Received>) {
    let mut follower = Follower {
        options: options.clone(),
        node: node.to_owned(),
        sender: sender.clone(),
        retry: Retry::new(options),
        kind: K::WATCHED,
        stale_since: Some(Timestamp::now()),
        listed: false,
        lenient: false,
    };
    tokio::spawn(async move {
        // The only way out is that nobody listens any more.
        let Closed = follower.run::<K>().await;
    });
}

impl Follower {
    async fn run<K: Watched>(&mut self) -> Closed {
        loop {
            let (since, error) = match connect_at(&self.options, Some(REQUESTS)).await {
                Ok((client, url)) => match self.follow::<K>(client, &url).await {
                    End::Closed => return Closed,
                    End::Undecodable(error) => {
                        tracing::warn!(kind = %self.kind, %error, "the API server sends what is no such object: all are decoded one by one");
                        self.lenient = true;
                        continue;
                    }
                    End::NoStream => {
                        tracing::debug!(kind = %self.kind, "the API server does not list as a stream: listing in pages");
                        self.options.listing = Listing::Pages;
                        continue;
                    }
                    End::Failed(since, error) => (since, error),
                },
                Err(error) => (Timestamp::now(), error),
            };
            if self.stale(since, error).await.is_err() || self.pause().await.is_err() {
                return Closed;
            }
        }
    }

    async fn follow<K: Watched>(&mut self, client: Client, url: &str) -> End {
        if self.lenient {
            self.watch::<Lenient<K>>(Api::all(client), url).await
        } else {
            self.watch::<K>(Api::all(client), url).await
        }
    }

    /// Tells that the state is stale, since then unless it has been so for longer.
    async fn stale(&mut self, since: Timestamp, error: SourceError) -> Result<(), Closed> {
        let since = *self.stale_since.get_or_insert(since);
        self.send(SourceEvent::Health(self.kind, Health::Stale { since, error })).await
    }

    /// Lists and watches until that can't be continued.
    async fn watch<K: Watched>(&mut self, api: Api<K>, url: &str) -> End {
        let config = K::select(watcher::Config::default(), &self.node);
        let config = if self.options.listing == Listing::Stream { config.streaming_lists() } else { config };
        let mut events = std::pin::pin!(watcher(api, config));
        // Whether a list has begun, and whether it is complete.
        let (mut listing, mut listed) = (false, false);
        let patience = tokio::time::Instant::now() + self.options.patience;
        let mut is_patient = self.listed || self.kind.is_essential();
        // When a watch broke that may have been taken up since.
        let mut broke: Option<(Instant, Timestamp)> = None;
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = self.sender.closed() => return End::Closed,
                () = tokio::time::sleep_until(patience), if !is_patient => {
                    is_patient = true;
                    let slow = SourceError::Slow { url: url.to_owned(), after: self.options.patience };
                    match self.stale(Timestamp::now(), slow).await {
                        Ok(()) => continue,
                        Err(Closed) => return End::Closed,
                    }
                }
            };
            if listed && matches!(event, Some(Ok(_))) {
                broke = None;
                self.retry.reset();
            }
            let told = match event {
                Some(Ok(Event::Init)) => {
                    if listing {
                        // The watcher begins anew at once, and as often as it is broken off.
                        let error = SourceError::ListBrokeOff { url: url.to_owned() };
                        return End::Failed(Timestamp::now(), error);
                    }
                    (listing, listed) = (true, false);
                    self.send(SourceEvent::Init(self.kind)).await
                }
                Some(Ok(Event::InitApply(object))) => self.version(&object, true).await,
                Some(Ok(Event::Apply(object))) => self.version(&object, false).await,
                Some(Ok(Event::Delete(object))) => match convert::name(self.kind, object.meta()) {
                    Ok(name) => self.send(SourceEvent::Delete(self.kind, name)).await,
                    Err(problem) => {
                        self.nameless(&problem);
                        Ok(())
                    }
                },
                Some(Ok(Event::InitDone)) => {
                    (listing, listed, is_patient) = (false, true, true);
                    self.retry.reset();
                    self.fresh().await
                }
                Some(Err(error)) => {
                    if is_no_stream(&error) && self.options.listing == Listing::Stream {
                        return End::NoStream;
                    }
                    if is_undecodable(&error) && !self.lenient {
                        return End::Undecodable(error);
                    }
                    let broken = matches!(error, watcher::Error::WatchFailed(_) | watcher::Error::WatchError(_));
                    // One that says nothing takes its time to break; the last word came before.
                    let silence = if is_timeout(&error) { self.options.silence_max } else { Duration::ZERO };
                    let before = broke.filter(|(at, _)| at.elapsed() < silence + TAKEN_UP).map(|(_, since)| since);
                    let since = before.unwrap_or_else(|| Timestamp::now() - silence);
                    if !listed || !broken || before.is_some() {
                        let source = Box::new(error);
                        return End::Failed(since, SourceError::Watch { url: url.to_owned(), source });
                    }
                    // The watcher takes it up by itself; what can't be told from here is only that it has. If it
                    // can't, that is an error of its own.
                    tracing::debug!(kind = %self.kind, %error, "watch broke");
                    broke = Some((Instant::now(), since));
                    self.pause().await
                }
                // It has no end by contract; start over.
                None => return End::Failed(Timestamp::now(), SourceError::WatchEnded { url: url.to_owned() }),
            };
            if let Err(Closed) = told {
                return End::Closed;
            }
        }
    }

    async fn version<K: Watched>(&self, object: &K, listing: bool) -> Result<(), Closed> {
        let name = match convert::name(self.kind, object.meta()) {
            Ok(name) => name,
            Err(problem) => {
                self.nameless(&problem);
                return Ok(());
            }
        };
        match object.version(&name) {
            Some(event) => self.send(event).await,
            // It may have been for us before. What a list leaves out is gone anyway.
            None if !listing => self.send(SourceEvent::Delete(self.kind, name)).await,
            None => Ok(()),
        }
    }

    fn nameless(&self, problem: &Problem) {
        tracing::warn!(kind = %self.kind, %problem, "the API server sent an object without a usable name");
    }

    async fn fresh(&mut self) -> Result<(), Closed> {
        self.listed = true;
        self.send(SourceEvent::InitDone(self.kind)).await?;
        if self.stale_since.take().is_some() {
            self.send(SourceEvent::Health(self.kind, Health::Fresh)).await?;
        }
        Ok(())
    }

    async fn send(&self, event: SourceEvent) -> Result<(), Closed> {
        self.sender.send(Received::now(event)).await.map_err(|_| Closed)
    }

    async fn pause(&mut self) -> Result<(), Closed> {
        tokio::select! {
            () = tokio::time::sleep(self.retry.next()) => Ok(()),
            () = self.sender.closed() => Err(Closed),
        }
    }
}

/// How long to wait before the next attempt.
struct Retry {
    min: Duration,
    max: Duration,
    next: Duration,
}

impl Retry {
    fn new(options: &Options) -> Self {
        Self { min: options.retry_min, max: options.retry_max, next: options.retry_min }
    }

    fn reset(&mut self) {
        self.next = self.min;
    }

    /// Twice as long as the last time, half of it at random: the nodes of a cluster lose an API server together.
    fn next(&mut self) -> Duration {
        let wait = self.next;
        self.next = (wait * 2).min(self.max);
        wait.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

/// Whether the API server refuses to list as a stream: 4xx for the request, other than for who makes it.
fn is_no_stream(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchStartFailed(kube::Error::Api(status)) if matches!(status.code, 400 | 422))
}

/// Whether a watch has broken since the API server has said nothing for too long.
fn is_timeout(error: &watcher::Error) -> bool {
    let watcher::Error::WatchFailed(error) = error else { return false };
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    let is_timeout = |error: &std::io::Error| error.kind() == std::io::ErrorKind::TimedOut;
    causes.filter_map(|error| error.downcast_ref::<std::io::Error>()).any(is_timeout)
}

/// A client, and what errors call the API server. Its configuration is read anew.
///
/// # Errors
/// Where there is no configuration, or none that can be used.
pub async fn connect(options: &Options) -> Result<(Client, String), SourceError> {
    connect_at(options, None).await
}

/// The same, for so many requests a second at most.
async fn connect_at(options: &Options, requests: Option<u64>) -> Result<(Client, String), SourceError> {
    let (mut config, url) = match &options.access {
        Access::Client { client, url } => return Ok((client.clone(), url.clone())),
        Access::Infer(places) => access::infer(places).await?,
        Access::Kubeconfig(path) => {
            let unusable = |source| SourceError::Kubeconfig { path: path.clone(), source: Box::new(source) };
            let kubeconfig = Kubeconfig::read_from(path).map_err(unusable)?;
            let options = KubeConfigOptions::default();
            let config = Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(unusable)?;
            let url = config.cluster_url.to_string();
            (config, url)
        }
    };
    config.read_timeout = Some(options.silence_max);
    // Retries are made, and told of, here.
    config.default_retry = false;
    let client = ClientBuilder::try_from(config);
    let client = client.map_err(|source| SourceError::Client { url: url.clone(), source: Box::new(source) })?;
    let client = match requests {
        Some(requests) => client.with_layer(&RateLimitLayer::new(requests, Duration::from_secs(1))).build(),
        None => client.build(),
    };
    Ok((client, url))
}
