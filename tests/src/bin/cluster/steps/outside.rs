//! The story that load balancers' services are for: people outside of the cluster, each kept on one pod, whatever happens to
//! that pod, and to the node that answers for the address.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

use super::{World, pod_of, rest};
use crate::client::Client;
use crate::lab::{DEMO, Lab, NODES, SYSTEM, eventually};
use crate::load::Question;
use crate::suite::{Figures, Observed};

/// The service, of tests/cluster/outside.
const SERVICE: &str = "web-outside";
/// How many requests each client makes at a time.
const MANY: u64 = 1_000;
const FEW: u64 = 100;

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

/// Who answers for the service's addresses, once each has somebody.
fn announced(lab: &Lab) -> Result<Vec<Announced>> {
    eventually("a node that answers for each address", || {
        let rows: Vec<Announced> = lab.affinity(NODES[0], &["announce", "list"])?;
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

/// All of it, in the order in which a person would try it.
pub fn story(world: &World<'_>) -> Result<Figures> {
    let lab = world.lab;
    lab.kubectl(&["apply", "-k", "tests/cluster/outside"])?;
    let ways = Ways::of(lab)?;
    let answering = announced(lab)?;
    let outsiders = [Outsider::new("client")?, Outsider::new("client2")?];
    let clients: Vec<&Client> = outsiders.iter().map(|one| &one.client).collect();
    let count = if world.short { FEW } else { MANY };
    for server in ways.balancer.iter().chain(&ways.node_port) {
        eventually(&format!("an answer by {server}"), || {
            Ok(clients[0].ask(Question::Http, *server, 1)?.pod().map(drop))
        })?;
    }

    // One pod each, by both families, by the load balancer's addresses and by each node's port.
    let mut all = one_pod_each(&clients, &ways.balancer, count)?;
    all.add(one_pod_each(&clients, &ways.node_port, FEW)?);
    for family in 0..2 {
        let by_balancer = pod_of(clients[0], ways.balancer[family])?;
        for node in &ways.node_port[2 * family..2 * family + 2] {
            let by_node = pod_of(clients[0], *node)?;
            ensure!(by_node == by_balancer, "{node} leads to {by_node}, the load balancer to {by_balancer}");
        }
    }

    let server = ways.balancer[0];
    // The daemon of the node that answers goes: another node takes over, and everybody stays where they
    // are. (Endpoints have not changed so far: who had been led elsewhere by a change that the other node's entries are older than
    // could move.)
    let holder = answering.iter().find(|row| row.address == server.ip()).and_then(|row| row.node.clone());
    let holder = holder.context("a holder")?;
    let before = clients.iter().map(|client| pod_of(client, server)).collect::<Result<Vec<_>>>()?;
    let running: Vec<_> = clients.iter().map(|client| client.start(Question::Http, server)).collect::<Result<_>>()?;
    rest(1);
    let daemon = lab.daemon(&holder)?;
    let left = Instant::now();
    lab.kubectl(&["delete", "pod", "-n", SYSTEM, &daemon.name, "--wait=false"])?;
    let took = eventually("another node that answers", || {
        let rows = announced(lab)?;
        let now = rows.into_iter().find(|row| row.address == server.ip()).and_then(|row| row.node);
        Ok(now.is_some_and(|node| node != holder).then(|| left.elapsed()))
    })?;
    rest(3);
    lab.rolled_out(SYSTEM, "daemonset/affinity")?;
    let mut observed = Observed::default();
    for load in running {
        observed.note(format!("{} while {holder} left", load.what), load.stop()?);
    }
    observed.moved_at_most(0)?;
    let lost = observed.sum().failed;
    // What was under way when the address went over.
    ensure!(lost <= 2 * clients.len() as u64, "{lost} requests were lost as {holder} left");
    let after = clients.iter().map(|client| pod_of(client, server)).collect::<Result<Vec<_>>>()?;
    ensure!(before == after, "{before:?} became {after:?} as {holder} left");
    all.add(observed);

    // Its pod goes: it moves once.
    let pod = pod_of(clients[0], server)?;
    let running: Vec<_> = clients.iter().map(|client| client.start(Question::Http, server)).collect::<Result<_>>()?;
    rest(2);
    lab.kubectl(&["delete", "pod", "-n", DEMO, &pod, "--wait=false"])?;
    lab.rolled_out(DEMO, "deployment/web")?;
    lab.wait_for_web(5)?;
    let mut observed = Observed::default();
    for load in running {
        observed.note(format!("{} while {pod} was deleted", load.what), load.stop()?);
    }
    observed.none_failed()?;
    observed.moved_at_most(1)?;
    all.add(observed);

    // Only one of the two is let in; by the nodes' ports both still are.
    let only = r#"{"spec": {"loadBalancerSourceRanges": ["198.51.100.100/32", "fd00:c5::100/128"]}}"#;
    lab.kubectl(&["patch", "service", "-n", DEMO, SERVICE, "-p", only])?;
    eventually("the second client is kept out", || Ok(is_kept_out("client2", server).then_some(())))?;
    all.add(one_pod_each(&clients[..1], &ways.balancer, FEW)?);
    all.add(one_pod_each(&clients[1..], &ways.node_port, FEW)?);
    lab.kubectl(&["patch", "service", "-n", DEMO, SERVICE, "-p", r#"{"spec": {"loadBalancerSourceRanges": null}}"#])?;

    // The nodes keep outsiders to their own pods, by their own addresses.
    lab.kubectl(&["patch", "service", "-n", DEMO, SERVICE, "-p", r#"{"spec": {"externalTrafficPolicy": "Local"}}"#])?;
    for server in &ways.balancer {
        let what = format!("its own address, as a pod sees it by {server}");
        eventually(&what, || {
            let seen = client_as_seen("client", *server)?;
            let own: [IpAddr; 2] = ["198.51.100.100".parse()?, "fd00:c5::100".parse()?];
            Ok(own.contains(&seen).then_some(()))
        })?;
    }
    all.add(one_pod_each(&clients, &ways.balancer, FEW)?);
    lab.kubectl(&["delete", "-k", "tests/cluster/outside"])?;
    let lines = format!("{holder} left, and another node answered after {took:?}, {lost} requests lost");
    Ok(all.figures(&lines))
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
