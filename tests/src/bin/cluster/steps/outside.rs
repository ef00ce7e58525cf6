//! The story that load balancers' services are for: people outside of the cluster, each kept on one pod, whatever happens to
//! that pod, and to the node that answers for the address.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

use super::{World, pod_of, rest};
use crate::client::{Client, Running};
use crate::lab::{DEMO, Lab, NODES, SYSTEM, eventually};
use crate::load::Question;
use crate::suite::{Figures, Observed};

/// The service, of tests/cluster/outside.
const SERVICE: &str = "web-outside";
/// How many requests each client makes at a time.
const MANY: u64 = 1_000;
const FEW: u64 = 100;
/// How long a node may be away until another one answers for its addresses: `--lease-duration` (15 s) from its last renewal, the
/// attempt of a client that was under way then, and a machine with much else to do.
const TAKEOVER: Duration = Duration::from_secs(30);

/// A process in a machine outside, by which it is a client as pods are.
struct Outsider {
    client: Client,
    process: Child,
}

impl Outsider {
    fn new(machine: &str) -> Result<Self> {
        let netns = format!("--net=/run/netns/affinity-{machine}");
        let mut command = Command::new("nsenter");
        command.args([&netns, "sleep", "infinity"]).stdin(Stdio::null()).stdout(Stdio::null());
        let process = command.spawn().with_context(|| format!("a process in {machine}"))?;
        let client = Client { name: machine.to_owned(), pid: process.id(), is_host: false };
        // It is there when it is no nsenter any more.
        let comm = format!("/proc/{}/comm", process.id());
        eventually(machine, || Ok((fs::read_to_string(&comm)?.trim() == "sleep").then_some(())))?;
        Ok(Self { client, process })
    }
}

impl Drop for Outsider {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What `affinity announce list` says of an address.
#[derive(Debug, Deserialize)]
struct Announced {
    address: IpAddr,
    service: String,
    node: Option<String>,
}

/// How people outside reach the service.
struct Ways {
    /// By the addresses that the pool gave it, one a family.
    balancer: Vec<SocketAddr>,
    /// By a port of each node.
    node_port: Vec<SocketAddr>,
}

impl Ways {
    fn of(lab: &Lab) -> Result<Self> {
        let service: Value = eventually("two addresses of the load balancer's", || {
            let service: Value =
                serde_json::from_str(&lab.kubectl(&["get", "service", "-n", DEMO, SERVICE, "-o", "json"])?)?;
            let given = service["status"]["loadBalancer"]["ingress"].as_array().map_or(0, Vec::len);
            Ok((given == 2).then_some(service))
        })?;
        let ingress = service["status"]["loadBalancer"]["ingress"].as_array().context("ingress")?;
        let addresses = ingress.iter().filter_map(|one| one["ip"].as_str()?.parse::<IpAddr>().ok());
        let balancer: Vec<_> = addresses.map(|address| SocketAddr::new(address, 80)).collect();
        ensure!(balancer.len() == 2, "{ingress:?}");
        let port = service["spec"]["ports"][0]["nodePort"].as_u64().context("a node port")?;
        let port = u16::try_from(port)?;
        let nodes = ["198.51.100.11", "198.51.100.12", "fd00:c5::11", "fd00:c5::12"];
        let node_port = nodes.map(|node| node.parse().map(|node: IpAddr| SocketAddr::new(node, port)));
        Ok(Self { balancer, node_port: node_port.into_iter().collect::<Result<_, _>>()? })
    }
}

/// Who answers for the service's addresses, once each has somebody, as a node knows it.
fn announced(lab: &Lab, asked: &str) -> Result<Vec<Announced>> {
    eventually("a node that answers for each address", || {
        let rows: Vec<Announced> = lab.affinity(asked, &["announce", "list"])?;
        let rows: Vec<_> = rows.into_iter().filter(|row| row.service == format!("{DEMO}/{SERVICE}")).collect();
        Ok((rows.len() == 2 && rows.iter().all(|row| row.node.is_some())).then_some(rows))
    })
}

/// Has each client ask by each way, and each be on one pod by all of them.
fn one_pod_each(clients: &[&Client], servers: &[SocketAddr], count: u64) -> Result<Observed> {
    let mut observed = Observed::default();
    for client in clients {
        for question in [Question::Http, Question::Udp] {
            let mut pods = BTreeSet::new();
            for server in servers {
                let seen = client.ask(question, *server, count)?;
                pods.extend(seen.pods.keys().cloned());
                observed.note(format!("{} {question:?} {server}", client.name), seen);
            }
            // The families are two identities.
            ensure!(pods.len() <= 2, "{} came by {question:?} to {pods:?}", client.name);
        }
    }
    observed.none_failed()?;
    observed.moved_at_most(0)?;
    Ok(observed)
}

/// The service's manifests.
const MANIFESTS: &str = "tests/cluster/outside";

fn outsiders() -> Result<[Outsider; 2]> {
    Ok([Outsider::new("client")?, Outsider::new("client2")?])
}

/// Waits until somebody has had an answer by each address.
fn answered(client: &Client, servers: &[SocketAddr]) -> Result<()> {
    for server in servers {
        let answer = || Ok(client.ask(Question::Http, *server, 1)?.pod().map(drop));
        eventually(&format!("an answer by {server}"), answer)?;
    }
    Ok(())
}

/// People outside who ask by each node's port without end, on connections of their own, and on ones that they keep. (Not by
/// datagrams, which nobody sends again: the version that is upgraded from forgets what its uplinks are for a moment as it starts.)
pub struct Visitors {
    running: Vec<Running>,
    _outsiders: [Outsider; 2],
}

impl Visitors {
    pub fn start(lab: &Lab) -> Result<Self> {
        lab.kubectl(&["apply", "-k", MANIFESTS])?;
        let outsiders = outsiders()?;
        let servers = Ways::of(lab)?.node_port;
        answered(&outsiders[0].client, &servers)?;
        let mut running = Vec::new();
        for Outsider { client, .. } in &outsiders {
            for server in &servers {
                for question in [Question::Http, Question::KeptHttp] {
                    running.push(client.start(question, *server)?);
                }
            }
        }
        Ok(Self { running, _outsiders: outsiders })
    }

