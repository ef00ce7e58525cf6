//! Restarts, crashes and upgrades under load: no request is lost, no client moved, no new connection refused, by packets and
//! by sockets; and an upgrade over a change of the layout carries everything over.
//!
//! `AFFINITY_RESTART_REQUESTS=N` makes as many requests at least (100,000 take some minutes), and
//! `AFFINITY_UPGRADE_FROM=BINARY` begins with an earlier version.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use affinity_common::abi::LAYOUT;
use affinity_common::abi::sockets::SocketKey;
use affinity_common::family::V4;
use affinity_tests::cgroup::ThreadCgroup;
use affinity_tests::daemon::{Daemon, DaemonOptions, PIN_DIR, SourceDir, binary};
use affinity_tests::objects::{Document, Endpoint, ServiceObject, SliceObject};
use affinity_tests::privilege::require_root;
use affinity_tests::process::Process;
use affinity_tests::topology::{Host, Lab, LabOptions};
use affinity_tests::traffic::{Backend, ClientOptions, HttpConnection, UdpClient};
use affinity_tests::{mountns, wait};
use affinity_user::tables::bpf;
use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

const SECOND: Duration = Duration::from_secs(1);
const POD_PORT: u16 = 8080;
const STICKY: &str = "10.96.0.10:80";
const SPREAD: &str = "10.96.0.20:80";
/// While the layout of `sockets_*` changes, a datagram that was sent before its programs were replaced and is answered in the
/// moment after that shows its pod: one at most of each client whose sockets are served.
const SWITCH: &str = "the layout is changed";
/// How long a client rests between its connections.
const PAUSE: Duration = Duration::from_millis(2);
/// How often the daemon ends and is started again.
const RESTARTS: u64 = 10;
/// How often it is replaced by another version.
const UPGRADES: u64 = 3;
/// How many requests there are at least, unless told otherwise.
const REQUESTS: u64 = 4_000;

/// A lab whose pods serve, and a cgroup: the sockets of threads in it are served.
struct Ground {
    // In the order in which they are dropped.
    _pods: Vec<Backend>,
    lab: Lab,
    source: SourceDir,
    namespaces: TempDir,
    cgroup: ThreadCgroup,
}

impl Ground {
    fn new() -> Result<Self> {
        require_root();
        let cgroup = ThreadCgroup::enter()?;
        let lab = Lab::new(LabOptions::default())?;
        let pods = lab.backends.iter().map(|host| Backend::start(host, POD_PORT)).collect::<Result<_>>()?;
        let source = SourceDir::new()?;
        for (name, address) in [("sticky", STICKY), ("spread", SPREAD)] {
            let address: SocketAddr = address.parse()?;
            let service = ServiceObject::new(name).cluster_ip(&address.ip().to_string());
            let service = service.tcp("http", 80, POD_PORT).udp("udp", 80, POD_PORT);
            let service = if name == "sticky" { service.affinity(10_800) } else { service.no_affinity() }.build();
            let mut slice = SliceObject::of(name, "1").tcp("http", POD_PORT).udp("udp", POD_PORT);
            for host in &lab.backends {
                slice = slice.endpoint(host.ip(), Endpoint::Ready).pod(&host.name);
            }
            source.write(name, &[&service as &dyn Document, &slice.build()])?;
        }
        let namespaces = tempfile::Builder::new().prefix("affinity-netns-").tempdir()?;
        for client in &lab.clients {
            symlink(client.netns.path(), namespaces.path().join(&client.name))?;
        }
        Ok(Self { _pods: pods, lab, source, namespaces, cgroup })
    }

    fn options(&self) -> DaemonOptions {
        let directory = self.namespaces.path().display().to_string();
        let mut options = DaemonOptions::new(self.source.source()).arguments(["--netns-dir", &directory]);
        options.cgroup = Some(self.cgroup.path().to_owned());
        options
    }

    /// Does something as a client on a host, whose sockets are served or not.
    fn be(&self, host: &Host, way: Way, work: impl FnOnce() -> Result<()> + Send) -> Result<()> {
        match way {
            Way::Packets => self.cgroup.outside(|| host.netns.enter(work)),
            Way::Socket => host.netns.enter(|| self.cgroup.join().and_then(|()| work())),
        }
    }

