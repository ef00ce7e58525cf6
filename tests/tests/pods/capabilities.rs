//! Which capabilities the daemon needs, and for what: those of its manifest, and those without each of them.
//!
//! It is root, with no more capabilities than that, as in a container.

use std::path::Path;
use std::process::Command;

use affinity_tests::process::Process;
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::site::Site;

/// The ways by which the node's own processes, a pod whose namespace is held by a file, and one that is known by a process of
/// another user alone, come to a service.
type Ways = [&'static str; 3];

/// All of them are served where their sockets are.
const ALL: Ways = ["socket", "socket", "socket"];

/// Those of the daemon's container, as the kernel names them.
fn of_the_manifest() -> Result<Vec<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kind/deploy/daemonset.yaml");
    let manifest: Value = serde_saphyr::from_str(&std::fs::read_to_string(&path)?)?;
    let context = &manifest["spec"]["template"]["spec"]["containers"][0]["securityContext"];
    ensure!(context["privileged"] == false && context["capabilities"]["drop"][0] == "ALL", "{context}");
    let added = context["capabilities"]["add"].as_array().context("capabilities")?;
    added.iter().map(|name| Ok(name.as_str().context("a name")?.to_lowercase())).collect()
}

/// Those of the manifest without some.
fn without(taken: &[&str]) -> Result<Vec<String>> {
    let mut capabilities = of_the_manifest()?;
    for name in taken {
        let at = capabilities.iter().position(|one| one == name).with_context(|| format!("{name} is not given"))?;
        capabilities.remove(at);
    }
    Ok(capabilities)
}

/// What a daemon without some of the capabilities can do: by which ways clients come, and what it says.
fn serves(taken: &[&str]) -> Result<(Ways, Vec<String>)> {
    let mut site = Site::new()?;
    site.daemon.options().capabilities = Some(without(taken)?);
    let [held, known, ..] = &site.lab.clients[..] else { anyhow::bail!("clients are missing") };
    site.hold(&held.name, &held.netns)?;
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--clear-groups", "--", "sleep", "600"]);
    let _process = Process::start(command, &known.netns.place(), None)?;
    site.daemon.resume()?;
    let ways = [&site.lab.node.netns, &held.netns, &known.netns].map(|netns| site.comes_by(netns));
    let [node, held, known] = ways;
    let status = site.daemon.cli().json(&["status"])?;
    let texts = |list: &Value| {
        let texts = list.as_array().into_iter().flatten();
        texts.map(|one| one["message"].as_str().or(one.as_str()).unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    Ok(([node?, held?, known?], [texts(&status["problems"]), texts(&status["sockets"]["problems"])].concat()))
}

/// The last line of a daemon that can't start.
fn ends(taken: &[&str]) -> Result<String> {
    let mut site = Site::new()?;
    site.daemon.options().capabilities = Some(without(taken)?);
    site.daemon.launch()?;
    let ended = site.daemon.wait_end()?;
    ensure!(ended.code() == Some(1), "{ended}");
    site.daemon.log().lines().last().map(ToOwned::to_owned).context("a last line")
}

#[test]
fn with_those_of_the_manifest_all_are_served() -> Result<()> {
    let (ways, problems) = serves(&[])?;
    assert_eq!((ways, problems), (ALL, Vec::new()));
    Ok(())
}

/// They are there for who takes `SYS_ADMIN` away.
#[test]
fn sys_admin_includes_bpf_and_perfmon() -> Result<()> {
    let (ways, problems) = serves(&["bpf", "perfmon"])?;
    assert_eq!((ways, problems), (ALL, Vec::new()));
    Ok(())
}

#[test]
fn without_sys_admin_pods_sockets_are_left_to_tc() -> Result<()> {
    let (ways, problems) = serves(&["sys_admin"])?;
    assert_eq!(ways, ["socket", "tc", "tc"]);
    assert!(!problems.is_empty() && problems.iter().all(|text| text.contains("CAP_SYS_ADMIN")), "{problems:?}");
    Ok(())
}

#[test]
fn without_sys_ptrace_so_are_those_that_no_file_holds() -> Result<()> {
    let (ways, problems) = serves(&["sys_ptrace"])?;
    assert_eq!(ways, ["socket", "socket", "tc"]);
    assert!(problems.len() == 1 && problems[0].contains("CAP_SYS_PTRACE"), "{problems:?}");
    Ok(())
}

#[test]
fn without_the_others_it_ends_and_names_them() -> Result<()> {
    for (taken, named) in
        [(&["net_admin"][..], "NET_ADMIN;"), (&["bpf", "sys_admin"], "BPF;"), (&["perfmon", "sys_admin"], "PERFMON;")]
    {
        let line = ends(taken)?;
        assert!(line.contains(&format!("it lacks: {named}")), "{line}");
    }
    Ok(())
}
