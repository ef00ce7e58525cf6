//! What packet tests can't show of the datapath's rarer ways: real stacks on both sides, that put datagrams together, learn
//! a path's MTU, choose ports and route.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use affinity_tests::branch::{Branch, Grown};
use affinity_tests::capture::Capture;
use affinity_tests::daemon::{Daemon, DaemonOptions, SourceDir};
use affinity_tests::netlink::{self, Via};
use affinity_tests::objects::{Document, Endpoint, ServiceObject, SliceObject};
use affinity_tests::privilege::require_root;
use affinity_tests::topology::{ETH0, Families, Host, Lab, LabOptions, Wiring, network};
use affinity_tests::traffic::{Backend, ClientOptions, HttpConnection, UdpClient, http_get};
use anyhow::{Context as _, Result, ensure};

const SECOND: Duration = Duration::from_secs(1);
const POD_PORT: u16 = 8080;
/// Two services, in both families.
const ONE: [&str; 2] = ["10.96.0.11:80", "[fd00:10:96::11]:80"];
const OTHER: [&str; 2] = ["10.96.0.12:80", "[fd00:10:96::12]:80"];
const CLIENT_PORT: u16 = 45_000;

/// A lab, and a daemon for two services with affinity whose only pod is the same.
struct Site {
    // In the order in which they are dropped.
    daemon: Daemon,
    _pods: Vec<Backend>,
    lab: Lab,
    _source: SourceDir,
}

impl Site {
    fn new(options: LabOptions) -> Result<Self> {
        require_root();
        let lab = Lab::new(options)?;
        let pod = lab.backends[0].clone();
        let pods = vec![Backend::start(&pod, POD_PORT)?];
        Self::of_pod(lab, pods, &pod.addresses)
    }

    /// With a pod at these addresses.
    fn of_pod(lab: Lab, pods: Vec<Backend>, pod: &[IpAddr]) -> Result<Self> {
        let source = SourceDir::new()?;
        for (name, frontends) in [("one", ONE), ("other", OTHER)] {
            let [v4, v6] = frontends.map(address);
            let service = ServiceObject::new(name).cluster_ips(v4.ip(), v6.ip()).affinity(10_800);
            let service = service.tcp("http", 80, POD_PORT).udp("udp", 80, POD_PORT).build();
            let slices: Vec<_> = pod
                .iter()
                .map(|address| {
                    let suffix = if address.is_ipv4() { "4" } else { "6" };
                    let slice = SliceObject::of(name, suffix).tcp("http", POD_PORT).udp("udp", POD_PORT);
                    slice.endpoint(address, Endpoint::Ready).pod("pod").build()
                })
                .collect();
            let mut objects: Vec<&dyn Document> = vec![&service];
            objects.extend(slices.iter().map(|slice| slice as &dyn Document));
            source.write(name, &objects)?;
        }
        let daemon = Daemon::start(&lab.node, DaemonOptions::new(source.source()))?;
        Ok(Self { daemon, _pods: pods, lab, _source: source })
    }

    /// How many packets have ended so.
    fn counted(&self, reason: &str) -> Result<u64> {
        self.daemon.cli().counted(|row| row.reason == reason)
    }
}

fn dual() -> LabOptions {
    LabOptions { clients: 2, backends: 2, families: Families::Dual, ..LabOptions::default() }
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address and a port")
}

fn tcp(from: &Host, to: SocketAddr, port: u16) -> Result<HttpConnection> {
    let options = ClientOptions::default().from_port(to.ip(), port).within(3 * SECOND);
    HttpConnection::open(&from.netns, to, &options)
}

fn udp(from: &Host, to: SocketAddr, port: u16) -> Result<UdpClient> {
    let options = ClientOptions::default().from_port(to.ip(), port).within(3 * SECOND);
    UdpClient::open(&from.netns, to, &options)
}

/// The pod's address of the family of `like`.
fn pod_like(pod: &Host, like: SocketAddr) -> SocketAddr {
    let ip = pod.addresses.iter().find(|ip| ip.is_ipv4() == like.is_ipv4()).expect("both families");
    SocketAddr::new(*ip, POD_PORT)
}

#[test]
fn datagrams_of_8_kilobytes_come_back_whole() -> Result<()> {
    for wiring in [Wiring::PointToPoint, Wiring::Bridge] {
        let site = Site::new(LabOptions { wiring, ..dual() })?;
        for service in ONE.map(address) {
            // No more at once than the server's receive buffer holds.
            let sockets: Vec<UdpClient> = (0..3)
                .flat_map(|n| site.lab.clients.iter().map(move |client| (client, n)))
                .map(|(client, n)| udp(client, service, CLIENT_PORT + n))
                .collect::<Result<_>>()?;
            // Every one asks before any is answered.
            std::thread::scope(|scope| {
                let asked: Vec<_> = sockets
                    .iter()
                    .zip(0u8..)
                    .map(|(socket, n)| scope.spawn(move || socket.ask(service, &vec![n; 8_000])))
                    .collect();
                asked.into_iter().try_for_each(|thread| thread.join().expect("no panic").map(drop))
            })?;
        }
        assert_eq!(site.counted("fragment-alone")?, 0);
    }
    Ok(())
}

