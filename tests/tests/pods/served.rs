//! `affinity status --pods`, against what pods really do: each is asked for by its own way to a service.

use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::process::Command;

use affinity_tests::daemon::Cli;
use affinity_tests::netlink::{self, Via};
use affinity_tests::netns::Netns;
use affinity_tests::process::Process;
use affinity_tests::topology::{self, ETH0, Host, Node};
use affinity_tests::wait;
use anyhow::{Context as _, Result};
use netlink_packet_route::link::MacVlanMode;
use rtnetlink::LinkMacVlan;
use serde_json::{Value, json};

use crate::site::{SECOND, Site};

/// Of the macvlan pod, and the node's in its network.
const MACVLAN_POD: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 244, 1, 11));
const MACVLAN_GATEWAY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 244, 1, 1));

/// A pod whose interface is a macvlan on one of the node's; that leads to the node's network by a cable of its own, whose other
/// end is no pod's.
fn macvlan_pod(node: &Node) -> Result<Netns> {
    let (trunk, gateway) = ("trunk0", "trunk1");
    let pod = Netns::new("macvlan")?;
    pod.set_sysctls(&[("net.ipv6.conf.all.disable_ipv6", "1"), ("net.ipv6.conf.default.disable_ipv6", "1")])?;
    topology::join((&node.netns, trunk), (&node.netns, gateway), 1500)?;
    node.netns.netlink(async |handle| {
        let index = netlink::link(&handle, gateway).await?.index;
        netlink::add_address(&handle, index, MACVLAN_GATEWAY, 24).await?;
        let on = netlink::link(&handle, trunk).await?.index;
        let link = LinkMacVlan::new(ETH0, on, MacVlanMode::Bridge).setns_by_fd(pod.as_raw_fd()).build();
        handle.link().add(link).execute().await.context("a macvlan interface (CONFIG_MACVLAN)")
    })?;
    pod.netlink(async |handle| {
        netlink::set_up(&handle, ETH0).await?;
        let index = netlink::link(&handle, ETH0).await?.index;
        netlink::add_address(&handle, index, MACVLAN_POD, 24).await?;
        netlink::add_route(&handle, "0.0.0.0".parse()?, 0, Via::Gateway(MACVLAN_GATEWAY)).await
    })?;
    Ok(pod)
}

/// The row of a pod; none where there is none.
fn row(cli: &Cli, name: &str) -> Result<Option<Value>> {
    let told = cli.json(&["status", "--pods"])?;
    assert_eq!(told["pods_are_known"], Value::Bool(true), "{told}");
    let rows = told["pods"].as_array().context("rows")?;
    Ok(rows.iter().find(|row| row["pod"] == name).cloned())
}

/// Waits until a pod is served as wanted: verdict, and the codes of why not by sockets and by TC.
fn wait_for(cli: &Cli, name: &str, wanted: (&str, Option<&str>, Option<&str>)) -> Result<Value> {
    let mut last = None;
    let found = wait::until(&format!("{name} served by {}", wanted.0), 10 * SECOND, || {
        last = row(cli, name)?;
        let Some(row) = &last else { return Ok(None) };
        let is = (row["served_by"].as_str(), row["socket"]["why"]["code"].as_str(), row["tc"]["why"]["code"].as_str());
        Ok((is == (Some(wanted.0), wanted.1, wanted.2)).then(|| row.clone()))
    });
    found.with_context(|| format!("it is {last:?}"))
}

