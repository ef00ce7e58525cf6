//! One pod for each client, many for many.

use std::collections::BTreeSet;

use anyhow::{Result, bail, ensure};
use serde_json::Value;

use super::{Way, World};
use crate::load::Question;
use crate::suite::{Figures, Observed};

/// Each client keeps its pod, by either family and by TCP and UDP; different clients spread.
pub fn one_pod_each(world: &World<'_>, way: Way) -> Result<Figures> {
    let count = if world.short { 100 } else { 1000 };
    let mut running = Vec::new();
    for client in &world.clients {
        for server in world.web.both() {
            running.push(client.begin(Question::Http, server, Some(count), std::time::Duration::ZERO)?);
            running.push(client.begin(Question::Udp, server, Some(count / 10), std::time::Duration::ZERO)?);
        }
    }
    let mut observed = Observed::default();
    for load in running {
        let what = load.what.clone();
        observed.note(what, load.wait()?);
    }
    observed.none_failed()?;
    let mut reached = BTreeSet::new();
    for (what, seen) in observed.iter() {
        ensure!(seen.pods.len() == 1, "{what}: came to {:?}", seen.pods);
        reached.extend(seen.pods.keys().cloned());
    }
    ensure!(reached.len() >= 2, "all clients are on {reached:?}");
    by_the_way(world, way)?;
    Ok(observed.figures(&format!("each client one pod, together {} of 5", reached.len())))
}

/// Connections of pods are in conntrack where their packets are translated, and only there.
fn by_the_way(world: &World<'_>, way: Way) -> Result<()> {
    for node in crate::lab::NODES {
        let pods = world.lab.pods(crate::lab::DEMO, &format!("clients={node}"))?;
        for pod in pods {
            for address in pod.addresses {
                let address = address.to_string();
                let rows: Vec<Value> = world.lab.affinity(node, &["conntrack", "list", "--client", &address])?;
                match (way, rows.len()) {
                    (Way::Sockets, 1..) => {
                        bail!("{} ({address}) has connections that TC translated: {rows:?}", pod.name)
                    }
                    (Way::Packets, 0) => bail!("{} ({address}) has no connection that TC translated", pod.name),
                    _ => {}
                }
            }
        }
    }
    Ok(())
}

/// Names by UDP and TCP, over both families, and the API server's own service.
pub fn names(world: &World<'_>) -> Result<Figures> {
    let count = if world.short { 20 } else { 100 };
    let mut observed = Observed::default();
    for client in &world.clients {
        for server in world.dns.both() {
            for question in [Question::DnsUdp, Question::DnsTcp] {
                observed.note(format!("{} {question:?} {server}", client.name), client.ask(question, server, count)?);
            }
        }
        observed.note(format!("{} API", client.name), client.ask(Question::Api, world.api, count)?);
    }
    observed.none_failed()?;
    // By a pod's own resolver and TLS.
    for pod in world.lab.pods(crate::lab::DEMO, "clients in (n1, n2)")? {
        let url = "https://kubernetes.default.svc.cluster.local/version";
        let version = world.lab.kubectl(&["exec", "-n", crate::lab::DEMO, &pod.name, "--", "curl", "-sk", url])?;
        ensure!(version.contains("gitVersion"), "{}: {url} says {version:?}", pod.name);
    }
    Ok(observed.figures("and `curl https://kubernetes.default` from each pod"))
}
