//! What the daemon knows, and what it does about what comes in.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::mpsc;

use super::attacher::Attacher;
use super::{LOOK, Options, PATIENCE, STATUS_LAG, SWEEP, Source};
use crate::collector::Collector;
use crate::duties::Board;
use crate::health_checks::HealthChecks;
use crate::loader::cgroup::CgroupAttachment;
use crate::metrics::{IgnoredTriggers, Metrics, Published, SourceCounts};
use crate::model::{Kind, Model, Notice, ServiceName};
use crate::node_ports;
use crate::plan::{HealthCheck, plan};
use crate::reconcile::{Change, Fill, Reconciler, Report, Subject};
use crate::sockets::keeper::Keeper;
use crate::sockets::live;
use crate::sockets::pods::PodSetting;
use crate::sources::kubernetes::events::Report as EventReport;
use crate::sources::{Health, Received, SourceEvent};
use crate::status::{ClientsStatus, NodeStatus, PodStatus, ProblemStatus, SourceStatus, StatusError, StatusFile};

/// What goes on beside the daemon's task.
pub(super) struct Threads {
    pub attacher: Attacher,
    pub keeper: Option<Arc<Keeper>>,
    pub collector: Collector,
    pub health_checks: HealthChecks,
    /// What the thread of duties tells, if there is one.
    pub board: Option<Arc<Board>>,
    /// Where events about objects are made, if that is possible.
    pub reporter: Option<mpsc::Sender<EventReport>>,
}

pub(super) struct State {
    model: Model,
    reconciler: Reconciler,
    threads: Threads,
    /// The cgroup whose sockets are served.
    cgroup: Option<CgroupAttachment>,
    /// How many entries the reconciler had taken out when the keeper last heard of it.
    removed: u64,
    /// What load balancers are told.
    health: BTreeMap<ServiceName, HealthCheck>,
    stale: BTreeMap<Kind, (Timestamp, String)>,
    /// What the sources have told.
    sources: BTreeMap<Kind, SourceCounts>,
    /// When the oldest event was received that is not programmed yet.
    received: Option<Instant>,
    /// When the oldest of the events happened that changes of services answer which are not programmed yet.
    triggers: BTreeMap<ServiceName, Timestamp>,
    ignored: IgnoredTriggers,
    /// Whether the sockets of pods that say nothing are served.
    pods_are_served: bool,
    /// Whether the keeper was told of pods at all.
    told_pods: bool,
    /// Whether the node's addresses are known.
    knows_addresses: bool,
    /// Since when what services need is there.
    has_essentials: Option<Instant>,
    /// What happened before that was for another process to answer.
    started: Timestamp,
    metrics: Arc<Metrics>,
    /// The problems that were logged already.
    logged: BTreeSet<String>,
    /// Node ports that processes of the node have bound, when it was last looked.
    in_use: BTreeSet<Notice>,
    /// When it is to be looked next, beside with every audit.
    look_at: Option<Instant>,
    /// What was told of already.
    noticed: BTreeSet<Notice>,
    /// The maps that were warned of.
    nearly_full: BTreeSet<String>,
    status: StatusFile,
    directory: PathBuf,
    /// When the status file is to be written, if anything has changed.
    write_at: Option<Instant>,
}

