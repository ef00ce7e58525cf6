//! A service that changes under its clients.

use std::collections::BTreeMap;
use std::time::Duration;

use affinity_tests::view::{ServiceRow, SessionRow};
use anyhow::{Context as _, Result, ensure};

use super::{World, pod_of, rest};
use crate::lab::{DEMO, NODES, eventually};
use crate::load::Question;
use crate::suite::{Figures, Observed};

fn patch(world: &World<'_>, spec: &str, timeout: Option<u32>) -> Result<()> {
    let patch = format!(r#"{{"spec": {spec}}}"#);
    world.lab.kubectl(&["patch", "service", "-n", DEMO, "web", "--type", "merge", "-p", &patch])?;
    for node in NODES {
        eventually(&format!("{spec} on {node}"), || {
            let rows: Vec<ServiceRow> = world.lab.affinity(node, &["service", "list"])?;
            let mut rows = rows.iter().filter(|row| row.service == "demo/web");
            let is_so = rows.clone().count() == 2 && rows.all(|row| row.affinity_timeout_seconds == timeout);
            Ok(is_so.then_some(()))
        })?;
    }
    Ok(())
}

const STICKY: &str =
    r#"{"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10800}}}"#;

/// `ClientIP`, `None`, `ClientIP`: kept, spread, kept.
pub fn off_and_on(world: &World<'_>) -> Result<Figures> {
    let mut observed = Observed::default();
    patch(world, r#"{"sessionAffinity": "None", "sessionAffinityConfig": null}"#, None)?;
    for client in &world.clients {
        for server in world.web.both() {
            let seen = client.ask(Question::Http, server, 60)?;
            ensure!(seen.pods.len() >= 3, "{}: without affinity on {:?} only", client.name, seen.pods);
            observed.note(format!("{} {server}, spread", client.name), seen);
        }
    }
    let moved = observed.sum().moved;
    patch(world, STICKY, Some(10800))?;
    for client in &world.clients {
        for server in world.web.both() {
            let seen = client.ask(Question::Http, server, 60)?;
            ensure!(seen.pods.len() == 1, "{}: with affinity on {:?}", client.name, seen.pods);
            observed.note(format!("{} {server}, kept", client.name), seen);
        }
    }
    observed.none_failed()?;
    ensure!(observed.sum().moved == moved, "clients moved with affinity");
    Ok(observed.figures("all of them while affinity was off"))
}

/// `trafficDistribution`, by the hints that the cluster's controller makes of it: each client stays on its node, and in its zone (each
/// node has one of its own). A client whose pod is elsewhere is led to a near one, and stays there when it need not any more.
pub fn near(world: &World<'_>) -> Result<Figures> {
    let pods: BTreeMap<String, String> = world.lab.web()?.into_iter().map(|pod| (pod.name, pod.node)).collect();
    let on = |node: &str| pods.values().filter(|at| *at == node).count();
    ensure!(NODES.iter().all(|node| on(node) > 0), "a node has no pod: {pods:?}");
    let mut observed = Observed::default();
    for wanted in ["PreferSameNode", "PreferSameZone", "PreferClose"] {
        patch(world, &format!(r#"{{"trafficDistribution": "{wanted}"}}"#), Some(10800))?;
        for node in NODES {
            world.wait_for_backends_on(node, on(node)).with_context(|| wanted.to_owned())?;
        }
        for client in &world.clients {
            let own = client.node();
            for server in world.web.both() {
                let seen = client.ask(Question::Http, server, 20)?;
                let far = seen.pods.keys().find(|pod| pods.get(*pod).is_none_or(|node| node != own));
                ensure!(far.is_none(), "{wanted}: {} came to {far:?}", client.name);
                ensure!(seen.pods.len() == 1, "{wanted}: {} was on {:?}", client.name, seen.pods);
                observed.note(format!("{} {server} {wanted}", client.name), seen);
            }
        }
    }
    patch(world, r#"{"trafficDistribution": null}"#, Some(10800))?;
    world.wait_for_backends(pods.len())?;
    observed.none_failed()?;
    Ok(observed.figures("each on its own node"))
}

/// The timeout of a session is that of the service as it is, not as it was.
pub fn timeout(world: &World<'_>) -> Result<Figures> {
    const SHORT: u32 = 6;
    let short = r#"{"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 6}}}"#;
    let client = world.clients.iter().find(|client| !client.is_host).unwrap_or(&world.clients[0]);
    let node = client.node();
    let pod = pod_of(client, world.web.v4)?;
    patch(world, short, Some(SHORT))?;
    // Used within the new timeout: it stays.
    let seen = client.begin(Question::Http, world.web.v4, Some(10), Duration::from_millis(500))?.wait()?;
    ensure!(seen.failed == 0 && seen.pods.keys().all(|other| *other == pod), "was on {pod}, then {:?}", seen.pods);
    rest(u64::from(SHORT) + 1);
    let sessions: Vec<SessionRow> = world.lab.affinity(node, &["session", "list", "--service", "demo/web"])?;
    ensure!(!sessions.is_empty() && sessions.iter().all(|session| !session.is_live()), "still live: {sessions:?}");
    patch(world, STICKY, Some(10800))?;
    Ok(format!(
        "10800 s -> {SHORT} s -> 10800 s: kept in use, {} sessions over after {SHORT} s of silence",
        sessions.len()
    )
    .into())
}