#[test]
fn two_services_on_one_client_port_both_work() -> Result<()> {
    for offloads in [true, false] {
        let site = Site::new(LabOptions { offloads, ..dual() })?;
        let (client, pod) = (&site.lab.clients[0], &site.lab.backends[0]);
        for (one, other) in ONE.map(address).into_iter().zip(OTHER.map(address)) {
            let straight = pod_like(pod, one);
            // All three at the same time, the last one past the services.
            let mut open = vec![tcp(client, one, CLIENT_PORT)?];
            open[0].get()?;
            open.push(tcp(client, other, CLIENT_PORT)?);
            open.push(tcp(client, straight, CLIENT_PORT)?);
            for round in 0..5 {
                for connection in &mut open {
                    connection.echo(50_000, round)?;
                }
            }
            let ports: Vec<u16> = open
                .iter_mut()
                .map(|connection| {
                    let seen = connection.get()?.client;
                    ensure!(client.addresses.contains(&seen.ip()), "the pod sees {seen}");
                    Ok(seen.port())
                })
                .collect::<Result<_>>()?;
            ensure!(ports[0] == CLIENT_PORT && ports[1] >= 61_000 && ports[2] >= 61_000, "{ports:?}");
            ensure!(ports[1] != ports[2], "{ports:?}");
            // One socket that talks to all of them.
            let socket = udp(client, one, CLIENT_PORT)?;
            for _ in 0..5 {
                for to in [one, other, straight] {
                    ensure!(client.addresses.contains(&socket.ask(to, b"who am I?")?.client.ip()), "{to}");
                }
            }
        }
        assert_eq!(site.counted("collision")?, 0);
    }
    Ok(())
}

#[test]
fn a_client_uses_its_port_again_at_once() -> Result<()> {
    let site = Site::new(dual())?;
    for service in ONE.map(address) {
        for _ in 0..20 {
            let mut connection = tcp(&site.lab.clients[0], service, CLIENT_PORT)?;
            connection.get()?;
            // A reset, as its own port is in TIME_WAIT otherwise.
            connection.reset()?;
        }
    }
    Ok(())
}

#[test]
fn a_connection_past_services_goes_on_when_one_through_them_has_its_ports() -> Result<()> {
    let site = Site::new(dual())?;
    let (client, pod) = (&site.lab.clients[0], &site.lab.backends[0]);
    for service in ONE.map(address) {
        // Nothing is known of it: it has no entry, and was there before.
        let mut straight = tcp(client, pod_like(pod, service), CLIENT_PORT)?;
        straight.echo(50_000, 0)?;
        // Its first SYN is answered to the other connection, and its second one has another port.
        let mut through = tcp(client, service, CLIENT_PORT)?;
        for round in 1..5 {
            straight.echo(50_000, round)?;
            through.echo(50_000, round)?;
        }
        let (straight, through) = (straight.get()?.client.port(), through.get()?.client.port());
        ensure!(straight == CLIENT_PORT && through >= 61_000, "{straight} and {through}");
    }
    Ok(())
}

#[test]
fn a_port_that_a_service_has_not_is_refused_at_once() -> Result<()> {
    let site = Site::new(dual())?;
    let since = Instant::now();
    for service in ONE.map(address) {
        let closed = SocketAddr::new(service.ip(), 81);
        let client = &site.lab.clients[0].netns;
        let error = http_get(client, closed, &ClientOptions::default()).expect_err("no service has the port");
        ensure!(format!("{error:#}").contains("refused"), "over TCP: {error:#}");
        let socket = UdpClient::open(client, closed, &ClientOptions::default())?;
        socket.connect(closed)?;
        let error = socket.ask(closed, b"anybody?").expect_err("no service has the port");
        ensure!(format!("{error:#}").contains("refused"), "over UDP: {error:#}");
    }
    ensure!(since.elapsed() < SECOND, "it took {:?}", since.elapsed());
    Ok(())
}