#[test]
fn each_pod_is_served_as_it_is_said_to_be() -> Result<()> {
    let mut site = Site::new()?;
    let clients: Vec<Host> = site.lab.clients.clone();
    let macvlan = macvlan_pod(&site.lab.node)?;
    for host in &clients {
        site.hold(&host.name, &host.netns)?;
    }
    site.hold("macvlan", &macvlan)?;
    site.write_pods(&[
        ("both", clients[0].ip(), None),
        ("packets", clients[1].ip(), Some("off")),
        ("left-out", clients[2].ip(), Some("off")),
        ("macvlan", MACVLAN_POD, None),
    ])?;
    site.daemon.resume()?;
    let cli = site.daemon.cli().clone();

    let both = wait_for(&cli, "default/both", ("both", None, None))?;
    assert_eq!(both["addresses"], json!([clients[0].ip()]));
    let end = json!([{"interface": "cli0", "ifindex": clients[0].node_ifindex, "mode": "tcx"}]);
    assert_eq!(both["interfaces"], end);
    wait_for(&cli, "default/packets", ("tc", Some("annotation"), None))?;
    let none = wait_for(&cli, "default/left-out", ("none", Some("annotation"), Some("no-pattern")))?;
    assert_eq!(none["tc"]["message"], "cli2 is not one of --interface cli* be* !cli2");
    let socket = wait_for(&cli, "default/macvlan", ("socket", None, Some("no-end")))?;
    assert_eq!(socket["tc"]["message"], "its eth0 is macvlan on trunk0, with no end on the node");
    // A namespace that is no pod's.
    let told = cli.json(&["status", "--pods"])?;
    let path = site.namespaces.path().join(&clients[3].name).display().to_string();
    let nobodys = told["pods"].as_array().context("rows")?.iter().find(|row| row["netns"] == path.as_str()).cloned();
    let nobodys = nobodys.with_context(|| told.to_string())?;
    assert_eq!((&nobodys["pod"], &nobodys["served_by"]), (&Value::Null, &json!("both")));

    // What they really do.
    let ways = [&clients[0].netns, &clients[1].netns, &clients[2].netns, &macvlan].map(|netns| site.comes_by(netns));
    let ways = ways.into_iter().collect::<Result<Vec<_>>>()?;
    assert_eq!(ways, ["socket", "tc", "none", "socket"]);

    // For people, and in words that the other verbs use.
    let table = cli.text(&["status", "--pods"])?;
    assert!(table.starts_with("node: node-1, zone zone-a\n"), "{table}");
    let line = table.lines().find(|line| line.starts_with("default/packets ")).context("a line")?;
    assert!(line.contains(" tc ") && line.contains("cli1 (tcx)") && line.contains("affinity.dev/socket-lb"), "{line}");
    assert!(cli.text(&["status"])?.contains("node: node-1, zone zone-a\n"));
    let policy = cli.json(&["service", "get", "sticky"])?["ports"][0]["internal_traffic_policy"].clone();
    assert_eq!(policy, "Local");
    assert!(cli.text(&["service", "get", "sticky"])?.contains("INTERNAL POLICY"));

    // As it changes.
    site.write_pods(&[
        ("both", clients[0].ip(), Some("off")),
        ("left-out", clients[2].ip(), None),
        ("macvlan", MACVLAN_POD, Some("off")),
    ])?;
    wait_for(&cli, "default/both", ("tc", Some("annotation"), None))?;
    wait_for(&cli, "default/left-out", ("socket", None, Some("no-pattern")))?;
    wait_for(&cli, "default/macvlan", ("none", Some("annotation"), Some("no-end")))?;
    wait::until_true("a pod that is gone from the table", 10 * SECOND, || Ok(row(&cli, "default/packets")?.is_none()))?;
    let ways = [&clients[0].netns, &clients[2].netns, &macvlan].map(|netns| site.comes_by(netns));
    let ways = ways.into_iter().collect::<Result<Vec<_>>>()?;
    assert_eq!(ways, ["tc", "socket", "none"]);
    Ok(())
}

/// Where nobody knows which pods there are it is said so, and their namespaces are told of.
#[test]
fn without_pods_or_without_a_daemon_namespaces_are_told_of() -> Result<()> {
    let mut site = Site::new()?;
    let client = site.lab.clients[0].clone();
    // Nothing but this process holds it.
    let mut command = Command::new("sleep");
    command.arg("600");
    let held = Process::start(command, &client.netns.place(), None)?;
    site.daemon.resume()?;
    let path = format!("/proc/{}/ns/net", held.pid());
    let cli = site.daemon.cli().clone();
    let told = |why: &str| {
        let mut last = Value::Null;
        let told = wait::until_true("the namespace of a process", 10 * SECOND, || {
            last = cli.json(&["status", "--pods"])?;
            let mut rows = last["pods"].as_array().context("rows")?.iter();
            Ok(rows.any(|row| row["netns"] == path.as_str() && row["pod"].is_null() && row["served_by"] == "both"))
        });
        told.with_context(|| last.to_string())?;
        assert_eq!(last["pods_are_known"], Value::Bool(false));
        assert!(last["why_not"].as_str().is_some_and(|text| text.contains(why)), "{last}");
        let table = cli.text(&["status", "--pods"])?;
        assert!(table.contains("is not known: ") && table.contains(why), "{table}");
        anyhow::Ok(())
    };
    told("has no pod of node-1")?;
    site.daemon.terminate()?;
    told("no daemon runs")
}
