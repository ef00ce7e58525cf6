//! What a daemon does for the cluster, beside serving its node: [giving addresses](crate::ipam) and
//! [answering for them](crate::announce), in a thread of its own, so that no Lease is lost while there is much to program.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kube::Client;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::announce::agent;
use crate::announce::announcer::{Announcement, Announcer, Place};
use crate::ipam::{self, pool::Usage};
use crate::lease::Timing;
use crate::sources::kubernetes;

/// How long after a failure it is tried again to make a client of the configuration.
const RETRY: Duration = Duration::from_secs(5);

/// How they are done.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the API server is.
    pub source: kubernetes::Options,
    /// The node's name, under which Leases are held.
    pub node: String,
    /// The namespace of the Leases; by default the pod's own, or the kubeconfig's.
    pub namespace: Option<String>,
    /// How long Leases last.
    pub timing: Timing,
}

/// What has come of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DutiesStatus {
    /// Whether this node gives load balancer addresses: it holds the Lease for that.
    pub gives_addresses: bool,
    /// The pools by name, if it does.
    pub pools: BTreeMap<String, PoolStatus>,
    /// How many services have not all the addresses that they ask for, by the reason of their condition, if it does.
    pub unmet: BTreeMap<String, u64>,
    /// The addresses that this node answers for.
    pub announced: Vec<IpAddr>,
}

/// How many addresses of a pool there are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolStatus {
    /// Its IPv4 addresses.
    pub ipv4: Usage,
    /// Its IPv6 addresses.
    pub ipv6: Usage,
}

/// Where the thread tells what has come of them.
pub struct Board {
    status: Mutex<DutiesStatus>,
    changed: Box<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for Board {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Board").finish_non_exhaustive()
    }
}

impl Default for Board {
    fn default() -> Self {
        Self::new(|| {})
    }
}

impl Board {
    /// An empty one. `changed` is called when something else is told than before.
    pub fn new(changed: impl Fn() + Send + Sync + 'static) -> Self {
        Self { status: Mutex::default(), changed: Box::new(changed) }
    }

    fn status(&self) -> MutexGuard<'_, DutiesStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is told.
    pub fn read(&self) -> DutiesStatus {
        self.status().clone()
    }

    /// Tells something else.
    pub fn tell(&self, tell: impl FnOnce(&mut DutiesStatus)) {
        let differs = {
            let mut status = self.status();
            let before = status.clone();
            tell(&mut status);
            *status != before
        };
        if differs {
            (self.changed)();
        }
    }
}

/// Answers, and tells for which addresses.
struct Told<A> {
    announcer: A,
    board: Arc<Board>,
}

impl<A: Announcer> Announcer for Told<A> {
    fn place(&mut self) -> io::Result<Place> {
        self.announcer.place()
    }

    fn set(&mut self, announcements: &[Announcement]) {
        self.announcer.set(announcements);
        let mut announced: Vec<IpAddr> = announcements.iter().map(|one| one.addr).collect();
        announced.sort_unstable();
        self.board.tell(|status| status.announced = announced);
    }
}

/// A handle of the thread. It is ended when this is dropped.
#[derive(Debug)]
pub struct Duties {
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Duties {
    /// Starts the thread.
    ///
    /// # Errors
    /// Where there is none to be had.
    pub fn start(options: Options, announcer: impl Announcer + 'static, board: Arc<Board>) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let thread = thread::Builder::new().name("duties".to_owned());
        let thread = thread.spawn(move || runtime.block_on(run(&options, announcer, &board, &stopped)))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Duties {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn run(options: &Options, announcer: impl Announcer, board: &Arc<Board>, stop: &CancellationToken) {
    let Some(client) = stop.run_until_cancelled(connect(options)).await else { return };
    let namespace = options.namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
    let Options { node, timing, .. } = options;
    let gives = ipam::controller::run(client.clone(), &namespace, node, *timing, board, stop);
    let mut announcer = Told { announcer, board: board.clone() };
    let answers = agent::run(client, &namespace, node, *timing, &mut announcer, stop);
    futures::future::join(Box::pin(gives), Box::pin(answers)).await;
}

async fn connect(options: &Options) -> Client {
    loop {
        match kubernetes::connect(&options.source).await {
            Ok((client, _)) => return client,
            // Those who follow the API server say so.
            Err(error) => tracing::debug!(%error, "no client"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Answers for what it is told to.
    struct Nowhere;

    impl Announcer for Nowhere {
        fn place(&mut self) -> io::Result<Place> {
            Ok(Place::default())
        }

        fn set(&mut self, _: &[Announcement]) {}
    }

    #[test]
    fn what_is_answered_for_is_told_once() {
        let count = Arc::new(AtomicUsize::new(0));
        let told = count.clone();
        let board = Arc::new(Board::new(move || {
            told.fetch_add(1, Ordering::Relaxed);
        }));
        let mut announcer = Told { announcer: Nowhere, board: board.clone() };
        let [four, six]: [IpAddr; 2] = [[192, 0, 2, 1].into(), [0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into()];
        let announcements = [six, four].map(|addr| Announcement { addr, interfaces: [2].into() });
        announcer.set(&announcements);
        announcer.set(&announcements);
        assert_eq!((board.read().announced, count.load(Ordering::Relaxed)), (vec![four, six], 1));
        announcer.set(&[]);
        assert_eq!((board.read(), count.load(Ordering::Relaxed)), (DutiesStatus::default(), 2));
    }
}