    /// Something about the node's pins.
    fn pins<R: Send>(&self, work: impl FnOnce(&Path) -> Result<R> + Send) -> Result<R> {
        self.lab.node.mounts.enter(|| work(Path::new(PIN_DIR)))
    }

    fn layout(&self) -> Result<u32> {
        self.pins(|dir| Ok(bpf::open_pinned(dir)?.shared.config.get(&0)?.context("no config")?.layout))
    }

    /// The layout, of maps that need not be ours.
    fn layout_as_is(&self) -> Result<u32> {
        let mut bpftool = Command::new("bpftool");
        bpftool.args(["--json", "map", "lookup", "pinned", &format!("{PIN_DIR}/config"), "key", "0", "0", "0", "0"]);
        let found: serde_json::Value = serde_json::from_str(&Process::output(bpftool, &self.lab.node.place())?)?;
        let byte = found["value"][0].as_str().context("no bytes")?.trim_start_matches("0x").to_owned();
        Ok(u32::from_str_radix(&byte, 16)?)
    }

    /// Puts the clock back by a layout: the maps of sockets are such as layout 3 had them, with what they hold now; the
    /// programs that are attached go on with the present ones.
    fn put_layout_back(&self) -> Result<()> {
        let sockets = self.pins(|dir| Ok(bpf::open_pinned(dir)?.v4.sockets.entries()?))?;
        ensure!(!sockets.is_empty(), "no socket is served");
        let mut script = String::new();
        for (name, key, value) in [("sockets_v4", size_of::<SocketKey<V4>>(), 20), ("sockets_v6", 28, 44)] {
            let sizes = format!("key {key} value {value}");
            writeln!(script, "map create {PIN_DIR}/{name} type lru_hash {sizes} entries 4096 name {name}")?;
        }
        for (key, value) in &sockets {
            let (key, value) = (hex(bytemuck::bytes_of(key))?, hex(&bytemuck::bytes_of(value)[..20])?);
            writeln!(script, "map update pinned {PIN_DIR}/sockets_v4 key{key} value{value}")?;
        }
        let layout = hex(&[&3_u32.to_ne_bytes()[..], &[0; 12]].concat())?;
        writeln!(script, "map update pinned {PIN_DIR}/config key 0 0 0 0 value{layout}")?;
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("script");
        fs::write(&file, script)?;
        let mut bpftool = Command::new("bpftool");
        bpftool.arg("batch").arg("file").arg(&file);
        Process::output(bpftool, &self.lab.node.place())?;
        self.pins(|dir| {
            for name in ["sockets_v4-v2", "sockets_v6-v2"] {
                fs::remove_file(dir.join(name)).with_context(|| name.to_owned())?;
            }
            Ok(())
        })
    }
}

/// Bytes as bpftool takes them.
fn hex(bytes: &[u8]) -> Result<String> {
    let mut text = String::new();
    for byte in bytes {
        write!(text, " 0x{byte:02x}")?;
    }
    Ok(text)
}

/// By what a client's connections are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Packets,
    Socket,
}

/// What has become of the requests.
#[derive(Default)]
struct Load {
    over: AtomicBool,
    requests: AtomicU64,
    lost: AtomicU64,
    moved: AtomicU64,
    /// Datagrams whose answer was heard by the programs of another layout than their question: see [`SWITCH`].
    between: AtomicU64,
    /// Which pod each client has by a protocol, whichever way it comes.
    pods: Mutex<BTreeMap<(String, &'static str), String>>,
    /// The first things that went wrong, and when.
    first: Mutex<Vec<String>>,
    /// What is going on.
    phase: Mutex<String>,
}

impl Load {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Notes an answer, or that there was none.
    fn note(&self, client: &str, protocol: &'static str, answer: Result<String>) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let wrong = match answer {
            Ok(pod) => {
                let mut pods = self.pods.lock().unwrap_or_else(PoisonError::into_inner);
                let known = pods.entry((client.to_owned(), protocol)).or_insert_with(|| pod.clone());
                if *known == pod {
                    return;
                }
                self.moved.fetch_add(1, Ordering::Relaxed);
                format!("{client} by {protocol}: {pod} and not {known}")
            }
            Err(error) => {
                let wrong = format!("{client} by {protocol}: {error:#}");
                if protocol == "UDP" && wrong.contains(" answered") && self.phase() == SWITCH {
                    self.between.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                self.lost.fetch_add(1, Ordering::Relaxed);
                wrong
            }
        };
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.len() < 10 {
            first.push(format!("{wrong}, noticed while {}", self.phase()));
        }
    }

