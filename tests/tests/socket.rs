//! Socket load balancing: real sockets of every kind, in pods and on the node, at a cgroup of the test's own.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use affinity_common::abi::netns::{NetnsClient, NetnsKey, TC_ONLY};
use affinity_common::family::{Family, V4, V6};
use affinity_tests::cgroup::ThreadCgroup;
use affinity_tests::daemon::{Daemon, DaemonOptions, PIN_DIR, SourceDir};
use affinity_tests::netns::Netns;
use affinity_tests::objects::{Document, Endpoint, ServiceObject, SliceObject};
use affinity_tests::privilege::require_root;
use affinity_tests::topology::{ETH0, Families, Lab, LabOptions};
use affinity_tests::traffic::{Backend, ClientOptions, HttpConnection, UdpClient};
use affinity_tests::{mountns, netlink, wait};
use affinity_user::tables::{FamilyTables, bpf};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

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
    cgroup: ThreadCgroup,
}

impl Site {
    fn new() -> Result<Self> {
        require_root();
        let cgroup = ThreadCgroup::enter()?;
        let lab = Lab::new(LabOptions { families: Families::Dual, ..LabOptions::default() })?;
        let pods = lab.backends.iter().map(|host| Backend::start(host, POD_PORT)).collect::<Result<_>>()?;
        let source = SourceDir::new()?;
        write(&source, &lab, Endpoint::Ready)?;
        let mut options = DaemonOptions::new(source.source());
        options.cgroup = Some(cgroup.path().to_owned());
        let daemon = Daemon::start(&lab.node, options)?;
        Ok(Self { daemon, _pods: pods, lab, source, cgroup })
    }

    /// With all clients and the node known.
    fn known() -> Result<Self> {
        let site = Self::new()?;
        for client in &site.lab.clients {
            site.know(&client.netns, &client.addresses, 0)?;
        }
        site.know(&site.lab.node.netns, &site.lab.node.addresses, 0)?;
        Ok(site)
    }

    /// Writes who the sockets of a namespace are.
    fn know(&self, netns: &Netns, addresses: &[IpAddr], flags: u32) -> Result<()> {
        let key = NetnsKey { cookie: netns.cookie()? };
        self.lab.node.mounts.enter(|| {
            let mut tables = bpf::open_pinned(Path::new(PIN_DIR))?;
            for address in addresses {
                know::<V4>(&mut tables.v4, key, *address, flags)?;
                know::<V6>(&mut tables.v6, key, *address, flags)?;
            }
            Ok(())
        })
    }

    /// How often a program has ended so.
    fn counted(&self, program: &str, reason: &str) -> Result<u64> {
        let status = self.daemon.cli().json(&["status"])?;
        let rows = status.get("counters").and_then(Value::as_array).context("no counters")?;
        let row = rows.iter().find(|row| row["program"] == program && row["reason"] == reason);
        Ok(row.and_then(|row| row["packets"].as_u64()).unwrap_or_default())
    }

    fn pins(&self) -> Result<Vec<String>> {
        let names = self.lab.node.mounts.enter(|| mountns::list(PathBuf::from(PIN_DIR).join("links")))?;
        Ok(names.into_iter().filter(|name| name.starts_with("cgroup-")).collect())
    }
}

fn know<F: Family>(tables: &mut FamilyTables<F>, key: NetnsKey, address: IpAddr, flags: u32) -> Result<()> {
    if let Some(addr) = F::from_ip(address) {
        tables.netns.insert(&key, &NetnsClient { addr, flags })?;
    }
    Ok(())
}

fn write(source: &SourceDir, lab: &Lab, state: Endpoint) -> Result<()> {
    for (name, frontends, sticky) in [("sticky", STICKY, true), ("spread", SPREAD, false)] {
        let [v4, v6] = frontends.map(|text| text.parse::<SocketAddr>().map(|address| address.ip()));
        let service = ServiceObject::new(name).tcp("http", 80, POD_PORT).udp("udp", 80, POD_PORT).cluster_ips(v4?, v6?);
        let service = if sticky { service.affinity(10_800) } else { service.no_affinity() }.build();
        let slices = [0, 1].map(|family| {
            let slice = SliceObject::of(name, &family.to_string()).tcp("http", POD_PORT).udp("udp", POD_PORT);
            let add = |slice: SliceObject, host: &affinity_tests::topology::Host| {
                slice.endpoint(host.addresses[family], state).pod(&host.name)
            };
            lab.backends.iter().fold(slice, add).build()
        });
        source.write(name, &[&service as &dyn Document, &slices[0], &slices[1]])?;
    }
    Ok(())
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
    let site = Site::new()?;
    for (client, service) in [(0, STICKY[0]), (1, STICKY[1])] {
        let client = &site.lab.clients[client];
        let service = service.parse()?;
        let before = site.counted("connect", "unknown-client")?;
        let pod = ways::tcp(&client.netns, service)?;
        assert_eq!(site.counted("connect", "unknown-client")?, before + 1);
        site.know(&client.netns, &client.addresses, 0)?;
        let hits = site.counted("connect", "affinity-hit")?;
        assert_eq!(ways::tcp(&client.netns, service)?, pod);
        assert_eq!(site.counted("connect", "affinity-hit")?, hits + 1);
        site.know(&client.netns, &client.addresses, TC_ONLY)?;
        let left = site.counted("connect", "left-to-tc")?;
        assert_eq!(ways::tcp(&client.netns, service)?, pod);
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
    write(&site.source, &site.lab, Endpoint::NotReady)?;
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
        netns.netlink(async |handle| {
            let eth0 = netlink::link(&handle, ETH0).await?.index;
            netlink::add_address(&handle, eth0, source.ip(), if source.is_ipv4() { 32 } else { 128 }).await
        })?;
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
    std::fs::create_dir(&other)?;
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
    std::fs::remove_dir(&other)?;
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
    assert_eq!(std::fs::read_dir(pins.path())?.count(), 0);
    Ok(())
}
