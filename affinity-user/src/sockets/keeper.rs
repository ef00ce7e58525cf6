//! The thread beside the daemon's that keeps `netns_*` true, refreshes the affinity of clients whose sockets are open, and
//! ends datagram sockets whose backend has gone.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{self, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use affinity_common::abi::backends::BackendKey;
use affinity_common::abi::netns::{NetnsClient, NetnsKey};
use affinity_common::abi::sockets::{Socket, SocketCookie, SocketKey};
use affinity_common::family::Family;
use affinity_common::types::Proto;
use caps::{CapSet, Capability};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::discovery::{self, Namespace};
use super::identity::{self, Role};
use super::live::{self, LiveSocket};
use super::namespace::{self, Seen};
use super::pace::Pace;
use super::pods::{self, PodSetting, Sight};
use crate::loader::{Touch, UnknownNetns};
use crate::tables::{BoxTable, FamilyTables, TableError, Tables};

/// How often namespaces are looked for, unless told otherwise, even if nothing says that there are new ones.
pub const LOOK: Duration = Duration::from_secs(10);
/// How often they are looked for again after an interface has come: a pod gets its address after that.
const LOOK_AGAIN: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(1)];
/// How often the clients of open sockets are refreshed, unless told otherwise. A timeout below that counts from the last
/// connect, send or close.
pub const SWEEP: Duration = Duration::from_secs(30);
/// How long what has been taken out of the maps may pile up before sockets are looked through for it.
const REST: Duration = Duration::from_millis(500);
/// What a daemon can't see without a capability.
const HIDDEN: &str = "without CAP_SYS_PTRACE the network namespaces of others' processes can't be seen: sockets in those that \
                      no file holds are left to TC";

/// How sockets are looked after.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directories of files that hold network namespaces, beside those of processes and mounts.
    pub directories: Vec<PathBuf>,
    /// Whether the sockets of pods are served, or those of the node's own namespace alone.
    pub pods: bool,
    /// How often namespaces are looked for.
    pub look: Duration,
    /// How often the clients of open sockets are refreshed.
    pub sweep: Duration,
}

/// What was found and done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketsStatus {
    /// Network namespaces of which some address is known.
    pub namespaces: usize,
    /// Those of them whose sockets are left to TC, in some family: they have several addresses, or are excluded.
    pub left_to_tc: usize,
    /// When they were last looked for, in seconds since 1970.
    pub looked: i64,
    /// Sockets whose clients' affinity was looked after when that was last done.
    pub refreshed: usize,
    /// Datagram sockets that were ended since the start, for their backend was gone.
    pub destroyed: u64,
    /// What could not be done.
    pub problems: Vec<String>,
}

enum Message {
    /// An interface has come or gone.
    Links,
    /// Something was taken out of the maps.
    Removed,
}

/// A handle of the thread, which ends when this is dropped.
pub struct Keeper {
    /// Messages, and what wakes the thread that they are for.
    messages: Option<(mpsc::Sender<Message>, UnixStream)>,
    status: Arc<Mutex<SocketsStatus>>,
    pods: Pods,
    thread: Option<JoinHandle<()>>,
}

/// The node's pods; `None` as long as nobody has said which there are.
type Pods = Arc<Mutex<Option<Vec<PodSetting>>>>;

impl Keeper {
    /// Looks for the node's namespaces once, then goes on with that on a thread.
    ///
    /// # Errors
    /// Where there is no `/proc`, namespaces have no cookies (before Linux 5.14), or there is no further thread.
    pub fn start(options: Options, tables: Tables, touch: Touch, unknown: UnknownNetns) -> io::Result<Self> {
        let status: Arc<Mutex<SocketsStatus>> = Arc::default();
        let pods = Pods::default();
        let own = discovery::own()?;
        namespace::cookie()?;
        let mut worker = Worker {
            options,
            tables,
            touch,
            unknown,
            own,
            sees_all_processes: caps::has_cap(None, CapSet::Effective, Capability::CAP_SYS_PTRACE).unwrap_or(true),
            namespaces: BTreeMap::new(),
            absent: HashSet::new(),
            status: status.clone(),
            pods: pods.clone(),
        };
        worker.look();
        let (messages, received) = mpsc::channel();
        let (wakes, woken) = UnixStream::pair()?;
        wakes.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        let thread = thread::Builder::new().name("sockets".to_owned()).spawn(move || worker.run(&received, &woken))?;
        Ok(Self { messages: Some((messages, wakes)), status, pods, thread: Some(thread) })
    }

    /// An interface has come or gone, and with it perhaps a namespace.
    pub fn links_changed(&self) {
        self.send(Message::Links);
    }

