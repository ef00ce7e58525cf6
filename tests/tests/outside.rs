//! Clients outside of the cluster: by node ports, load balancers' and external addresses, to pods of the node and of others.
//!
//! ```text
//!   outside eth0 ---- eth0 node ---- be0 pod0
//!      far0 ---- eth0 far: a pod elsewhere
//! ```
//! The client is the node's router, too: what leaves the node for the pod elsewhere with the client's own address would be
//! answered past the node.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use affinity_common::abi::announced::{Announced, AnnouncedKey};
use affinity_common::family::{Family as _, V4, V6};
use affinity_common::types::Nanos;
use affinity_tests::daemon::{Daemon, DaemonOptions, PIN_DIR, SourceDir};
use affinity_tests::netlink::{self, Via};
use affinity_tests::netns::Netns;
use affinity_tests::objects::{Document, Endpoint, ServiceObject, SliceObject};
use affinity_tests::privilege::require_root;
use affinity_tests::topology::{ETH0, Families, Host, Lab, LabOptions, NODE_IP, join};
use affinity_tests::traffic::{Answer, Backend, ClientOptions, HttpConnection, UdpClient, http_get};
use affinity_tests::wait;
use affinity_user::tables::bpf;
use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::{
    LoadBalancerIngress, LoadBalancerStatus, Node, NodeAddress, NodeStatus, Service, ServiceStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use nix::time::{ClockId, clock_gettime};

const SECOND: Duration = Duration::from_secs(1);
const POD_PORT: u16 = 8080;
const NODE: &str = "node0";
const NODE_PORT: u16 = 30_080;
/// On the node's own link: somebody has to answer for it.
const LOAD_BALANCER: [&str; 2] = ["198.51.100.80", "fd00:c5::80"];
/// Routed to the node.
const EXTERNAL: [&str; 2] = ["203.0.113.7", "fd00:203::7"];
const CLUSTER: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];
const FAR: [(&str, &str); 2] = [("10.245.0.1", "10.245.0.2"), ("fd00:10:245::1", "fd00:10:245::2")];

/// What a site's service is like.
#[derive(Clone, Copy, Default)]
struct Wanted {
    /// `externalTrafficPolicy: Local`.
    local: bool,
    /// Whether the node's own pod is there.
    without_local_pod: bool,
    /// `loadBalancerSourceRanges`.
    ranges: Option<[&'static str; 2]>,
}

struct Site {
    // In the order in which they are dropped.
    daemon: Daemon,
    _pods: Vec<Backend>,
    far: Host,
    lab: Lab,
    source: SourceDir,
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

impl Site {
    fn new(wanted: Wanted) -> Result<Self> {
        require_root();
        let lab = Lab::new(LabOptions { clients: 1, backends: 1, families: Families::Dual, ..LabOptions::default() })?;
        let far = far(&lab)?;
        let mut pods = vec![Backend::start(&lab.backends[0], POD_PORT)?];
        pods.push(Backend::start(&far, POD_PORT)?);
        let source = SourceDir::new()?;
        write(&source, &lab, wanted)?;
        let options = DaemonOptions::new(source.source()).arguments(["--node-name", NODE]);
        let daemon = Daemon::start(&lab.node, options)?;
        let site = Self { daemon, _pods: pods, far, lab, source };
        site.announce()?;
        Ok(site)
    }

    fn set(&self, wanted: Wanted) -> Result<()> {
        write(&self.source, &self.lab, wanted)
    }

