//! How network namespaces are wired to the node's: which interface of the node leads to which of theirs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::path::Path;

use futures::{StreamExt as _, TryStreamExt as _};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage};
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use rtnetlink::packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::discovery::{self, Namespace};
use super::namespace::{self, Seen};

/// An interface of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeInterface {
    /// Its name.
    pub name: String,
    /// Whether its packets have an Ethernet header.
    pub is_ethernet: bool,
}

/// An interface of another namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its name there.
    pub name: String,
    /// Its addresses that others can know.
    pub addresses: BTreeSet<IpAddr>,
    /// What it is, as `ip link` calls it (`veth`, `macvlan`); none for a device.
    pub kind: Option<String>,
    /// The device behind it, where it is one (`0000:3b:02.1`): a function of a network card is moved into the namespace.
    pub device: Option<String>,
    /// The index of the interface of the node that what it sends comes in by: its other end.
    pub other_end: Option<u32>,
    /// The index of the interface of the node that it is a part of, where that is so (`macvlan`, `ipvlan`).
    pub part_of: Option<u32>,
}

/// The node's interfaces, and what leads to single addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// By index.
    pub interfaces: BTreeMap<u32, NodeInterface>,
    /// The indices of the interfaces that routes to one address alone lead to, by that address.
    pub routes: BTreeMap<IpAddr, u32>,
}

/// The interfaces of the namespace that the calling thread is in, as the node's.
///
/// # Errors
/// Where there is no netlink.
pub fn node() -> io::Result<Node> {
    block_on(async |handle| {
        let links = links(&handle).await?;
        let interfaces = links.iter().filter_map(|link| {
            let is_ethernet = link.header.link_layer_type == LinkLayerType::Ether;
            Some((link.header.index, NodeInterface { name: name(link)?, is_ethernet }))
        });
        let mut node = Node { interfaces: interfaces.collect(), ..Node::default() };
        for all in [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()] {
            let routes: Vec<RouteMessage> =
                handle.route().get(all).execute().try_collect().await.map_err(io::Error::other)?;
            node.routes.extend(routes.iter().filter_map(route_to_one_address));
        }
        Ok(node)
    })
}

/// Looks into a namespace by a path to it, as [`namespace::look`] does, and at its interfaces that have addresses. What leads to
/// the calling thread's namespace, the node's, is told from what leads elsewhere.
///
/// # Errors
/// Where it has gone, or can't be entered, or there is no netlink.
pub fn look(namespace: Namespace, path: &Path) -> io::Result<(Seen, Vec<Interface>)> {
    let own = File::open(discovery::OWN)?;
    namespace::within(namespace, path, || {
        let mut addresses = namespace::addresses()?;
        let seen = Seen::new(&addresses)?;
        let interfaces = block_on(async |handle| {
            let links = links(&handle).await?;
            // After the links: what is asked for them is given a number here.
            let node = number_of(handle, own.as_fd()).await?;
            Ok(links.iter().filter_map(|link| interface(link, node, &mut addresses)).collect())
        })?;
        Ok((seen, interfaces))
    })
}

/// An interface that has addresses, in a namespace that calls the node's by this number.
fn interface(
    link: &LinkMessage,
    node: Option<i32>,
    addresses: &mut BTreeMap<String, BTreeSet<IpAddr>>,
) -> Option<Interface> {
    let name = name(link)?;
    let addresses = addresses.remove(&name)?;
    let mut interface = Interface { name, addresses, ..Interface::default() };
    let (mut other, mut is_of_node) = (None, false);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Link(index) => other = Some(*index),
            LinkAttribute::LinkNetNsId(number) => is_of_node = Some(*number) == node,
            LinkAttribute::ParentDevName(device) => interface.device = Some(device.clone()),
            LinkAttribute::LinkInfo(infos) => {
                interface.kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    let other = other.filter(|_| is_of_node);
    let pairs = [InfoKind::Veth, InfoKind::Netkit].map(|kind| kind.to_string());
    if interface.kind.as_ref().is_some_and(|kind| pairs.contains(kind)) {
        interface.other_end = other;
    } else {
        interface.part_of = other;
    }
    Some(interface)
}

fn name(link: &LinkMessage) -> Option<String> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })
}

fn route_to_one_address(route: &RouteMessage) -> Option<(IpAddr, u32)> {
    if route.header.kind != RouteType::Unicast {
        return None;
    }
    let (mut to, mut by) = (None, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => to = Some((IpAddr::V4(*ip), 32)),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => to = Some((IpAddr::V6(*ip), 128)),
            RouteAttribute::Oif(index) => by = Some(*index),
            _ => {}
        }
    }
    let (to, length) = to?;
    (route.header.destination_prefix_length == length).then_some((to, by?))
}

