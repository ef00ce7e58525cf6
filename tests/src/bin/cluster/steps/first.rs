//! A pod's first packets: those of a container that connects as the very first thing that it does.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::World;
use crate::lab::{DEMO, NODES, eventually};
use crate::suite::Figures;

/// How long a container's connect may take: a SYN that is lost comes again after a second.
const TIMEOUT: &str = "900ms";

/// Pods that come all at once connect to the web service, each once, by the first SYN that they ever send.
///
/// Over IPv4 alone: over IPv6 the first packets of a new pod are lost in this cluster's network, also those to a pod's own
/// address, which no service has a part in.
pub fn packets(world: &World<'_>) -> Result<Figures> {
    let count = if world.short { 3 } else { 15 };
    let server = world.web.v4.to_string();
    let pods: Vec<Value> = (0..count * NODES.len())
        .map(|index| {
            json!({
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": format!("first-{index}"), "namespace": DEMO, "labels": {"app": "first"}},
                "spec": {
                    "nodeName": NODES[index % NODES.len()],
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": 0,
                    "containers": [{
                        "name": "first",
                        "image": "localhost/agnhost:1",
                        "args": ["connect", "--timeout", TIMEOUT, server],
                    }],
                },
            })
        })
        .collect();
    let delete = ["delete", "pods", "-n", DEMO, "-l", "app=first", "--ignore-not-found", "--wait=true"];
    world.lab.kubectl(&delete).context("those of an earlier run")?;
    let file = world.lab.state.join("first.json");
    let list = json!({"apiVersion": "v1", "kind": "List", "items": pods});
    fs::write(&file, list.to_string()).with_context(|| file.display().to_string())?;
    world.lab.kubectl(&["apply", "-f", &file.display().to_string()])?;
    let phases = eventually("the end of pods that connect once", || {
        let phases = "jsonpath={range .items[*]}{.metadata.name}={.status.phase} {end}";
        let phases = world.lab.kubectl(&["get", "pods", "-n", DEMO, "-l", "app=first", "-o", phases])?;
        let is_over = |pod: &str| pod.ends_with("=Succeeded") || pod.ends_with("=Failed");
        Ok(phases.split_whitespace().all(is_over).then_some(phases))
    })?;
    let failed: Vec<&str> = phases.split_whitespace().filter(|pod| pod.ends_with("=Failed")).collect();
    ensure!(phases.split_whitespace().count() == pods.len(), "not all of {} pods: {phases}", pods.len());
    let say = |pod: &&str| {
        let name = pod.trim_end_matches("=Failed");
        let said = world.lab.kubectl(&["logs", "-n", DEMO, name]).unwrap_or_else(|error| format!("{error:#}"));
        format!("{name}: {}", said.trim())
    };
    let failed: Vec<String> = failed.iter().map(say).collect();
    ensure!(failed.is_empty(), "not connected within {TIMEOUT}: {failed:?} of {} pods", pods.len());
    world.lab.kubectl(&delete)?;
    Ok(format!("{} pods that came at once each connected by the first SYN they sent", pods.len()).into())
}