    /// Has them go; nobody has missed an answer, and nobody has moved.
    pub fn stop(self, lab: &Lab, when: &str) -> Result<Observed> {
        let observed = observe(self.running, when)?;
        lab.kubectl(&["delete", "-k", MANIFESTS])?;
        observed.none_failed().context("outside")?;
        observed.moved_at_most(0).context("outside")?;
        Ok(observed)
    }
}

/// All of it, in the order in which a person would try it.
pub fn story(world: &World<'_>) -> Result<Figures> {
    let lab = world.lab;
    lab.kubectl(&["apply", "-k", MANIFESTS])?;
    let outsiders = outsiders()?;
    let clients = [&outsiders[0].client, &outsiders[1].client];
    let ways = Ways::of(lab)?;
    let mut story = Story { world, ways, clients, all: Observed::default(), lines: Vec::new() };
    story.one_pod_each().context("one pod each")?;
    story.daemon_leaves().context("as the daemon of the node that answers left")?;
    story.node_is_cut_off().context("as the node that answers was cut off")?;
    story.pod_deleted().context("as a pod was deleted")?;
    story.source_ranges().context("with source ranges")?;
    story.node_drained().context("as a node was drained")?;
    story.local().context("with externalTrafficPolicy: Local")?;
    lab.kubectl(&["delete", "-k", MANIFESTS])?;
    Ok(story.all.figures(&story.lines.join("; ")))
}

struct Story<'a> {
    world: &'a World<'a>,
    ways: Ways,
    clients: [&'a Client; 2],
    all: Observed,
    /// What is told of it.
    lines: Vec<String>,
}

impl<'a> Story<'a> {
    fn lab(&self) -> &'a Lab {
        self.world.lab
    }

