//! Socket load balancing: real sockets of every kind, in pods and on the node, at a cgroup of the test's own.

use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use affinity_common::abi::netns::{NODE, NetnsKey, TC_ONLY};
use affinity_common::family::{Family as _, V4, V6};
use affinity_tests::cgroup::ThreadCgroup;
use affinity_tests::daemon::{Daemon, DaemonOptions, PIN_DIR, SourceDir};
use affinity_tests::netns::Netns;
use affinity_tests::objects::{Document, Endpoint, ServiceObject, SliceObject};
use affinity_tests::privilege::require_root;
use affinity_tests::topology::{ETH0, Families, Host, Lab, LabOptions};
use affinity_tests::traffic::{Backend, ClientOptions, HttpConnection, UdpClient};
use affinity_tests::{mountns, netlink, wait};
use affinity_user::tables::bpf;
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

const SECOND: Duration = Duration::from_secs(1);
const POD_PORT: u16 = 8080;
/// A service in each family, with affinity, by TCP and UDP.
const STICKY: [&str; 2] = ["10.96.0.10:80", "[fd00:10:96::10]:80"];
/// Another one, without affinity.
const SPREAD: [&str; 2] = ["10.96.0.20:80", "[fd00:10:96::20]:80"];

/// A lab with pods that serve, and a daemon that serves the sockets of this test.
struct Site {
    // In the order in which they are dropped.
    daemon: Daemon,
    _pods: Vec<Backend>,
    lab: Lab,
    source: SourceDir,
    /// Where namespaces are held.
    namespaces: TempDir,
    cgroup: ThreadCgroup,
}

impl Site {
    /// Of nobody's but the node's own namespace anything is known.
    fn new(arguments: &[&str]) -> Result<Self> {
        let site = Self::stopped(arguments)?;
        site.started()
    }

    /// With all clients known.
    fn known() -> Result<Self> {
        let site = Self::stopped(&[])?;
        for client in &site.lab.clients {
            site.hold(client)?;
        }
        site.started()
    }

    fn stopped(arguments: &[&str]) -> Result<Self> {
        require_root();
        let cgroup = ThreadCgroup::enter()?;
        let lab = Lab::new(LabOptions { families: Families::Dual, ..LabOptions::default() })?;
        let pods = lab.backends.iter().map(|host| Backend::start(host, POD_PORT)).collect::<Result<_>>()?;
        let source = SourceDir::new()?;
        write(&source, &[(Endpoint::Ready, &lab.backends[..])], 10_800)?;
        let namespaces = tempfile::Builder::new().prefix("affinity-netns-").tempdir()?;
        let directory = namespaces.path().display().to_string();
        let mut options = DaemonOptions::new(source.source())
            .arguments(["--netns-dir", &directory, "--socket-sweep-interval", "1"])
            .arguments(arguments.iter().copied());
        if !arguments.contains(&"--netns-interval") {
            options = options.arguments(["--netns-interval", "1"]);
        }
        options.cgroup = Some(cgroup.path().to_owned());
        let daemon = Daemon::stopped(&lab.node, options)?;
        Ok(Self { daemon, _pods: pods, lab, source, namespaces, cgroup })
    }

    fn started(mut self) -> Result<Self> {
        self.daemon.resume()?;
        Ok(self)
    }

    /// Lets the daemon see a host's namespace, as a CNI plugin does.
    fn hold(&self, host: &Host) -> Result<()> {
        Ok(symlink(host.netns.path(), self.namespaces.path().join(&host.name))?)
    }

    /// The namespace is gone.
    fn let_go(&self, host: &Host) -> Result<()> {
        Ok(fs::remove_file(self.namespaces.path().join(&host.name))?)
    }

    /// Who the sockets of a host are: address and flags, in either family.
    fn who(&self, netns: &Netns) -> Result<Vec<(IpAddr, u32)>> {
        let key = NetnsKey { cookie: netns.cookie()? };
        self.lab.node.mounts.enter(|| {
            let tables = bpf::open_pinned(Path::new(PIN_DIR))?;
            let v4 = tables.v4.netns.get(&key)?.map(|client| (V4::to_ip(&client.addr), client.flags));
            let v6 = tables.v6.netns.get(&key)?.map(|client| (V6::to_ip(&client.addr), client.flags));
            Ok(v4.into_iter().chain(v6).collect())
        })
    }

