//! What the daemon knows, and what it does about what comes in.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Options, STATUS_LAG, SWEEP, Source};
use crate::collector::Collector;
use crate::loader::Datapath;
use crate::loader::interfaces::{Action, Follower, Interface, LinkEvent};
use crate::metrics::{Metrics, Published, SourceCounts};
use crate::model::{Kind, Model};
use crate::plan::plan;
use crate::reconcile::{Change, Reconciler, Report};
use crate::sockets::keeper::Keeper;
use crate::sources::{Health, SourceEvent};
use crate::status::{ProblemStatus, SourceStatus, StatusError, StatusFile};

/// How long after a failure an interface is tried again.
const ATTACH_RETRY: Duration = Duration::from_secs(1);

pub(super) struct State {
    model: Model,
    reconciler: Reconciler,
    datapath: Datapath,
    follower: Follower,
    keeper: Option<Keeper>,
    collector: Collector,
    /// How many entries the reconciler had taken out when the keeper last heard of it.
    removed: u64,
    /// Interfaces that could not be attached to, and why.
    unattached: BTreeMap<u32, (Interface, String)>,
    retry_attach: Option<Instant>,
    seen_interfaces: bool,
    stale: BTreeMap<Kind, (jiff::Timestamp, String)>,
    /// What the sources have told.
    sources: BTreeMap<Kind, SourceCounts>,
    /// When the oldest event was received that is not programmed yet.
    received: Option<Instant>,
    metrics: Arc<Metrics>,
    /// The problems that were logged already.
    logged: BTreeSet<String>,
    status: StatusFile,
    directory: PathBuf,
    /// When the status file is to be written, if anything has changed.
    write_at: Option<Instant>,
}

impl State {
    pub(super) fn new(
        options: &Options,
        datapath: Datapath,
        reconciler: Reconciler,
        follower: Follower,
        keeper: Option<Keeper>,
        collector: Collector,
        metrics: Arc<Metrics>,
    ) -> Result<Self, StatusError> {
        let source = match &options.source {
            Source::Kubernetes(_) => SourceStatus::new("kubernetes", "the API server"),
            Source::Directory(path) => SourceStatus::new("directory", path.display()),
        };
        Ok(Self {
            model: Model::new(options.node_name.as_str()),
            reconciler,
            datapath,
            follower,
            keeper,
            collector,
            removed: 0,
            unattached: BTreeMap::new(),
            retry_attach: None,
            seen_interfaces: false,
            stale: BTreeMap::new(),
            sources: Kind::ALL.map(|kind| (kind, SourceCounts::default())).into(),
            received: None,
            metrics,
            logged: BTreeSet::new(),
            status: StatusFile::new(source)?,
            directory: options.state_dir.clone(),
            write_at: None,
        })
    }

    /// Takes an event of the source in. What it changes is programmed by [`Self::program`].
    pub(super) fn enter(&mut self, event: SourceEvent) {
        self.received.get_or_insert_with(Instant::now);
        self.count(&event);
        match event.enter(&mut self.model) {
            Some((kind, Health::Fresh)) if self.stale.remove(&kind).is_some() => {
                tracing::info!(?kind, "the source is up to date again");
                self.touch();
            }
            Some((kind, Health::Stale { since, error })) => {
                let error = error.to_string();
                if self.stale.get(&kind).is_none_or(|(_, known)| *known != error) {
                    tracing::warn!(?kind, %since, %error, "the source can't be followed; what is known stays");
                }
                self.stale.insert(kind, (since, error));
                self.touch();
            }
            Some((_, Health::Fresh)) | None => {}
        }
    }

