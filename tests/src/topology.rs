//! The standard lab: clients and backends, each in a namespace of its own as a pod is, and the node that routes between.
//!
//! ```text
//!   client0  eth0 ---- cli0 +--------------------+ be0 ---- eth0  backend0
//!   client1  eth0 ---- cli1 |  node: routes,     | be1 ---- eth0  backend1
//!   ...                     |  strict rp_filter  | ...
//!                           +--------------------+
//!                               eth0 (uplink)
//!                                 |
//!                               eth0  outside: the rest of the world
//! ```
//!
//! Pods have 10.244.0.N of a point-to-point CNI plugin, or of one with a bridge. The node has, as a real one, no address
//! and no route for service addresses but its default route: a packet to a service that nobody translates goes out by the
//! uplink and is seen ([`crate::capture`]) and dropped outside.
//!
//! Everything is held by this process alone, and is gone with it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use netlink_packet_route::link::{InfoData, InfoVeth};
use rtnetlink::{LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth};

use crate::mountns::MountNs;
use crate::netlink::{self, Via};
use crate::netns::Netns;
use crate::process::Place;
use crate::sys::{self, Offload};
use crate::wait;

/// The name of every pod's interface, and of the node's uplink.
pub const ETH0: &str = "eth0";
/// The name of the bridge that [`Wiring::Bridge`] makes in the node.
pub const BRIDGE: &str = "cni0";
/// The default gateway of the pods.
pub const POD_GATEWAY: [IpAddr; 2] = [v4(10, 244, 0, 1), v6(0xfd00, 0x10, 0x244, 1)];
/// The node's address on its uplink.
pub const NODE_IP: [IpAddr; 2] = [v4(198, 51, 100, 11), v6(0xfd00, 0xc5, 0, 0x11)];
/// The address of the machine outside, the node's default gateway.
pub const OUTSIDE_IP: [IpAddr; 2] = [v4(198, 51, 100, 1), v6(0xfd00, 0xc5, 0, 1)];

const FIRST_CLIENT: usize = 11;
const FIRST_BACKEND: usize = 101;
const LAST_POD: usize = 254;

const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(a, b, c, d))
}

const fn v6(a: u16, b: u16, c: u16, last: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(a, b, c, 0, 0, 0, 0, last))
}

/// The address families that a lab has; addresses come in this order everywhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Families {
    /// IPv4 alone; IPv6 is switched off, so that captures are quiet.
    #[default]
    V4,
    /// IPv6 alone.
    V6,
    /// Both, IPv4 first.
    Dual,
}

impl Families {
    fn has_v6(self) -> bool {
        self != Self::V4
    }

    fn choose(self, [v4, v6]: [IpAddr; 2]) -> Vec<IpAddr> {
        match self {
            Self::V4 => vec![v4],
            Self::V6 => vec![v6],
            Self::Dual => vec![v4, v6],
        }
    }
}

/// How pods are wired to the node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wiring {
    /// A routed veth each (the `ptp` plugin, kindnet): every pod has a /32 and the node a host route to it.
    #[default]
    PointToPoint,
    /// A veth each, enslaved to the bridge `cni0` (the `bridge` plugin): the pods share an L2 segment.
    Bridge,
}

/// What a lab looks like. The default is the standard one: three clients, five backends, IPv4, point to point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabOptions {
    /// How many clients; at most 90.
    pub clients: usize,
    /// How many backends; at most 154.
    pub backends: usize,
    /// Address families.
    pub families: Families,
    /// How pods are wired.
    pub wiring: Wiring,
    /// Whether the veths have the checksum and segmentation offloads that they are born with. Without them every
    /// packet has its full checksum and is at most an MTU long.
    pub offloads: bool,
    /// MTU of every link, in bytes.
    pub mtu: u32,
    /// Whether somebody has mounted bpffs on the node.
    pub bpffs: bool,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self {
            clients: 3,
            backends: 5,
            families: Families::V4,
            wiring: Wiring::PointToPoint,
            offloads: true,
            mtu: 1500,
            bpffs: true,
        }
    }
}

