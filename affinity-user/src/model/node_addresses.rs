//! The node's own addresses, and which of them have node ports.

use std::{collections::BTreeSet, net::IpAddr, str::FromStr};

use ipnet::IpNet;
use thiserror::Error;

/// Some of a node's addresses: a value of `--nodeport-addresses`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// The Node's first `InternalIP` of each family.
    Primary,
    /// Every address of the node.
    All,
    /// Those in a range.
    Within(IpNet),
}

/// A text that names none of a node's addresses.
#[derive(Debug, Error)]
#[error("{0:?} is neither primary nor all, and no CIDR such as 192.168.0.0/16")]
pub struct NoNodePortAddresses(String);

impl FromStr for NodePortAddresses {
    type Err = NoNodePortAddresses;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "primary" => Ok(Self::Primary),
            "all" => Ok(Self::All),
            _ => text.parse().map(Self::Within).map_err(|_| NoNodePortAddresses(text.to_owned())),
        }
    }
}

/// A node's addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NodeAddresses {
    /// Which of them have node ports: all that one of these names.
    settings: Vec<NodePortAddresses>,
    /// Those of its interfaces.
    own: BTreeSet<IpAddr>,
    /// Those that its Node has as `InternalIP`, in their order.
    internal: Vec<IpAddr>,
    /// Those with node ports.
    node_ports: BTreeSet<IpAddr>,
}

impl Default for NodeAddresses {
    fn default() -> Self {
        Self {
            settings: vec![NodePortAddresses::Primary],
            own: BTreeSet::new(),
            internal: Vec::new(),
            node_ports: BTreeSet::new(),
        }
    }
}

impl NodeAddresses {
    /// The same with other settings.
    pub fn with_settings(self, settings: Vec<NodePortAddresses>) -> Self {
        Self { settings, ..self }.settled()
    }

    /// The same with other interfaces.
    pub fn with_own(self, own: BTreeSet<IpAddr>) -> Self {
        Self { own, ..self }.settled()
    }

    /// The same with another Node.
    pub fn with_internal(self, internal: Vec<IpAddr>) -> Self {
        Self { internal, ..self }.settled()
    }

    fn settled(mut self) -> Self {
        let Self { settings, own, internal, .. } = &self;
        let first = |is_v4: bool| internal.iter().copied().find(|addr| addr.is_ipv4() == is_v4);
        let named = settings.iter().flat_map(|setting| -> Vec<IpAddr> {
            match setting {
                NodePortAddresses::Primary => [first(true), first(false)].into_iter().flatten().collect(),
                NodePortAddresses::All => own.iter().copied().collect(),
                NodePortAddresses::Within(range) => own.iter().copied().filter(|addr| range.contains(addr)).collect(),
            }
        });
        self.node_ports = named.filter(|addr| is_reachable(*addr)).collect();
        self
    }

    /// Those that have node ports.
    pub fn node_ports(&self) -> &BTreeSet<IpAddr> {
        &self.node_ports
    }

    /// All of them; some of them twice.
    pub fn all(&self) -> impl Iterator<Item = IpAddr> {
        self.own.iter().chain(&self.internal).copied()
    }

    /// Whether an address is the node's.
    pub fn has(&self, addr: IpAddr) -> bool {
        self.own.contains(&addr) || self.internal.contains(&addr)
    }
}

/// Whether others than the node can have it as their destination, by any way.
fn is_reachable(addr: IpAddr) -> bool {
    let is_link_local = match addr {
        IpAddr::V4(addr) => addr.is_link_local(),
        IpAddr::V6(addr) => addr.is_unicast_link_local(),
    };
    !addr.is_loopback() && !is_link_local && !addr.is_unspecified() && !addr.is_multicast()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_ports_are_at_the_addresses_that_are_named() {
        const OWN: [&str; 7] = ["127.0.0.1", "::1", "169.254.1.1", "fe80::1", "192.168.1.5", "10.9.0.1", "fd00::5"];
        const INTERNAL: [&str; 4] = ["192.168.1.5", "192.168.1.6", "fd00::5", "fd00::6"];
        let parse =
            |texts: &[&str]| texts.iter().map(|text| text.parse().expect("an address")).collect::<Vec<IpAddr>>();
        for (settings, expected) in [
            (&["primary"][..], &["192.168.1.5", "fd00::5"][..]),
            (&["all"], &["10.9.0.1", "192.168.1.5", "fd00::5"]),
            (&["192.168.0.0/16"], &["192.168.1.5"]),
            (&["127.0.0.0/8", "fe80::/10", "::/0"], &["fd00::5"]),
            (&["primary", "10.9.0.0/24"], &["10.9.0.1", "192.168.1.5", "fd00::5"]),
            (&["172.16.0.0/12"], &[]),
        ] {
            let settings = settings.iter().map(|text| text.parse().expect("a setting")).collect();
            let addresses = NodeAddresses::default().with_own(parse(&OWN).into_iter().collect());
            let addresses = addresses.with_internal(parse(&INTERNAL)).with_settings(settings);
            assert_eq!(addresses.node_ports().iter().copied().collect::<Vec<_>>(), parse(expected));
        }
        assert!("secondary".parse::<NodePortAddresses>().is_err());
        assert!("10.0.0.1".parse::<NodePortAddresses>().is_err());
    }
}