    fn phase(&self) -> String {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says what goes on from now.
    fn enter(&self, phase: String) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = phase;
    }

    /// Waits for so many further requests.
    fn go_on(&self, requests: u64) -> Result<()> {
        let until = self.requests.load(Ordering::Relaxed) + requests;
        let reached = || Ok(self.requests.load(Ordering::Relaxed) >= until);
        wait::until_true("requests", Duration::from_secs(60 + requests / 50), reached)
    }
}

/// A connection each: the whole way of a first packet, over and over.
fn connect_again_and_again(load: &Load, client: &str, service: SocketAddr) {
    let options = ClientOptions::default().within(3 * SECOND);
    while !load.is_over() {
        let answer = HttpConnection::open_here(service, &options).and_then(|mut it| it.get());
        load.note(client, "TCP", answer.map(|answer| answer.backend));
        let udp = UdpClient::open_here(service, &options);
        let udp = udp.and_then(|it| it.connect(service).and_then(|()| it.ask(service, b"who?")));
        load.note(client, "UDP", udp.map(|answer| answer.backend));
        // So that the maps of connections do not fill up, which is not what is looked at here.
        thread::sleep(PAUSE);
    }
}

/// One connection that is kept, to a service without affinity: nothing but the connection holds it to its pod.
fn keep_a_connection(load: &Load, client: &str, service: SocketAddr) -> Result<()> {
    let options = ClientOptions::default().within(3 * SECOND);
    let mut connection = HttpConnection::open_here(service, &options)?;
    let udp = UdpClient::open_here(service, &options)?;
    udp.connect(service)?;
    let is_the_service = |peer: SocketAddr| {
        ensure!(peer == service, "connected to {peer}");
        Ok(())
    };
    while !load.is_over() {
        let tcp = connection.peer_addr().and_then(is_the_service).and_then(|()| connection.get());
        load.note(client, "a kept TCP connection", tcp.map(|answer| answer.backend));
        let answer = udp.peer_addr().and_then(is_the_service).and_then(|()| udp.ask(service, b"who?"));
        load.note(client, "a kept UDP socket", answer.map(|answer| answer.backend));
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Does something under the load of all clients, by both ways.
fn under_load(ground: &Ground, load: &Load, work: impl FnOnce() -> Result<()>) -> Result<()> {
    thread::scope(|scope| {
        let mut threads = Vec::new();
        // By both ways: what goes to a pod past its service, as a socket's packets do, soon has ports that a connection through
        // it had a moment ago.
        for host in &ground.lab.clients {
            for way in [Way::Packets, Way::Socket] {
                threads.push(scope.spawn(move || {
                    let service = STICKY.parse()?;
                    ground.be(host, way, || {
                        connect_again_and_again(load, &host.name, service);
                        Ok(())
                    })
                }));
                threads.push(scope.spawn(move || {
                    let name = format!("{} ({way:?})", host.name);
                    ground.be(host, way, || keep_a_connection(load, &name, SPREAD.parse()?))
                }));
            }
        }
        let done = load.go_on(200).and_then(|()| work());
        load.over.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        done
    })
}

#[test]
fn nobody_notices_restarts_crashes_and_upgrades() -> Result<()> {
    let least = std::env::var("AFFINITY_RESTART_REQUESTS").ok().and_then(|n| n.parse().ok()).unwrap_or(REQUESTS);
    let earlier = std::env::var_os("AFFINITY_UPGRADE_FROM").map(PathBuf::from);
    // With a daemon and without one, for each of them.
    let share = least / (2 * (RESTARTS + UPGRADES));
    let ground = Ground::new()?;
    let load = Load::default();
    let started = Instant::now();
    let mut options = ground.options();
    options.binary.clone_from(&earlier);
    let mut daemon = Daemon::start(&ground.lab.node, options)?;
    under_load(&ground, &load, || {
        upgrade_over_a_layout(&ground, &mut daemon, &load, earlier.is_some(), share)?;
        for round in 0..RESTARTS {
            load.enter(format!("round {round} ends"));
            let ended = if round % 2 == 0 { daemon.kill()? } else { daemon.terminate()? };
            ensure!(ended.success() == (round % 2 == 1), "round {round}: {ended}");
            load.go_on(share)?;
            load.enter(format!("round {round} starts"));
            daemon.resume()?;
            load.go_on(share)?;
        }
        load.enter("two run".to_owned());
        // As a rolling update does that starts the new one first.
        let elsewhere = ["--metrics-address", "off", "--health-address", "off"];
        let mut next = Daemon::start(&ground.lab.node, ground.options().arguments(elsewhere))?;
        load.go_on(share)?;
        daemon.terminate()?;
        load.go_on(share)?;
        next.cli().json(&["status"])?;
        load.enter("other programs come".to_owned());
        // With other programs: these log, as the earlier ones did not.
        next.terminate()?;
        let mut last = Daemon::stopped(&ground.lab.node, ground.options().arguments(["--datapath-log", "debug"]))?;
        last.resume()?;
        load.go_on(share)?;
        last.terminate()?;
        load.go_on(share)
    })?;
    let [requests, lost, moved, between] =
        [&load.requests, &load.lost, &load.moved, &load.between].map(|it| it.load(Ordering::Relaxed));
    println!(
        "{requests} requests over {RESTARTS} restarts and {UPGRADES} upgrades in {:.0?}: {lost} lost, {moved} moved, \
         {between} in flight at the change of the layout",
        started.elapsed()
    );
    let first = load.first.lock().unwrap_or_else(PoisonError::into_inner);
    if lost != 0 || moved != 0 {
        println!("{}", daemon.cli().text(&["status", "-o", "wide"])?);
    }
    ensure!(lost == 0 && moved == 0, "{lost} lost, {moved} moved of {requests}: {first:#?}");
    ensure!(between <= ground.lab.clients.len() as u64, "{between} datagrams between two layouts");
    ensure!(requests >= least, "{requests} requests");
    Ok(())
}

/// From maps of the layout before; those of a real earlier version, where there is one.
fn upgrade_over_a_layout(ground: &Ground, daemon: &mut Daemon, load: &Load, real: bool, share: u64) -> Result<()> {
    load.enter(SWITCH.to_owned());
    daemon.terminate()?;
    load.go_on(share)?;
    if !real {
        ground.put_layout_back()?;
    }
    ensure!(ground.layout_as_is()? == LAYOUT - 1, "not the layout before");
    daemon.options().binary = Some(binary()?);
    *daemon = Daemon::stopped(&ground.lab.node, daemon.options().clone())?;
    daemon.resume()?;
    wait::until_true("the new layout", 10 * SECOND, || Ok(ground.layout()? == LAYOUT))?;
    let left = ground.pins(|dir| mountns::list(dir))?;
    ensure!(!left.iter().any(|name| ["sockets_v4", "sockets_v6", "tail_calls"].contains(&&**name)), "{left:?}");
    load.go_on(share)
}

/// Whoever goes back to an earlier version is told so, and nothing is harmed.
#[test]
fn maps_of_a_later_layout_are_refused() -> Result<()> {
    let ground = Ground::new()?;
    let mut daemon = Daemon::start(&ground.lab.node, ground.options())?;
    daemon.terminate()?;
    for (layout, advice) in
        [(LAYOUT + 1, "a later version made them"), (LAYOUT - 2, "go by way of a version with layout")]
    {
        ground.pins(|dir| {
            let mut config = bpf::open_pinned(dir)?.shared.config;
            let found = config.get(&0)?.context("no config")?;
            Ok(config.insert(&0, &affinity_common::abi::config::Config { layout, ..found })?)
        })?;
        daemon.launch()?;
        ensure!(!daemon.wait_end()?.success());
        let log = daemon.log();
        let line = log.lines().last().unwrap_or_default();
        for part in [&format!("layout {layout}"), &format!("layout {LAYOUT}"), advice, "affinity cleanup"] {
            ensure!(line.contains(part), "{part:?} is not in {line:?}");
        }
        // The programs go on.
        let host = &ground.lab.clients[0];
        let served = || HttpConnection::open_here(STICKY.parse()?, &ClientOptions::default())?.get().map(drop);
        ground.be(host, Way::Packets, served)?;
        ground.be(host, Way::Socket, served)?;
    }
    Ok(())
}