    /// These are the node's pods that have a network namespace of their own.
    pub fn set_pods(&self, settings: Vec<PodSetting>) {
        *lock(&self.pods) = Some(settings);
        self.links_changed();
    }

    /// Something was taken out of the maps: perhaps a backend.
    pub fn removed(&self) {
        self.send(Message::Removed);
    }

    fn send(&self, message: Message) {
        if let Some((messages, wakes)) = &self.messages
            && messages.send(message).is_ok()
        {
            // Where there is no room for it the thread wakes anyway, and where that has ended there is nothing to do.
            let _ = (&*wakes).write(&[0]);
        }
    }

    /// What was found and done.
    pub fn status(&self) -> SocketsStatus {
        lock(&self.status).clone()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.messages = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Worker {
    options: Options,
    tables: Tables,
    touch: Touch,
    unknown: UnknownNetns,
    own: Namespace,
    sees_all_processes: bool,
    /// Those that there are, with a path to each.
    namespaces: BTreeMap<Namespace, PathBuf>,
    /// Sockets of which the last sweep has found an entry and nothing else.
    absent: HashSet<SocketCookie>,
    status: Arc<Mutex<SocketsStatus>>,
    pods: Pods,
}

impl Worker {
    fn run(mut self, messages: &mpsc::Receiver<Message>, woken: &UnixStream) {
        let start = Instant::now();
        let (mut look, mut sweep) = (start + self.options.look, start + self.options.sweep);
        let mut soon: BTreeSet<Instant> = BTreeSet::new();
        let (mut told, mut pace) = (None, Pace::new(start, self.options.look));
        // The one before us may have ended before it had ended theirs.
        let mut removed = Some(start + REST);
        loop {
            let next = soon.first().copied().into_iter().chain(removed).chain(told).fold(look.min(sweep), Instant::min);
            // Nothing is to be heard of a namespace while one is to be looked for anyway.
            if self.wait(woken, next, told.is_none()) {
                told = Some(pace.answer_at(Instant::now()));
            }
            loop {
                match messages.try_recv() {
                    Ok(Message::Links) => {
                        let now = Instant::now();
                        soon.insert(now);
                        soon.extend(LOOK_AGAIN.map(|later| now + later));
                    }
                    Ok(Message::Removed) => {
                        removed.get_or_insert_with(|| Instant::now() + REST);
                    }
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            let now = Instant::now();
            if look <= now || soon.first().copied().into_iter().chain(told).any(|due| due <= now) {
                soon = soon.split_off(&(now + Duration::from_nanos(1)));
                let found = self.look();
                look = now + self.options.look;
                if told.take_if(|due| *due <= now).is_some() {
                    pace.answered(now, Instant::now(), found);
                }
            }
            if removed.is_some_and(|due| due <= now) {
                removed = None;
                self.end_those_of_gone_backends();
            }
            if sweep <= now {
                self.sweep();
                // Of a namespace that could not be looked into when its backend went.
                self.end_those_of_gone_backends();
                sweep = now + self.options.sweep;
            }
        }
    }

    /// Waits for a message or for a time, and where it `hears`, for the programs to tell of an unknown namespace. Returns
    /// whether they do.
    fn wait(&self, woken: &UnixStream, until: Instant, hears: bool) -> bool {
        let mut events =
            [PollFd::new(woken.as_fd(), PollFlags::POLLIN), PollFd::new(self.unknown.as_fd(), PollFlags::POLLIN)];
        let waited = if hears { &mut events[..] } else { &mut events[..1] };
        // Whole milliseconds, and none too few.
        let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        if poll(waited, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)).is_err() {
            // By a signal: then what is due is looked at early.
            return false;
        }
        let is_ready = |event: &PollFd<'_>| event.any().unwrap_or_default();
        let told = waited.get(1).is_some_and(is_ready);
        if is_ready(&events[0]) {
            while (&*woken).read(&mut [0; 64]).is_ok_and(|read| read > 0) {}
        }
        told
    }

    /// Looks for namespaces, and brings `netns_*` to what is there. Returns whether there was anything new.
    fn look(&mut self) -> bool {
        let mut problems = Vec::new();
        if !self.sees_all_processes {
            problems.push(HIDDEN.to_owned());
        }
        // First: what is told from now on may be of one that is not seen any more.
        for key in self.unknown.take() {
            tracing::debug!(cookie = key.cookie, "a socket of an unknown network namespace");
        }
        match discovery::find(&self.options.directories) {
            Ok(found) => self.namespaces = found,
            Err(error) => problems.push(format!("network namespaces can't be found: {error}")),
        }
        let (mut v4, mut v6) = (BTreeMap::new(), BTreeMap::new());
        let mut known = BTreeMap::new();
        let mut all = BTreeMap::new();
        for (namespace, path) in &self.namespaces {
            match namespace::look(*namespace, path) {
                Ok(seen) => drop(all.insert(*namespace, seen)),
                // Gone in between.
                Err(_) if discovery::of(path, self.own) != Some(*namespace) => {}
                Err(error) => problems.push(format!("{}: {error}: its sockets are left to TC", path.display())),
            }
        }
        let left = self.left_to_tc(&all);
        for (namespace, seen) in &all {
            let role = if *namespace == self.own {
                Role::Node { routed: [true, false].into_iter().filter_map(namespace::routed_source).collect() }
            } else if left.contains(namespace) {
                Role::Excluded
            } else {
                Role::Pod
            };
            let (one, other) = (identity::client(&role, &seen.addresses), identity::client(&role, &seen.addresses));
            let is_left = one.is_some_and(|it| NetnsClient::is_tc_only(&it))
                || other.is_some_and(|it| NetnsClient::is_tc_only(&it));
            if one.is_some() || other.is_some() {
                known.insert(seen.key, is_left);
            }
            v4.extend(one.map(|client| (seen.key, client)));
            v6.extend(other.map(|client| (seen.key, client)));
        }
        let mut found = false;
        for brought in [bring(&mut self.tables.v4.netns, &v4), bring(&mut self.tables.v6.netns, &v6)] {
            match brought {
                Ok(new) => found |= new,
                Err(error) => problems.push(error.to_string()),
            }
        }
        let mut status = lock(&self.status);
        for problem in problems.iter().filter(|problem| !status.problems.contains(problem)) {
            tracing::warn!("sockets: {problem}");
        }
        status.namespaces = known.len();
        status.left_to_tc = known.values().filter(|is_left| **is_left).count();
        status.looked = seconds_since_1970();
        status.problems = problems;
        found
    }

    /// The namespaces whose sockets are to be left to TC, by what their pods say.
    fn left_to_tc(&self, seen: &BTreeMap<Namespace, Seen>) -> BTreeSet<Namespace> {
        let default = self.options.pods;
        let Some(settings) = lock(&self.pods).clone() else {
            // Nobody has said yet: those that an earlier process has left to TC stay so.
            let was_left = |seen: &Seen| {
                let of = (self.tables.v4.netns.get(&seen.key), self.tables.v6.netns.get(&seen.key));
                of.0.is_ok_and(|it| it.is_some_and(|it| it.is_tc_only()))
                    || of.1.is_ok_and(|it| it.is_some_and(|it| it.is_tc_only()))
            };
            let left = seen.iter().filter(|(_, seen)| !default || was_left(seen));
            return left.map(|(namespace, _)| *namespace).collect();
        };
        // Who is in which namespace takes a look at every process: not where all pods are alike.
        let differ = settings.iter().any(|pod| pod.served != default);
        let mut uids = if differ { pods::uids() } else { BTreeMap::new() };
        let sights = seen.iter().filter(|(namespace, _)| **namespace != self.own).map(|(namespace, seen)| {
            let uids = uids.remove(namespace).unwrap_or_default();
            (*namespace, Sight { addresses: seen.addresses.clone(), uids })
        });
        pods::left_to_tc(&sights.collect(), &settings, default)
    }

    /// Refreshes the clients of open sockets, and forgets sockets that are closed and were not seen to close.
    fn sweep(&mut self) {
        let (v4, v6) = (entries(&self.tables.v4), entries(&self.tables.v6));
        if v4.is_empty() && v6.is_empty() {
            return;
        }
        // Later than the entries: a socket that has one and is not there has closed.
        let Some(live) = self.live_sockets() else { return };
        let mut absent = HashSet::new();
        let mut refreshed = 0;
        let Self { tables, touch, absent: before, .. } = self;
        refreshed += sweep_family(&mut tables.v4, touch, &v4, &live, before, &mut absent);
        refreshed += sweep_family(&mut tables.v6, touch, &v6, &live, before, &mut absent);
        self.absent = absent;
        lock(&self.status).refreshed = refreshed;
    }

    /// The sockets of all namespaces; `None` where some could not be listed.
    fn live_sockets(&self) -> Option<HashMap<SocketCookie, LiveSocket>> {
        let mut sockets = HashMap::new();
        for (namespace, path) in &self.namespaces {
            match namespace::within(*namespace, path, live::list) {
                Ok(listed) => sockets.extend(listed.into_iter().map(|socket| (socket.cookie, socket))),
                Err(_) if discovery::of(path, self.own) != Some(*namespace) => {}
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "the sockets of a network namespace can't be listed");
                    return None;
                }
            }
        }
        Some(sockets)
    }

    /// Ends the connected UDP sockets that were translated to a backend which is no longer in the maps: their
    /// application would send into the void. TCP's get their answer from whoever has the address now; unconnected ones choose
    /// again by themselves.
    fn end_those_of_gone_backends(&mut self) {
        let mut gone: HashSet<(SocketCookie, SocketAddr)> = HashSet::new();
        let found = gone_of(&self.tables.v4, &mut gone).and(gone_of(&self.tables.v6, &mut gone));
        if let Err(error) = found {
            tracing::warn!(%error, "sockets of backends that are gone can't be told from others");
            return;
        }
        if gone.is_empty() {
            return;
        }
        for (namespace, path) in &self.namespaces {
            let ended = namespace::within(*namespace, path, || {
                let sockets = live::list()?;
                let ours = sockets.iter().filter(|socket| is_to_end(socket, &gone));
                Ok(ours.filter_map(|socket| live::destroy(socket).ok()).count())
            });
            if let Ok(ended @ 1..) = ended {
                tracing::info!(path = %path.display(), ended, "ended datagram sockets whose backend is gone");
                lock(&self.status).destroyed += ended as u64;
            }
        }
    }
}

/// Whether a socket is one of the connected UDP sockets whose backend is gone.
fn is_to_end(socket: &LiveSocket, gone: &HashSet<(SocketCookie, SocketAddr)>) -> bool {
    socket.proto == Proto::UDP && socket.peer.is_some_and(|peer| gone.contains(&(socket.cookie, peer)))
}

/// Brings a table to what it is to hold. Returns whether anything has come to it.
fn bring<F: Family>(
    table: &mut BoxTable<NetnsKey, NetnsClient<F>>,
    wanted: &BTreeMap<NetnsKey, NetnsClient<F>>,
) -> Result<bool, TableError> {
    let there: BTreeMap<NetnsKey, NetnsClient<F>> = table.entries()?.into_iter().collect();
    for key in there.keys().filter(|key| !wanted.contains_key(key)) {
        match table.remove(key) {
            Ok(()) | Err(TableError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let mut new = false;
    for (key, client) in wanted.iter().filter(|(key, client)| there.get(key) != Some(client)) {
        table.insert(key, client)?;
        new = true;
    }
    Ok(new)
}

fn entries<F: Family>(tables: &FamilyTables<F>) -> Vec<(SocketKey<F>, Socket<F>)> {
    tables.sockets.entries().unwrap_or_else(|error| {
        tracing::warn!(%error, "translated sockets can't be read");
        Vec::new()
    })
}

fn peer<F: Family>(key: &SocketKey<F>) -> SocketAddr {
    SocketAddr::new(F::to_ip(&key.addr), key.port.get())
}

/// Returns how many sockets are open.
fn sweep_family<F: Family>(
    tables: &mut FamilyTables<F>,
    touch: &Touch,
    entries: &[(SocketKey<F>, Socket<F>)],
    live: &HashMap<SocketCookie, LiveSocket>,
    before: &HashSet<SocketCookie>,
    absent: &mut HashSet<SocketCookie>,
) -> usize {
    let mut refreshed = 0;
    for (key, socket) in entries {
        match live.get(&key.cookie) {
            Some(open) if open.peer == Some(peer(key)) => match touch.touch(key, socket) {
                Ok(_) => refreshed += 1,
                Err(error) => {
                    tracing::warn!(%error, "the clients of open sockets can't be refreshed");
                    return refreshed;
                }
            },
            // Not connected: it counts when it sends.
            Some(_) => {}
            // Twice: it may have been about to connect.
            None if before.contains(&key.cookie) => {
                let _ = tables.sockets.remove(key);
            }
            None => {
                absent.insert(key.cookie);
            }
        }
    }
    refreshed
}

/// The connections of UDP sockets to backends that are no longer there.
fn gone_of<F: Family>(
    tables: &FamilyTables<F>,
    gone: &mut HashSet<(SocketCookie, SocketAddr)>,
) -> Result<(), TableError> {
    for (key, socket) in tables.sockets.entries()?.into_iter().filter(|(key, _)| key.proto == Proto::UDP) {
        let backend = BackendKey { service: socket.service, backend: socket.backend };
        if tables.backends.get(&backend)?.is_none() {
            gone.insert((key.cookie, peer(&key)));
        }
    }
    Ok(())
}

fn seconds_since_1970() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}