    /// Has the node answer for the load balancer's addresses.
    fn announce(&self) -> Result<()> {
        let ifindex = self.lab.outside.node_ifindex;
        self.lab.node.mounts.enter(|| {
            let mut tables = bpf::open_pinned(Path::new(PIN_DIR))?;
            let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE)?);
            let until = Nanos(u64::try_from((now + 600 * SECOND).as_nanos())?).ticks();
            let [v4, v6] = LOAD_BALANCER.map(ip);
            let addr = V4::from_ip(v4).context("an IPv4 address")?;
            tables.v4.announced.insert(&AnnouncedKey { addr, ifindex }, &Announced { until })?;
            let addr = V6::from_ip(v6).context("an IPv6 address")?;
            tables.v6.announced.insert(&AnnouncedKey { addr, ifindex }, &Announced { until })?;
            Ok(())
        })
    }

    /// Every way to the service from outside, of a family.
    fn frontends(family: usize) -> [SocketAddr; 4] {
        [
            SocketAddr::new(NODE_IP[family], NODE_PORT),
            SocketAddr::new(ip(LOAD_BALANCER[family]), 80),
            SocketAddr::new(ip(EXTERNAL[family]), 80),
            SocketAddr::new(ip(CLUSTER[family]), 80),
        ]
    }

    fn ask(&self, netns: &Netns, frontend: SocketAddr) -> Result<Answer> {
        let answer = http_get(netns, frontend, &ClientOptions::default().within(3 * SECOND));
        answer.with_context(|| format!("{frontend}: {}", self.daemon.log()))
    }

    /// What the pods see of a client outside that asks by a frontend: its own address, or where they are elsewhere the node's.
    fn ask_from_outside(&self, frontend: SocketAddr) -> Result<String> {
        let own = self.lab.outside.addresses[usize::from(frontend.is_ipv6())];
        let options =
            ClientOptions { source: Some(SocketAddr::new(own, 0)), ..ClientOptions::default().within(3 * SECOND) };
        let answer = http_get(&self.lab.outside.netns, frontend, &options);
        let answer = answer.with_context(|| format!("{frontend}: {}", self.daemon.log()))?;
        self.check(&answer, own, frontend);
        Ok(answer.backend)
    }

    fn check(&self, answer: &Answer, client: IpAddr, frontend: SocketAddr) {
        let is_elsewhere = answer.backend == self.far.name;
        let expected = if is_elsewhere { NODE_IP[usize::from(frontend.is_ipv6())] } else { client };
        assert_eq!(answer.client.ip(), expected, "{} by {frontend}", answer.backend);
    }

    /// Has clients of other addresses ask, until a pod has answered each of them.
    fn until_answered_by(&self, name: &str, family: usize) -> Result<SocketAddr> {
        let netns = &self.lab.outside.netns;
        for number in 0..64u16 {
            let source = another_address(self, family, number)?;
            let options = ClientOptions { source: Some(source), ..ClientOptions::default().within(3 * SECOND) };
            if http_get(netns, Self::frontends(family)[1], &options)?.backend == name {
                return Ok(source);
            }
        }
        anyhow::bail!("nobody of 64 clients is on {name}")
    }
}

/// Gives the machine outside one more address, by its number.
fn another_address(site: &Site, family: usize, number: u16) -> Result<SocketAddr> {
    let addr: IpAddr = if family == 0 {
        ip(&format!("198.51.100.{}", 130 + number))
    } else {
        ip(&format!("fd00:c5::{:x}", 0x1000 + number))
    };
    let prefix = if family == 0 { 24 } else { 64 };
    site.lab.outside.netns.netlink(async |handle| {
        let eth0 = netlink::link(&handle, ETH0).await?.index;
        // There already: a test asks twice.
        let _ = netlink::add_address(&handle, eth0, addr, prefix).await;
        Ok(())
    })?;
    Ok(SocketAddr::new(addr, 0))
}

