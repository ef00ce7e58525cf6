//! The node's interfaces: which of them are clients', and how they come and go.

use std::collections::BTreeMap;
use std::time::Instant;

use futures::{StreamExt as _, TryStreamExt as _};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkLayerType, LinkMessage};
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::{MulticastGroup, new_multicast_connection};
use tokio::sync::mpsc;

/// The host's ends of pods' interfaces, as the usual CNI plugins name them.
pub const DEFAULT_PATTERNS: [&str; 6] = ["veth*", "lxc*", "cali*", "eni*", "azv*", "gke*"];

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether its packets have an Ethernet header.
    pub is_ethernet: bool,
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

/// Which interfaces are clients', by their names: `*` stands for any text, `?` for a character, and a pattern after `!` takes
/// out what the others matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patterns {
    include: Vec<String>,
    exclude: Vec<String>,
}

impl Patterns {
    /// Of patterns as people write them; the default ones where there is none to include.
    pub fn new<T: AsRef<str>>(patterns: &[T]) -> Self {
        let (exclude, mut include): (Vec<String>, Vec<String>) =
            patterns.iter().map(|pattern| pattern.as_ref().to_owned()).partition(|pattern| pattern.starts_with('!'));
        if include.is_empty() {
            include = DEFAULT_PATTERNS.map(str::to_owned).to_vec();
        }
        Self { include, exclude: exclude.into_iter().map(|pattern| pattern[1..].to_owned()).collect() }
    }

    /// The patterns, as people write them.
    pub fn texts(&self) -> Vec<String> {
        let excluded = self.exclude.iter().map(|pattern| format!("!{pattern}"));
        self.include.iter().cloned().chain(excluded).collect()
    }

    /// Whether an interface of this name is a client's.
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
    patterns: Patterns,
    known: BTreeMap<u32, Interface>,
}

impl Follower {
    /// Follows the interfaces of these patterns.
    pub fn new(patterns: Patterns) -> Self {
        Self { patterns, known: BTreeMap::new() }
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
        }
    }

    /// An attachment has failed: the interface is tried again when it is next seen.
    pub fn retry(&mut self, index: u32) {
        self.known.remove(&index);
    }

    fn wants(&self, interface: &Interface) -> bool {
        interface.is_ethernet && self.patterns.matches(&interface.name)
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
            (false, false) if old.is_none() && self.patterns.matches(&interface.name) => {
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

/// Sends all interfaces, then each change, until nobody listens, with the time at which it was heard of. After a loss of messages (the socket's buffer was full), and
/// now and then anyway, all of them are sent again.
///
/// # Errors
/// Where there is no netlink.
pub async fn watch(events: mpsc::Sender<(Instant, LinkEvent)>) -> std::io::Result<()> {
    /// How often all interfaces are sent again.
    const RESYNC: std::time::Duration = std::time::Duration::from_secs(30);
    // Listening before listing: nothing is missed in between.
    let (connection, handle, mut messages) = new_multicast_connection(&[MulticastGroup::Link])?;
    tokio::spawn(connection);
    let mut resync = tokio::time::interval(RESYNC);
    loop {
        let event = tokio::select! {
            _ = resync.tick() => {
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
    Some(Interface { index: link.header.index, name, is_ethernet: link.header.link_layer_type == LinkLayerType::Ether })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ether(index: u32, name: &str) -> Interface {
        Interface { index, name: name.to_owned(), is_ethernet: true }
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
        let mut follower = Follower::new(Patterns::new(&["cli*"]));
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
    fn what_has_no_ethernet_header_is_named_once() {
        let mut follower = Follower::new(Patterns::new(&["tun*"]));
        let tun = Interface { is_ethernet: false, ..ether(5, "tun0") };
        assert_eq!(follower.follow(LinkEvent::There(tun.clone())), [Action::Unsupported(tun.clone())]);
        assert_eq!(follower.follow(LinkEvent::There(tun)), []);
        assert_eq!(follower.follow(LinkEvent::Gone(5)), []);
    }
}