    fn patch(&self, spec: &str) -> Result<()> {
        let patch = format!(r#"{{"spec": {{{spec}}}}}"#);
        self.lab().kubectl(&["patch", "service", "-n", DEMO, SERVICE, "-p", &patch]).map(drop)
    }

    /// The node that answers for an address, as another one knows it, or any.
    fn holder(&self, server: SocketAddr, asked: &str) -> Result<String> {
        let rows = announced(self.lab(), asked)?;
        let row = rows.into_iter().find(|row| row.address == server.ip());
        row.and_then(|row| row.node).with_context(|| format!("nobody answers for {server}"))
    }

    /// Both clients ask the load balancer's first address without end.
    fn start(&self) -> Result<Vec<Running>> {
        self.clients.iter().map(|client| client.start(Question::Http, self.ways.balancer[0])).collect()
    }

    /// Has each client be where it was, by each of the load balancer's addresses.
    fn where_each_is(&self) -> Result<Vec<String>> {
        let all = self.clients.iter().flat_map(|client| self.ways.balancer.iter().map(move |server| (client, server)));
        all.map(|(client, server)| pod_of(client, *server)).collect()
    }

    /// By both families, by the load balancer's addresses and by each node's port; and the cluster's own pods and nodes, too.
    fn one_pod_each(&mut self) -> Result<()> {
        let every: Vec<_> = [&self.ways.balancer[..], &self.ways.node_port].concat();
        answered(self.clients[0], &every)?;
        let many = if self.world.short { FEW } else { MANY };
        self.all.add(one_pod_each(&self.clients, &self.ways.balancer, many)?);
        self.all.add(one_pod_each(&self.clients, &self.ways.node_port, FEW)?);
        let inside: Vec<&Client> = self.world.clients.iter().collect();
        self.all.add(one_pod_each(&inside, &every, FEW / 10)?);
        for family in 0..2 {
            let by_balancer = pod_of(self.clients[0], self.ways.balancer[family])?;
            for node in &self.ways.node_port[2 * family..2 * family + 2] {
                let by_node = pod_of(self.clients[0], *node)?;
                ensure!(by_node == by_balancer, "{node} leads to {by_node}, the load balancer to {by_balancer}");
            }
        }
        Ok(())
    }

    /// Another node takes over, and everybody stays where they are. (Endpoints have not changed so far: who had been led
    /// elsewhere by a change that the other node's entries are older than could move.)
    fn daemon_leaves(&mut self) -> Result<()> {
        let (lab, server) = (self.lab(), self.ways.balancer[0]);
        let holder = self.holder(server, NODES[0])?;
        let before = self.where_each_is()?;
        let running = self.start()?;
        rest(1);
        let daemon = lab.daemon(&holder)?;
        let left = Instant::now();
        lab.kubectl(&["delete", "pod", "-n", SYSTEM, &daemon.name, "--wait=false"])?;
        let took = eventually("another node that answers", || {
            Ok((self.holder(server, NODES[0])? != holder).then(|| left.elapsed()))
        })?;
        rest(3);
        lab.rolled_out(SYSTEM, "daemonset/affinity")?;
        let observed = observe(running, &format!("while {holder} left"))?;
        observed.moved_at_most(0)?;
        let lost = observed.sum().failed;
        // What was under way when the address went over.
        ensure!(lost <= 2 * self.clients.len() as u64, "{lost} requests were lost as {holder} left");
        let after = self.where_each_is()?;
        ensure!(before == after, "{before:?} became {after:?} as {holder} left");
        self.all.add(observed);
        self.lines.push(format!("{holder} left, and another node answered after {took:?}, {lost} requests lost"));
        Ok(())
    }

    /// A client and an address such that the node that answers for it is not the one that the client's pod is on; that pod, and
    /// both nodes.
    fn apart(&self) -> Result<(&'a Client, SocketAddr, String, [String; 2])> {
        // Who is on the same node as what answers for them gets another pod when theirs is deleted: before long, one elsewhere.
        for _ in 0..12 {
            for server in &self.ways.balancer {
                let holder = self.holder(*server, NODES[0])?;
                for client in self.clients {
                    let pod = pod_of(client, *server)?;
                    let pods = self.lab().web()?;
                    let node = pods.iter().find(|one| one.name == pod).map(|one| one.node.clone());
                    match node {
                        Some(node) if node != holder => return Ok((client, *server, pod, [holder, node])),
                        _ => (),
                    }
                }
            }
            let pod = pod_of(self.clients[0], self.ways.balancer[0])?;
            self.lab().kubectl(&["delete", "pod", "-n", DEMO, &pod])?;
            self.lab().wait_for_web(5)?;
            self.world.wait_for_backends(5)?;
        }
        bail!("no client's pod is on the node that does not answer for it")
    }

    /// Nobody says goodbye: the other node takes over when the Lease is over, and leads to the same pod.
    fn node_is_cut_off(&mut self) -> Result<()> {
        let (client, server, pod, [holder, other]) = self.apart()?;
        let cable = Cable::pull(&holder)?;
        let pulled = Instant::now();
        // An attempt without an answer takes two seconds; the Lease lasts 15.
        let again = eventually("an answer from another node", || {
            Ok(client.ask(Question::Http, server, 1)?.pod().map(str::to_owned))
        })?;
        let took = pulled.elapsed();
        ensure!(again == pod, "{} was on {pod}, and is on {again} by {other}", client.name);
        ensure!(took < TAKEOVER, "it took {took:?}");
        let mut observed = Observed::default();
        observed.note(format!("{} by {other} alone", client.name), client.ask(Question::Http, server, FEW)?);
        drop(cable);
        // When it is back, it is not the one that answers.
        eventually(&format!("{holder} is back"), || {
            Ok(self.lab().affinity_text(&holder, &["announce", "list"]).ok().map(drop))
        })?;
        rest(2);
        let now = self.holder(server, &holder)?;
        ensure!(now == other, "{now} answers for {server}, not {other}");
        observed.note(format!("{} with {holder} back", client.name), client.ask(Question::Http, server, FEW)?);
        observed.none_failed()?;
        observed.moved_at_most(0)?;
        ensure!(observed.sum().pods.keys().all(|one| *one == pod), "{:?}, and it was {pod}", observed.sum().pods);
        self.all.add(observed);
        self.lines.push(format!("{holder} was cut off, and {other} answered after {took:?}"));
        self.lab().wait_for_web(5)?;
        self.world.wait_for_backends(5)
    }

    /// Its client moves once.
    fn pod_deleted(&mut self) -> Result<()> {
        let lab = self.lab();
        let pod = pod_of(self.clients[0], self.ways.balancer[0])?;
        let running = self.start()?;
        rest(2);
        lab.kubectl(&["delete", "pod", "-n", DEMO, &pod, "--wait=false"])?;
        lab.rolled_out(DEMO, "deployment/web")?;
        lab.wait_for_web(5)?;
        let observed = observe(running, &format!("while {pod} was deleted"))?;
        observed.none_failed()?;
        observed.moved_at_most(1)?;
        self.all.add(observed);
        Ok(())
    }

    /// Only one of the two is let in; by the nodes' ports both still are.
    fn source_ranges(&mut self) -> Result<()> {
        self.patch(r#""loadBalancerSourceRanges": ["198.51.100.100/32", "fd00:c5::100/128"]"#)?;
        for server in &self.ways.balancer {
            eventually("the second client is kept out", || Ok(is_kept_out("client2", *server).then_some(())))?;
        }
        self.all.add(one_pod_each(&self.clients[..1], &self.ways.balancer, FEW)?);
        // Who was on the pod that was deleted has a new one since, by each node: chosen when it asked there, of the pods of then.
        let [first_v4, second_v4, first_v6, second_v6] = self.ways.node_port[..] else { bail!("four node ports") };
        for node in [[first_v4, first_v6], [second_v4, second_v6]] {
            self.all.add(one_pod_each(&self.clients[1..], &node, FEW)?);
        }
        self.patch(r#""loadBalancerSourceRanges": null"#)
    }

    /// The node of the first client's pod: those whom it served move, as often as their next pod was on it as well.
    fn node_drained(&mut self) -> Result<()> {
        let lab = self.lab();
        let pod = pod_of(self.clients[0], self.ways.balancer[0])?;
        let pods = lab.web()?;
        let node = pods.iter().find(|one| one.name == pod).context("its pod")?.node.clone();
        let there = pods.iter().filter(|one| one.node == node).count() as u64;
        let running = self.start()?;
        rest(1);
        // The others there are clients that the test goes on with.
        let only = ["--ignore-daemonsets", "--delete-emptydir-data", "--pod-selector=app=web"];
        lab.kubectl(&[&["drain", &node][..], &only].concat())?;
        lab.wait_for_web(5)?;
        self.world.wait_for_backends(5)?;
        rest(1);
        let observed = observe(running, &format!("while {node} was drained"))?;
        observed.none_failed()?;
        observed.moved_at_most(there)?;
        self.all.add(observed);
        let left: Vec<_> = lab.web()?.into_iter().filter(|one| one.node == node).collect();
        ensure!(left.is_empty(), "{left:?} are on {node}");
        self.lines.push(format!("{node} with {there} of 5 pods was drained"));
        Ok(())
    }

    /// The nodes keep outsiders to their own pods, by their own addresses; a node that has none, as here, does not answer.
    fn local(&mut self) -> Result<()> {
        let lab = self.lab();
        let nodes: BTreeSet<String> = lab.web()?.into_iter().map(|pod| pod.node).collect();
        let [node] = Vec::from_iter(nodes).try_into().map_err(|nodes| anyhow!("web pods are on {nodes:?}"))?;
        self.patch(r#""externalTrafficPolicy": "Local""#)?;
        for server in &self.ways.balancer {
            eventually(&format!("{node} answers for {server}"), || {
                Ok((self.holder(*server, NODES[0])? == node).then_some(()))
            })?;
            eventually(&format!("its own address, as a pod sees it by {server}"), || {
                let seen = client_as_seen("client", *server)?;
                let own: [IpAddr; 2] = ["198.51.100.100".parse()?, "fd00:c5::100".parse()?];
                Ok(own.contains(&seen).then_some(()))
            })?;
        }
        self.all.add(one_pod_each(&self.clients, &self.ways.balancer, FEW)?);
        // Pods on both nodes again, for those who come after.
        for node in NODES {
            lab.kubectl(&["uncordon", node])?;
        }
        lab.kubectl(&["rollout", "restart", "-n", DEMO, "deployment/web"])?;
        lab.rolled_out(DEMO, "deployment/web")?;
        lab.wait_for_web(5)?;
        self.world.wait_for_backends(5)
    }
}

/// A node's cable: out until this is dropped.
struct Cable<'a>(&'a str);

impl<'a> Cable<'a> {
    fn pull(node: &'a str) -> Result<Self> {
        let cable = Self(node);
        cable.set("down")?;
        Ok(cable)
    }

    fn set(&self, state: &str) -> Result<()> {
        let end = format!("to-{}", self.0);
        let output = Command::new("ip").args(["-n", "affinity-cp", "link", "set", &end, state]).output()?;
        ensure!(output.status.success(), "{end} {state}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

impl Drop for Cable<'_> {
    fn drop(&mut self) {
        let _ = self.set("up");
    }
}

fn observe(running: Vec<Running>, when: &str) -> Result<Observed> {
    let mut observed = Observed::default();
    for load in running {
        observed.note(format!("{} {when}", load.what), load.stop()?);
    }
    Ok(observed)
}

/// What curl prints in a machine.
fn curl(machine: &str, url: &str, seconds: &str) -> Result<String> {
    let netns = format!("--net=/run/netns/affinity-{machine}");
    let output = Command::new("nsenter").args([&netns, "curl", "-gsS", "-m", seconds, url]).output()?;
    ensure!(output.status.success(), "{url}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn is_kept_out(machine: &str, server: SocketAddr) -> bool {
    let started = Instant::now();
    curl(machine, &format!("http://{server}/hostname"), "1").is_err() && started.elapsed() >= Duration::from_millis(900)
}

/// The address that a pod takes a client for.
fn client_as_seen(machine: &str, server: SocketAddr) -> Result<IpAddr> {
    let text = curl(machine, &format!("http://{server}/clientip"), "3")?;
    let seen: SocketAddr = text.trim().parse().with_context(|| text.clone())?;
    Ok(seen.ip())
}
