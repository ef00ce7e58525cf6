//! What is tested, in its order.

mod daemon;
mod endpoints;
mod first;
mod outside;
mod removal;
mod service;
mod sticky;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::client::{Client, Running};
use crate::lab::{DEMO, Frontend, Lab, NODES, SYSTEM, eventually};
use crate::load::{Question, Seen};
use crate::suite::{Figures, Observed, Suite};

/// How pods' connections reach services; those of the nodes' own processes go by sockets in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Where their sockets connect.
    Sockets,
    /// Packet by packet.
    Packets,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Sockets => "sockets",
            Self::Packets => "tc",
        }
    }

    fn arguments(self) -> &'static str {
        match self {
            Self::Sockets => r#"["run"]"#,
            Self::Packets => r#"["run", "--socket-lb-pods", "off"]"#,
        }
    }
}

/// The cluster with the demo in it.
struct World<'a> {
    lab: &'a Lab,
    clients: Vec<Client>,
    web: Frontend,
    dns: Frontend,
    api: SocketAddr,
    short: bool,
}

/// Runs all steps.
pub fn run(lab: &Lab, suite: &mut Suite, short: bool) -> Result<()> {
    // What all others stand on.
    let started = Instant::now();
    install(lab).context("installing kind/deploy")?;
    suite.step("install", || Ok(format!("kind/deploy is ready on both nodes after {:?}", started.elapsed()).into()));
    let world = World::set(lab, short).context("setting up the demo")?;
    for way in [Way::Sockets, Way::Packets] {
        let mut step = |name: &str, is_core: bool, step: &dyn Fn() -> Result<Figures>| {
            if is_core || !short {
                suite.step(&format!("{}/{name}", way.name()), step);
            }
        };
        switch(lab, way)?;
        step("sticky", true, &|| sticky::one_pod_each(&world, way));
        step("dns-and-api", true, &|| sticky::names(&world));
        step("first-packets", true, &|| first::packets(&world));
        step("outside", way == Way::Packets, &|| outside::story(&world));
        step("pod-deleted", true, &|| endpoints::pod_deleted(&world));
        step("pod-unready", false, &|| endpoints::pod_unready(&world));
        step("terminating-with-connections", false, &|| endpoints::terminating(&world));
        step("affinity-off-and-on", way == Way::Packets, &|| service::off_and_on(&world));
        step("traffic-distribution", way == Way::Packets, &|| service::near(&world));
        step("timeout", false, &|| service::timeout(&world));
        step("rolling-update", false, &|| endpoints::rolling_update(&world));
        step("scale", false, &|| endpoints::scale(&world));
        step("daemon-killed", true, &|| daemon::killed(&world));
        step("daemon-restarts", false, &|| daemon::restarts(&world));
        step("daemon-upgrades", false, &|| daemon::upgrades(&world));
        step("daemon-out-of-memory", false, &|| daemon::out_of_memory(&world));
        step("kubelet-stopped", false, &|| daemon::kubelet_stopped(&world));
    }
    suite.step("removed", || removal::removed(&world));
    Ok(())
}

fn install(lab: &Lab) -> Result<()> {
    lab.kubectl(&["apply", "-k", "kind/deploy"])?;
    lab.rolled_out(SYSTEM, "daemonset/affinity")
}

/// Has the daemons serve pods in this way.
fn switch(lab: &Lab, way: Way) -> Result<()> {
    let patch = format!(
        r#"[{{"op": "replace", "path": "/spec/template/spec/containers/0/args", "value": {}}}]"#,
        way.arguments()
    );
    lab.kubectl(&["patch", "-n", SYSTEM, "daemonset", "affinity", "--type", "json", "-p", &patch])?;
    lab.rolled_out(SYSTEM, "daemonset/affinity")?;
    for node in NODES {
        lab.affinity_text(node, &["conntrack", "flush", "--all"])?;
    }
    Ok(())
}

