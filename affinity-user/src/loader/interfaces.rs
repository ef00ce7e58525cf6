//! The node's interfaces: which of them are clients', which lead outside, and how they come and go.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Instant;

use futures::{StreamExt as _, TryStreamExt as _};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkLayerType, LinkMessage};
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::{Handle, MulticastGroup, new_multicast_connection};
use tokio::sync::mpsc;

/// The host's ends of pods' interfaces, as the usual CNI plugins name them.
pub const DEFAULT_PATTERNS: [&str; 6] = ["veth*", "lxc*", "cali*", "eni*", "azv*", "gke*"];

/// The interfaces by which a node usually talks to what is outside of it, and the overlay devices of CNI plugins that have an
/// Ethernet header.
pub const DEFAULT_UPLINKS: [&str; 8] = ["eth*", "en*", "bond*", "team*", "br-ex", "flannel*", "vxlan*", "genev*"];

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether its packets have an Ethernet header.
    pub is_ethernet: bool,
    /// Its link-layer address; zeroes where it has none of six bytes.
    pub mac: [u8; 6],
}

/// An address of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeAddress {
    /// The index of the interface that has it.
    pub ifindex: u32,
    /// The address.
    pub addr: IpAddr,
    /// Whether packets of others may leave with it: it is there to stay, and no second one of its network.
    pub is_primary: bool,
}

/// What the kernel says of interfaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// These, and no others, are there.
    All(Vec<Interface>),
    /// One is there, new or changed.
    There(Interface),
    /// One has gone.
    Gone(u32),
    /// The addresses of all of them, in the kernel's order, but for those of a link or of the node alone.
    Addresses(Vec<NodeAddress>),
}

/// What is to be done about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Attach to it.
    Attach(Interface),
    /// It is attached to and has another name now.
    Rename(Interface),
    /// Detach from it, or forget it.
    Detach(u32),
    /// Its name matches, but it has no Ethernet header: leave it, and say so.
    Unsupported(Interface),
}

/// What an interface is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Clients of this node are behind it.
    Client,
    /// It leads outside, and to other nodes.
    Uplink,
}

/// Which interfaces are clients', or lead outside, by their names: `*` stands for any text, `?` for a character, and a pattern after `!` takes
/// out what the others matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patterns {
    include: Vec<String>,
    exclude: Vec<String>,
}

impl Patterns {
    /// Those of clients, of patterns as people write them; [`DEFAULT_PATTERNS`] where there is none to include.
    pub fn new<T: AsRef<str>>(patterns: &[T]) -> Self {
        Self::with_default(patterns, &DEFAULT_PATTERNS)
    }

    /// Those that lead outside; [`DEFAULT_UPLINKS`] where there is none to include.
    pub fn of_uplinks<T: AsRef<str>>(patterns: &[T]) -> Self {
        Self::with_default(patterns, &DEFAULT_UPLINKS)
    }

    fn with_default<T: AsRef<str>>(patterns: &[T], default: &[&str]) -> Self {
        let (exclude, mut include): (Vec<String>, Vec<String>) =
            patterns.iter().map(|pattern| pattern.as_ref().to_owned()).partition(|pattern| pattern.starts_with('!'));
        if include.is_empty() {
            include = default.iter().map(|&pattern| pattern.to_owned()).collect();
        }
        Self { include, exclude: exclude.into_iter().map(|pattern| pattern[1..].to_owned()).collect() }
    }

    /// The patterns, as people write them.
    pub fn texts(&self) -> Vec<String> {
        let excluded = self.exclude.iter().map(|pattern| format!("!{pattern}"));
        self.include.iter().cloned().chain(excluded).collect()
    }

    /// Whether an interface of this name is one of them.
    pub fn matches(&self, name: &str) -> bool {
        let any = |patterns: &[String]| patterns.iter().any(|pattern| glob(pattern.as_bytes(), name.as_bytes()));
        any(&self.include) && !any(&self.exclude)
    }
}

/// Whether a name is of a pattern.
fn glob(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => glob(rest, name) || name.split_first().is_some_and(|(_, name)| glob(pattern, name)),
        (Some((b'?', rest)), Some((_, name))) => glob(rest, name),
        (Some((a, rest)), Some((b, name))) => a == b && glob(rest, name),
        _ => false,
    }
}

/// Turns what the kernel says into what is to be done. Pure.
#[derive(Clone, Debug)]
pub struct Follower {
    clients: Patterns,
    uplinks: Patterns,
    known: BTreeMap<u32, Interface>,
    addresses: Vec<NodeAddress>,
}

impl Follower {
    /// Follows the interfaces of these patterns; one that is of both is a client's.
    pub fn new(clients: Patterns, uplinks: Patterns) -> Self {
        Self { clients, uplinks, known: BTreeMap::new(), addresses: Vec::new() }
    }

