//! By which way each pod of the node is served, and why not by the other. [`look`] looks at the node; the rest is pure.
//!
//! What is told is what the datapath has: the entries of `netns_*` and the attached programs. What pods and the daemon want
//! only says why.

mod look;
#[cfg(test)]
mod tests;
mod why;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::Serialize;

use crate::loader::attach::Mode;
use crate::loader::interfaces::Patterns;
use crate::sockets::pods::{self, Sight};
use crate::sockets::wiring::{Interface, Node};
use crate::status::PodStatus;

pub use look::{LookError, look};
pub use why::{FamilyName, Why};

/// By which ways a pod is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ServedBy {
    /// Its sockets where they connect, and what else it sends by its packets.
    Both,
    /// Its sockets alone.
    Socket,
    /// Its packets alone.
    Tc,
    /// By none: it reaches no service by this proxy.
    None,
}

impl ServedBy {
    const fn new(socket: bool, tc: bool) -> Self {
        match (socket, tc) {
            (true, true) => Self::Both,
            (true, false) => Self::Socket,
            (false, true) => Self::Tc,
            (false, false) => Self::None,
        }
    }

    /// The name for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Both => "both",
            Self::Socket => "socket",
            Self::Tc => "tc",
            Self::None => "none",
        }
    }
}

/// One of the two ways.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Way {
    /// Whether the pod is served by it, at least in one of its families and on one of its interfaces.
    pub served: bool,
    /// Why it is not, or not in all of them.
    pub why: Option<Why>,
    /// That, for people.
    pub message: Option<String>,
}

impl Way {
    fn new(served: bool, why: Option<Why>) -> Self {
        Self { served, message: why.as_ref().map(ToString::to_string), why }
    }

    fn not(why: Why) -> Self {
        Self::new(false, Some(why))
    }
}

/// An interface of the node that leads to a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NodeEnd {
    /// Its name.
    pub interface: String,
    /// Its index.
    pub ifindex: u32,
    /// How the programs are attached to it, if they are.
    pub mode: Option<Mode>,
}

/// A pod of the node, or a network namespace that is no known pod's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PodRow {
    /// `namespace/name`; none for a network namespace of which it is not known whose it is.
    pub pod: Option<String>,
    /// A path to its network namespace, where that was seen; none in the node's own.
    pub netns: Option<String>,
    /// Its addresses: by its status, or those that were seen.
    pub addresses: Vec<IpAddr>,
    /// The verdict.
    pub served_by: ServedBy,
    /// By its sockets.
    pub socket: Way,
    /// By its packets.
    pub tc: Way,
    /// What leads to it.
    pub interfaces: Vec<NodeEnd>,
}

/// What was seen of a network namespace that is not the node's own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamespaceView {
    /// A path to it.
    pub path: String,
    /// Its addresses, and whose processes are in it.
    pub sight: Sight,
    /// The families in which `netns_*` has an entry of it, with whether that leaves its sockets to TC.
    pub clients: BTreeMap<FamilyName, bool>,
    /// Its interfaces that have addresses.
    pub interfaces: Vec<Interface>,
}

/// What was seen of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeView {
    /// Whether programs of sockets are attached.
    pub sockets: bool,
    /// The pods of the node; none where nobody knows them.
    pub pods: Option<Vec<PodStatus>>,
    /// Whether the sockets of pods that say nothing are served.
    pub pods_are_served: bool,
    /// The patterns of clients' interfaces, where there is a daemon that has said so.
    pub patterns: Option<Vec<String>>,
    /// The families in which `netns_*` has an entry of the node's own namespace, as of others.
    pub own: BTreeMap<FamilyName, bool>,
    /// The other ones.
    pub namespaces: Vec<NamespaceView>,
    /// The node's interfaces.
    pub node: Node,
    /// How programs are attached, by the interface's index.
    pub attached: BTreeMap<u32, Mode>,
    /// Why they could not be, by the interface's name.
    pub failed: BTreeMap<String, String>,
    /// Namespaces that could not be looked into, and why.
    pub problems: Vec<String>,
}

impl NodeView {
    /// The pods by name, then the network namespaces that have addresses and are no known pod's, by path.
    pub fn rows(&self) -> Vec<PodRow> {
        let all = self.pods.as_deref().unwrap_or_default();
        let (on_node, own): (Vec<_>, Vec<_>) = all.iter().partition(|pod| pod.host_network);
        let known: Vec<_> = own.iter().map(|pod| (&*pod.uid, &*pod.addresses)).collect();
        let owners: Vec<_> = self.namespaces.iter().map(|one| pods::whose(&one.sight, &known)).collect();
        let mut rows: Vec<_> = on_node.into_iter().map(|pod| self.on_node(pod)).collect();
        for (at, pod) in own.into_iter().enumerate() {
            let mut of_pod =
                self.namespaces.iter().zip(&owners).filter(|(_, owner)| **owner == Some(at)).map(|(one, _)| one);
            // A pod may have made further ones, which have no address of its own.
            let first = of_pod.clone().find(|one| pod.addresses.iter().any(|ip| one.sight.addresses.contains(ip)));
            rows.push(self.row(Some(pod), first.or_else(|| of_pod.next())));
        }
        rows.sort_by(|a, b| a.pod.cmp(&b.pod));
        let nobodys = self
            .namespaces
            .iter()
            .zip(&owners)
            .filter(|(one, owner)| owner.is_none() && !one.sight.addresses.is_empty());
        let mut nobodys: Vec<_> = nobodys.map(|(one, _)| self.row(None, Some(one))).collect();
        nobodys.sort_by(|a, b| a.netns.cmp(&b.netns));
        rows.extend(nobodys);
        rows
    }