async fn links(handle: &Handle) -> io::Result<Vec<LinkMessage>> {
    handle.link().get().execute().try_collect().await.map_err(io::Error::other)
}

/// What the calling thread's namespace calls another one; none where nothing of it is known there.
async fn number_of(mut handle: Handle, other: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    let mut message = NsidMessage::default();
    message.attributes.push(NsidAttribute::Fd(other.as_raw_fd().cast_unsigned()));
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetNsId(message));
    request.header.flags = NLM_F_REQUEST;
    let mut answers = handle.request(request).map_err(io::Error::other)?;
    while let Some(answer) = answers.next().await {
        match answer.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNsId(message)) => {
                return Ok(message.attributes.iter().find_map(|attribute| match attribute {
                    NsidAttribute::Id(number @ 0..) => Some(*number),
                    _ => None,
                }));
            }
            NetlinkPayload::Error(error) => return Err(error.to_io()),
            _ => {}
        }
    }
    Ok(None)
}

/// Runs `work` with a netlink connection of the calling thread's namespace.
fn block_on<R, F: Future<Output = io::Result<R>>>(work: impl FnOnce(Handle) -> F) -> io::Result<R> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        work(handle).await
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: i32 = 3;

    fn link(attributes: Vec<LinkAttribute>) -> Option<Interface> {
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::IfName("eth0".to_owned())];
        message.attributes.extend(attributes);
        let mut addresses =
            BTreeMap::from([("eth0".to_owned(), BTreeSet::from(["10.0.0.1".parse().expect("an address")]))]);
        interface(&message, Some(NODE), &mut addresses)
    }

    fn kind(kind: InfoKind) -> LinkAttribute {
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)])
    }

    #[test]
    fn the_other_end_is_the_nodes_only_where_it_says_so() {
        let of = |kind_of, number| {
            link(vec![kind(kind_of), LinkAttribute::Link(7), LinkAttribute::LinkNetNsId(number)])
                .map(|interface| (interface.other_end, interface.part_of))
        };
        assert_eq!(of(InfoKind::Veth, NODE), Some((Some(7), None)));
        assert_eq!(of(InfoKind::Netkit, NODE), Some((Some(7), None)));
        assert_eq!(of(InfoKind::MacVlan, NODE), Some((None, Some(7))));
        assert_eq!(of(InfoKind::IpVlan, NODE), Some((None, Some(7))));
        for elsewhere in [InfoKind::Veth, InfoKind::MacVlan] {
            assert_eq!(of(elsewhere, NODE + 1), Some((None, None)), "in another namespace");
        }
        // Both ends of it are there.
        let here = link(vec![kind(InfoKind::Veth), LinkAttribute::Link(7)]).expect("it has an address");
        assert_eq!((here.other_end, here.part_of), (None, None));
        let device = link(vec![LinkAttribute::ParentDevName("0000:3b:02.1".to_owned())]).expect("it has an address");
        assert_eq!((device.kind, device.device.as_deref(), device.other_end), (None, Some("0000:3b:02.1"), None));
    }

    #[test]
    fn routes_to_one_address_lead_to_it() {
        let route = |to: [u8; 4], length, kind| {
            let mut route = RouteMessage::default();
            route.header.destination_prefix_length = length;
            route.header.kind = kind;
            route.attributes = vec![RouteAttribute::Destination(RouteAddress::Inet(to.into())), RouteAttribute::Oif(5)];
            route_to_one_address(&route)
        };
        assert_eq!(route([10, 0, 0, 1], 32, RouteType::Unicast), Some(([10, 0, 0, 1].into(), 5)));
        assert_eq!(route([10, 0, 0, 0], 24, RouteType::Unicast), None);
        assert_eq!(route([10, 0, 0, 1], 32, RouteType::Local), None, "the node's own");
    }

    #[test]
    fn a_namespace_looks_at_itself_and_calls_itself_by_no_number_of_another() {
        let own = discovery::own().expect("proc");
        assert!(node().expect("netlink").interfaces.values().any(|interface| interface.name == "lo"));
        // A thread may enter only with CAP_SYS_ADMIN.
        if nix::unistd::geteuid().is_root() {
            let (_, interfaces) = look(own, Path::new(discovery::OWN)).expect("the own one");
            assert!(interfaces.iter().all(|interface| interface.name != "lo"));
        }
    }
}