/// A machine at one end of a veth: a client, a backend, or the machine outside.
#[derive(Clone, Debug)]
pub struct Host {
    /// `client0`, `backend0`, `outside`.
    pub name: String,
    /// Its namespace; its interface there is `eth0`.
    pub netns: Netns,
    /// Its addresses, in the order of [`Families`].
    pub addresses: Vec<IpAddr>,
    /// The Ethernet address of its `eth0`.
    pub mac: [u8; 6],
    /// The name of the node's side of the veth.
    pub node_interface: String,
    /// The index of the node's side of the veth, in the node.
    pub node_ifindex: u32,
    /// The Ethernet address of the node's side of the veth.
    pub node_mac: [u8; 6],
}

impl Host {
    /// Its first address.
    pub fn ip(&self) -> IpAddr {
        self.addresses[0]
    }

    /// Its IPv4 address.
    pub fn ip4(&self) -> Option<Ipv4Addr> {
        self.addresses.iter().find_map(|address| match address {
            IpAddr::V4(address) => Some(*address),
            IpAddr::V6(_) => None,
        })
    }

    /// Its IPv6 address.
    pub fn ip6(&self) -> Option<Ipv6Addr> {
        self.addresses.iter().find_map(|address| match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => Some(*address),
        })
    }
}

/// The node: a router with mounts of its own, where the daemon runs.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its network namespace.
    pub netns: Netns,
    /// Its mount namespace: its own bpffs on `/sys/fs/bpf`, an empty `/run`.
    pub mounts: MountNs,
    /// Its addresses on the uplink, in the order of [`Families`].
    pub addresses: Vec<IpAddr>,
}

impl Node {
    /// Both its namespaces, for processes and for [`Place::enter`].
    pub fn place(&self) -> Place {
        Place { net: Some(self.netns.clone()), mount: Some(self.mounts.clone()) }
    }
}

/// Clients, backends, a node and the world outside.
#[derive(Debug)]
pub struct Lab {
    /// Where the daemon runs.
    pub node: Node,
    /// What the node's default route leads to. It drops all that is not for it.
    pub outside: Host,
    /// The clients, in the order of their numbers.
    pub clients: Vec<Host>,
    /// The backends, in the order of their numbers.
    pub backends: Vec<Host>,
    options: LabOptions,
    clients_made: usize,
    backends_made: usize,
}

impl Lab {
    /// Builds a lab.
    ///
    /// # Errors
    /// Where the process is not root, or the kernel lacks something that is named.
    pub fn new(options: LabOptions) -> Result<Self> {
        let netns = Netns::new("node")?;
        netns.set_sysctls(&ipv6_settings(options.families))?;
        // Before any interface is made: these are what new interfaces start with, and forwarding resets some.
        netns.set_sysctls(&[
            ("net.ipv4.ip_forward", "1"),
            ("net.ipv4.conf.all.rp_filter", "1"),
            ("net.ipv4.conf.default.rp_filter", "1"),
        ])?;
        if options.families.has_v6() {
            netns.set_sysctls(&[("net.ipv6.conf.all.forwarding", "1"), ("net.ipv6.conf.default.forwarding", "1")])?;
        }
        let mounts = if options.bpffs { MountNs::for_node()? } else { MountNs::without_bpffs()? };
        let node = Node { netns, mounts, addresses: options.families.choose(NODE_IP) };
        if options.wiring == Wiring::Bridge {
            add_bridge(&node, &options)?;
        }
        let outside = add_outside(&node, &options)?;
        let mut lab = Self {
            node,
            outside,
            clients: Vec::new(),
            backends: Vec::new(),
            clients_made: 0,
            backends_made: 0,
            options,
        };
        for _ in 0..lab.options.clients {
            lab.add_client()?;
        }
        for _ in 0..lab.options.backends {
            lab.add_backend()?;
        }
        Ok(lab)
    }