/// A pod behind the machine outside, which routes.
fn far(lab: &Lab) -> Result<Host> {
    let netns = Netns::new("far")?;
    netns.set_sysctls(&[("net.ipv6.conf.all.accept_dad", "0"), ("net.ipv6.conf.default.accept_dad", "0")])?;
    let outside = &lab.outside.netns;
    join((outside, "far0"), (&netns, ETH0), 1500)?;
    outside.set_sysctls(&[("net.ipv4.ip_forward", "1"), ("net.ipv6.conf.all.forwarding", "1")])?;
    outside.netlink(async |handle| {
        let far0 = netlink::link(&handle, "far0").await?.index;
        let node = NODE_IP;
        for (family, prefix) in [(0, 24), (1, 64)] {
            netlink::add_address(&handle, far0, ip(FAR[family].0), prefix).await?;
            for (address, prefix) in [(EXTERNAL[family], [32, 128]), (CLUSTER[family], [32, 128])] {
                netlink::add_route(&handle, ip(address), prefix[family], Via::Gateway(node[family])).await?;
            }
        }
        Ok(())
    })?;
    netns.netlink(async |handle| {
        let eth0 = netlink::link(&handle, ETH0).await?.index;
        for ((gateway, own), (prefix, any)) in FAR.into_iter().zip([(24, "0.0.0.0"), (64, "::")]) {
            netlink::add_address(&handle, eth0, ip(own), prefix).await?;
            netlink::add_route(&handle, ip(any), 0, Via::Gateway(ip(gateway))).await?;
        }
        Ok(())
    })?;
    Ok(Host {
        name: "far".to_owned(),
        netns,
        addresses: FAR.map(|(_, own)| ip(own)).into(),
        node_interface: ETH0.to_owned(),
        ..lab.outside.clone()
    })
}

fn write(source: &SourceDir, lab: &Lab, wanted: Wanted) -> Result<()> {
    let node = Node {
        metadata: ObjectMeta { name: Some(NODE.to_owned()), ..ObjectMeta::default() },
        status: Some(NodeStatus {
            addresses: Some(
                NODE_IP
                    .map(|address| NodeAddress { address: address.to_string(), type_: "InternalIP".to_owned() })
                    .into(),
            ),
            ..NodeStatus::default()
        }),
        ..Node::default()
    };
    let [v4, v6] = CLUSTER.map(ip);
    let service = ServiceObject::new("web").tcp("http", 80, POD_PORT).udp("udp", 80, POD_PORT).cluster_ips(v4, v6);
    let service = service.affinity(600).change(|spec| {
        spec.type_ = Some("LoadBalancer".to_owned());
        spec.external_ips = Some(EXTERNAL.map(str::to_owned).into());
        spec.external_traffic_policy = Some(if wanted.local { "Local" } else { "Cluster" }.to_owned());
        spec.load_balancer_source_ranges = wanted.ranges.map(|ranges| ranges.map(str::to_owned).into());
        for port in spec.ports.iter_mut().flatten() {
            port.node_port = Some(NODE_PORT.into());
        }
    });
    let ingress =
        LOAD_BALANCER.map(|ip| LoadBalancerIngress { ip: Some(ip.to_owned()), ..LoadBalancerIngress::default() });
    let service = Service {
        status: Some(ServiceStatus {
            load_balancer: Some(LoadBalancerStatus { ingress: Some(ingress.into()) }),
            ..ServiceStatus::default()
        }),
        ..service.build()
    };
    let slices = [0, 1].map(|family| {
        let mut slice = SliceObject::of("web", &family.to_string()).tcp("http", POD_PORT).udp("udp", POD_PORT);
        if !wanted.without_local_pod {
            slice = slice.endpoint(lab.backends[0].addresses[family], Endpoint::Ready).pod(&lab.backends[0].name);
            slice = slice.change(|slice| {
                for endpoint in &mut slice.endpoints {
                    endpoint.node_name = Some(NODE.to_owned());
                }
            });
        }
        slice.endpoint(FAR[family].1, Endpoint::Ready).pod("far").build()
    });
    let mut documents: Vec<&dyn Document> = vec![&node, &service];
    documents.extend(slices.iter().map(|slice| slice as &dyn Document));
    source.write("web.yaml", &documents)
}

