//! The thread beside the daemon's that puts the programs on clients' interfaces as they come: whatever else is programmed, a
//! new pod does not wait for it.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use prometheus_client::metrics::histogram::Histogram;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep_until;

use crate::loader::interfaces::{Action, Follower, Interface, LinkEvent, NodeAddress, watch};
use crate::loader::{Attachment, Datapath, uplinks};
use crate::status::{AttachingStatus, ProblemStatus, interface_object};
use crate::tables::{TableError, Tables};

/// How long after a failure an interface is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How many of the kernel's words may wait to be acted on.
const BACKLOG: usize = 4096;
/// Of how many interfaces, the last ones that came, it is told how long it took.
const REMEMBERED: usize = 1000;

/// What is attached where.
#[derive(Clone, Debug, Default)]
pub(super) struct Attached {
    /// Whether the node's interfaces are known, and were attached to.
    pub seen_interfaces: bool,
    pub attachments: Vec<Attachment>,
    /// Interfaces that could not be attached to.
    pub problems: Vec<ProblemStatus>,
    pub attaching: AttachingStatus,
    /// The addresses of the node; `None` as long as they are not known.
    pub addresses: Option<Vec<NodeAddress>>,
}

/// A handle of the thread, which ends when this is dropped. The programs stay where they are.
pub(super) struct Attacher {
    attached: Arc<Mutex<Attached>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Attacher {
    /// Follows the node's interfaces from now on. `changed` is called on the thread, when something has been done;
    /// `duration` gets how long each interface that came has waited.
    pub fn start(
        datapath: Datapath,
        tables: Tables,
        follower: Follower,
        duration: Histogram,
        changed: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        let attached: Arc<Mutex<Attached>> = Arc::default();
        let (stop, stopped) = oneshot::channel();
        // Beside the thread that attaches, and waits for the kernel meanwhile, one that takes the kernel's word: else that would be
        // late, and lost where the socket has no room for more.
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).thread_name("links").enable_all().build()?;
        let worker = Worker {
            datapath,
            tables,
            follower,
            unattached: BTreeMap::new(),
            retry: None,
            seen_interfaces: false,
            knows_addresses: false,
            waits: Waits::default(),
            duration,
            attached: attached.clone(),
            changed: Box::new(changed),
        };
        let thread = thread::Builder::new().name("interfaces".to_owned());
        let thread = thread.spawn(move || runtime.block_on(worker.run(stopped)))?;
        Ok(Self { attached, stop: Some(stop), thread: Some(thread) })
    }

    /// What is attached where.
    pub fn attached(&self) -> Attached {
        lock(&self.attached).clone()
    }
}

impl Drop for Attacher {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(attached: &Mutex<Attached>) -> MutexGuard<'_, Attached> {
    attached.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An interface that could not be attached to.
struct Unattached {
    interface: Interface,
    /// When it came; `None` where it was there before.
    came: Option<Instant>,
    error: String,
}

struct Worker {
    datapath: Datapath,
    tables: Tables,
    follower: Follower,
    unattached: BTreeMap<u32, Unattached>,
    retry: Option<Instant>,
    seen_interfaces: bool,
    knows_addresses: bool,
    waits: Waits,
    duration: Histogram,
    attached: Arc<Mutex<Attached>>,
    changed: Box<dyn Fn() + Send>,
}

impl Worker {
    async fn run(mut self, mut stopped: oneshot::Receiver<()>) {
        let (sender, mut links) = mpsc::channel(BACKLOG);
        let mut watcher = tokio::spawn(watch(sender.clone()));
        loop {
            let retry = self.retry.unwrap_or_else(|| Instant::now() + Duration::from_mins(1));
            tokio::select! {
                biased;
                _ = &mut stopped => break,
                Some((at, event)) = links.recv() => self.follow(at, event),
                ended = &mut watcher => {
                    if let Ok(Err(error)) = ended {
                        tracing::error!(%error, "interfaces can't be followed: pods that come are not served by TC; tried again");
                    }
                    tokio::time::sleep(RETRY).await;
                    watcher = tokio::spawn(watch(sender.clone()));
                }
                () = sleep_until(retry.into()), if self.retry.is_some() => self.try_again(),
            }
        }
        watcher.abort();
    }