    fn on_node(&self, pod: &PodStatus) -> PodRow {
        let socket = self.socket(&pod.addresses, &self.own, |_| Why::MayBeAnother);
        let tc = Way::not(Why::HostNetwork);
        PodRow {
            pod: Some(pod.name.clone()),
            netns: None,
            addresses: pod.addresses.clone(),
            served_by: ServedBy::new(socket.served, tc.served),
            socket,
            tc,
            interfaces: Vec::new(),
        }
    }

    fn row(&self, pod: Option<&PodStatus>, namespace: Option<&NamespaceView>) -> PodRow {
        let mut addresses = pod.map(|pod| pod.addresses.clone()).unwrap_or_default();
        if addresses.is_empty() {
            addresses = namespace.into_iter().flat_map(|one| &one.sight.addresses).copied().collect();
        }
        let (socket, tc, interfaces);
        if addresses.is_empty() {
            (socket, tc, interfaces) = (Way::not(Why::NoAddress), Way::not(Why::NoAddress), Vec::new());
        } else if let Some(namespace) = namespace {
            socket = self.socket(&addresses, &namespace.clients, |family| self.why_left(pod, namespace, family));
            (tc, interfaces) = self.tc(namespace.ends(&addresses), Why::NoAddress);
        } else {
            socket = Way::not(if self.sockets { Why::NamespaceNotSeen } else { Why::SocketsOff });
            let routed: BTreeSet<u32> = addresses.iter().filter_map(|ip| self.node.routes.get(ip)).copied().collect();
            (tc, interfaces) = self.tc(routed.into_iter().map(Ok), Why::NamespaceNotSeen);
        }
        PodRow {
            pod: pod.map(|pod| pod.name.clone()),
            netns: namespace.map(|one| one.path.clone()),
            addresses,
            served_by: ServedBy::new(socket.served, tc.served),
            socket,
            tc,
            interfaces,
        }
    }

    /// Whether sockets of these addresses are served, by the entries of their namespace.
    fn socket(
        &self,
        addresses: &[IpAddr],
        clients: &BTreeMap<FamilyName, bool>,
        why_left: impl Fn(FamilyName) -> Why,
    ) -> Way {
        if !self.sockets {
            return Way::not(Why::SocketsOff);
        }
        let families: BTreeSet<FamilyName> = addresses.iter().copied().map(FamilyName::from).collect();
        let (mut served, mut why) = (false, None);
        for family in families {
            match clients.get(&family) {
                Some(false) => served = true,
                Some(true) => drop(why.get_or_insert(why_left(family))),
                None => drop(why.get_or_insert(Why::NamespaceNotKnown { family })),
            }
        }
        Way::new(served, why)
    }

    /// Why the entry of a namespace leaves its sockets to TC.
    fn why_left(&self, pod: Option<&PodStatus>, namespace: &NamespaceView, family: FamilyName) -> Why {
        let several = namespace.sight.addresses.iter().filter(|ip| FamilyName::from(**ip) == family).count() > 1;
        match pod.and_then(|pod| pod.socket_lb) {
            Some(false) => Why::Annotation,
            None if !self.pods_are_served => Why::PodsOff,
            _ if several => Why::SeveralAddresses { family },
            _ => Why::MayBeAnother,
        }
    }

    /// Whether what comes in by a pod's ends on the node is served; and why not, where it has none.
    fn tc(&self, ends: impl Iterator<Item = Result<u32, Interface>>, without: Why) -> (Way, Vec<NodeEnd>) {
        let (mut served, mut why, mut found) = (false, None, Vec::new());
        for end in ends {
            let index = match end {
                Ok(index) => index,
                Err(interface) => {
                    why.get_or_insert(self.no_end(interface));
                    continue;
                }
            };
            let seen = self.node.interfaces.get(&index);
            let name = seen.map_or_else(|| format!("the interface with the index {index}"), |one| one.name.clone());
            let mode = self.attached.get(&index).copied();
            if mode.is_some() {
                served = true;
            } else {
                why.get_or_insert(self.why_not_attached(&name, seen.is_none_or(|one| one.is_ethernet)));
            }
            found.push(NodeEnd { interface: name, ifindex: index, mode });
        }
        let why = why.or((!served).then_some(without));
        (Way::new(served, why), found)
    }

    fn no_end(&self, interface: Interface) -> Why {
        let Interface { name, kind, device, part_of, .. } = interface;
        let part_of = part_of.and_then(|index| self.node.interfaces.get(&index)).map(|one| one.name.clone());
        Why::NoEnd { interface: name, kind, part_of, device }
    }

    fn why_not_attached(&self, name: &str, is_ethernet: bool) -> Why {
        let interface = name.to_owned();
        let patterns = self.patterns.as_ref().map(|patterns| Patterns::new(patterns));
        match patterns {
            Some(patterns) if !patterns.matches(name) => Why::NoPattern { interface, patterns: patterns.texts() },
            _ if !is_ethernet => Why::NoEthernet { interface },
            _ => match self.failed.get(name) {
                Some(error) => Why::Failed { interface, error: error.clone() },
                None => Why::NotAttached { interface },
            },
        }
    }
}

impl NamespaceView {
    /// The ends on the node of the interfaces that have one of these addresses, or of all where none has: each the index of
    /// an interface of the node, or what has none.
    fn ends(&self, addresses: &[IpAddr]) -> impl Iterator<Item = Result<u32, Interface>> {
        let has = |interface: &Interface| addresses.iter().any(|ip| interface.addresses.contains(ip));
        let any = self.interfaces.iter().any(has);
        let meant = self.interfaces.iter().filter(move |interface| !any || has(interface));
        meant.map(|interface| interface.other_end.ok_or_else(|| interface.clone()))
    }
}