    /// What it was made with.
    pub fn options(&self) -> &LabOptions {
        &self.options
    }

    /// Wires a new client, as when a pod starts. Numbers are not used twice.
    ///
    /// # Errors
    /// Where there are too many.
    pub fn add_client(&mut self) -> Result<&Host> {
        let number = self.clients_made;
        let address = FIRST_CLIENT + number;
        if address >= FIRST_BACKEND {
            bail!("a lab has room for {number} clients");
        }
        let host = self.add_pod(&format!("client{number}"), &format!("cli{number}"), address)?;
        self.clients_made += 1;
        self.clients.push(host);
        Ok(&self.clients[self.clients.len() - 1])
    }

    /// Wires a new backend, as when a pod starts. Numbers are not used twice.
    ///
    /// # Errors
    /// Where there are too many.
    pub fn add_backend(&mut self) -> Result<&Host> {
        let number = self.backends_made;
        let address = FIRST_BACKEND + number;
        if address > LAST_POD {
            bail!("a lab has room for {number} backends");
        }
        let host = self.add_pod(&format!("backend{number}"), &format!("be{number}"), address)?;
        self.backends_made += 1;
        self.backends.push(host);
        Ok(&self.backends[self.backends.len() - 1])
    }

    /// Takes a client or backend out, as when a pod is deleted: its veth goes at once, its routes with it, and its
    /// namespace with the last handle and socket.
    ///
    /// # Errors
    /// Where there is none of that name.
    pub fn remove(&mut self, name: &str) -> Result<Host> {
        let hosts = [&mut self.clients, &mut self.backends];
        let host = hosts
            .into_iter()
            .find_map(|hosts| {
                let at = hosts.iter().position(|host| host.name == name)?;
                Some(hosts.remove(at))
            })
            .with_context(|| format!("no {name} in this lab"))?;
        let interface = &host.node_interface;
        self.node.netns.netlink(async |handle| netlink::delete(&handle, interface).await)?;
        Ok(host)
    }

    /// Takes the node's side of a host's veth down or up again.
    ///
    /// Taking it down loses the routes of a point-to-point pod, as on a real node; up again restores them.
    ///
    /// # Errors
    /// Where the host has been removed.
    pub fn set_link(&self, host: &Host, up: bool) -> Result<()> {
        let interface = &host.node_interface;
        self.node.netns.netlink(async |handle| {
            if !up {
                return netlink::set_down(&handle, interface).await;
            }
            netlink::set_up(&handle, interface).await?;
            if self.options.wiring == Wiring::PointToPoint {
                for address in &host.addresses {
                    let via = Via::Link(host.node_ifindex);
                    netlink::add_route(&handle, *address, host_prefix(*address), via).await?;
                }
            }
            Ok(())
        })
    }

    fn add_pod(&self, name: &str, node_interface: &str, number: usize) -> Result<Host> {
        let number = u8::try_from(number)?;
        let addresses = self.options.families.choose([v4(10, 244, 0, number), v6(0xfd00, 0x10, 0x244, number.into())]);
        let host = connect(name, &self.node, node_interface, addresses, &self.options)
            .with_context(|| format!("wiring {name}"))?;
        match self.options.wiring {
            Wiring::PointToPoint => self.route_point_to_point(&host)?,
            Wiring::Bridge => self.route_bridged(&host)?,
        }
        self.wait_for_carrier(&host)?;
        Ok(host)
    }