impl<'a> World<'a> {
    fn set(lab: &'a Lab, short: bool) -> Result<Self> {
        lab.kubectl(&["apply", "-k", "tests/cluster/demo"])?;
        for what in ["deployment/web", "deployment/clients-n1", "deployment/clients-n2", "daemonset/hosts"] {
            lab.rolled_out(DEMO, what)?;
        }
        lab.rolled_out("kube-system", "deployment/coredns")?;
        let pods = lab.pods(DEMO, "clients")?;
        let clients = pods.iter().map(Client::of).collect::<Result<Vec<_>>>()?;
        let web = lab.frontend(DEMO, "web", 80)?;
        let dns = lab.frontend("kube-system", "kube-dns", 53)?;
        let api = SocketAddr::new([10, 96, 0, 1].into(), 443);
        let world = Self { lab, clients, web, dns, api, short };
        world.wait_for_backends(5)?;
        Ok(world)
    }

    /// Waits until every node has this many pods of the web service that take new sessions, a backend for each family.
    fn wait_for_backends(&self, count: usize) -> Result<()> {
        NODES.iter().try_for_each(|node| self.wait_for_backends_on(node, count))
    }

    /// Waits until a node has them.
    fn wait_for_backends_on(&self, node: &str, count: usize) -> Result<()> {
        eventually(&format!("{count} backends on {node}"), || {
            let rows: Vec<affinity_tests::view::ServiceRow> = self.lab.affinity(node, &["service", "list"])?;
            let mut ports = rows.iter().filter(|row| row.service == "demo/web");
            let complete = ports.clone().count() == 2 && ports.all(|row| row.eligible == 2 * count);
            Ok(complete.then_some(()))
        })
    }

    /// Has every client ask the web service without end, by HTTP over both families and by datagrams, and names and the API
    /// server asked for beside that.
    fn start_all(&self) -> Result<Load> {
        let mut web = Vec::new();
        for client in &self.clients {
            for server in self.web.both() {
                web.push(client.start(Question::Http, server)?);
            }
            web.push(client.start(Question::Udp, self.web.v4)?);
        }
        let mut others = Vec::new();
        for client in self.clients.iter().filter(|client| !client.is_host).step_by(3) {
            others.push(client.start(Question::DnsUdp, self.dns.v4)?);
            others.push(client.start(Question::DnsTcp, self.dns.v4)?);
            others.push(client.start(Question::Api, self.api)?);
        }
        Ok(Load { web, others })
    }
}

/// Where a client is now.
fn pod_of(client: &Client, server: SocketAddr) -> Result<String> {
    let seen = client.ask(Question::Http, server, 1)?;
    seen.pod().map(str::to_owned).with_context(|| format!("{} has no answer: {:?}", client.name, seen.errors))
}

/// Loads of all clients.
struct Load {
    web: Vec<Running>,
    others: Vec<Running>,
}

/// What came of them.
struct Loaded {
    /// The clients of the web service.
    web: Observed,
    /// Those of DNS and of the API server.
    others: Observed,
}

impl Load {
    /// Ends them all.
    fn stop(self) -> Result<Loaded> {
        let observe = |loads: Vec<Running>| -> Result<Observed> {
            let mut observed = Observed::default();
            for load in loads {
                let what = load.what.clone();
                observed.note(what, load.stop()?);
            }
            Ok(observed)
        };
        Ok(Loaded { web: observe(self.web)?, others: observe(self.others)? })
    }
}

impl Loaded {
    /// Nothing failed, and nobody moved more often than this.
    fn check(&self, moves: u64) -> Result<()> {
        self.web.none_failed()?;
        self.others.none_failed().context("beside the web service")?;
        self.web.moved_at_most(moves)
    }

    /// This and what came of the same loads later.
    fn and(mut self, later: Self) -> Self {
        self.web.add(later.web);
        self.others.add(later.others);
        self
    }

    fn figures(&self, more: &str) -> Figures {
        let others: Seen = self.others.sum();
        let beside = format!("{} of DNS and the API server, {} failed", others.requests, others.failed);
        self.web.figures(&if more.is_empty() { beside } else { format!("{more}; {beside}") })
    }
}

/// Lets a load run: what happens in that time is what is tested.
fn rest(seconds: u64) {
    std::thread::sleep(Duration::from_secs(seconds));
}