#[test]
fn a_pod_reaches_itself() -> Result<()> {
    for (wiring, offloads) in
        [(Wiring::PointToPoint, true), (Wiring::PointToPoint, false), (Wiring::Bridge, true), (Wiring::Bridge, false)]
    {
        let site = Site::new(LabOptions { wiring, offloads, ..dual() })?;
        let (pod, client) = (&site.lab.backends[0], &site.lab.clients[0]);
        let capture = Capture::start(&pod.netns, ETH0)?;
        for service in ONE.map(address) {
            let mut connection = tcp(pod, service, CLIENT_PORT)?;
            for round in 0..3 {
                let answer = connection.echo(100_000, round)?;
                ensure!(answer.client == SocketAddr::new(service.ip(), CLIENT_PORT), "it sees {}", answer.client);
            }
            let socket = udp(pod, service, CLIENT_PORT)?;
            for bytes in [1, 1_000, 8_000] {
                let answer = socket.ask(service, &vec![1; bytes]).with_context(|| format!("{bytes} bytes"))?;
                ensure!(answer.client == SocketAddr::new(service.ip(), CLIENT_PORT), "it sees {}", answer.client);
            }
            // Others at the same time, as ever.
            let mut others = tcp(client, service, CLIENT_PORT)?;
            ensure!(client.addresses.contains(&others.get()?.client.ip()), "another client's address");
            connection.get()?;
        }
        let status = site.daemon.cli().json(&["status"])?;
        ensure!(site.counted("hairpin")? > 0, "{status}");
        ensure!(!capture.frames().iter().any(|frame| is_redirect(&frame.bytes)), "a redirect");
    }
    Ok(())
}

/// Whether a frame is a redirect of either family's ICMP.
fn is_redirect(frame: &[u8]) -> bool {
    match frame.get(12..14) {
        Some([0x08, 0x00]) => frame.get(23) == Some(&1) && frame.get(34) == Some(&5),
        Some([0x86, 0xdd]) => frame.get(20) == Some(&58) && frame.get(54) == Some(&137),
        _ => false,
    }
}

/// Behind the lab's first backend, which routes: a link of 1,280 bytes, another router, and a pod.
struct Narrow {
    pod: Host,
    _grown: Grown,
}

impl Narrow {
    fn behind(lab: &Lab) -> Result<Self> {
        const LINK: [(&str, &str); 2] = [("10.244.8.1", "10.244.8.2"), ("fd00:10:8::1", "fd00:10:8::2")];
        const POD: [(&str, &str); 2] = [("10.244.9.1", "10.244.9.2"), ("fd00:10:9::1", "fd00:10:9::2")];
        let near = lab.backends[0].clone();
        near.netns.set_sysctls(&[("net.ipv4.ip_forward", "1"), ("net.ipv6.conf.all.forwarding", "1")])?;
        let grown = Branch { name: "pod", link: LINK, net: POD }.grow(&near.netns, 1_280)?;
        let addresses: Vec<IpAddr> = POD.iter().map(|(_, pod)| pod.parse()).collect::<Result<_, _>>()?;
        let links = LINK.iter().map(|(_, lower)| lower.parse()).collect::<Result<Vec<IpAddr>, _>>()?;
        lab.node.netns.netlink(async |handle| {
            for of in addresses.iter().chain(&links) {
                let router = near.addresses[usize::from(of.is_ipv6())];
                let prefix = if of.is_ipv4() { 24 } else { 64 };
                netlink::add_route(&handle, network(*of), prefix, Via::Gateway(router)).await?;
            }
            Ok(())
        })?;
        let pod = Host { name: "pod".to_owned(), netns: grown.netns.clone(), addresses, ..near };
        Ok(Self { pod, _grown: grown })
    }
}

#[test]
fn a_megabyte_passes_a_narrow_link_behind_a_service_in_both_directions() -> Result<()> {
    for offloads in [true, false] {
        require_root();
        let lab = Lab::new(LabOptions { offloads, ..dual() })?;
        let narrow = Narrow::behind(&lab)?;
        let pods = vec![Backend::start(&narrow.pod, POD_PORT)?];
        let site = Site::of_pod(lab, pods, &narrow.pod.addresses)?;
        let client = &site.lab.clients[0];
        for service in ONE.map(address) {
            let before = site.counted("icmp-error")?;
            let mut connection = tcp(client, service, CLIENT_PORT)?;
            for seed in 0..2 {
                connection.echo(1 << 20, seed)?;
            }
            // The errors came to the client as if of the way to the service, or nothing would have got through.
            ensure!(site.counted("icmp-error")? > before, "{service}: no error was translated");
            // And datagrams, which the client's stack parts anew once it knows.
            let socket = udp(client, service, CLIENT_PORT)?;
            let answered = (0..5).any(|_| socket.ask(service, &vec![5; 8_000]).is_ok());
            ensure!(answered, "{service}: 8 kB datagrams");
        }
    }
    Ok(())
}