    fn wait_for(&self, netns: &Netns, who: &[(IpAddr, u32)]) -> Result<()> {
        wait::until_true("a namespace to be known", 5 * SECOND, || Ok(self.who(netns)? == who))
            .with_context(|| format!("{:?} and not {who:?}", self.who(netns)))
    }

    /// How often a program has ended so.
    fn counted(&self, program: &str, reason: &str) -> Result<u64> {
        self.daemon.cli().counted(|row| row.program == program && row.reason == reason)
    }

    fn pins(&self) -> Result<Vec<String>> {
        let names = self.lab.node.mounts.enter(|| mountns::list(PathBuf::from(PIN_DIR).join("links")))?;
        Ok(names.into_iter().filter(|name| name.starts_with("cgroup-")).collect())
    }
}

/// Both services, with pods in the given states.
fn write(source: &SourceDir, pods: &[(Endpoint, &[Host])], timeout: i32) -> Result<()> {
    for (name, frontends, sticky) in [("sticky", STICKY, true), ("spread", SPREAD, false)] {
        let [v4, v6] = frontends.map(|text| text.parse::<SocketAddr>().map(|address| address.ip()));
        let service = ServiceObject::new(name).tcp("http", 80, POD_PORT).udp("udp", 80, POD_PORT).cluster_ips(v4?, v6?);
        let service = if sticky { service.affinity(timeout) } else { service.no_affinity() }.build();
        let slices = [0, 1].map(|family| {
            let mut slice = SliceObject::of(name, &family.to_string()).tcp("http", POD_PORT).udp("udp", POD_PORT);
            for (state, host) in pods.iter().flat_map(|(state, hosts)| hosts.iter().map(move |host| (*state, host))) {
                slice = slice.endpoint(host.addresses[family], state).pod(&host.name);
            }
            slice.build()
        });
        source.write(name, &[&service as &dyn Document, &slices[0], &slices[1]])?;
    }
    Ok(())
}

fn add_address(netns: &Netns, interface: &str, address: IpAddr) -> Result<()> {
    netns.netlink(async |handle| {
        let index = netlink::link(&handle, interface).await?.index;
        netlink::add_address(&handle, index, address, if address.is_ipv4() { 32 } else { 128 }).await
    })
}

/// The address as a socket of IPv6 has it.
fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    }
}

fn options() -> ClientOptions {
    ClientOptions::default().within(3 * SECOND)
}

/// The ways of a socket to a service; each returns the pod that has answered, and sees nothing but the service.
mod ways {
    use super::*;

    pub fn tcp(netns: &Netns, service: SocketAddr) -> Result<String> {
        let mut connection = HttpConnection::open(netns, service, &options())?;
        ensure!(connection.peer_addr()? == service, "connected to {}", connection.peer_addr()?);
        Ok(connection.get()?.backend)
    }

    pub fn connected_udp(netns: &Netns, service: SocketAddr) -> Result<String> {
        let socket = UdpClient::open(netns, service, &options())?;
        socket.connect(service)?;
        ensure!(socket.peer_addr()? == service, "connected to {}", socket.peer_addr()?);
        Ok(socket.ask(service, b"who?")?.backend)
    }

    /// `ask` fails where the answer comes from another address.
    pub fn unconnected_udp(netns: &Netns, service: SocketAddr) -> Result<String> {
        Ok(UdpClient::open(netns, service, &options())?.ask(service, b"who?")?.backend)
    }
}

#[test]
fn every_kind_of_socket_reaches_its_clients_pod_and_sees_the_service() -> Result<()> {
    let site = Site::known()?;
    let pods = [&site.lab.clients[0].netns, &site.lab.clients[1].netns, &site.lab.node.netns];
    for netns in pods {
        for service in STICKY {
            let service: SocketAddr = service.parse()?;
            // TCP and UDP are two service ports, each with an entry of its own.
            let first = [ways::tcp(netns, service)?, ways::connected_udp(netns, service)?];
            for service in [service, mapped(service)] {
                for _ in 0..50 {
                    assert_eq!(ways::tcp(netns, service)?, first[0], "{netns:?} {service}");
                    assert_eq!(ways::connected_udp(netns, service)?, first[1], "{netns:?} {service}");
                    assert_eq!(ways::unconnected_udp(netns, service)?, first[1], "{netns:?} {service}");
                }
            }
        }
    }
    // Nothing was left for the packets' programs to translate.
    let connections = site.daemon.cli().json(&["conntrack", "list"])?;
    assert_eq!(connections.as_array().map(Vec::len), Some(0), "{connections}");
    // Two service ports for each client and family, whichever way it came.
    assert_eq!(site.daemon.cli().sessions()?.len(), pods.len() * 2 * 2);
    for (program, reason) in [("connect", "affinity-hit"), ("sendmsg", "affinity-hit"), ("getpeername", "reply")] {
        assert!(site.counted(program, reason)? >= 50, "{program} {reason}");
    }
    Ok(())
}