    fn count(&mut self, event: &SourceEvent) {
        let Some(kind) = event.kind() else { return };
        let counts = self.sources.entry(kind).or_default();
        match event {
            SourceEvent::Init(_) => counts.lists += 1,
            SourceEvent::Health(_, Health::Fresh) => counts.stale_since = None,
            SourceEvent::Health(_, Health::Stale { since, .. }) => {
                counts.failures += 1;
                counts.stale_since = Some(*since);
            }
            SourceEvent::InitDone(_) | SourceEvent::File(..) => {}
            SourceEvent::Service(_)
            | SourceEvent::EndpointSlice(_)
            | SourceEvent::Node(_)
            | SourceEvent::Pod(_)
            | SourceEvent::Delete(..) => counts.events += 1,
        }
    }

    /// Programs what has changed.
    pub(super) fn program(&mut self) {
        if !self.model.is_heard(Kind::Node) {
            // Its zone may decide who gets which clients: planned without it, they would move at each restart.
            return;
        }
        let before = self.reconciler.counts().writes();
        let changes = self.model.take_changes();
        if !changes.is_empty() {
            self.touch();
        }
        for rejection in &changes.rejected {
            tracing::error!("rejected: {rejection}");
        }
        for subject in &changes.accepted {
            tracing::info!("accepted: {subject}");
        }
        let judged = !changes.rejected.is_empty() || !changes.accepted.is_empty();
        let model = &self.model;
        let changes = changes.dirty.into_iter().map(|name| match model.service(&name) {
            Some(view) => Change::Apply(plan(&view)),
            None => Change::Delete(name),
        });
        let report = self.reconciler.reconcile(changes);
        self.tell(&report);
        if judged || !self.reconciler.is_synced() {
            let report = self.reconciler.withhold(|name| self.model.is_withheld(name));
            self.tell(&report);
        }
        if self.model.is_synced() && !self.reconciler.is_synced() {
            let report = self.reconciler.synced();
            tracing::info!("every source has synced");
            if self.model.node().is_none() {
                tracing::warn!(node = self.model.node_name(), "no such Node is known: topology hints are not followed");
            }
            self.tell(&report);
            self.touch();
        }
        if let Some(received) = self.received.take()
            && self.reconciler.counts().writes() != before
        {
            self.metrics.sync.observe(received.elapsed().as_secs_f64());
        }
    }

    /// Follows the node's interfaces.
    pub(super) fn follow(&mut self, event: LinkEvent) {
        let is_all = matches!(event, LinkEvent::All(_));
        let actions = self.follower.follow(event);
        if let Some(keeper) = &self.keeper
            && !actions.is_empty()
        {
            keeper.links_changed();
        }
        for action in actions {
            self.act(action);
        }
        if is_all && !self.seen_interfaces {
            self.seen_interfaces = true;
            // Left by an earlier process on interfaces that are gone, or are no clients' any more.
            self.datapath.drop_others();
            self.touch();
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Attach(interface) => self.attach(interface),
            Action::Rename(interface) => self.datapath.rename(interface.index, &interface.name),
            Action::Detach(index) => {
                self.unattached.remove(&index);
                self.datapath.detach(index);
                tracing::info!(index, "detached");
            }
            Action::Unsupported(interface) => {
                tracing::warn!("interface {} has no Ethernet header: its clients are not served", interface.name);
            }
        }
        self.touch();
    }

    fn attach(&mut self, interface: Interface) {
        self.unattached.remove(&interface.index);
        match self.datapath.attach(interface.index, &interface.name) {
            Ok(mode) => tracing::info!(interface = interface.name, index = interface.index, %mode, "attached"),
            Err(error) if error.is_gone() => tracing::debug!(%error, "gone before it was attached to"),
            Err(error) => {
                tracing::error!("{error}");
                self.unattached.insert(interface.index, (interface, error.to_string()));
                self.retry_attach = Some(Instant::now() + ATTACH_RETRY);
            }
        }
    }

