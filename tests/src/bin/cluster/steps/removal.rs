//! The way back: the daemon is deleted, and everything that it has left is taken off the nodes.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use aya::programs::loaded_programs;

use super::{World, install, pod_of};
use crate::lab::{NODES, eventually};
use crate::load::Question;
use crate::suite::Figures;

const CLEANUP: &str = "affinity-cleanup";

/// Services are served until `kind/cleanup` has been there, and again once the daemon is back.
pub fn removed(world: &World<'_>) -> Result<Figures> {
    let lab = world.lab;
    let Some(client) = world.clients.iter().find(|client| !client.is_host) else { anyhow::bail!("there is no client") };
    let before = pod_of(client, world.web.v4)?;
    lab.kubectl(&["delete", "-k", "kind/deploy"])?;
    let after = pod_of(client, world.web.v4)?;
    ensure!(before == after, "without a daemon it is on {after}, no more on {before}");
    lab.kubectl(&["apply", "-k", "kind/cleanup"])?;
    lab.rolled_out(CLEANUP, "daemonset/affinity-cleanup")?;
    for node in NODES {
        let pinned = lab.on_node(node, &["ls", "/sys/fs/bpf"])?;
        ensure!(!pinned.contains("affinity"), "still pinned on {node}: {pinned}");
    }
    // The kernel lets go of them a moment later.
    let mut left = BTreeSet::new();
    let gone = eventually("no program of ours in the kernel", || {
        let names = loaded_programs().map(|one| Ok(one?.name_as_str().unwrap_or_default().to_owned()));
        left = names.collect::<Result<BTreeSet<String>>>()?;
        left.retain(|name| name.starts_with("affinity_"));
        Ok(left.is_empty().then_some(()))
    });
    ensure!(gone.is_ok(), "still in the kernel: {left:?}");
    let seen = client.ask(Question::Http, world.web.v4, 1)?;
    ensure!(seen.pod().is_none(), "somebody still serves: {:?}", seen.pod());
    lab.kubectl(&["delete", "-k", "kind/cleanup"])?;
    install(lab)?;
    world.wait_for_backends(5)?;
    pod_of(client, world.web.v4)?;
    Ok("served until it was cleaned up, nothing left then, and served again".to_owned().into())
}
