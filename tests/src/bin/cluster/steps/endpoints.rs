//! Pods that come and go.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use affinity_tests::wait;
use anyhow::{Context as _, Result, ensure};

use super::{World, pod_of, rest};
use crate::lab::DEMO;
use crate::load::{Question, Seen};
use crate::suite::{Figures, Observed};

/// How many clients of the web service were on a pod when their loads began.
fn on_pod(observed: &Observed, pod: &str) -> usize {
    observed.iter().filter(|(_, seen)| seen.pods.contains_key(pod)).count()
}

/// Its clients move, once, and nobody else does.
pub fn pod_deleted(world: &World<'_>) -> Result<Figures> {
    let lost = pod_of(&world.clients[0], world.web.v4)?;
    let load = world.start_all()?;
    rest(2);
    world.lab.kubectl(&["delete", "pod", "-n", DEMO, &lost, "--wait=true"])?;
    world.lab.wait_for_web(5)?;
    world.wait_for_backends(5)?;
    rest(1);
    let loaded = load.stop()?;
    loaded.check(1)?;
    only_those_of(&loaded.web, &lost)?;
    let moved = on_pod(&loaded.web, &lost);
    Ok(loaded.figures(&format!("{moved} clients were on {lost}")))
}

fn only_those_of(observed: &Observed, lost: &str) -> Result<()> {
    for (what, seen) in observed.iter() {
        let was_there = seen.pods.contains_key(lost);
        ensure!(was_there == (seen.moved == 1), "{what}: moved {} times over {:?}, {lost} went", seen.moved, seen.pods);
    }
    Ok(())
}

/// The same of a pod that is not ready any more; when it is ready again, nobody moves.
pub fn pod_unready(world: &World<'_>) -> Result<Figures> {
    let lost = pod_of(&world.clients[0], world.web.v6)?;
    let load = world.start_all()?;
    rest(2);
    world.lab.kubectl(&["exec", "-n", DEMO, &lost, "--", "touch", "/tmp/unready"])?;
    world.wait_for_backends(4)?;
    rest(1);
    world.lab.kubectl(&["exec", "-n", DEMO, &lost, "--", "rm", "/tmp/unready"])?;
    world.wait_for_backends(5)?;
    rest(1);
    let loaded = load.stop()?;
    loaded.check(1)?;
    only_those_of(&loaded.web, &lost)?;
    let moved = on_pod(&loaded.web, &lost);
    Ok(loaded.figures(&format!("{moved} clients were on {lost}, and did not come back")))
}

/// Open connections go on for as long as the pod does, while new ones go elsewhere.
pub fn terminating(world: &World<'_>) -> Result<Figures> {
    let mut kept = Vec::new();
    let clients = world.clients.iter().filter(|client| !client.is_host);
    let lost = pod_of(clients.clone().next().context("no client")?, world.web.v4)?;
    for client in clients {
        if pod_of(client, world.web.v4)? == lost {
            kept.push((client, client.start(Question::KeptHttp, world.web.v4)?));
        }
    }
    rest(1);
    let started = Instant::now();
    world.lab.kubectl(&["delete", "pod", "-n", DEMO, &lost, "--wait=false"])?;
    let mut observed = Observed::default();
    // The pod serves for 5 s yet (preStop).
    for (client, _) in &kept {
        wait::until_true("another pod for a new connection", Duration::from_secs(4), || {
            Ok(pod_of(client, world.web.v4)? != lost)
        })?;
    }
    let elsewhere = started.elapsed();
    if let Some(left) = Duration::from_secs(4).checked_sub(started.elapsed()) {
        std::thread::sleep(left);
    }
    for (_, load) in kept {
        let what = load.what.clone();
        let seen: Seen = load.stop()?;
        ensure!(seen.pods.len() == 1, "{what}: the connection was with {:?}", seen.pods);
        observed.note(what, seen);
    }
    observed.none_failed()?;
    world.lab.wait_for_web(5)?;
    world.wait_for_backends(5)?;
    let after = elsewhere.as_millis();
    Ok(observed.figures(&format!("on {lost} for 4 s after its deletion, new connections elsewhere after {after} ms")))
}

/// All pods are replaced, one by one; no request fails.
pub fn rolling_update(world: &World<'_>) -> Result<Figures> {
    let before = world.lab.web()?;
    let load = world.start_all()?;
    rest(1);
    world.lab.kubectl(&["rollout", "restart", "-n", DEMO, "deployment/web"])?;
    world.lab.rolled_out(DEMO, "deployment/web")?;
    world.lab.wait_for_web(5)?;
    rest(1);
    let loaded = load.stop()?;
    // A client's next pod may be one that is to be replaced, too.
    loaded.check(5)?;
    let after = world.lab.web()?;
    ensure!(after.iter().all(|pod| before.iter().all(|old| old.name != pod.name)), "not all pods were replaced");
    world.wait_for_backends(5)?;
    Ok(loaded.figures("5 pods replaced"))
}

/// To many, to one, to none, and back.
pub fn scale(world: &World<'_>) -> Result<Figures> {
    let many = 50;
    let to = |count: usize| -> Result<()> {
        world.lab.kubectl(&["scale", "-n", DEMO, "deployment/web", &format!("--replicas={count}")])?;
        world.lab.wait_for_web(count)?;
        world.wait_for_backends(count)
    };
    let load = world.start_all()?;
    to(many)?;
    rest(1);
    let up = load.stop()?;
    up.check(0)?;
    let load = world.start_all()?;
    rest(1);
    to(1)?;
    rest(1);
    let down = load.stop()?;
    // Once, though on the way there a second choice may go, too.
    down.check(8)?;
    to(0)?;
    let mut refused: BTreeMap<String, u64> = BTreeMap::new();
    let mut slowest = Duration::ZERO;
    for client in &world.clients {
        for server in world.web.both() {
            let seen = client.ask(Question::Http, server, 5)?;
            ensure!(seen.failed == 5, "{}: {server} has no pod, and answers: {:?}", client.name, seen.pods);
            slowest = slowest.max(seen.slowest_failure);
            for (error, count) in seen.errors {
                *refused.entry(error).or_default() += count;
            }
        }
    }
    ensure!(
        refused.keys().all(|error| error.contains("Connection refused")),
        "without a pod not all clients were refused: {refused:?}"
    );
    to(5)?;
    for client in &world.clients {
        pod_of(client, world.web.v4)?;
    }
    let moved = down.web.sum().moved;
    let more = format!(
        "5 -> {many} -> 1 -> 0 -> 5 pods, {moved} moves on the way down alone; without a pod refused within {} ms",
        slowest.as_millis()
    );
    Ok(up.and(down).figures(&more))
}
