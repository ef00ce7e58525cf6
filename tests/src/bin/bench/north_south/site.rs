//! A machine outside, a node that serves node ports, and another node, with pods on both.
//!
//! ```text
//!   outside eth0 ---- eth0 node eth1 ---- eth0 node1 pod ---- eth0 elsewhere
//!                          be0, be1 ---- eth0 backend0, backend1
//! ```
//! The other node knows no way to the machine outside: only what has left the first node as that one's own is answered.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use affinity_tests::apiproxy::ApiProxy;
use affinity_tests::apiserver::ApiServer;
use affinity_tests::daemon::{Daemon, DaemonOptions, SourceDir};
use affinity_tests::netlink::{self, Via};
use affinity_tests::netns::Netns;
use affinity_tests::objects::{Document, Endpoint, ServiceObject, SliceObject};
use affinity_tests::topology::{ETH0, Families, Host, Lab, LabOptions, NODE_IP, join};
use affinity_tests::wait;
use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::{Pod, Proxy, settings};
use crate::control_plane::kube_proxy::{self, KubeProxy};
use crate::control_plane::real::NODE;
use crate::crr::load::{self, Done};
use crate::crr::site::{forget_soon, quicken};
use crate::version::Version;

/// Where backends serve.
const PORT: u16 = 8080;
/// How long a proxy may take until it serves everything.
const PATIENCE: Duration = Duration::from_mins(1);
/// The name of the first node's interface to the other one.
const BETWEEN: &str = "eth1";
/// The name of the other node's interface to its pod.
const TO_POD: &str = "pod";

