//! `affinity status --pods`, against what pods really do: each is asked for by its own way to a service.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::Duration;

use affinity_tests::cgroup::ThreadCgroup;
use affinity_tests::daemon::{Cli, Daemon, DaemonOptions, SourceDir};
use affinity_tests::netlink::{self, Via};
use affinity_tests::netns::Netns;
use affinity_tests::objects::{Document, Endpoint, ServiceObject, SliceObject};
use affinity_tests::privilege::require_root;
use affinity_tests::process::Process;
use affinity_tests::topology::{self, ETH0, Host, Lab, LabOptions, Node};
use affinity_tests::traffic::{Backend, ClientOptions, http_get};
use affinity_tests::wait;
use anyhow::{Context as _, Result};
use netlink_packet_route::link::MacVlanMode;
use rtnetlink::LinkMacVlan;
use serde_json::{Value, json};
use tempfile::TempDir;

const SECOND: Duration = Duration::from_secs(1);
const POD_PORT: u16 = 8080;
const STICKY: &str = "10.96.0.10:80";
const NODE: &str = "node-1";
/// Of the macvlan pod, and the node's in its network.
const MACVLAN_POD: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 244, 1, 11));
const MACVLAN_GATEWAY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 244, 1, 1));

/// A lab with a service, and a daemon that attaches to all clients but `cli2`, and serves the sockets of this test.
struct Site {
    // In the order in which they are dropped.
    daemon: Daemon,
    _backends: Vec<Backend>,
    lab: Lab,
    source: SourceDir,
    /// Where namespaces are held.
    namespaces: TempDir,
    _cgroup: ThreadCgroup,
}

impl Site {
    fn new() -> Result<Self> {
        require_root();
        let cgroup = ThreadCgroup::enter()?;
        let lab = Lab::new(LabOptions { clients: 4, backends: 2, ..LabOptions::default() })?;
        let backends = lab.backends.iter().map(|host| Backend::start(host, POD_PORT)).collect::<Result<_>>()?;
        let source = SourceDir::new()?;
        let service = ServiceObject::new("sticky").cluster_ip("10.96.0.10").tcp("http", 80, POD_PORT).affinity(600);
        let service = service.change(|spec| spec.internal_traffic_policy = Some("Local".to_owned())).build();
        let mut slice = SliceObject::of("sticky", "1").tcp("http", POD_PORT);
        for host in &lab.backends {
            slice = slice.endpoint(host.ip(), Endpoint::Ready).pod(&host.name);
        }
        let slice = slice.change(|slice| {
            for endpoint in &mut slice.endpoints {
                endpoint.node_name = Some(NODE.to_owned());
            }
        });
        let node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": NODE, "labels": {"topology.kubernetes.io/zone": "zone-a"}},
        });
        source.write("service", &[&service as &dyn Document, &slice.build(), &node])?;
        let namespaces = tempfile::Builder::new().prefix("affinity-netns-").tempdir()?;
        let directory = namespaces.path().display().to_string();
        let mut options = DaemonOptions::new(source.source());
        options.interfaces.push("!cli2".to_owned());
        options.cgroup = Some(cgroup.path().to_owned());
        let options = options.arguments(["--node-name", NODE, "--netns-dir", &directory, "--netns-interval", "1"]);
        let daemon = Daemon::stopped(&lab.node, options)?;
        Ok(Self { daemon, _backends: backends, lab, source, namespaces, _cgroup: cgroup })
    }

    /// Lets the daemon see a namespace, as a CNI plugin does.
    fn hold(&self, name: &str, netns: &Netns) -> Result<()> {
        Ok(symlink(netns.path(), self.namespaces.path().join(name))?)
    }

    /// Pods of this node: name, address, and the annotation `affinity.dev/socket-lb`.
    fn write_pods(&self, pods: &[(&str, IpAddr, Option<&str>)]) -> Result<()> {
        let objects: Vec<Value> = pods.iter().map(|(name, ip, setting)| pod(name, *ip, *setting)).collect();
        let objects: Vec<&dyn Document> = objects.iter().map(|object| object as &dyn Document).collect();
        self.source.write("pods", &objects)
    }

    /// How often a program has ended so.
    fn counted(&self, program: &str, reason: &str) -> Result<u64> {
        self.daemon.cli().counted(|row| row.program == program && row.reason == reason)
    }

    /// By which way a client comes to the service, as its request tells.
    fn comes_by(&self, netns: &Netns) -> Result<&'static str> {
        let chosen = |program: &str| -> Result<u64> {
            Ok(self.counted(program, "affinity-new")? + self.counted(program, "affinity-hit")?)
        };
        let before = (chosen("connect")?, chosen("ingress")?);
        let service: SocketAddr = STICKY.parse()?;
        let answered = http_get(netns, service, &ClientOptions::default().within(SECOND)).is_ok();
        let after = (chosen("connect")?, chosen("ingress")?);
        Ok(match (answered, after.0 - before.0, after.1 - before.1) {
            (true, 1, 0) => "socket",
            (true, 0, 1) => "tc",
            (false, 0, 0) => "none",
            other => anyhow::bail!("{netns:?}: {other:?}"),
        })
    }
}

fn pod(name: &str, ip: IpAddr, setting: Option<&str>) -> Value {
    let annotations = setting.map(|setting| json!({"affinity.dev/socket-lb": setting}));
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}"), "annotations": annotations},
        "spec": {"nodeName": NODE, "containers": []},
        "status": {"podIPs": [{"ip": ip.to_string()}]},
    })
}

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