#[test]
fn without_affinity_sockets_spread_and_each_keeps_its_pod() -> Result<()> {
    let site = Site::known()?;
    let netns = &site.lab.clients[0].netns;
    for service in SPREAD {
        let service: SocketAddr = service.parse()?;
        let pods: std::collections::BTreeSet<_> = (0..40).map(|_| ways::tcp(netns, service)).collect::<Result<_>>()?;
        assert!(pods.len() >= 3, "{pods:?}");
        let socket = UdpClient::open(netns, service, &options())?;
        let first = socket.ask(service, b"who?")?.backend;
        for _ in 0..20 {
            assert_eq!(socket.ask(service, b"who?")?.backend, first);
        }
        let counted = site.counted("sendmsg", "hashed")?;
        assert_eq!(socket.ask(service, b"who?")?.backend, first);
        assert_eq!(site.counted("sendmsg", "hashed")?, counted, "a datagram is no connection");
    }
    Ok(())
}

#[test]
fn a_client_that_comes_by_packets_and_by_sockets_has_one_entry() -> Result<()> {
    let site = Site::new(&[])?;
    for (client, service, second) in [(0, STICKY[0], "10.244.0.70"), (1, STICKY[1], "fd00:10:244::70")] {
        let client = &site.lab.clients[client];
        let service = service.parse()?;
        let before = site.counted("connect", "unknown-client")?;
        let pod = ways::tcp(&client.netns, service)?;
        assert_eq!(site.counted("connect", "unknown-client")?, before + 1);
        site.hold(client)?;
        let [v4, v6] = client.addresses[..] else { anyhow::bail!("both families") };
        site.wait_for(&client.netns, &[(v4, 0), (v6, 0)])?;
        let hits = site.counted("connect", "affinity-hit")?;
        assert_eq!(ways::tcp(&client.netns, service)?, pod);
        assert_eq!(site.counted("connect", "affinity-hit")?, hits + 1);
        // With a second address it is no one client any more.
        let second: IpAddr = second.parse()?;
        add_address(&client.netns, ETH0, second)?;
        let flags = |family: bool| if second.is_ipv4() == family { TC_ONLY } else { 0 };
        let first = |own: IpAddr| if second.is_ipv4() == own.is_ipv4() { own.min(second) } else { own };
        site.wait_for(&client.netns, &[(first(v4), flags(true)), (first(v6), flags(false))])?;
        let left = site.counted("connect", "left-to-tc")?;
        let own = if second.is_ipv4() { v4 } else { v6 };
        let bound = ClientOptions { source: Some(SocketAddr::new(own, 0)), ..options() };
        assert_eq!(HttpConnection::open(&client.netns, service, &bound)?.get()?.backend, pod);
        assert_eq!(site.counted("connect", "left-to-tc")?, left + 1);
    }
    // One for each of the two clients.
    assert_eq!(site.daemon.cli().sessions()?.len(), 2);
    Ok(())
}

fn refused<T>(what: &str, result: std::io::Result<T>, since: Instant) {
    let kind = result.err().map(|error| error.kind());
    assert_eq!(kind, Some(ErrorKind::ConnectionRefused), "{what}");
    assert!(since.elapsed() < SECOND / 2, "{what}: after {:?}", since.elapsed());
}