    /// What the `ptp` plugin configures.
    fn route_point_to_point(&self, host: &Host) -> Result<()> {
        let gateways = self.options.families.choose(POD_GATEWAY);
        host.netns.netlink(async |handle| {
            let eth0 = netlink::link(&handle, ETH0).await?.index;
            for (address, gateway) in host.addresses.iter().zip(&gateways) {
                let prefix = host_prefix(*address);
                netlink::add_address(&handle, eth0, *address, prefix).await?;
                netlink::add_route(&handle, *gateway, prefix, Via::Link(eth0)).await?;
                netlink::add_route(&handle, any(*address), 0, Via::Gateway(*gateway)).await?;
            }
            Ok(())
        })?;
        self.node.netns.netlink(async |handle| {
            let index = host.node_ifindex;
            for (address, gateway) in host.addresses.iter().zip(&gateways) {
                let prefix = host_prefix(*address);
                netlink::add_address(&handle, index, *gateway, prefix).await?;
                netlink::add_route(&handle, *address, prefix, Via::Link(index)).await?;
            }
            Ok(())
        })
    }

    /// What the `bridge` plugin configures.
    fn route_bridged(&self, host: &Host) -> Result<()> {
        let gateways = self.options.families.choose(POD_GATEWAY);
        host.netns.netlink(async |handle| {
            let eth0 = netlink::link(&handle, ETH0).await?.index;
            for (address, gateway) in host.addresses.iter().zip(&gateways) {
                netlink::add_address(&handle, eth0, *address, pod_prefix(*address)).await?;
                netlink::add_route(&handle, any(*address), 0, Via::Gateway(*gateway)).await?;
            }
            Ok(())
        })?;
        self.node.netns.netlink(async |handle| {
            let bridge = netlink::link(&handle, BRIDGE).await?.index;
            netlink::enslave(&handle, &host.node_interface, bridge).await
        })
    }

    /// A veth carries nothing until both its ends are up, which the kernel notices a little later.
    fn wait_for_carrier(&self, host: &Host) -> Result<()> {
        let ends = [(&host.netns, ETH0), (&self.node.netns, &host.node_interface)];
        for (netns, interface) in ends {
            let what = format!("carrier on {interface} of {}", netns.name());
            wait::until_true(&what, Duration::from_secs(5), || {
                netns.netlink(async |handle| Ok(netlink::link(&handle, interface).await?.running))
            })?;
        }
        Ok(())
    }
}

/// IPv6 without what takes time (duplicate address detection) or makes noise (router solicitations), or none at all.
fn ipv6_settings(families: Families) -> Vec<(&'static str, &'static str)> {
    let mut settings = vec![("net.ipv6.conf.all.disable_ipv6", "1"), ("net.ipv6.conf.default.disable_ipv6", "1")];
    if families.has_v6() {
        settings = vec![
            ("net.ipv6.conf.all.accept_dad", "0"),
            ("net.ipv6.conf.default.accept_dad", "0"),
            ("net.ipv6.conf.default.dad_transmits", "0"),
            ("net.ipv6.conf.default.router_solicitations", "0"),
        ];
    }
    settings
}

/// A new namespace `name` with `eth0`, joined to the node's `node_interface`; both ends are up.
fn connect(
    name: &str,
    node: &Node,
    node_interface: &str,
    addresses: Vec<IpAddr>,
    options: &LabOptions,
) -> Result<Host> {
    let netns = Netns::new(name)?;
    netns.set_sysctls(&ipv6_settings(options.families))?;
    let peer = LinkMessageBuilder::<LinkUnspec>::new()
        .name(node_interface)
        .mtu(options.mtu)
        .setns_by_fd(node.netns.as_raw_fd())
        .build();
    let pair = LinkMessageBuilder::<LinkVeth>::new(ETH0, node_interface)
        .mtu(options.mtu)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .build();
    let end = netns.netlink(async |handle| {
        handle.link().add(pair).execute().await?;
        netlink::set_up(&handle, ETH0).await?;
        netlink::link(&handle, ETH0).await
    })?;
    let node_end = node.netns.netlink(async |handle| {
        netlink::set_up(&handle, node_interface).await?;
        netlink::link(&handle, node_interface).await
    })?;
    if !options.offloads {
        switch_off_offloads(&netns, ETH0)?;
        switch_off_offloads(&node.netns, node_interface)?;
    }
    Ok(Host {
        name: name.to_owned(),
        netns,
        addresses,
        mac: end.mac,
        node_interface: node_interface.to_owned(),
        node_ifindex: node_end.index,
        node_mac: node_end.mac,
    })
}