/// Addresses of a family.
struct Addresses {
    /// Of the first node and of the other one, between them.
    between: [&'static str; 2],
    /// The network of the other node's pods, and its own address there.
    pods: [&'static str; 2],
    /// What its pod has.
    elsewhere: [&'static str; 2],
    /// The services' cluster addresses.
    services: [&'static str; 2],
    /// The length of every prefix.
    prefix: u8,
}

const ADDRESSES: [Addresses; 2] = [
    Addresses {
        between: ["10.246.0.1", "10.246.0.2"],
        pods: ["10.245.0.0", "10.245.0.1"],
        elsewhere: ["10.245.0.2", "10.245.0.3"],
        services: ["10.96.0.10", "10.96.0.11"],
        prefix: 24,
    },
    Addresses {
        between: ["fd00:10:246::1", "fd00:10:246::2"],
        pods: ["fd00:10:245::", "fd00:10:245::1"],
        elsewhere: ["fd00:10:245::2", "fd00:10:245::3"],
        services: ["fd00:10:96::10", "fd00:10:96::11"],
        prefix: 64,
    },
];

/// What serves a site's node.
enum Running {
    Affinity(Daemon),
    /// It, and its way to the API server.
    KubeProxy(KubeProxy, #[expect(dead_code, reason = "held as long as kube-proxy runs")] ApiProxy),
}

/// Everything of one proxy.
pub struct Site {
    // In the order in which they are dropped.
    running: Running,
    _source: SourceDir,
    world: World,
}

/// Both nodes and their pods, which serve.
struct World {
    /// The first node, its pods, and the machine outside.
    lab: Lab,
    /// The other node and its pod.
    _other: [Netns; 2],
}

impl Site {
    /// With a daemon that has its objects from files.
    pub fn with_affinity() -> Result<Self> {
        let world = World::new()?;
        let lab = &world.lab;
        let source = SourceDir::new()?;
        let (services, slices) = objects(lab);
        let node = kube_proxy::node_object(&lab.node)?;
        let mut documents: Vec<&dyn Document> = vec![&node];
        documents.extend(services.iter().map(|service| service as &dyn Document));
        documents.extend(slices.iter().map(|slice| slice as &dyn Document));
        source.write("services", &documents)?;
        let options = DaemonOptions::new(source.source()).arguments(["--node-name", NODE]);
        let running = Running::Affinity(Daemon::start(&lab.node, options)?);
        Ok(Self { running, _source: source, world })
    }

    /// With kube-proxy before an API server.
    pub fn with_kube_proxy(api: &ApiServer) -> Result<Self> {
        let world = World::new()?;
        let lab = &world.lab;
        let (services, slices) = objects(lab);
        services.iter().try_for_each(|service| api.apply(service).map(drop))?;
        slices.iter().try_for_each(|slice| api.apply(slice).map(drop))?;
        kube_proxy::register(api, &lab.node)?;
        let (door, kubeconfig) = api.proxy(Some(&lab.node.netns))?;
        let running = Running::KubeProxy(KubeProxy::start(&lab.node, &kubeconfig)?, door);
        forget_soon(&lab.node.netns)?;
        Ok(Self { running, _source: SourceDir::new()?, world })
    }

    /// What serves it.
    pub fn proxy(&self) -> Proxy {
        match self.running {
            Running::Affinity(_) => Proxy::Affinity,
            Running::KubeProxy(..) => Proxy::KubeProxy,
        }
    }

    /// Waits until every service is served, and sees that it is by the proxy. Neighbours are found then, and caches filled.
    pub fn warm_up(&mut self) -> Result<()> {
        for (version, pod) in settings() {
            let what = format!("{}, pods on {}", version.name(), pod.name());
            wait::until_ok(&what, PATIENCE, || self.run(version, pod, 1, Duration::from_millis(50)))?;
        }
        match &mut self.running {
            Running::Affinity(daemon) => {
                let text = daemon.cli().text(&["conntrack", "list", "-o", "json"])?;
                for address in NODE_IP {
                    ensure!(text.contains(&address.to_string()), "nothing was translated for {address}: {text}");
                }
                Ok(())
            }
            Running::KubeProxy(proxy, _) => proxy.must_run(),
        }
    }

    /// Runs the load.
    pub fn run(&self, version: Version, pod: Pod, threads: usize, duration: Duration) -> Result<Done> {
        let [v4, v6] = NODE_IP;
        let to = SocketAddr::new(version.of(v4, v6), node_port(pod));
        let done = load::run(&self.world.lab.outside, None, to, threads, duration)?;
        // Hooks of netfilter are there by namespace: what is tracked shows whether they are.
        let tracked: u64 = self.world.lab.node.netns.sysctl("net.netfilter.nf_conntrack_count")?.parse()?;
        let proxy = self.proxy();
        ensure!((tracked > 0) == (proxy == Proxy::KubeProxy), "{}: the node tracks {tracked}", proxy.name());
        Ok(done)
    }
}

fn node_port(pod: Pod) -> u16 {
    match pod {
        Pod::Here => 30_080,
        Pod::Elsewhere => 30_081,
    }
}

impl World {
    fn new() -> Result<Self> {
        let lab = Lab::new(LabOptions { clients: 0, backends: 2, families: Families::Dual, ..LabOptions::default() })?;
        let (node, elsewhere) = other_node(&lab).context("building another node")?;
        quicken(&lab.outside.netns, lab.backends.iter().map(|backend| &backend.netns).chain([&elsewhere.netns]))?;
        for host in lab.backends.iter().chain([&elsewhere]) {
            for address in &host.addresses {
                load::serve(&Host { addresses: vec![*address], ..host.clone() }, PORT)?;
            }
        }
        Ok(Self { lab, _other: [node, elsewhere.netns] })
    }
}

/// Wires another node and its pod to the lab's.
fn other_node(lab: &Lab) -> Result<(Netns, Host)> {
    let (node, pod) = (Netns::new("node1")?, Netns::new("elsewhere")?);
    for netns in [&node, &pod] {
        netns.set_sysctls(&[("net.ipv6.conf.all.accept_dad", "0"), ("net.ipv6.conf.default.accept_dad", "0")])?;
    }
    node.set_sysctls(&[("net.ipv4.ip_forward", "1"), ("net.ipv6.conf.all.forwarding", "1")])?;
    let mtu = lab.options().mtu;
    join((&lab.node.netns, BETWEEN), (&node, ETH0), mtu)?;
    join((&node, TO_POD), (&pod, ETH0), mtu)?;
    let mut addresses = Vec::new();
    for Addresses { between, pods, elsewhere, prefix, .. } in &ADDRESSES {
        let [first, other] = parsed(between)?;
        let [network, gateway] = parsed(pods)?;
        let own = parsed(elsewhere)?;
        lab.node.netns.netlink(async |handle| {
            let link = netlink::link(&handle, BETWEEN).await?.index;
            netlink::add_address(&handle, link, first, *prefix).await?;
            netlink::add_route(&handle, network, *prefix, Via::Gateway(other)).await
        })?;
        node.netlink(async |handle| {
            let link = netlink::link(&handle, ETH0).await?.index;
            netlink::add_address(&handle, link, other, *prefix).await?;
            let link = netlink::link(&handle, TO_POD).await?.index;
            netlink::add_address(&handle, link, gateway, *prefix).await
        })?;
        pod.netlink(async |handle| {
            let link = netlink::link(&handle, ETH0).await?.index;
            for address in own {
                netlink::add_address(&handle, link, address, *prefix).await?;
            }
            let any = if gateway.is_ipv4() { "0.0.0.0" } else { "::" };
            netlink::add_route(&handle, any.parse()?, 0, Via::Gateway(gateway)).await
        })?;
        addresses.extend(own);
    }
    Ok((node, Host { name: "elsewhere".to_owned(), netns: pod, addresses, ..lab.outside.clone() }))
}

fn parsed(addresses: &[&str; 2]) -> Result<[IpAddr; 2]> {
    let [first, second] = addresses;
    Ok([first.parse()?, second.parse()?])
}

/// A service with the node's own pods and one with those elsewhere, and their slices.
fn objects(lab: &Lab) -> (Vec<Service>, Vec<EndpointSlice>) {
    let (mut services, mut slices) = (Vec::new(), Vec::new());
    for (number, (pod, name)) in Pod::ALL.into_iter().zip(["here", "elsewhere"]).enumerate() {
        let addresses: Vec<String> = ADDRESSES.iter().map(|of| of.services[number].to_owned()).collect();
        let service = ServiceObject::new(name).cluster_ip(&addresses[0]).tcp("http", 80, PORT).affinity(10_800);
        let service = service.change(|spec| {
            spec.cluster_ips = Some(addresses);
            spec.ip_family_policy = Some("RequireDualStack".to_owned());
            spec.type_ = Some("NodePort".to_owned());
            for port in spec.ports.iter_mut().flatten() {
                port.node_port = Some(node_port(pod).into());
            }
        });
        services.push(service.build());
        for (family, of) in ADDRESSES.iter().enumerate() {
            let backends: Vec<String> = match pod {
                Pod::Here => lab.backends.iter().map(|host| host.addresses[family].to_string()).collect(),
                Pod::Elsewhere => of.elsewhere.map(str::to_owned).into(),
            };
            let slice = SliceObject::of(name, &family.to_string()).tcp("http", PORT);
            slices.push(slice.endpoints(backends, Endpoint::Ready).build());
        }
    }
    (services, slices)
}
