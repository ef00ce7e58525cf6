//! Who the sockets of a network namespace are: one address of a family is one client. Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;

use affinity_common::abi::netns::{NODE, NetnsClient, TC_ONLY};
use affinity_common::family::Family;

/// What is known of a namespace beside its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// The node's own, with the addresses that routing gives packets to the world outside. Its sockets are never left to TC,
    /// which does not see their packets.
    Node {
        /// As far as there is a route.
        routed: Vec<IpAddr>,
    },
    /// A pod's, or whoever's.
    Pod,
    /// One whose sockets are to be left to TC.
    Excluded,
}

/// The client that a namespace's sockets are; `None` where it has no address of the family.
pub fn client<F: Family>(role: &Role, addresses: &BTreeSet<IpAddr>) -> Option<NetnsClient<F>> {
    let of_family = || addresses.iter().filter_map(|address| F::from_ip(*address));
    let first = of_family().next();
    match role {
        Role::Node { routed } => {
            let addr = routed.iter().find_map(|address| F::from_ip(*address)).or(first)?;
            Some(NetnsClient { addr, flags: NODE })
        }
        // Several addresses are no one identity: at TC each packet has its own.
        Role::Pod => Some(NetnsClient { addr: first?, flags: if of_family().count() > 1 { TC_ONLY } else { 0 } }),
        Role::Excluded => Some(NetnsClient { addr: first?, flags: TC_ONLY }),
    }
}

#[cfg(test)]
mod tests {
    use affinity_common::family::{V4, V6};

    use super::*;

    fn addresses(of: &[&str]) -> BTreeSet<IpAddr> {
        of.iter().map(|address| address.parse().expect("an address")).collect()
    }

    fn v4(role: &Role, of: &[&str]) -> Option<(String, u32)> {
        client::<V4>(role, &addresses(of)).map(|client| (V4::to_ip(&client.addr).to_string(), client.flags))
    }

    #[test]
    fn one_address_is_one_client_and_several_are_left_to_tc() {
        let named = |name: &str, flags| Some((name.to_owned(), flags));
        assert_eq!(v4(&Role::Pod, &[]), None);
        assert_eq!(v4(&Role::Pod, &["fd00::1"]), None);
        assert_eq!(v4(&Role::Pod, &["10.0.0.1", "fd00::1"]), named("10.0.0.1", 0));
        assert_eq!(v4(&Role::Pod, &["10.0.0.2", "10.0.0.1"]), named("10.0.0.1", TC_ONLY));
        assert_eq!(v4(&Role::Excluded, &["10.0.0.1"]), named("10.0.0.1", TC_ONLY));
        let node = Role::Node { routed: vec!["10.0.0.2".parse().expect("an address")] };
        assert_eq!(v4(&node, &["10.0.0.1", "10.0.0.2"]), named("10.0.0.2", NODE));
        assert_eq!(v4(&Role::Node { routed: Vec::new() }, &["10.0.0.1", "10.0.0.2"]), named("10.0.0.1", NODE));
    }

    #[test]
    fn families_have_identities_of_their_own() {
        let both = addresses(&["10.0.0.1", "fd00::1", "fd00::2"]);
        assert_eq!(client::<V4>(&Role::Pod, &both).map(|client| client.flags), Some(0));
        assert_eq!(client::<V6>(&Role::Pod, &both).map(|client| client.flags), Some(TC_ONLY));
    }
}