#[test]
fn without_backends_sockets_are_refused_at_once() -> Result<()> {
    let site = Site::known()?;
    write(&site.source, &[(Endpoint::NotReady, &site.lab.backends[..])], 10_800)?;
    site.daemon
        .cli()
        .wait_for_service("default/sticky", 10 * SECOND, |row| row.is_some_and(|row| row.eligible == 0))?;
    for netns in [&site.lab.clients[0].netns, &site.lab.node.netns] {
        for service in STICKY {
            let service: SocketAddr = service.parse()?;
            netns.enter(|| {
                for service in [service, mapped(service)] {
                    let any = SocketAddr::new(
                        if service.is_ipv4() { [0, 0, 0, 0].into() } else { Ipv6Addr::UNSPECIFIED.into() },
                        0,
                    );
                    let now = Instant::now();
                    refused("TCP", TcpStream::connect_timeout(&service, 3 * SECOND), now);
                    refused("UDP connect", UdpSocket::bind(any)?.connect(service), now);
                    refused("UDP send", UdpSocket::bind(any)?.send_to(b"who?", service), now);
                    let elsewhere = SocketAddr::new(service.ip(), 81);
                    refused("no such port", TcpStream::connect_timeout(&elsewhere, 3 * SECOND), now);
                    refused("no such port", UdpSocket::bind(any)?.send_to(b"who?", elsewhere), now);
                }
                Ok(())
            })?;
        }
    }
    assert!(site.counted("connect", "no-backend")? >= 16 && site.counted("sendmsg", "no-backend")? >= 8);
    Ok(())
}

#[test]
fn a_bound_source_address_is_who_the_socket_is() -> Result<()> {
    let site = Site::known()?;
    let netns = &site.lab.clients[0].netns;
    for (source, service) in [("10.244.0.77:0", STICKY[0]), ("[fd00:10:244::77]:0", STICKY[1])] {
        let (source, service): (SocketAddr, SocketAddr) = (source.parse()?, service.parse()?);
        // Not one of those by which the namespace is known.
        add_address(netns, "lo", source.ip())?;
        netns.enter(|| {
            // An IPv6 address is tentative for a moment, though nobody is asked about it.
            let socket = wait::until("the address", SECOND, || Ok(UdpSocket::bind(source).ok()))?;
            socket.connect(service)?;
            // Again: connected as it is, it goes on as who it was.
            Ok(socket.connect(service)?)
        })?;
        let sessions = site.daemon.cli().sessions()?;
        assert!(sessions.iter().any(|row| row.client == source.ip()), "{sessions:?}");
    }
    assert_eq!(site.daemon.cli().sessions()?.len(), 2);
    Ok(())
}

#[test]
fn a_restart_keeps_everything_and_cleanup_leaves_nothing() -> Result<()> {
    let mut site = Site::known()?;
    let service = STICKY[0].parse()?;
    let netns = site.lab.clients[0].netns.clone();
    let mut open = HttpConnection::open(&netns, service, &options())?;
    let pod = open.get()?.backend;
    let pins = site.pins()?;
    assert_eq!(pins.len(), 9, "{pins:?}");
    for how in ["terminate", "kill"] {
        let hits = site.counted("connect", "affinity-hit")?;
        if how == "kill" {
            site.daemon.kill()?
        } else {
            site.daemon.terminate()?
        };
        assert_eq!(ways::tcp(&netns, service)?, pod, "without a daemon");
        assert_eq!(open.get()?.backend, pod);
        site.daemon.resume()?;
        assert_eq!(ways::tcp(&netns, service)?, pod, "with the next one");
        assert_eq!(open.peer_addr()?, service);
        // Each connection was seen by one set of programs.
        assert_eq!(site.counted("connect", "affinity-hit")?, hits + 2, "{how}");
        assert_eq!(site.pins()?, pins);
    }
    // By the daemon's word, and by the pins.
    let status = site.daemon.cli().json(&["status"])?;
    assert_eq!(status.pointer("/cgroup/path").and_then(Value::as_str), site.cgroup.path().to_str());
    site.daemon.terminate()?;
    let alone = site.daemon.cli().json(&["status"])?;
    assert_eq!(alone.pointer("/cgroup/id"), status.pointer("/cgroup/id"), "{alone}");
    site.daemon.cli().text(&["cleanup"])?;
    assert_eq!(site.pins()?, Vec::<String>::new());
    let patience = ClientOptions::default().within(SECOND / 2);
    assert!(HttpConnection::open(&netns, service, &patience).is_err(), "nobody serves it any more");
    Ok(())
}

