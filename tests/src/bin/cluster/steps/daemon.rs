//! The daemon that goes, comes and changes under load: no request fails, and nobody moves.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::outside::Visitors;
use super::{World, rest};
use crate::lab::{NODES, SYSTEM, eventually, processes_of};
use crate::suite::Figures;

/// SIGKILL, on both nodes, while clients ask on.
pub fn killed(world: &World<'_>) -> Result<Figures> {
    let load = world.start_all()?;
    rest(1);
    for node in NODES {
        let pod = world.lab.daemon(node)?;
        for pid in processes_of(&pod.uid, "run")? {
            kill(Pid::from_raw(pid.try_into()?), Signal::SIGKILL)?;
        }
    }
    rest(2);
    back(world)?;
    rest(1);
    let loaded = load.stop()?;
    loaded.check(0)?;
    Ok(loaded.figures("killed on both nodes"))
}

/// The pod deleted, ten times over both nodes.
pub fn restarts(world: &World<'_>) -> Result<Figures> {
    let load = world.start_all()?;
    for time in 0..10 {
        let pod = world.lab.daemon(NODES[time % 2])?;
        world.lab.kubectl(&["delete", "pod", "-n", SYSTEM, &pod.name, "--wait=true"])?;
        back(world)?;
        rest(3);
    }
    let loaded = load.stop()?;
    loaded.check(0)?;
    Ok(loaded.figures("10 restarts"))
}

/// An upgrade from an earlier commit's image to this one's, three times, and the way back in between, while people outside ask,
/// too.
pub fn upgrades(world: &World<'_>) -> Result<Figures> {
    let times = 3;
    let image = std::path::absolute("target/image/earlier.tar")?;
    ensure!(image.is_file(), "there is no {}: `cargo xtask cluster test` builds it", image.display());
    for node in NODES {
        world.lab.import(node, &image.display().to_string())?;
    }
    let done = roll(world, EARLIER).and_then(|()| {
        let load = world.start_all()?;
        let visitors = Visitors::start(world.lab)?;
        rest(1);
        for time in 0..times {
            if time > 0 {
                roll(world, EARLIER)?;
            }
            roll(world, CURRENT)?;
        }
        let visited = visitors.stop(world.lab, "while daemons were replaced")?;
        Ok((load.stop()?, visited))
    });
    if done.is_err() {
        // The steps after this one are to be about this version.
        set_image(world, CURRENT)?;
    }
    let (mut loaded, visited) = done?;
    loaded.check(0)?;
    loaded.web.add(visited);
    Ok(loaded.figures(&format!("{times} upgrades, other programs each time, and {} ways back", times - 1)))
}

/// The image of this checkout, as `kind/deploy` has it.
const CURRENT: &str = "localhost/affinity:dev";
/// That of an earlier commit.
const EARLIER: &str = "localhost/affinity:earlier";

fn set_image(world: &World<'_>, image: &str) -> Result<()> {
    let images = ["affinity", "mount"].map(|container| format!("{container}={image}"));
    world.lab.kubectl(&["set", "image", "-n", SYSTEM, "daemonset/affinity", &images[0], &images[1]])?;
    world.lab.rolled_out(SYSTEM, "daemonset/affinity")?;
    back(world)
}

/// Has both nodes run another image, and sees that other programs are where those of the one before were.
fn roll(world: &World<'_>, image: &str) -> Result<()> {
    let before = NODES.map(|node| world.lab.programs(node));
    set_image(world, image)?;
    for (node, before) in NODES.into_iter().zip(before) {
        let (before, after) = (before?, world.lab.programs(node)?);
        let same: Vec<&String> =
            before.iter().filter(|(link, tag)| after.get(*link) == Some(*tag)).map(|it| it.0).collect();
        ensure!(after.len() >= before.len() && same.len() < before.len(), "{node}: {image} left {same:?} as they were");
    }
    Ok(())
}