    fn follow(&mut self, at: Instant, event: LinkEvent) {
        let is_all = matches!(event, LinkEvent::All(_));
        let are_addresses = matches!(event, LinkEvent::Addresses(_));
        self.knows_addresses |= are_addresses;
        let actions = self.follower.follow(event);
        let has_acted = !actions.is_empty() || are_addresses;
        let is_first = is_all && !self.seen_interfaces;
        // What comes by an uplink is to be known as such from its first packet on. As long as interfaces are not known, the maps
        // hold what the process before this one has known of them.
        if (is_first || has_acted && self.seen_interfaces)
            && let Err(error) = self.settle_uplinks()
        {
            tracing::error!(%error, "uplinks are not known to the datapath: tried again when interfaces change");
        }
        for action in actions {
            // Those of a list have been there before, nobody knows since when.
            self.act(action, (!is_all).then_some(at));
        }
        if is_first {
            self.seen_interfaces = true;
            // Left by an earlier process on interfaces that are gone, or are no clients' any more.
            self.datapath.drop_others(|ifindex| self.unattached.contains_key(&ifindex));
            self.finish_migration();
        }
        if has_acted || is_first {
            self.tell();
        }
    }

    /// Once no program of an earlier version is left that writes to its own maps.
    fn finish_migration(&mut self) {
        if self.unattached.keys().any(|ifindex| self.datapath.has_links(*ifindex)) {
            return;
        }
        if let Err(error) = self.datapath.finish_migration() {
            tracing::error!("{error}");
        }
    }

    fn settle_uplinks(&mut self) -> Result<(), TableError> {
        let Self { tables, follower, .. } = self;
        uplinks::settle(&mut tables.v4.uplinks, follower.uplinks(), follower.addresses())?;
        uplinks::settle(&mut tables.v6.uplinks, follower.uplinks(), follower.addresses())
    }

    fn act(&mut self, action: Action, came: Option<Instant>) {
        match action {
            Action::Attach(interface) => self.attach(interface, came),
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
    }

    fn attach(&mut self, interface: Interface, came: Option<Instant>) {
        self.unattached.remove(&interface.index);
        match self.datapath.attach(interface.index, &interface.name) {
            Ok(mode) => {
                if let Some(wait) = came.map(|came| came.elapsed()) {
                    self.duration.observe(wait.as_secs_f64());
                    self.waits.note(wait);
                }
                tracing::info!(interface = interface.name, index = interface.index, %mode, "attached");
            }
            Err(error) if error.is_gone() => tracing::debug!(%error, "gone before it was attached to"),
            Err(error) => {
                tracing::error!("{error}");
                self.unattached.insert(interface.index, Unattached { interface, came, error: error.to_string() });
                self.retry = Some(Instant::now() + RETRY);
            }
        }
    }

    fn try_again(&mut self) {
        self.retry = None;
        for (_, Unattached { interface, came, .. }) in std::mem::take(&mut self.unattached) {
            self.attach(interface, came);
        }
        if self.seen_interfaces {
            self.finish_migration();
        }
        self.tell();
    }

    fn tell(&self) {
        let problems = self
            .unattached
            .values()
            .map(|it| ProblemStatus { object: interface_object(&it.interface.name), message: it.error.clone() });
        *lock(&self.attached) = Attached {
            seen_interfaces: self.seen_interfaces,
            attachments: self.datapath.attachments().cloned().collect(),
            problems: problems.collect(),
            attaching: self.waits.status(),
            addresses: self.knows_addresses.then(|| self.follower.addresses().to_vec()),
        };
        (self.changed)();
    }
}

/// How long the last interfaces that came have waited.
#[derive(Debug, Default)]
struct Waits {
    last: VecDeque<Duration>,
    interfaces: u64,
}

impl Waits {
    fn note(&mut self, wait: Duration) {
        self.interfaces += 1;
        if self.last.len() == REMEMBERED {
            self.last.pop_front();
        }
        self.last.push_back(wait);
    }

    fn status(&self) -> AttachingStatus {
        let mut sorted: Vec<_> = self.last.iter().collect();
        sorted.sort_unstable();
        // The smallest that so many of a hundred do not exceed.
        let percentile = |percent: usize| {
            let rank = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
            sorted.get(rank).map_or(0.0, |wait| wait.as_secs_f64())
        };
        AttachingStatus {
            interfaces: self.interfaces,
            p50_seconds: percentile(50),
            p99_seconds: percentile(99),
            longest_seconds: percentile(100),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::float_cmp, reason = "whole milliseconds come out as they went in")]
    fn percentiles_are_of_the_last_ones() {
        let mut waits = Waits::default();
        assert_eq!(waits.status(), AttachingStatus::default());
        waits.note(Duration::from_millis(7));
        let status = waits.status();
        assert_eq!([status.p50_seconds, status.p99_seconds, status.longest_seconds], [0.007; 3]);
        for millis in (1..=1000).rev() {
            waits.note(Duration::from_millis(millis));
        }
        let status = waits.status();
        assert_eq!((status.interfaces, status.p50_seconds, status.p99_seconds), (1001, 0.5, 0.99));
        assert_eq!(status.longest_seconds, 1.0);
    }
}