/// Joins two namespaces by a veth pair of the given names, both ends up.
///
/// # Errors
/// Where a name is taken, or the kernel refuses.
pub fn join((netns, name): (&Netns, &str), (peer, peer_name): (&Netns, &str), mtu: u32) -> Result<()> {
    let end = LinkMessageBuilder::<LinkUnspec>::new().name(peer_name).mtu(mtu).setns_by_fd(peer.as_raw_fd()).build();
    let pair = LinkMessageBuilder::<LinkVeth>::new(name, peer_name)
        .mtu(mtu)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(end)))
        .build();
    netns.netlink(async |handle| {
        handle.link().add(pair).execute().await?;
        netlink::set_up(&handle, name).await
    })?;
    peer.netlink(async |handle| netlink::set_up(&handle, peer_name).await)
}

fn add_bridge(node: &Node, options: &LabOptions) -> Result<()> {
    let gateways = options.families.choose(POD_GATEWAY);
    node.netns.netlink(async |handle| {
        let bridge = LinkBridge::new(BRIDGE)
            // A bridge without an address of its own takes its ports', and changes it as they come and go.
            .address(vec![0x02, 0, 0, 0, 0, 0xb0])
            .mtu(options.mtu)
            .up()
            .build();
        handle.link().add(bridge).execute().await.context("adding a bridge")?;
        let index = netlink::link(&handle, BRIDGE).await?.index;
        for gateway in gateways {
            netlink::add_address(&handle, index, gateway, pod_prefix(gateway)).await?;
        }
        Ok(())
    })
}

fn add_outside(node: &Node, options: &LabOptions) -> Result<Host> {
    let addresses = options.families.choose(OUTSIDE_IP);
    let outside = connect("outside", node, ETH0, addresses, options)?;
    let pods = options.families.choose(POD_GATEWAY);
    node.netns.netlink(async |handle| {
        for (own, gateway) in node.addresses.iter().zip(&outside.addresses) {
            netlink::add_address(&handle, outside.node_ifindex, *own, pod_prefix(*own)).await?;
            netlink::add_route(&handle, any(*own), 0, Via::Gateway(*gateway)).await?;
        }
        Ok(())
    })?;
    outside.netns.netlink(async |handle| {
        let eth0 = netlink::link(&handle, ETH0).await?.index;
        for ((own, node), pod) in outside.addresses.iter().zip(&node.addresses).zip(pods) {
            let prefix = pod_prefix(*own);
            netlink::add_address(&handle, eth0, *own, prefix).await?;
            let network = network(pod);
            netlink::add_route(&handle, network, prefix, Via::Gateway(*node)).await?;
        }
        Ok(())
    })?;
    Ok(outside)
}

fn switch_off_offloads(netns: &Netns, interface: &str) -> Result<()> {
    // Segmentation first: it depends on the others.
    let offloads = [
        Offload::GenericReceive,
        Offload::TcpSegmentation,
        Offload::GenericSegmentation,
        Offload::ScatterGather,
        Offload::TxChecksum,
        Offload::RxChecksum,
    ];
    netns.enter(|| {
        for offload in offloads {
            sys::set_offload(interface, offload, false)
                .with_context(|| format!("switching off {offload:?} of {interface}"))?;
        }
        Ok(())
    })
}

/// The prefix length of one address.
fn host_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// The prefix length of a network of the lab.
fn pod_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 24 } else { 64 }
}

fn any(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// The network of 24 bits, or of 64, that an address is in.
pub fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(address) => Ipv4Addr::from_bits(address.to_bits() & !0xff).into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}