impl State {
    pub(super) fn new(
        options: &Options,
        reconciler: Reconciler,
        threads: Threads,
        cgroup: Option<CgroupAttachment>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, StatusError> {
        let source = match &options.source {
            Source::Kubernetes(_) => SourceStatus::new("kubernetes", "the API server"),
            Source::Directory(path) => SourceStatus::new("directory", path.display()),
        };
        let mut status = StatusFile::new(source)?;
        status.clients = Some(ClientsStatus {
            interfaces: options.interfaces.clone(),
            netns_directories: options.keeper.directories.clone(),
            pods_are_served: options.keeper.pods,
        });
        Ok(Self {
            model: Model::new(options.node_name.as_str()).with_node_port_addresses(options.node_port_addresses.clone()),
            reconciler,
            threads,
            cgroup,
            removed: 0,
            health: BTreeMap::new(),
            stale: BTreeMap::new(),
            sources: Kind::ALL.map(|kind| (kind, SourceCounts::default())).into(),
            received: None,
            triggers: BTreeMap::new(),
            ignored: IgnoredTriggers::default(),
            pods_are_served: options.keeper.pods,
            told_pods: false,
            knows_addresses: false,
            has_essentials: None,
            started: Timestamp::now(),
            metrics,
            logged: BTreeSet::new(),
            in_use: BTreeSet::new(),
            look_at: None,
            noticed: BTreeSet::new(),
            nearly_full: BTreeSet::new(),
            status,
            directory: options.state_dir.clone(),
            write_at: None,
        })
    }

    /// Takes an event of the source in. What it changes is programmed by [`Self::program`].
    pub(super) fn enter(&mut self, Received { at, event }: Received) {
        self.received = Some(self.received.map_or(at, |oldest| oldest.min(at)));
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

    /// Whose sockets are served is also the pods' own choice, as far as they have a network namespace of their own.
    fn tell_pods(&self) {
        let Some(keeper) = &self.threads.keeper else { return };
        let pods = self.model.pods().filter(|pod| !pod.host_network && !pod.finished);
        let settings = pods.map(|pod| PodSetting {
            uid: pod.uid.clone(),
            addresses: pod.addresses.clone(),
            served: pod.socket_lb.unwrap_or(self.pods_are_served),
        });
        keeper.set_pods(settings.collect());
    }

    fn note_trigger(&mut self, service: ServiceName, time: Timestamp) {
        if time > Timestamp::now() {
            self.ignored.future += 1;
        } else if time >= self.started {
            let oldest = self.triggers.entry(service).or_insert(time);
            *oldest = time.min(*oldest);
        }
    }

    /// Takes note of how long it took to answer what has happened, for the services that are as planned now.
    fn measure(&mut self) {
        if self.triggers.is_empty() || !self.reconciler.is_synced() {
            return;
        }
        let failing: BTreeSet<&ServiceName> = self
            .reconciler
            .problems()
            .filter_map(|problem| match &problem.subject {
                Subject::ServicePort(name) => Some(&name.service),
                Subject::Stray(_) | Subject::Addresses => None,
            })
            .collect();
        let now = Timestamp::now();
        self.triggers.retain(|service, time| {
            let waits = failing.contains(service);
            if !waits {
                self.metrics.programming.observe(now.duration_since(*time).as_secs_f64());
            }
            waits
        });
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

    /// Programs what has changed. A service is not programmed without its endpoints, nor without this node's zone, which may
    /// decide who gets which clients, or its addresses, which node ports may be at: what is listed waits until all is.
    pub(super) fn program(&mut self) {
        if self.model.has_essentials() {
            self.has_essentials.get_or_insert_with(Instant::now);
        }
        let is_heard = self.model.is_synced() || self.waits_until().is_some_and(|until| until <= Instant::now());
        let syncs = is_heard && self.knows_addresses && !self.reconciler.is_synced();
        if !syncs && !self.reconciler.is_synced() {
            return;
        }
        let before = self.reconciler.counts().writes();
        let changes = self.model.take_changes();
        if !changes.is_empty() {
            self.touch();
        }
        for rejection in &changes.rejected {
            tracing::error!("rejected: {rejection}");
            self.report(EventReport::of_rejection(rejection));
        }
        for subject in &changes.accepted {
            tracing::info!("accepted: {subject}");
        }
        self.ignored.unreadable += changes.unreadable_triggers;
        for (service, time) in changes.triggers {
            self.note_trigger(service, time);
        }
        if self.model.is_heard(Kind::Pod) && (changes.pods || !self.told_pods) {
            self.told_pods = true;
            self.tell_pods();
        }
        if changes.node_ports {
            self.look_at.get_or_insert_with(|| Instant::now() + LOOK);
        }
        let judged = !changes.rejected.is_empty() || !changes.accepted.is_empty();
        let (model, health) = (&self.model, &mut self.health);
        let changes = changes.dirty.into_iter().map(|name| {
            let plan = model.service(&name).map(|view| plan(&view));
            match plan.as_ref().and_then(|plan| plan.health) {
                Some(check) => health.insert(name.clone(), check),
                None => health.remove(&name),
            };
            plan.map_or(Change::Delete(name), Change::Apply)
        });
        if syncs {
            self.reconciler.withhold(|name| model.is_withheld(name));
            let report = self.reconciler.sync(changes);
            if self.model.node().is_none() {
                tracing::warn!(node = self.model.node_name(), "no such Node is known: topology hints are not followed");
            }
            self.tell(&report);
            self.touch();
        } else {
            let report = self.reconciler.reconcile(changes);
            self.tell(&report);
            if judged {
                let report = self.reconciler.withhold(|name| self.model.is_withheld(name));
                self.tell(&report);
            }
        }
        self.notice();
        // After what they tell of is programmed.
        self.threads.health_checks.set(&self.health);
        if let Some(received) = self.received.take()
            && self.reconciler.counts().writes() != before
        {
            self.metrics.sync.observe(received.elapsed().as_secs_f64());
        }
    }

    /// Until when the node and its pods are waited for, where what services need is there.
    fn waits_until(&self) -> Option<Instant> {
        let waits = self.knows_addresses && !self.reconciler.is_synced();
        self.has_essentials.filter(|_| waits).map(|since| since + PATIENCE)
    }

    /// Says once of a map that it has become nearly full.
    fn warn_of_fill(&mut self) {
        for fill in self.reconciler.fills() {
            let Fill { map, used, capacity } = &fill;
            if !fill.is_high() {
                self.nearly_full.remove(map);
            } else if self.nearly_full.insert(map.clone()) {
                let size = map.trim_end_matches("_v4").trim_end_matches("_v6");
                tracing::warn!("{map} is nearly full ({used} of {capacity}): raise --map-size {size}=N");
            }
        }
    }

    /// When [`Self::wake`] has something to do; never more than a minute ahead.
    pub(super) fn next_wake(&self) -> Instant {
        let times = [
            self.reconciler.next_retry(),
            self.reconciler.next_sweep(),
            self.look_at,
            self.write_at,
            self.waits_until(),
        ];
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
        if due(self.waits_until()) {
            self.program();
        }
        if due(self.look_at) {
            self.look_at_sockets();
        }
        if due(self.write_at)
            && let Err(error) = self.write_status()
        {
            tracing::warn!(%error, "the status file is out of date");
        }
    }

    /// Looks which node ports processes of the node have bound.
    fn look_at_sockets(&mut self) {
        self.look_at = None;
        match live::bound() {
            Ok(sockets) => self.in_use = node_ports::in_use(&self.model, &sockets),
            Err(error) => tracing::warn!(%error, "the node's sockets can't be listed: who has node ports is not known"),
        }
        self.notice();
    }

    /// Tells once of what people should know of services.
    fn notice(&mut self) {
        let mut notices = self.model.notices();
        notices.extend(self.in_use.iter().cloned());
        if notices == self.noticed {
            return;
        }
        for notice in notices.difference(&self.noticed) {
            tracing::warn!("{notice}");
            self.report(Some(EventReport::of_notice(notice)));
        }
        for notice in self.noticed.difference(&notices) {
            tracing::info!("no longer so: {notice}");
        }
        self.noticed = notices;
        self.touch();
    }

    /// Compares everything with the maps, and repairs what differs.
    pub(super) fn audit(&mut self) {
        self.look_at_sockets();
        match self.reconciler.audit() {
            Ok(audit) => self.tell(&audit.report),
            Err(error) => tracing::warn!(%error, "the maps can't be compared with what they should hold"),
        }
    }

    /// The node's interfaces, or their addresses, have changed.
    pub(super) fn links_changed(&mut self) {
        if let Some(addresses) = self.threads.attacher.attached().addresses {
            self.knows_addresses = true;
            self.model.set_node_addresses(addresses.iter().map(|address| address.addr).collect());
        }
        self.program();
        self.touch();
    }

    /// The status file is to be written soon.
    pub(super) fn touch(&mut self) {
        self.write_at.get_or_insert_with(|| Instant::now() + STATUS_LAG);
    }

    /// Makes an event of a report, if there is room for it: the log and the status have it anyway.
    fn report(&self, report: Option<EventReport>) {
        if let (Some(reporter), Some(report)) = (&self.threads.reporter, report) {
            let _ = reporter.try_send(report);
        }
    }

    /// Logs problems that are new and those that are solved.
    fn tell(&mut self, report: &Report) {
        self.measure();
        tracing::debug!(programmed = report.programmed.len(), writes = report.writes, "reconciled");
        let removed = self.reconciler.counts().removed;
        if let Some(keeper) = &self.threads.keeper
            && removed != self.removed
        {
            keeper.removed();
        }
        self.removed = removed;
        self.warn_of_fill();
        let mut problems = BTreeSet::new();
        for problem in self.reconciler.problems() {
            let text = problem.to_string();
            if !self.logged.contains(&text) {
                tracing::error!("not programmed: {text}");
                self.report(EventReport::of_problem(problem));
            }
            problems.insert(text);
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
        let Threads { attacher, keeper, collector, health_checks, board, reporter: _ } = &self.threads;
        let attached = attacher.attached();
        let status = &mut self.status;
        status.synced = self.reconciler.is_synced();
        status.ready = status.synced && attached.seen_interfaces;
        let oldest = self.stale.values().min_by_key(|(since, _)| *since);
        status.source.stale_since = oldest.map(|(since, _)| since.as_second());
        status.source.last_error = oldest.map(|(_, error)| error.clone());
        status.node = Some(NodeStatus::of(&self.model));
        let pods = || self.model.pods().filter(|pod| !pod.finished).map(PodStatus::from).collect();
        status.pods = self.model.is_listed(Kind::Pod).then(pods);
        status.rejected = self.model.rejections().map(|rejection| (&rejection).into()).collect();
        let unprogrammed = self
            .reconciler
            .problems()
            .map(|problem| ProblemStatus { object: problem.subject.to_string(), message: problem.error.to_string() });
        let noticed = self
            .noticed
            .iter()
            .map(|notice| ProblemStatus { object: notice.subject().to_string(), message: notice.message() });
        let problems = unprogrammed.chain(attached.problems).chain(health_checks.problems()).chain(noticed);
        status.problems = problems.collect();
        status.attachments = attached.attachments;
        status.attaching = attached.attaching;
        status.cgroup.clone_from(&self.cgroup);
        status.collector = Some(collector.status());
        status.sockets = keeper.as_ref().map(|keeper| keeper.status());
        status.duties = board.as_ref().map(|board| board.read());
        self.metrics.publish(Published {
            status: status.clone(),
            seen_interfaces: attached.seen_interfaces,
            counts: self.reconciler.counts(),
            sources: self.sources.clone(),
            ignored: self.ignored,
        });
        status.write(&self.directory)
    }

    /// Ends: what the status file says is not true any more.
    pub(super) fn end(self) {
        self.status.remove(&self.directory);
    }
}