/// Whichever way a client comes, it is on one pod, which sees it as itself or, elsewhere, as the node; others are on others.
#[test]
fn a_client_outside_is_on_one_pod_by_every_frontend() -> Result<()> {
    let site = Site::new(Wanted::default())?;
    for family in [0, 1] {
        let mut pods = BTreeSet::new();
        for frontend in Site::frontends(family) {
            for _ in 0..20 {
                pods.insert(site.ask_from_outside(frontend)?);
            }
        }
        assert_eq!(pods.len(), 1, "{pods:?}");
        for name in [&site.lab.backends[0].name, &site.far.name] {
            let source = site.until_answered_by(name, family)?;
            // Each of a service's ports has its own affinity.
            let mut by_udp = BTreeSet::new();
            for frontend in Site::frontends(family) {
                let options = ClientOptions { source: Some(source), ..ClientOptions::default().within(3 * SECOND) };
                let answer = http_get(&site.lab.outside.netns, frontend, &options)?;
                assert_eq!(answer.backend, *name, "{source} by {frontend}");
                let socket = UdpClient::open(&site.lab.outside.netns, frontend, &options)?;
                // In fragments, there and back.
                for bytes in [1, 4_000] {
                    let answer = socket.ask(frontend, &vec![7; bytes])?;
                    assert_eq!(answer.body.len(), bytes, "by {frontend}");
                    site.check(&answer, source.ip(), frontend);
                    by_udp.insert(answer.backend);
                }
            }
            assert_eq!(by_udp.len(), 1, "{by_udp:?}");
        }
    }
    Ok(())
}

/// Much data, both ways, in segments of the largest size that offloads make; the checksums are right, or it would not arrive.
#[test]
fn much_data_goes_through_to_a_pod_elsewhere() -> Result<()> {
    let site = Site::new(Wanted { without_local_pod: true, ..Wanted::default() })?;
    for frontend in [0, 1].map(Site::frontends).concat() {
        let options = ClientOptions::default().within(10 * SECOND);
        let mut connection = HttpConnection::open(&site.lab.outside.netns, frontend, &options)?;
        let answer = connection.echo(4 << 20, 7)?;
        assert_eq!((answer.backend.as_str(), answer.body.len()), ("far", 4 << 20), "by {frontend}");
    }
    let text = site.daemon.cli().text(&["conntrack", "list"])?;
    assert!(text.contains(&format!("{}:", NODE_IP[0])), "what a pod elsewhere sees is listed:\n{text}");
    Ok(())
}

/// `externalTrafficPolicy: Local` keeps clients outside to the pods of the node, by their own address, and no one else.
#[test]
fn a_local_policy_keeps_outsiders_on_the_node() -> Result<()> {
    let site = Site::new(Wanted { local: true, ..Wanted::default() })?;
    let own = &site.lab.backends[0].name;
    for family in [0, 1] {
        let (outside, pod) = (&site.lab.outside, &site.lab.clients[0]);
        for number in 0..8 {
            let source = another_address(&site, family, number)?;
            for frontend in &Site::frontends(family)[..3] {
                let options = ClientOptions { source: Some(source), ..ClientOptions::default().within(3 * SECOND) };
                let answer = http_get(&outside.netns, *frontend, &options)?;
                assert_eq!((&answer.backend, answer.client.ip()), (own, source.ip()));
            }
        }
        // A pod goes to any of them.
        let by_pod: BTreeSet<_> = Site::frontends(family)
            .into_iter()
            .map(|frontend| Ok(site.ask(&pod.netns, frontend)?.backend))
            .collect::<Result<_>>()?;
        assert_eq!(by_pod.len(), 1);
    }
    site.set(Wanted { local: true, without_local_pod: true, ..Wanted::default() })?;
    for family in [0, 1] {
        let frontend = Site::frontends(family)[1];
        wait::until_true("no pod is left on the node", 10 * SECOND, || {
            let options = ClientOptions::default().within(SECOND / 2);
            Ok(http_get(&site.lab.outside.netns, frontend, &options).is_err())
        })?;
        wait::until_true("a pod goes elsewhere", 10 * SECOND, || {
            Ok(site.ask(&site.lab.clients[0].netns, frontend).is_ok_and(|answer| answer.backend == "far"))
        })?;
    }
    let counted = site.daemon.cli().text(&["status"])?;
    assert!(counted.contains("no-local-backend"), "{counted}");
    Ok(())
}