#[test]
fn another_cgroup_takes_the_place_of_the_first_and_off_takes_it_away() -> Result<()> {
    let mut site = Site::known()?;
    let (service, netns) = (STICKY[0].parse()?, site.lab.clients[0].netns.clone());
    // This one has no processes.
    let other = site.cgroup.path().with_extension("other");
    fs::create_dir(&other)?;
    let at = |site: &mut Site, cgroup: Option<PathBuf>| -> Result<u64> {
        site.daemon.terminate()?;
        site.daemon.options().cgroup = cgroup;
        site.daemon.resume()?;
        let hits = site.counted("connect", "affinity-hit")?;
        ways::tcp(&netns, service)?;
        Ok(site.counted("connect", "affinity-hit")? - hits)
    };
    ways::tcp(&netns, service)?;
    let own = site.cgroup.path().to_owned();
    let seen = [at(&mut site, Some(own))?, at(&mut site, Some(other.clone()))?, at(&mut site, None)?];
    fs::remove_dir(&other)?;
    assert_eq!(seen, [1, 0, 0]);
    assert_eq!(site.pins()?, Vec::<String>::new());
    Ok(())
}

#[test]
fn a_path_that_is_no_cgroup_is_told_in_a_line_before_anything_is_loaded() -> Result<()> {
    require_root();
    let source = SourceDir::new()?;
    let pins = tempfile::Builder::new().prefix("affinity-").tempdir()?;
    let mut command = std::process::Command::new(affinity_tests::daemon::binary()?);
    command.args(["run", "--cgroup", "/proc", "--source-dir"]).arg(source.path()).arg("--pin-dir").arg(pins.path());
    let output = command.output()?;
    let error = String::from_utf8(output.stderr)?;
    ensure!(!output.status.success(), "{error}");
    assert_eq!(error.trim_end().lines().count(), 1, "{error}");
    assert!(error.contains("/proc is no cgroup") && error.contains("--socket-lb off"), "{error}");
    assert_eq!(fs::read_dir(pins.path())?.count(), 0);
    Ok(())
}

#[test]
fn what_is_known_of_a_pod_comes_and_goes_with_it() -> Result<()> {
    let mut site = Site::new(&[])?;
    let host = site.lab.add_client()?.clone();
    site.hold(&host)?;
    let [v4, v6] = host.addresses[..] else { anyhow::bail!("both families") };
    site.wait_for(&host.netns, &[(v4, 0), (v6, 0)])?;
    // The node is one client whatever addresses it has.
    let [v4, v6] = site.lab.node.addresses[..] else { anyhow::bail!("both families") };
    site.wait_for(&site.lab.node.netns, &[(v4, NODE), (v6, NODE)])?;
    site.let_go(&host)?;
    site.wait_for(&host.netns, &[])?;
    let status = site.daemon.cli().json(&["status"])?;
    assert_eq!(status.pointer("/sockets/problems"), Some(&serde_json::json!([])), "{status}");
    // A file that holds none, and one that leads nowhere.
    fs::write(site.namespaces.path().join("file"), "")?;
    symlink("/does/not/exist", site.namespaces.path().join("nowhere"))?;
    site.hold(&host)?;
    site.wait_for(&host.netns, &[(host.addresses[0], 0), (host.addresses[1], 0)])?;
    Ok(())
}

#[test]
fn pods_can_be_left_to_tc_and_the_node_is_not() -> Result<()> {
    let site = Site::stopped(&["--socket-lb-pods", "off"])?;
    let client = site.lab.clients[0].clone();
    site.hold(&client)?;
    let site = site.started()?;
    for service in STICKY {
        let service = service.parse()?;
        let before = (site.counted("connect", "left-to-tc")?, site.counted("connect", "affinity-new")?);
        ways::tcp(&client.netns, service)?;
        ways::tcp(&site.lab.node.netns, service)?;
        let after = (site.counted("connect", "left-to-tc")?, site.counted("connect", "affinity-new")?);
        assert_eq!(after, (before.0 + 1, before.1 + 1));
    }
    Ok(())
}

