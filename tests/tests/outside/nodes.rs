//! Two nodes: a router that spreads clients over both, and a node that is a client itself.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use affinity_tests::daemon::{Daemon, DaemonOptions};
use affinity_tests::mountns::MountNs;
use affinity_tests::netlink::{self, Via};
use affinity_tests::netns::Netns;
use affinity_tests::topology::{self, ETH0, NODE_IP, join};
use affinity_tests::traffic::{ClientOptions, http_get};
use anyhow::{Context as _, Result};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteNextHop};
use rtnetlink::RouteMessageBuilder;

use crate::site::{self, SECOND, SECOND_NODE, SECOND_NODE_IP, SPREAD, Site, Wanted, at_home, ip};

/// The router's addresses on its link to the second node.
const ROUTER: [&str; 2] = ["198.51.101.1", "fd00:c6::1"];

/// The second node: it has no pod of its own, so everybody whom it serves is on a pod elsewhere.
fn second_node(site: &Site) -> Result<(topology::Node, Daemon)> {
    let netns = Netns::new(SECOND_NODE)?;
    netns.set_sysctls(&[
        ("net.ipv6.conf.all.accept_dad", "0"),
        ("net.ipv6.conf.default.accept_dad", "0"),
        ("net.ipv4.ip_forward", "1"),
        ("net.ipv4.conf.all.rp_filter", "1"),
        ("net.ipv4.conf.default.rp_filter", "1"),
        ("net.ipv6.conf.all.forwarding", "1"),
    ])?;
    let router = &site.lab.outside.netns;
    join((router, SECOND_NODE), (&netns, ETH0), 1500)?;
    router.netlink(async |handle| {
        let link = netlink::link(&handle, SECOND_NODE).await?.index;
        for (address, prefix) in ROUTER.into_iter().zip([24, 64]) {
            netlink::add_address(&handle, link, ip(address), prefix).await?;
        }
        Ok(())
    })?;
    netns.netlink(async |handle| {
        let eth0 = netlink::link(&handle, ETH0).await?.index;
        for (family, (prefix, any)) in [(24, "0.0.0.0"), (64, "::")].into_iter().enumerate() {
            netlink::add_address(&handle, eth0, ip(SECOND_NODE_IP[family]), prefix).await?;
            netlink::add_route(&handle, ip(any), 0, Via::Gateway(ip(ROUTER[family]))).await?;
        }
        Ok(())
    })?;
    let node = topology::Node { netns, mounts: MountNs::for_node()?, addresses: SECOND_NODE_IP.map(ip).into() };
    let options = DaemonOptions::new(site.source.source()).arguments(["--node-name", SECOND_NODE]);
    let daemon = Daemon::start(&node, options)?;
    Ok((node, daemon))
}

/// Has the router spread connections to [`SPREAD`] over both nodes, by their addresses and ports.
fn spread(site: &Site) -> Result<()> {
    let router = &site.lab.outside.netns;
    router.set_sysctls(&[("net.ipv4.fib_multipath_hash_policy", "1"), ("net.ipv6.fib_multipath_hash_policy", "1")])?;
    let hop = |gateway| {
        let mut hop = RouteNextHop::default();
        hop.attributes.push(RouteAttribute::Gateway(RouteAddress::from(gateway)));
        hop
    };
    router.netlink(async |handle| {
        for (family, prefix) in [32, 128].into_iter().enumerate() {
            let hops = [NODE_IP[family], ip(SECOND_NODE_IP[family])].map(hop);
            let route = RouteMessageBuilder::<std::net::IpAddr>::new()
                .destination_prefix(ip(SPREAD[family]), prefix)?
                .multipath(hops.into());
            handle.route().add(route.build()).execute().await.context("adding a route of two ways")?;
        }
        Ok(())
    })
}

/// How many connections of clients a node has given a pod.
fn given(daemon: &Daemon) -> Result<u64> {
    daemon.cli().counted(|row| row.reason.starts_with("affinity-"))
}

/// Both nodes choose alike, though nothing is shared: the hash of client and service is the same.
#[test]
fn a_router_may_spread_a_client_over_nodes() -> Result<()> {
    const CLIENTS: u16 = 24;
    const CONNECTIONS: usize = 12;
    let site = Site::new(Wanted::default())?;
    let (_node, second) = second_node(&site)?;
    spread(&site)?;
    let home = site::home(&site.lab.outside.netns, CLIENTS, 1_500)?;
    for (family, spread) in SPREAD.into_iter().enumerate() {
        let before = [given(&site.daemon)?, given(&second)?];
        let frontend = SocketAddr::new(ip(spread), 80);
        let mut used = BTreeSet::new();
        for number in 0..CLIENTS {
            let source = Some(SocketAddr::new(at_home(family, number), 0));
            let options = ClientOptions { source, ..ClientOptions::default().within(3 * SECOND) };
            let pods: BTreeSet<String> = (0..CONNECTIONS)
                .map(|_| {
                    let answer = http_get(&home.netns, frontend, &options);
                    let logs = || format!("{}\nthe second node:\n{}", site.daemon.log(), second.log());
                    Ok(answer.with_context(logs)?.backend)
                })
                .collect::<Result<_>>()?;
            assert_eq!(pods.len(), 1, "client {number} came to {pods:?}");
            used.extend(pods);
        }
        assert_eq!(used.len(), 2, "clients are on both pods");
        let all = u64::from(CLIENTS) * CONNECTIONS as u64;
        let each = [given(&site.daemon)? - before[0], given(&second)? - before[1]];
        assert!(each.iter().all(|given| *given > all / 4), "the router has spread them: {each:?} of {all}");
    }
    Ok(())
}

/// A node goes to another one's node port, and to what is routed to that one, as anybody outside does.
#[test]
fn a_node_is_a_client_as_any_other() -> Result<()> {
    let site = Site::new(Wanted::default())?;
    let (node, _daemon) = second_node(&site)?;
    for family in [0, 1] {
        let own = SocketAddr::new(ip(SECOND_NODE_IP[family]), 0);
        let options = ClientOptions { source: Some(own), ..ClientOptions::default().within(3 * SECOND) };
        let mut pods = BTreeSet::new();
        for frontend in Site::frontends(family) {
            for _ in 0..5 {
                let answer = http_get(&node.netns, frontend, &options);
                let answer = answer.with_context(|| format!("{frontend}: {}", site.daemon.log()))?;
                site.check(&answer, own.ip(), frontend);
                pods.insert(answer.backend);
            }
        }
        assert_eq!(pods.len(), 1, "{pods:?}");
    }
    Ok(())
}
