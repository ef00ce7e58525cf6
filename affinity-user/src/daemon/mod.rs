//! The node daemon: sources, model, plan, reconciler and interfaces, wired together.
//!
//! One task owns the state. What comes in is taken as it comes, and whatever has piled up meanwhile is programmed at once:
//! there is no fixed wait, and a service that changed ten times in a backlog is programmed once.
//!
//! The daemon leaves everything in place when it ends: services are served without it, and the next one takes over.

mod attacher;
mod datapath_log;
mod state;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use affinity_common::abi::lifetimes::Lifetimes;
use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, sleep_until};

use crate::announce::announcer::TableAnnouncer;
use crate::collector::Collector;
use crate::duties::{self, Board, Duties};
use crate::health::Pulse;
use crate::health_checks::HealthChecks;
use crate::lease::Timing;
use crate::loader::interfaces::{Follower, Patterns};
use crate::loader::{self, Datapath, LoadError, cgroup};
use crate::metrics::Metrics;
use crate::model::NodePortAddresses;
use crate::reconcile::Reconciler;
use crate::server::{Addresses, ListenError, Listeners};
use crate::sockets::keeper::{self, Keeper};
use crate::sources::{Received, SourceError, directory, kubernetes};
use crate::status::StatusError;
use crate::tables::{ONLY, TableError, bpf};

use attacher::Attacher;
use state::{State, Threads};

/// Where objects come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// The API server.
    Kubernetes(kubernetes::Options),
    /// A directory of YAML files.
    Directory(PathBuf),
}

/// Whether sockets are served where they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Sockets {
    /// Those of the node's whole cgroup hierarchy.
    #[default]
    Node,
    /// Those below a cgroup.
    Cgroup(PathBuf),
    /// None: all by TC.
    Off,
}

/// How the daemon runs.
#[derive(Clone, Debug)]
pub struct Options {
    /// The node's name: that of its Node object, and of its endpoints.
    pub node_name: String,
    /// Where objects come from.
    pub source: Source,
    /// At which of the node's addresses node ports are: at all that one of these names.
    pub node_port_addresses: Vec<NodePortAddresses>,
    /// How the datapath is loaded.
    pub loader: loader::Options,
    /// Whether sockets are served where they are, and at which cgroup; by default at the node's root.
    pub sockets: Sockets,
    /// How long connections may be silent; 0 stands for the default.
    pub lifetimes: Lifetimes,
    /// How sockets are looked after, where they are served.
    pub keeper: keeper::Options,
    /// Which interfaces are clients': see [`Patterns`].
    pub interfaces: Vec<String>,
    /// Which interfaces lead outside: see [`Patterns::of_uplinks`].
    pub uplinks: Vec<String>,
    /// Where the status file is written.
    pub state_dir: PathBuf,
    /// How often everything is compared with the maps.
    pub audit_interval: Duration,
    /// Where metrics and health are asked for.
    pub addresses: Addresses,
    /// The namespace of the daemons' Leases; by default the pod's own, or the kubeconfig's.
    pub lease_namespace: Option<String>,
    /// How long they last.
    pub leases: Timing,
}

