//! The site: a service with every kind of address, a pod on the node and one elsewhere, and the world outside.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use affinity_common::abi::announced::{Announced, AnnouncedKey};
use affinity_common::family::{Family as _, V4, V6};
use affinity_common::types::Nanos;
use affinity_tests::branch::{Branch, Grown};
use affinity_tests::daemon::{Daemon, DaemonOptions, PIN_DIR, SourceDir};
use affinity_tests::netlink::{self, Via};
use affinity_tests::netns::Netns;
use affinity_tests::objects::{Document, Endpoint, ServiceObject, SliceObject};
use affinity_tests::privilege::require_root;
use affinity_tests::topology::{ETH0, Families, Host, Lab, LabOptions, NODE_IP};
use affinity_tests::traffic::{Answer, Backend, ClientOptions, http_get};
use affinity_user::tables::bpf;
use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::{
    LoadBalancerIngress, LoadBalancerStatus, Node, NodeAddress, NodeStatus, Service, ServiceStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use nix::time::{ClockId, clock_gettime};

pub const SECOND: Duration = Duration::from_secs(1);
pub const POD_PORT: u16 = 8080;
pub const NODE: &str = "node0";
pub const NODE_PORT: u16 = 30_080;
/// On the node's own link: somebody has to answer for it.
pub const LOAD_BALANCER: [&str; 2] = ["198.51.100.80", "fd00:c5::80"];
/// Routed to the node.
pub const EXTERNAL: [&str; 2] = ["203.0.113.7", "fd00:203::7"];
const CLUSTER: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];
pub const FAR: [(&str, &str); 2] = [("10.245.0.1", "10.245.0.2"), ("fd00:10:245::1", "fd00:10:245::2")];

/// Of the second node, which only some sites have.
pub const SECOND_NODE: &str = "node1";
pub const SECOND_NODE_IP: [&str; 2] = ["198.51.101.12", "fd00:c6::12"];
/// Routed to both nodes, where there are two.
pub const SPREAD: [&str; 2] = ["203.0.113.8", "fd00:203::8"];
/// Behind the machine outside.
pub const HOME: [(&str, &str); 2] = [("198.51.102.1", "198.51.102.2"), ("fd00:c7::1", "fd00:c7::2")];
const TIMEOUT: i32 = 600;

/// What a site's service is like.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    /// `externalTrafficPolicy: Local`.
    pub local: bool,
    /// Whether the node's own pod is gone.
    pub without_local_pod: bool,
    /// Whether the pod elsewhere is gone.
    pub without_far_pod: bool,
    /// `loadBalancerSourceRanges`.
    pub ranges: Option<[&'static str; 2]>,
    /// `timeoutSeconds`, where it is not [`TIMEOUT`].
    pub timeout: Option<i32>,
}

pub struct Site {
    // In the order in which they are dropped.
    pub daemon: Daemon,
    _pods: Vec<Backend>,
    pub far: Host,
    _grown: Grown,
    pub lab: Lab,
    pub source: SourceDir,
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

impl Site {
    pub fn new(wanted: Wanted) -> Result<Self> {
        Self::narrow(wanted, 1_500)
    }

    /// One where a link between the node and the pod elsewhere carries so many bytes.
    pub fn narrow(wanted: Wanted, mtu: u32) -> Result<Self> {
        require_root();
        let lab = Lab::new(LabOptions { clients: 1, backends: 1, families: Families::Dual, ..LabOptions::default() })?;
        let (far, grown) = far(&lab, mtu)?;
        let mut pods = vec![Backend::start(&lab.backends[0], POD_PORT)?];
        pods.push(Backend::start(&far, POD_PORT)?);
        let source = SourceDir::new()?;
        write(&source, &lab, wanted)?;
        let options = DaemonOptions::new(source.source()).arguments(["--node-name", NODE]);
        let daemon = Daemon::start(&lab.node, options)?;
        let site = Self { daemon, _pods: pods, far, _grown: grown, lab, source };
        site.announce()?;
        Ok(site)
    }

    pub fn set(&self, wanted: Wanted) -> Result<()> {
        write(&self.source, &self.lab, wanted)
    }

