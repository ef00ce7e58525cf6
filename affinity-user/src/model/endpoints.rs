//! The endpoints of a slice, packed: there are many, and they are looked at only where their service is planned.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use super::{Endpoint, Hints, Text};
use crate::packed::{Packing, Unpacking, flags};

/// Endpoints in their order.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Endpoints {
    /// Of each its flags, its address, and the name of its pod, where there is one.
    packed: Box<[u8]>,
    /// The nodes of those that have one.
    nodes: Box<[Text]>,
    /// The hints of those that have some, but for those that have what the one before had.
    hints: Box<[Arc<Hints>]>,
}

const READY: u8 = 1;
const SERVING: u8 = 2;
const TERMINATING: u8 = 4;
const IPV6: u8 = 8;
const NODE: u8 = 16;
const TARGET: u8 = 32;
const HINTS: u8 = 64;
const OTHER_HINTS: u8 = 128;

impl Endpoints {
    /// The endpoints one by one.
    pub fn iter(&self) -> Iter<'_> {
        Iter { packed: Unpacking::new(&self.packed), nodes: self.nodes.iter(), hints: self.hints.iter(), last: None }
    }

    /// Whether some of them are known to be on another node than this.
    pub fn are_elsewhere(&self, node: &str) -> bool {
        self.nodes.iter().any(|known| *known != *node)
    }

    /// Forgets which nodes they are on, but for this one.
    pub fn keep_node(&mut self, node: &str) {
        let kept = self.iter().map(|mut endpoint| {
            endpoint.node_name = endpoint.node_name.filter(|known| **known == *node);
            endpoint
        });
        *self = kept.collect();
    }

    /// Whether the node's zone may matter to them.
    pub fn have_zone_hints(&self) -> bool {
        self.hints.iter().any(|hints| !hints.zones.is_empty())
    }
}

impl<'a> IntoIterator for &'a Endpoints {
    type Item = Endpoint;
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        self.iter()
    }
}

impl FromIterator<Endpoint> for Endpoints {
    fn from_iter<I: IntoIterator<Item = Endpoint>>(endpoints: I) -> Self {
        let (mut packing, mut nodes, mut all_hints) = (Packing::default(), Vec::new(), Vec::new());
        for Endpoint { address, ready, serving, terminating, node_name, hints, target } in endpoints {
            let is_other = hints.is_some() && hints.as_ref() != all_hints.last();
            let flags = flags([
                (ready, READY),
                (serving, SERVING),
                (terminating, TERMINATING),
                (address.is_ipv6(), IPV6),
                (node_name.is_some(), NODE),
                (target.is_some(), TARGET),
                (hints.is_some(), HINTS),
                (is_other, OTHER_HINTS),
            ]);
            packing.bytes(&[flags]);
            match address {
                IpAddr::V4(address) => packing.bytes(&address.octets()),
                IpAddr::V6(address) => packing.bytes(&address.octets()),
            }
            nodes.extend(node_name);
            if let Some(target) = target {
                packing.text(&target);
            }
            all_hints.extend(hints.filter(|_| is_other));
        }
        Self { packed: packing.into(), nodes: nodes.into(), hints: all_hints.into() }
    }
}

impl fmt::Debug for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self).finish()
    }
}

/// [`Endpoints`] one by one.
#[derive(Clone)]
pub struct Iter<'a> {
    packed: Unpacking<'a>,
    nodes: std::slice::Iter<'a, Text>,
    hints: std::slice::Iter<'a, Arc<Hints>>,
    last: Option<&'a Arc<Hints>>,
}

impl Iterator for Iter<'_> {
    type Item = Endpoint;

    fn next(&mut self) -> Option<Endpoint> {
        if self.packed.is_over() {
            return None;
        }
        let [flags] = self.packed.bytes();
        let has = |flag| flags & flag != 0;
        let address = if has(IPV6) {
            IpAddr::V6(Ipv6Addr::from(self.packed.bytes::<16>()))
        } else {
            IpAddr::V4(Ipv4Addr::from(self.packed.bytes::<4>()))
        };
        let node_name = if has(NODE) { self.nodes.next().cloned() } else { None };
        let target = has(TARGET).then(|| self.packed.text().into());
        if has(OTHER_HINTS) {
            self.last = self.hints.next();
        }
        Some(Endpoint {
            address,
            ready: has(READY),
            serving: has(SERVING),
            terminating: has(TERMINATING),
            node_name,
            hints: self.last.filter(|_| has(HINTS)).cloned(),
            target,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn endpoint() -> impl Strategy<Value = Endpoint> {
        let zones = prop::collection::vec("[ab]", 0..3);
        let hints = prop::option::of(zones.prop_map(|zones| {
            Arc::new(Hints { nodes: Vec::new(), zones: zones.into_iter().map(Into::into).collect() })
        }));
        let conditions = (any::<bool>(), any::<bool>(), any::<bool>());
        let texts = (prop::option::of("[ab]{0,2}"), prop::option::of("[a-zé]{0,4}"));
        (any::<IpAddr>(), conditions, texts, hints).prop_map(
            |(address, (ready, serving, terminating), (node_name, target), hints)| Endpoint {
                address,
                ready,
                serving,
                terminating,
                node_name: node_name.map(Into::into),
                hints,
                target: target.map(Into::into),
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_packed_is_there(endpoints in prop::collection::vec(endpoint(), 0..8)) {
            let mut packed: Endpoints = endpoints.iter().cloned().collect();
            prop_assert_eq!(packed.iter().collect::<Vec<_>>(), endpoints.clone());
            let zones = endpoints.iter().any(|it| it.hints.as_ref().is_some_and(|hints| !hints.zones.is_empty()));
            prop_assert_eq!(packed.have_zone_hints(), zones);

            prop_assert_eq!(packed.are_elsewhere("a"), endpoints.iter().flat_map(|it| &it.node_name).any(|it| it != "a"));
            packed.keep_node("a");
            prop_assert!(!packed.are_elsewhere("a"));
            let kept = endpoints.into_iter().map(|it| Endpoint { node_name: it.node_name.filter(|it| it == "a"), ..it });
            prop_assert_eq!(packed.iter().collect::<Vec<_>>(), kept.collect::<Vec<_>>());
        }
    }
}