    /// What an interface is to us, if anything.
    pub fn role(&self, interface: &Interface) -> Option<Role> {
        if self.clients.matches(&interface.name) {
            Some(Role::Client)
        } else {
            self.uplinks.matches(&interface.name).then_some(Role::Uplink)
        }
    }

    /// The uplinks that there are.
    pub fn uplinks(&self) -> impl Iterator<Item = &Interface> {
        self.known.values().filter(|one| one.is_ethernet && self.role(one) == Some(Role::Uplink))
    }

    /// The addresses of the node.
    pub fn addresses(&self) -> &[NodeAddress] {
        &self.addresses
    }

    /// What is to be done about an event.
    pub fn follow(&mut self, event: LinkEvent) -> Vec<Action> {
        match event {
            LinkEvent::All(all) => {
                let gone: Vec<u32> =
                    self.known.keys().copied().filter(|index| all.iter().all(|one| one.index != *index)).collect();
                let gone = gone.into_iter().flat_map(|index| self.forget(index)).collect::<Vec<_>>();
                gone.into_iter().chain(all.into_iter().flat_map(|one| self.see(one)).collect::<Vec<_>>()).collect()
            }
            LinkEvent::There(interface) => self.see(interface),
            LinkEvent::Gone(index) => self.forget(index),
            LinkEvent::Addresses(addresses) => {
                self.addresses = addresses;
                Vec::new()
            }
        }
    }

    /// An attachment has failed: the interface is tried again when it is next seen.
    pub fn retry(&mut self, index: u32) {
        self.known.remove(&index);
    }

    fn wants(&self, interface: &Interface) -> bool {
        interface.is_ethernet && self.role(interface).is_some()
    }

    fn see(&mut self, interface: Interface) -> Vec<Action> {
        let old = self.known.insert(interface.index, interface.clone());
        let had = old.as_ref().is_some_and(|old| self.wants(old));
        match (had, self.wants(&interface)) {
            (false, true) => vec![Action::Attach(interface)],
            (true, false) => vec![Action::Detach(interface.index)],
            (true, true) if old.as_ref().is_some_and(|old| old.name != interface.name) => {
                vec![Action::Rename(interface)]
            }
            (false, false) if old.is_none() && self.role(&interface).is_some() => {
                vec![Action::Unsupported(interface)]
            }
            _ => Vec::new(),
        }
    }

    fn forget(&mut self, index: u32) -> Vec<Action> {
        let had = self.known.remove(&index).is_some_and(|old| self.wants(&old));
        if had { vec![Action::Detach(index)] } else { Vec::new() }
    }
}

/// Sends all addresses and all interfaces, then each change, until nobody listens, with the time at which it was heard of. After a loss of messages (the socket's buffer was full), and
/// now and then anyway, all of them are sent again.
///
/// # Errors
/// Where there is no netlink.
pub async fn watch(events: mpsc::Sender<(Instant, LinkEvent)>) -> std::io::Result<()> {
    /// How often all interfaces are sent again.
    const RESYNC: std::time::Duration = std::time::Duration::from_secs(30);
    // Listening before listing: nothing is missed in between.
    let (connection, handle, mut messages) =
        new_multicast_connection(&[MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr])?;
    tokio::spawn(connection);
    let mut resync = tokio::time::interval(RESYNC);
    loop {
        let event = tokio::select! {
            _ = resync.tick() => {
                if events.send((Instant::now(), addresses(&handle).await?)).await.is_err() {
                    return Ok(());
                }
                let links: Vec<LinkMessage> =
                    handle.link().get().execute().try_collect().await.map_err(std::io::Error::other)?;
                Some(LinkEvent::All(links.iter().filter_map(interface).collect()))
            }
            message = messages.next() => match message {
                None => return Err(std::io::Error::other("the netlink connection has ended")),
                Some((message, _)) => match message.payload {
                    NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => {
                        interface(&link).map(LinkEvent::There)
                    }
                    NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) => {
                        Some(LinkEvent::Gone(link.header.index))
                    }
                    NetlinkPayload::InnerMessage(
                        RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_),
                    ) => Some(addresses(&handle).await?),
                    NetlinkPayload::Overrun(_) => {
                        resync.reset_immediately();
                        None
                    }
                    _ => None,
                },
            },
        };
        if let Some(event) = event
            && events.send((Instant::now(), event)).await.is_err()
        {
            return Ok(());
        }
    }
}

fn interface(link: &LinkMessage) -> Option<Interface> {
    let name = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })?;
    let mac = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(mac) => mac.as_slice().try_into().ok(),
        _ => None,
    });
    Some(Interface {
        index: link.header.index,
        name,
        is_ethernet: link.header.link_layer_type == LinkLayerType::Ether,
        mac: mac.unwrap_or_default(),
    })
}