    /// Waits until the service has so many pods that take clients, each of both families.
    pub fn wait_for_pods(&self, count: usize) -> Result<()> {
        let cli = self.daemon.cli();
        cli.wait_for_service("default/web", 10 * SECOND, |row| row.is_some_and(|row| row.eligible == 2 * count))
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
    pub fn frontends(family: usize) -> [SocketAddr; 4] {
        [
            SocketAddr::new(NODE_IP[family], NODE_PORT),
            SocketAddr::new(ip(LOAD_BALANCER[family]), 80),
            SocketAddr::new(ip(EXTERNAL[family]), 80),
            SocketAddr::new(ip(CLUSTER[family]), 80),
        ]
    }

    pub fn ask(&self, netns: &Netns, frontend: SocketAddr) -> Result<Answer> {
        let answer = http_get(netns, frontend, &ClientOptions::default().within(3 * SECOND));
        answer.with_context(|| format!("{frontend}: {}", self.daemon.log()))
    }

    /// What the pods see of a client outside that asks by a frontend: its own address, or where they are elsewhere the node's.
    pub fn ask_from_outside(&self, frontend: SocketAddr) -> Result<String> {
        let own = self.lab.outside.addresses[usize::from(frontend.is_ipv6())];
        let options =
            ClientOptions { source: Some(SocketAddr::new(own, 0)), ..ClientOptions::default().within(3 * SECOND) };
        let answer = http_get(&self.lab.outside.netns, frontend, &options);
        let answer = answer.with_context(|| format!("{frontend}: {}", self.daemon.log()))?;
        self.check(&answer, own, frontend);
        Ok(answer.backend)
    }

    pub fn check(&self, answer: &Answer, client: IpAddr, frontend: SocketAddr) {
        let is_elsewhere = answer.backend == self.far.name;
        let expected = if is_elsewhere { NODE_IP[usize::from(frontend.is_ipv6())] } else { client };
        assert_eq!(answer.client.ip(), expected, "{} by {frontend}", answer.backend);
    }

    /// Has clients of other addresses ask, until a pod has answered each of them.
    pub fn until_answered_by(&self, name: &str, family: usize) -> Result<SocketAddr> {
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

/// A machine behind the one outside, with as many addresses of each family as are asked for from [`HOME`] on, and a link of so
/// many bytes on the way to it.
pub fn home(outside: &Netns, addresses: u16, mtu: u32) -> Result<Grown> {
    let home =
        Branch { name: "home", link: [("198.51.103.1", "198.51.103.2"), ("fd00:c8::1", "fd00:c8::2")], net: HOME };
    let grown = home.grow(outside, mtu)?;
    grown.netns.netlink(async |handle| {
        let eth0 = netlink::link(&handle, ETH0).await?.index;
        for (family, prefix) in [24, 64].into_iter().enumerate() {
            for number in 1..addresses {
                netlink::add_address(&handle, eth0, at_home(family, number), prefix).await?;
            }
        }
        Ok(())
    })?;
    Ok(grown)
}

/// An address of [`home`], by its number.
pub fn at_home(family: usize, number: u16) -> IpAddr {
    match ip(HOME[family].1) {
        IpAddr::V4(first) => IpAddr::V4((first.to_bits() + u32::from(number)).into()),
        IpAddr::V6(first) => IpAddr::V6((first.to_bits() + u128::from(number)).into()),
    }
}

/// Gives the machine outside one more address, by its number.
pub fn another_address(site: &Site, family: usize, number: u16) -> Result<SocketAddr> {
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

/// A pod behind the machine outside, which routes; a link on the way to it carries so many bytes.
fn far(lab: &Lab, mtu: u32) -> Result<(Host, Grown)> {
    let outside = &lab.outside.netns;
    outside.set_sysctls(&[("net.ipv4.ip_forward", "1"), ("net.ipv6.conf.all.forwarding", "1")])?;
    let far =
        Branch { name: "far", link: [("10.246.0.1", "10.246.0.2"), ("fd00:10:246::1", "fd00:10:246::2")], net: FAR };
    let grown = far.grow(outside, mtu)?;
    outside.netlink(async |handle| {
        for (family, prefix) in [32, 128].into_iter().enumerate() {
            for address in [EXTERNAL[family], CLUSTER[family]] {
                netlink::add_route(&handle, ip(address), prefix, Via::Gateway(NODE_IP[family])).await?;
            }
        }
        Ok(())
    })?;
    let host = Host {
        name: "far".to_owned(),
        netns: grown.netns.clone(),
        addresses: FAR.map(|(_, own)| ip(own)).into(),
        node_interface: ETH0.to_owned(),
        ..lab.outside.clone()
    };
    Ok((host, grown))
}

fn node(name: &str, addresses: [String; 2]) -> Node {
    let internal = addresses.map(|address| NodeAddress { address, type_: "InternalIP".to_owned() });
    Node {
        metadata: ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() },
        status: Some(NodeStatus { addresses: Some(internal.into()), ..NodeStatus::default() }),
        ..Node::default()
    }
}

fn write(source: &SourceDir, lab: &Lab, wanted: Wanted) -> Result<()> {
    let nodes =
        [node(NODE, NODE_IP.map(|address| address.to_string())), node(SECOND_NODE, SECOND_NODE_IP.map(str::to_owned))];
    let [v4, v6] = CLUSTER.map(ip);
    let service = ServiceObject::new("web").tcp("http", 80, POD_PORT).udp("udp", 80, POD_PORT).cluster_ips(v4, v6);
    let service = service.affinity(wanted.timeout.unwrap_or(TIMEOUT)).change(|spec| {
        spec.type_ = Some("LoadBalancer".to_owned());
        spec.external_ips = Some([EXTERNAL, SPREAD].concat().into_iter().map(str::to_owned).collect());
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
        if !wanted.without_far_pod {
            slice = slice.endpoint(FAR[family].1, Endpoint::Ready).pod("far");
        }
        slice.build()
    });
    let mut documents: Vec<&dyn Document> = vec![&nodes[0], &nodes[1], &service];
    documents.extend(slices.iter().map(|slice| slice as &dyn Document));
    source.write("web.yaml", &documents)
}