#[test]
fn an_open_connection_keeps_its_client_though_nothing_is_sent() -> Result<()> {
    const TIMEOUT: u32 = 3;
    let site = Site::known()?;
    write(&site.source, &[(Endpoint::Ready, &site.lab.backends[..])], 3)?;
    site.daemon.cli().wait_for_service("default/sticky", 10 * SECOND, |row| {
        row.is_some_and(|row| row.affinity_timeout_seconds == Some(TIMEOUT))
    })?;
    let count = |reason: &str| site.counted("connect", reason);
    // Of all kinds, in a pod and on the node: one socket stays open, another one is closed.
    let (held, closed) =
        ([&site.lab.clients[0].netns, &site.lab.node.netns], [&site.lab.clients[1].netns, &site.lab.clients[2].netns]);
    let services = STICKY.map(|service| service.parse::<SocketAddr>().expect("an address and a port"));
    let kinds = [services[0], services[1], mapped(services[0])];
    for service in kinds {
        let mut open = Vec::new();
        for netns in held {
            let stream = HttpConnection::open(netns, service, &options())?;
            let datagrams = UdpClient::open(netns, service, &options())?;
            datagrams.connect(service)?;
            open.push((stream, datagrams));
        }
        let pods = held.map(|netns| Ok([ways::tcp(netns, service)?, ways::connected_udp(netns, service)?]));
        let [of_pod, of_node]: [Result<[String; 2]>; 2] = pods;
        let pods = [of_pod?, of_node?];
        for netns in closed {
            ways::tcp(netns, service)?;
            ways::connected_udp(netns, service)?;
        }
        std::thread::sleep(SECOND * (TIMEOUT + 2));
        let before = (count("affinity-hit")?, count("affinity-expired")?);
        for (netns, pods) in held.into_iter().zip(&pods) {
            assert_eq!([ways::tcp(netns, service)?, ways::connected_udp(netns, service)?], *pods);
        }
        for netns in closed {
            ways::tcp(netns, service)?;
            ways::connected_udp(netns, service)?;
        }
        assert_eq!((count("affinity-hit")?, count("affinity-expired")?), (before.0 + 4, before.1 + 4), "{service}");
        // A close is a use.
        std::thread::sleep(SECOND);
        drop(open);
        std::thread::sleep(SECOND * (TIMEOUT - 1));
        for (netns, pods) in held.into_iter().zip(&pods) {
            assert_eq!([ways::tcp(netns, service)?, ways::connected_udp(netns, service)?], *pods);
        }
        assert_eq!(count("affinity-hit")?, before.0 + 8, "{service}");
    }
    Ok(())
}

#[test]
fn clients_of_a_lost_pod_move_by_every_kind_of_socket() -> Result<()> {
    let site = Site::known()?;
    let services = STICKY.map(|service| service.parse::<SocketAddr>().expect("an address and a port"));
    let all = &site.lab.backends;
    for netns in [&site.lab.clients[0].netns, &site.lab.node.netns] {
        for service in [services[0], services[1], mapped(services[0])] {
            let ask = || -> Result<[String; 3]> {
                let unconnected = ways::unconnected_udp(netns, service)?;
                Ok([ways::tcp(netns, service)?, ways::connected_udp(netns, service)?, unconnected])
            };
            let before = ask()?;
            let is_lost = |host: &Host| before.contains(&host.name);
            let (lost, others): (Vec<Host>, Vec<Host>) = all.iter().cloned().partition(is_lost);
            let wait = |eligible: usize| {
                site.daemon.cli().wait_for_service("default/sticky", 10 * SECOND, |row| {
                    row.is_some_and(|row| row.eligible == eligible)
                })
            };
            write(&site.source, &[(Endpoint::NotReady, &lost[..]), (Endpoint::Ready, &others[..])], 10_800)?;
            wait(2 * others.len())?;
            let after = ask()?;
            assert!(after.iter().all(|pod| !before.contains(pod)), "{netns:?} {service}: {before:?}, {after:?}");
            write(&site.source, &[(Endpoint::Ready, &all[..])], 10_800)?;
            wait(2 * all.len())?;
            assert_eq!(ask()?, after, "who has moved stays");
        }
    }
    Ok(())
}

#[test]
fn a_pod_reaches_itself_by_every_kind_of_socket() -> Result<()> {
    let mut site = Site::stopped(&[])?;
    let pod = site.lab.backends[0].clone();
    site.hold(&pod)?;
    write(&site.source, &[(Endpoint::Ready, std::slice::from_ref(&pod))], 10_800)?;
    site = site.started()?;
    for service in STICKY.into_iter().chain(SPREAD) {
        let service: SocketAddr = service.parse()?;
        for service in [service, mapped(service)] {
            assert_eq!(ways::tcp(&pod.netns, service)?, pod.name);
            assert_eq!(ways::connected_udp(&pod.netns, service)?, pod.name);
            assert_eq!(ways::unconnected_udp(&pod.netns, service)?, pod.name);
        }
    }
    assert_eq!(site.counted("ingress", "hairpin")?, 0, "its packets never leave it");
    Ok(())
}