    /// When [`Self::wake`] has something to do; never more than a minute ahead.
    pub(super) fn next_wake(&self) -> Instant {
        let times = [self.reconciler.next_retry(), self.reconciler.next_sweep(), self.retry_attach, self.write_at];
        let latest = Instant::now() + Duration::from_mins(1);
        times.into_iter().flatten().min().map_or(latest, |time| time.min(latest))
    }

    /// Does what is due.
    pub(super) fn wake(&mut self) {
        let now = Instant::now();
        let due = |time: Option<Instant>| time.is_some_and(|time| time <= now);
        if due(self.reconciler.next_retry()) {
            let report = self.reconciler.retry();
            self.tell(&report);
        }
        if due(self.reconciler.next_sweep())
            && let Err(error) = self.reconciler.sweep_affinity(SWEEP)
        {
            tracing::warn!(%error, "affinity entries of services without affinity stay for now");
        }
        if due(self.retry_attach) {
            self.retry_attach = None;
            for (_, (interface, _)) in std::mem::take(&mut self.unattached) {
                self.attach(interface);
            }
            self.touch();
        }
        if due(self.write_at)
            && let Err(error) = self.write_status()
        {
            tracing::warn!(%error, "the status file is out of date");
        }
    }

    /// Compares everything with the maps, and repairs what differs.
    pub(super) fn audit(&mut self) {
        match self.reconciler.audit() {
            Ok(audit) => self.tell(&audit.report),
            Err(error) => tracing::warn!(%error, "the maps can't be compared with what they should hold"),
        }
    }

    /// The status file is to be written soon.
    pub(super) fn touch(&mut self) {
        self.write_at.get_or_insert_with(|| Instant::now() + STATUS_LAG);
    }

    /// Logs problems that are new and those that are solved.
    fn tell(&mut self, report: &Report) {
        tracing::debug!(programmed = report.programmed.len(), writes = report.writes, "reconciled");
        let removed = self.reconciler.counts().removed;
        if let Some(keeper) = &self.keeper
            && removed != self.removed
        {
            keeper.removed();
        }
        self.removed = removed;
        let problems: BTreeSet<String> = self.reconciler.problems().map(ToString::to_string).collect();
        for problem in problems.difference(&self.logged) {
            tracing::error!("not programmed: {problem}");
        }
        for problem in self.logged.difference(&problems) {
            tracing::info!("solved: {problem}");
        }
        if problems != self.logged || !report.programmed.is_empty() {
            self.touch();
        }
        self.logged = problems;
    }

    pub(super) fn write_status(&mut self) -> Result<(), StatusError> {
        self.write_at = None;
        let status = &mut self.status;
        status.synced = self.reconciler.is_synced();
        status.ready = status.synced && self.seen_interfaces;
        let oldest = self.stale.values().min_by_key(|(since, _)| *since);
        status.source.stale_since = oldest.map(|(since, _)| since.as_second());
        status.source.last_error = oldest.map(|(_, error)| error.clone());
        status.rejected = self.model.rejections().map(|rejection| (&rejection).into()).collect();
        let unprogrammed = self
            .reconciler
            .problems()
            .map(|problem| ProblemStatus { object: problem.subject.to_string(), message: problem.error.to_string() });
        let unattached = self.unattached.values().map(|(interface, error)| ProblemStatus {
            object: format!("interface {}", interface.name),
            message: error.clone(),
        });
        status.problems = unprogrammed.chain(unattached).collect();
        status.attachments = self.datapath.attachments().cloned().collect();
        status.cgroup = self.datapath.cgroup().cloned();
        status.collector = Some(self.collector.status());
        status.sockets = self.keeper.as_ref().map(Keeper::status);
        self.metrics.publish(Published {
            status: status.clone(),
            seen_interfaces: self.seen_interfaces,
            counts: self.reconciler.counts(),
            sources: self.sources.clone(),
        });
        status.write(&self.directory)
    }

    /// Ends: what the status file says is not true any more.
    pub(super) fn end(self) {
        StatusFile::remove(&self.directory);
    }
}
