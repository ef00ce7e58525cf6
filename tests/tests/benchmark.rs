//! Every part of the benchmark runs, and its figures can be read by programs. What they come to is for no test to say.

use std::path::Path;
use std::process::Command;

use affinity_tests::apiserver;
use affinity_tests::privilege::require_root;
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

/// Runs a part with the least effort and returns what it prints for programs.
fn quick(part: &str) -> Result<Value> {
    require_root();
    let object = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/bench.o");
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    command.args([part, "--quick", "--rounds", "2", "--output", "json", "--object"]).arg(object);
    let output = command.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn rows<'a>(figures: &'a Value, part: &str) -> Result<&'a Vec<Value>> {
    figures[part]["rows"].as_array().with_context(|| format!("no rows: {figures}"))
}

#[test]
fn packets_are_measured() -> Result<()> {
    let figures = quick("--packets")?;
    assert!(figures["crr"].is_null(), "{figures}");
    let rows = rows(&figures, "packets")?;
    for version in [4, 6] {
        let syn = |row: &&Value| row["name"] == "SYN, not for a service" && row["version"] == version;
        assert_eq!(rows.iter().filter(syn).count(), 2, "one for each number of services: {figures}");
    }
    let all = rows.iter().filter(|row| row["name"] == "SNAT, first packet, both").count();
    assert_eq!(all, 2 * 2, "for each number of services in each family: {figures}");
    let is_held_against_ipv4 = |row: &Value| row["to_ipv4"]["median"].as_f64().is_some() == (row["version"] == 6);
    assert!(rows.iter().all(is_held_against_ipv4), "{figures}");
    Ok(())
}

#[test]
fn exchanges_are_measured_by_every_way() -> Result<()> {
    let figures = quick("--crr")?;
    assert!(figures["packets"].is_null(), "{figures}");
    let rows = rows(&figures, "crr")?;
    for (way, settings) in
        [("direct", [1, 1]), ("direct-tracked", [1, 1]), ("nftables", [2, 1]), ("tc", [2, 1]), ("socket-lb", [2, 1])]
    {
        let of_it: Vec<&Value> = rows.iter().filter(|row| row["way"] == way).collect();
        let of = |version| of_it.iter().filter(|row| row["version"] == version).count();
        assert_eq!([of(4), of(6)], settings.map(|settings| settings * 2), "by one thread and by sixteen: {figures}");
        assert!(of_it.iter().all(|row| row["rate"]["median"].as_f64() > Some(0.0)), "{figures}");
    }
    Ok(())
}

#[test]
fn exchanges_from_outside_are_measured_by_every_proxy_that_there_is() -> Result<()> {
    let figures = quick("--north-south")?;
    assert!(figures["crr"].is_null(), "{figures}");
    let rows = rows(&figures, "north_south")?;
    let kube_proxy = apiserver::program("kube-proxy").is_ok();
    for (proxy, is_there) in [("affinity", true), ("kube-proxy", kube_proxy)] {
        let of_it: Vec<&Value> = rows.iter().filter(|row| row["proxy"] == proxy).collect();
        for (pod, version) in [("here", 4), ("here", 6), ("elsewhere", 4), ("elsewhere", 6)] {
            let of = of_it.iter().filter(|row| row["pod"] == pod && row["version"] == version);
            assert_eq!(of.count(), if is_there { 2 } else { 0 }, "{proxy}, by one thread and by sixteen: {figures}");
        }
        assert!(of_it.iter().all(|row| row["rate"]["median"].as_f64() > Some(0.0)), "{figures}");
        let is_held = |row: &&Value| row["ratio"]["median"].as_f64().is_some() == (proxy == "affinity" && kube_proxy);
        assert!(of_it.iter().all(is_held), "{figures}");
    }
    Ok(())
}

#[test]
fn calls_of_sockets_are_measured_in_both_families() -> Result<()> {
    let figures = quick("--sockets")?;
    let rows = rows(&figures, "sockets")?;
    assert_eq!(rows.len(), 3 * 3 * 2, "{figures}");
    for figure in ["nanos", "empty"] {
        assert!(rows.iter().all(|row| row[figure]["median"].as_f64() > Some(0.0)), "{figure}: {figures}");
    }
    Ok(())
}

#[test]
fn interfaces_that_come_are_timed_by_both_clocks() -> Result<()> {
    let figures = quick("--attach")?;
    let rows = figures["rows"].as_array().context("rows")?;
    // TCX, the same with grace periods as set, clsact: each one by one and in a burst.
    assert_eq!(rows.len(), 3 * 2, "{figures}");
    for row in rows {
        let (daemon, outside) = (row["daemon"]["median"].as_f64(), row["outside"]["median"].as_f64());
        assert!(daemon > Some(0.0), "{figures}");
        assert_eq!(outside.is_some(), row["by"] != "clsact", "{figures}");
    }
    Ok(())
}

#[test]
fn what_is_to_be_measured_is_said_before_and_without_root() -> Result<()> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
    let output = command.args(["--plan", "--crr", "--sockets", "--rounds", "30"]).output()?;
    let text = String::from_utf8(output.stderr)?;
    ensure!(output.status.success() && output.stdout.is_empty(), "{text}");
    assert!(text.contains("crr: ") && text.contains("sockets: ") && !text.contains("packets: "), "{text}");
    assert!(text.contains("30 rounds, about ") && text.contains(" in all"), "{text}");
    Ok(())
}