#[test]
fn source_ranges_let_in_and_keep_out() -> Result<()> {
    let site = Site::new(Wanted::default())?;
    site.set(Wanted { ranges: Some(["198.51.100.128/25", "fd00:c5::1000/116"]), ..Wanted::default() })?;
    for family in [0, 1] {
        let [node_port, balancer, external, _] = Site::frontends(family);
        let netns = &site.lab.outside.netns;
        let short = ClientOptions::default().within(SECOND / 2);
        wait::until_true("it is kept out", 10 * SECOND, || Ok(http_get(netns, balancer, &short).is_err()))?;
        let source = Some(another_address(&site, family, 3)?);
        let options = ClientOptions { source, ..ClientOptions::default().within(3 * SECOND) };
        http_get(netns, balancer, &options)?;
        // By the other ways everybody comes in.
        site.ask_from_outside(node_port)?;
        site.ask_from_outside(external)?;
        let pod = &site.lab.clients[0].netns;
        assert!(http_get(pod, balancer, &short).is_err(), "a pod is in no range");
    }
    site.set(Wanted::default())?;
    for family in [0, 1] {
        wait::until_true("everybody is let in again", 10 * SECOND, || {
            Ok(site.ask(&site.lab.outside.netns, Site::frontends(family)[1]).is_ok())
        })?;
    }
    Ok(())
}

/// The daemon dies and comes again while a client outside holds a connection to a pod elsewhere, and opens others.
#[test]
fn clients_outside_do_not_notice_that_the_daemon_dies() -> Result<()> {
    let mut site = Site::new(Wanted { without_local_pod: true, ..Wanted::default() })?;
    let netns = site.lab.outside.netns.clone();
    let options = ClientOptions::default().within(3 * SECOND);
    let mut held: Vec<_> = [0, 1]
        .map(Site::frontends)
        .concat()
        .into_iter()
        .map(|frontend| HttpConnection::open(&netns, frontend, &options))
        .collect::<Result<_>>()?;
    let mut ask = |site: &Site| -> Result<()> {
        for connection in &mut held {
            assert_eq!(connection.get()?.backend, "far");
        }
        for frontend in [0, 1].map(Site::frontends).concat() {
            site.ask_from_outside(frontend)?;
        }
        Ok(())
    };
    ask(&site)?;
    site.daemon.kill()?;
    ask(&site)?;
    site.daemon.resume()?;
    ask(&site)?;
    site.daemon.terminate()?;
    ask(&site)
}

/// Node ports take nothing else of the node: its other ports answer for themselves, and so does the node to a ping.
#[test]
fn the_nodes_own_ports_stay_its_own() -> Result<()> {
    let site = Site::new(Wanted::default())?;
    let own = Backend::start(
        &Host { name: "node".to_owned(), netns: site.lab.node.netns.clone(), ..site.lab.outside.clone() },
        2_000,
    )?;
    for address in NODE_IP {
        // In the range that packets leave by, too.
        let answer = site.ask(&site.lab.outside.netns, SocketAddr::new(address, 2_000))?;
        assert_eq!(answer.backend, "node");
        let answer = site.ask(&site.far.netns, SocketAddr::new(address, 2_000))?;
        assert_eq!(answer.backend, "node");
    }
    assert!(own.http.requests() >= 4);
    Ok(())
}