/// The kernel kills it for its memory: its limit is put below what it takes.
pub fn out_of_memory(world: &World<'_>) -> Result<Figures> {
    let usual = world.lab.kubectl(&[
        "get",
        "daemonset/affinity",
        "-n",
        SYSTEM,
        "-o",
        "jsonpath={.spec.template.spec.containers[0].resources}",
    ])?;
    let give = |resources: &str| {
        let path = "/spec/template/spec/containers/0/resources";
        let patch = format!(r#"[{{"op": "replace", "path": "{path}", "value": {resources}}}]"#);
        world.lab.kubectl(&["patch", "-n", SYSTEM, "daemonset", "affinity", "--type", "json", "-p", &patch])
    };
    let load = world.start_all()?;
    rest(1);
    give(&format!(r#"{{"limits": {{"memory": "{TOO_LITTLE}"}}, "requests": {{"memory": "{TOO_LITTLE}"}}}}"#))?;
    let killed = eventually("a daemon that is killed for its memory", || {
        let text = world.lab.kubectl(&["get", "pods", "-n", SYSTEM, "-o", "json"])?;
        let pods: Value = serde_json::from_str(&text)?;
        let statuses = pods["items"].as_array().into_iter().flatten().map(|pod| &pod["status"]["containerStatuses"][0]);
        let times = statuses.filter_map(|status| {
            let is_killed = |state: &str| status[state]["terminated"]["reason"] == "OOMKilled";
            (is_killed("lastState") || is_killed("state")).then(|| status["restartCount"].as_u64()).flatten()
        });
        // Once more after it was started again.
        Ok(times.max().filter(|times| *times > 1))
    });
    give(&usual)?;
    let killed = killed?;
    world.lab.rolled_out(SYSTEM, "daemonset/affinity")?;
    back(world)?;
    let loaded = load.stop()?;
    loaded.check(0)?;
    Ok(loaded.figures(&format!("killed for {TOO_LITTLE} of memory, {killed} times over")))
}

/// Enough for a container to start, and not for the daemon in it.
const TOO_LITTLE: &str = "12Mi";

/// A node's kubelet stops until its pods count as not ready, and comes back.
pub fn kubelet_stopped(world: &World<'_>) -> Result<Figures> {
    let pods = world.lab.web()?.into_iter().filter(|pod| pod.node == "n2");
    let gone: BTreeSet<String> = pods.map(|pod| pod.name).collect();
    ensure!((1..5).contains(&gone.len()), "n2 has {} of 5 pods", gone.len());
    let load = world.start_all()?;
    rest(1);
    world.lab.on_node("n2", &["touch", "/run/kubelet.stopped"])?;
    let file = world.lab.state.join("n2/init.pid");
    let init = fs::read_to_string(&file)?.trim().to_owned();
    stop_kubelet(&init).context("stopping n2's kubelet")?;
    let ready = |wanted: &str| {
        eventually(&format!("node n2 Ready={wanted}"), || {
            let text = world.lab.kubectl(&["get", "node", "n2", "-o", "json"])?;
            let node: Value = serde_json::from_str(&text)?;
            let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let is_so = conditions.iter().any(|one| one["type"] == "Ready" && one["status"] == wanted);
            Ok(is_so.then_some(()))
        })
    };
    let unknown = ready("Unknown");
    rest(5);
    world.lab.on_node("n2", &["rm", "-f", "/run/kubelet.stopped"])?;
    unknown?;
    ready("True")?;
    world.lab.wait_for_web(5)?;
    world.wait_for_backends(5)?;
    rest(1);
    let loaded = load.stop()?;
    // One pod after the other counts as not ready: on the way to the other node's there may be some that do a moment later.
    loaded.check(gone.len() as u64)?;
    for (what, seen) in loaded.web.iter() {
        let was_there = seen.pods.keys().any(|pod| gone.contains(pod));
        let is_there = seen.pod().is_none_or(|pod| gone.contains(pod));
        ensure!(was_there == (seen.moved > 0) && !is_there, "{what}: {seen:?}, and {gone:?} were not ready");
    }
    Ok(loaded.figures(&format!("n2 with {} of the pods was NotReady, its clients asked on", gone.len())))
}

fn stop_kubelet(init: &str) -> Result<()> {
    let children = fs::read_to_string(format!("/proc/{init}/task/{init}/children"))?;
    let mut stopped = 0;
    let mut next: Vec<String> = children.split_whitespace().map(str::to_owned).collect();
    while let Some(pid) = next.pop() {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if name.trim() == "kubelet" {
            kill(Pid::from_raw(pid.parse()?), Signal::SIGKILL)?;
            stopped += 1;
        } else if name.trim() == "node.sh" {
            let more = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
            next.extend(more.split_whitespace().map(str::to_owned));
        }
    }
    ensure!(stopped == 1, "{stopped} of them were running");
    Ok(())
}

/// Both daemons are ready, and have all backends.
fn back(world: &World<'_>) -> Result<()> {
    std::thread::sleep(Duration::from_millis(200));
    for node in NODES {
        world.lab.daemon(node)?;
    }
    world.wait_for_backends(5)
}