/// Why the daemon can't run.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// The datapath can't be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The maps can't be opened.
    #[error(transparent)]
    Open(#[from] bpf::OpenError),
    /// The maps can't be taken over.
    #[error("the pinned maps can't be taken over: {0}")]
    TakeOver(#[from] TableError),
    /// There is no API server to follow.
    #[error(transparent)]
    Kubernetes(#[from] SourceError),
    /// The source can't be followed.
    #[error("{path}: {source}", path = path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Metrics or health can't be asked for.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The status file can't be written.
    #[error(transparent)]
    Status(#[from] StatusError),
    /// Signals, netlink.
    #[error("{0}")]
    System(#[from] std::io::Error),
}

/// How many affinity entries of services that have none any more are taken out at a time.
const SWEEP: usize = 4096;
/// How long after node ports have changed it is looked who has bound them: what comes together is looked at together.
const LOOK: Duration = Duration::from_secs(1);
/// How long the node's own object and its pods are waited for at the start, once all else is there: without them services are
/// served, but no hints for its zone are followed, and no pod's own choice.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the status file may be behind what it tells.
const STATUS_LAG: Duration = Duration::from_millis(50);
/// How often it is written even if nothing has happened.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);

/// Runs until SIGTERM or SIGINT. Programs and maps stay in place.
///
/// # Errors
/// Where the datapath can't be loaded or the source not be read at all. What goes wrong later is logged, shown by
/// `affinity status` and tried again.
pub async fn run(options: Options) -> Result<(), DaemonError> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    // What is wrong already now is for whoever has typed it, not for the log.
    let listeners = Listeners::bind(&options.addresses)?;
    let mut events = follow_source(&options).await?;
    let cgroup = match &options.sockets {
        Sockets::Node => Some(cgroup::find(None)?),
        Sockets::Cgroup(path) => Some(cgroup::find(Some(path))?),
        Sockets::Off => None,
    };
    let mut datapath = Datapath::open(&options.loader)?;
    for warning in datapath.warnings() {
        tracing::warn!("{warning}");
    }
    if options.loader.log_level > 0 {
        datapath_log::forward(&mut datapath);
    }
    let mut tables = bpf::open_pinned(&options.loader.pin_dir)?;
    tables.shared.lifetimes.insert(&ONLY, &options.lifetimes)?;
    let reconciler = Reconciler::open(tables, Box::new(Instant::now))?;
    let keeper = if let Some(path) = cgroup {
        let touch = datapath.touch()?;
        // Who sockets are is known before the first one is served.
        let tables = bpf::open_pinned(&options.loader.pin_dir)?;
        let unknown = datapath.unknown_netns()?;
        let keeper = Arc::new(Keeper::start(options.keeper.clone(), tables, touch, unknown)?);
        datapath.attach_cgroup(&path)?;
        tracing::info!(cgroup = %path.display(), "serves sockets");
        Some(keeper)
    } else {
        datapath.detach_cgroup();
        None
    };
    let collector = Collector::start(bpf::open_pinned(&options.loader.pin_dir)?)?;
    let metrics = Arc::new(Metrics::new(bpf::open_pinned(&options.loader.pin_dir)?));
    let cgroup = datapath.cgroup().cloned();
    let (pulse, mut pings) = Pulse::new();
    let pulse = Arc::new(pulse);
    let (changed, mut changes) = mpsc::channel(1);
    let changed = move || {
        // One that waits to be heard says it too.
        let _ = changed.try_send(());
    };
    let health_checks = HealthChecks::start(pulse.clone(), changed.clone())?;
    let board = Arc::new(Board::new(changed.clone()));
    let attacher = {
        let (clients, uplinks) = (Patterns::new(&options.interfaces), Patterns::of_uplinks(&options.uplinks));
        let (follower, keeper) = (Follower::new(clients, uplinks), keeper.clone());
        let tables = bpf::open_pinned(&options.loader.pin_dir)?;
        Attacher::start(datapath, tables, follower, metrics.attach.clone(), move || {
            if let Some(keeper) = &keeper {
                keeper.links_changed();
            }
            changed();
        })?
    };
    let reporter = match &options.source {
        Source::Kubernetes(source) => Some(kubernetes::events::start(source, &options.node_name)),
        Source::Directory(_) => None,
    };
    let duties = start_duties(&options, &board)?;
    let board = duties.as_ref().map(|_| board);
    let threads = Threads { attacher, keeper, collector, health_checks, board, reporter };
    let mut state = State::new(&options, reconciler, threads, cgroup, metrics.clone())?;
    state.write_status()?;
    for address in listeners.addresses() {
        tracing::info!(%address, "answers about metrics and health");
    }
    let server = listeners.serve(metrics, pulse)?;

    let mut audit = interval(options.audit_interval);
    audit.set_missed_tick_behavior(MissedTickBehavior::Delay);
    audit.reset();
    let mut status = interval(STATUS_INTERVAL);
    status.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let next = state.next_wake();
        tokio::select! {
            Some(event) = events.recv() => {
                state.enter(event);
                while let Ok(event) = events.try_recv() {
                    state.enter(event);
                }
                state.program();
            }
            Some(()) = changes.recv() => state.links_changed(),
            () = sleep_until(next.into()) => state.wake(),
            _ = audit.tick() => state.audit(),
            _ = status.tick() => state.touch(),
            // Whoever asked may not wait any more.
            Some(ping) = pings.recv() => drop(ping.send(())),
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    drop(duties);
    drop(server);
    tracing::info!("ends; services are served without it, until `affinity cleanup`");
    state.end();
    Ok(())
}

/// What a daemon does for the cluster, where there is one.
fn start_duties(options: &Options, board: &Arc<Board>) -> Result<Option<Duties>, DaemonError> {
    let Source::Kubernetes(source) = &options.source else { return Ok(None) };
    let duties = duties::Options {
        source: source.clone(),
        node: options.node_name.clone(),
        namespace: options.lease_namespace.clone(),
        timing: options.leases,
    };
    let tables = bpf::open_pinned(&options.loader.pin_dir)?;
    let announcer = TableAnnouncer::new(tables, options.leases.duration);
    Ok(Some(Duties::start(duties, announcer, board.clone())?))
}

/// What is wrong with the source already now is for whoever has typed it, not for the log. But where an earlier daemon has left
/// services, these are served on, and the source may get right: pods that come are attached to meanwhile.
async fn follow_source(options: &Options) -> Result<mpsc::Receiver<Received>, DaemonError> {
    match &options.source {
        Source::Kubernetes(source) => {
            if let Err(error) = kubernetes::check(source).await
                && !loader::is_pinned(&options.loader.pin_dir)
            {
                return Err(error.into());
            }
            Ok(kubernetes::watch(source, &options.node_name))
        }
        Source::Directory(path) => {
            let followed = path.read_dir().and_then(|_| directory::watch(path));
            followed.map_err(|source| DaemonError::Directory { path: path.clone(), source })
        }
    }
}