/// All addresses of the node.
async fn addresses(handle: &Handle) -> std::io::Result<LinkEvent> {
    let messages = handle.address().get().execute().try_collect::<Vec<_>>().await.map_err(std::io::Error::other)?;
    Ok(LinkEvent::Addresses(messages.iter().filter_map(address).collect()))
}

fn address(message: &AddressMessage) -> Option<NodeAddress> {
    let (mut local, mut addr, mut flags) = (None, None, AddressFlags::empty());
    for attribute in &message.attributes {
        match attribute {
            // Of a link between two, the other attribute is the other end's.
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => addr = Some(*ip),
            AddressAttribute::Flags(set) => flags = *set,
            _ => {}
        }
    }
    let addr = local.or(addr)?;
    if !matches!(message.header.scope, AddressScope::Universe | AddressScope::Site) || addr.is_loopback() {
        return None;
    }
    // Of IPv6, a secondary one is temporary (RFC 8981).
    let not = AddressFlags::Secondary | AddressFlags::Deprecated | AddressFlags::Tentative | AddressFlags::Dadfailed;
    Some(NodeAddress { ifindex: message.header.index, addr, is_primary: !flags.intersects(not) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ether(index: u32, name: &str) -> Interface {
        Interface { index, name: name.to_owned(), is_ethernet: true, mac: [2, 0, 0, 0, 0, 1] }
    }

    #[test]
    fn patterns_match_names() {
        let patterns = Patterns::new(&["cli*", "be?", "!cli9*"]);
        for (name, matches) in [
            ("cli0", true),
            ("cli", true),
            ("be1", true),
            ("be10", false),
            ("cli99", false),
            ("eth0", false),
            ("xcli", false),
        ] {
            assert_eq!(patterns.matches(name), matches, "{name}");
        }
        assert!(Patterns::new(&["!veth1"]).matches("veth0"));
        assert!(!Patterns::new(&["!veth1"]).matches("veth1"));
        assert!(!Patterns::new::<&str>(&[]).matches("eth0"));
        assert!(Patterns::new(&["a*b*c"]).matches("a-b-b-c"));
    }

    #[test]
    fn interfaces_are_followed() {
        let mut follower = Follower::new(Patterns::new(&["cli*"]), Patterns::of_uplinks(&["up*"]));
        let all = LinkEvent::All(vec![ether(1, "lo"), ether(2, "cli0"), ether(3, "cli1")]);
        assert_eq!(follower.follow(all.clone()), [Action::Attach(ether(2, "cli0")), Action::Attach(ether(3, "cli1"))]);
        assert_eq!(follower.follow(all), []);
        assert_eq!(follower.follow(LinkEvent::There(ether(2, "cli7"))), [Action::Rename(ether(2, "cli7"))]);
        assert_eq!(follower.follow(LinkEvent::There(ether(2, "eth7"))), [Action::Detach(2)]);
        assert_eq!(follower.follow(LinkEvent::Gone(2)), []);
        assert_eq!(follower.follow(LinkEvent::All(vec![])), [Action::Detach(3)]);
        // The same index comes again, as another interface.
        assert_eq!(follower.follow(LinkEvent::There(ether(3, "cli1"))), [Action::Attach(ether(3, "cli1"))]);
        follower.retry(3);
        assert_eq!(follower.follow(LinkEvent::There(ether(3, "cli1"))), [Action::Attach(ether(3, "cli1"))]);
    }

    #[test]
    fn what_leads_outside_is_attached_to_unless_it_is_a_clients() {
        let mut follower = Follower::new(Patterns::new(&["eth7", "cli*"]), Patterns::of_uplinks::<&str>(&[]));
        let all = [ether(2, "eth0"), ether(3, "eth7"), ether(4, "dummy0"), ether(5, "cli0")];
        let attached = [2, 3, 5].map(|index| all.iter().find(|one| one.index == index).cloned().expect("it"));
        assert_eq!(follower.follow(LinkEvent::All(all.to_vec())), attached.map(Action::Attach));
        assert_eq!(follower.uplinks().map(|one| one.index).collect::<Vec<_>>(), [2]);
        follower.follow(LinkEvent::Gone(2));
        assert_eq!(follower.uplinks().count(), 0);
    }

    #[test]
    fn what_has_no_ethernet_header_is_named_once() {
        let mut follower = Follower::new(Patterns::new(&["tun*"]), Patterns::of_uplinks::<&str>(&[]));
        let tun = Interface { is_ethernet: false, ..ether(5, "tun0") };
        assert_eq!(follower.follow(LinkEvent::There(tun.clone())), [Action::Unsupported(tun.clone())]);
        assert_eq!(follower.follow(LinkEvent::There(tun)), []);
        assert_eq!(follower.follow(LinkEvent::Gone(5)), []);
    }
}