#[test]
fn a_port_that_a_service_has_not_is_refused_by_every_kind_of_socket() -> Result<()> {
    let site = Site::known()?;
    for netns in [&site.lab.clients[0].netns, &site.lab.node.netns] {
        for service in STICKY {
            let closed = SocketAddr::new(service.parse::<SocketAddr>()?.ip(), 81);
            netns.enter(|| {
                for closed in [closed, mapped(closed)] {
                    let now = Instant::now();
                    refused("TCP", TcpStream::connect_timeout(&closed, 3 * SECOND), now);
                    let any = if closed.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                    refused("UDP", UdpSocket::bind(any)?.send_to(b"who?", closed), now);
                }
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// A pod's would be refused by their first datagram.
#[test]
fn connected_datagram_sockets_of_the_node_are_refused_by_a_port_that_a_service_has_not() -> Result<()> {
    let site = Site::known()?;
    let connect = |netns: &Netns, to: SocketAddr| {
        netns.enter(|| Ok(UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?.connect(to)))
    };
    for service in STICKY {
        let service: SocketAddr = service.parse()?;
        for service in [service, mapped(service)] {
            let port = |port| SocketAddr::new(service.ip(), port);
            for closed in [1, 81, 65_534] {
                let now = Instant::now();
                refused("UDP", connect(&site.lab.node.netns, port(closed))?, now);
                connect(&site.lab.clients[0].netns, port(closed))??;
            }
            // By these libraries ask for their source.
            for asking in [0, 9, 65_535] {
                connect(&site.lab.node.netns, port(asking))??;
            }
            connect(&site.lab.node.netns, service)??;
        }
    }
    assert_eq!(site.counted("connect", "no-such-port")?, 12);
    Ok(())
}

#[test]
fn a_namespace_is_looked_for_as_soon_as_it_connects() -> Result<()> {
    // But for that it would be seen in an hour: no interface of the node's own namespace comes or goes.
    let site = Site::new(&["--netns-interval", "3600"])?;
    for (client, service) in site.lab.clients.iter().zip(STICKY) {
        let service = service.parse()?;
        // The daemon has looked when they came: what it could not see then, it is to see now.
        std::thread::sleep(2 * SECOND);
        site.hold(client)?;
        std::thread::sleep(SECOND);
        assert_eq!(site.who(&client.netns)?, []);
        let count = |reason: &str| site.counted("connect", reason);
        let before = (count("unknown-client")?, count("affinity-hit")?);
        let pod = ways::tcp(&client.netns, service)?;
        assert_eq!((count("unknown-client")?, count("affinity-hit")?), (before.0 + 1, before.1), "by TC");
        let [v4, v6] = client.addresses[..] else { anyhow::bail!("both families") };
        site.wait_for(&client.netns, &[(v4, 0), (v6, 0)])?;
        assert_eq!(ways::tcp(&client.netns, service)?, pod);
        assert_eq!((count("unknown-client")?, count("affinity-hit")?), (before.0 + 1, before.1 + 1), "by its socket");
    }
    Ok(())
}

#[test]
fn datagram_sockets_of_a_backend_that_has_gone_are_ended_and_no_others() -> Result<()> {
    let site = Site::known()?;
    for (family, service) in STICKY.into_iter().enumerate() {
        let service: SocketAddr = service.parse()?;
        let netns = &site.lab.clients[family].netns;
        let open = || UdpClient::open(netns, service, &options());
        let (connected, unconnected, direct, mut kept) =
            (open()?, open()?, open()?, HttpConnection::open(netns, service, &options())?);
        connected.connect(service)?;
        let pod = connected.ask(service, b"who?")?.backend;
        assert_eq!(unconnected.ask(service, b"who?")?.backend, pod);
        let at = site.lab.backends.iter().position(|host| host.name == pod).context("a pod")?;
        let straight = SocketAddr::new(site.lab.backends[at].addresses[family], POD_PORT);
        direct.connect(straight)?;
        direct.ask(straight, b"who?")?;
        let of_tcp = kept.get()?.backend;

        let mut others = site.lab.backends.clone();
        others.remove(at);
        write(&site.source, &[(Endpoint::Ready, &others[..])], 10_800)?;
        wait::until_true("an end of the connected socket", 10 * SECOND, || {
            Ok(connected.ask(service, b"who?").is_err_and(|error| format!("{error:#}").contains("abort")))
        })?;
        assert_eq!(direct.ask(straight, b"who?")?.backend, pod, "it was not translated");
        assert_ne!(unconnected.ask(service, b"who?")?.backend, pod, "it chooses anew");
        assert_eq!(kept.get()?.backend, of_tcp, "TCP is left to its peer");
        write(&site.source, &[(Endpoint::Ready, &site.lab.backends[..])], 10_800)?;
        site.daemon.cli().wait_for_service("default/sticky", 10 * SECOND, |row| {
            row.is_some_and(|row| row.eligible == 2 * site.lab.backends.len())
        })?;
    }
    Ok(())
}

#[test]
fn sockets_are_listed_with_and_without_a_daemon() -> Result<()> {
    let mut site = Site::known()?;
    let [client, other] = [&site.lab.clients[0], &site.lab.clients[1]];
    let mut held = Vec::new();
    for (family, service) in STICKY.into_iter().enumerate() {
        let service: SocketAddr = service.parse()?;
        let mut stream = HttpConnection::open(&client.netns, service, &options())?;
        let pod = stream.get()?.backend;
        held.push((client.addresses[family], service, pod, stream));
    }
    ways::tcp(&other.netns, STICKY[0].parse()?)?;
    let list = |site: &Site, arguments: &[&str]| -> Result<Vec<Value>> {
        let rows = site.daemon.cli().json(&[&["socket", "list"], arguments].concat())?;
        rows.as_array().cloned().context("no rows")
    };
    // That of the other client is closed.
    wait::until_true("the closed socket to be forgotten", 5 * SECOND, || Ok(list(&site, &[])?.len() == 2))?;
    for killed in [false, true] {
        if killed {
            site.daemon.kill()?;
        }
        for (address, service, pod, _) in &held {
            let rows = list(&site, &["--client", &address.to_string(), "--service", "sticky"])?;
            let [row] = &rows[..] else { anyhow::bail!("{rows:?}") };
            assert_eq!(row["frontend"], service.to_string());
            assert_eq!((&row["proto"], &row["service"]), (&Value::from("TCP"), &Value::from("default/sticky")));
            assert_eq!(row["pod"], Value::from(pod.clone()));
            let at = site.lab.backends.iter().position(|host| host.name == *pod).context("a pod")?;
            let family = usize::from(address.is_ipv6());
            let backend = SocketAddr::new(site.lab.backends[at].addresses[family], POD_PORT);
            assert_eq!(row["backend"], backend.to_string());
        }
        let table = site.daemon.cli().text(&["socket", "list"])?;
        assert!(table.starts_with("CLIENT") && table.lines().count() == 3, "{table}");
        assert_eq!(list(&site, &["--service", "spread"])?.len(), 0);
    }
    Ok(())
}

#[test]
fn a_pods_annotation_leaves_its_sockets_to_tc_and_takes_them_back() -> Result<()> {
    let site = Site::stopped(&["--node-name", "node-1"])?;
    for client in &site.lab.clients {
        site.hold(client)?;
    }
    let site = site.started()?;
    let [one, other] = [0, 1].map(|i| site.lab.clients[i].clone());
    let as_clients = |host: &Host, flags: u32| host.addresses.iter().map(|ip| (*ip, flags)).collect::<Vec<_>>();
    let write = |annotation: &str, ips: &[IpAddr]| {
        let ips: Vec<_> = ips.iter().map(|ip| format!("{{ip: '{ip}'}}")).collect();
        let annotations = format!("annotations: {{{annotation}}}");
        site.source.write_text(
            "pod",
            &format!(
                "{{apiVersion: v1, kind: Pod, metadata: {{name: one, uid: u-1, {annotations}}}, \
                 spec: {{nodeName: node-1}}, status: {{podIPs: [{}]}}}}",
                ips.join(", ")
            ),
        )
    };
    site.wait_for(&one.netns, &as_clients(&one, 0))?;
    // While it has no address yet, it may be any of them.
    write("affinity.dev/socket-lb: 'off'", &[])?;
    site.wait_for(&one.netns, &as_clients(&one, TC_ONLY))?;
    site.wait_for(&other.netns, &as_clients(&other, TC_ONLY))?;
    write("affinity.dev/socket-lb: 'off'", &one.addresses)?;
    site.wait_for(&other.netns, &as_clients(&other, 0))?;
    assert_eq!(site.who(&one.netns)?, as_clients(&one, TC_ONLY));
    write("", &one.addresses)?;
    site.wait_for(&one.netns, &as_clients(&one, 0))
}
