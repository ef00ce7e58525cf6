//! The verbs that show something, `conntrack flush` and `cleanup`.

use std::net::IpAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{SigSet, Signal};
use serde_json::{Value, json};

use super::args::{ClusterArgs, Common, Output};
use super::cluster;
use super::duties;
use super::print::{self, line, or_dash, span};
use crate::flush;
use crate::loader::{self, cgroup::CgroupAttachment};
use crate::model::FrontendKind;
use crate::monitor::{self, Happening};
use crate::status::{NodeStatus, StatusFile};
use crate::view::{self, BackendRow, Certainty, EvictionRow, FrontendRow, ServiceRow, SessionRow, Snapshot};

pub(super) fn services(common: &Common) -> Result<()> {
    let rows = view::services(&Snapshot::read(&common.pin_dir)?);
    if common.output == Output::Json {
        return print::json(&rows);
    }
    print_services(common, &rows, common.output == Output::Wide)?;
    if common.output != Output::Wide {
        return Ok(());
    }
    line("")?;
    print_frontends(&rows)
}

fn print_services(common: &Common, rows: &[ServiceRow], with_policy: bool) -> Result<()> {
    let wide = common.output == Output::Wide;
    let mut header = vec!["service", "port", "frontends", "affinity", "backends", "sessions"];
    header.extend(with_policy.then_some("internal policy"));
    header.extend(wide.then_some("id"));
    print::table(
        &header,
        rows.iter().map(|row| {
            let affinity = row.affinity_timeout_seconds.map(|seconds| format!("ClientIP {}", span(seconds.into())));
            let mut cells = vec![
                row.service.clone(),
                or_dash(Some(&row.port_name).filter(|name| !name.is_empty())),
                row.frontend_details.iter().map(describe_frontend).collect::<Vec<_>>().join(", "),
                affinity.unwrap_or_else(|| "None".to_owned()),
                format!("{}/{}", row.eligible, row.backends),
                row.live_sessions.to_string(),
            ];
            cells.extend(with_policy.then(|| row.internal_traffic_policy.to_owned()));
            cells.extend(wide.then(|| row.id.to_string()));
            cells
        }),
    )
}

/// `192.168.1.5:30080/TCP (NodePort)`: of a cluster IP, where it is.
fn describe_frontend(it: &FrontendRow) -> String {
    if it.kind == FrontendKind::ClusterIp.to_string() {
        it.frontend.clone()
    } else {
        format!("{} ({})", it.frontend, it.kind)
    }
}

/// What there is to say of each frontend of service ports.
fn print_frontends(rows: &[ServiceRow]) -> Result<()> {
    let are_announced = rows.iter().flat_map(|row| &row.frontend_details).any(|it| it.announced_by.is_some());
    let header = ["port", "frontend", "kind", "traffic policy", "lets in", "announced by"];
    print::table(
        &header[..header.len() - usize::from(!are_announced)],
        rows.iter().flat_map(|row| row.frontend_details.iter().map(move |it| (row, it))).map(|(row, it)| {
            let lets_in = it.source_ranges.as_ref().map_or_else(
                || "all".to_owned(),
                |ranges| if ranges.is_empty() { "nobody".to_owned() } else { ranges.join(", ") },
            );
            let mut cells = vec![
                or_dash(Some(&row.port_name).filter(|name| !name.is_empty())),
                it.frontend.clone(),
                it.kind.clone(),
                it.traffic_policy.to_owned(),
                lets_in,
            ];
            cells.extend(are_announced.then(|| or_dash(it.announced_by.as_ref())));
            cells
        }),
    )
}

/// The name in full.
fn qualified(name: &str) -> String {
    if name.contains('/') { name.to_owned() } else { format!("default/{name}") }
}

pub(super) fn service(common: &Common, name: &str, cluster: ClusterArgs, namespace: Option<&str>) -> Result<()> {
    let name = qualified(name);
    let snapshot = Snapshot::read(&common.pin_dir)?;
    let mut services: Vec<_> = view::services(&snapshot).into_iter().filter(|row| row.service == name).collect();
    if services.is_empty() {
        bail!(
            "no service {name}: `affinity service list` shows those that are served, `affinity status` what was rejected"
        );
    }
    let details = services.iter_mut().flat_map(|row| &mut row.frontend_details);
    let mut announced: Vec<_> = details.filter(|it| it.kind == FrontendKind::LoadBalancer.to_string()).collect();
    if !announced.is_empty() || cluster.is_named() {
        let announcers = cluster::announcers(cluster, namespace)?;
        for it in &mut announced {
            it.announced_by = announcers.get(&it.address).cloned();
        }
    }
    let backends: Vec<_> = view::backends(&snapshot).into_iter().filter(|row| row.service == name).collect();
    if common.output == Output::Json {
        return print::json(&json!({"service": name, "ports": services, "backends": backends}));
    }
    print_services(common, &services, true)?;
    line("")?;
    print_frontends(&services)?;
    line("")?;
    print_backends(common, &backends)
}

pub(super) fn backends(common: &Common, service: Option<&str>) -> Result<()> {
    let service = service.map(qualified);
    let mut rows = view::backends(&Snapshot::read(&common.pin_dir)?);
    rows.retain(|row| service.as_ref().is_none_or(|name| row.service == *name));
    if common.output == Output::Json {
        return print::json(&rows);
    }
    print_backends(common, &rows)
}

fn print_backends(common: &Common, rows: &[BackendRow]) -> Result<()> {
    let wide = common.output == Output::Wide;
    let mut header =
        vec!["service", "port", "pod", "address", "state", "share", "connections", "sessions", "flows", "packets"];
    header.extend(wide.then_some("id"));
    print::table(
        &header,
        rows.iter().map(|row| {
            let mut cells = vec![
                row.service.clone(),
                or_dash(Some(&row.port_name).filter(|name| !name.is_empty())),
                or_dash(row.pod.as_ref()),
                row.address.to_string(),
                row.state.to_owned(),
                format!("{:.1}%", row.share * 100.0),
                row.connections.to_string(),
                row.live_sessions.to_string(),
                row.flows.to_string(),
                row.packets.to_string(),
            ];
            cells.extend(wide.then(|| row.id.to_string()));
            cells
        }),
    )
}

pub(super) fn sessions(common: &Common, service: Option<&str>, client: Option<IpAddr>, live: bool) -> Result<()> {
    let service = service.map(qualified);
    let mut rows = view::sessions(&Snapshot::read(&common.pin_dir)?);
    rows.retain(|row| {
        service.as_ref().is_none_or(|name| row.service == *name)
            && client.is_none_or(|client| row.client == client)
            && (!live || row.left_seconds.is_some())
    });
    if common.output == Output::Json {
        return print::json(&rows);
    }
    print_sessions(common, &rows)
}

fn print_sessions(common: &Common, rows: &[SessionRow]) -> Result<()> {
    let wide = common.output == Output::Wide;
    let mut header = vec!["client", "service", "port", "pod", "backend", "age", "left", "state"];
    header.extend(wide.then_some("backend id"));
    print::table(
        &header,
        rows.iter().map(|row| {
            let mut cells = vec![
                row.client.to_string(),
                row.service.clone(),
                or_dash(Some(&row.port_name).filter(|name| !name.is_empty())),
                or_dash(row.pod.as_ref()),
                or_dash(row.backend),
                span(row.age_seconds),
                or_dash(row.left_seconds.map(span)),
                row.state.to_owned(),
            ];
            cells.extend(wide.then(|| row.backend_id.to_string()));
            cells
        }),
    )
}

pub(super) fn connections(common: &Common, client: Option<IpAddr>) -> Result<()> {
    let mut rows = view::connections(&Snapshot::read(&common.pin_dir)?);
    rows.retain(|row| client.is_none_or(|client| row.client.ip() == client));
    if common.output == Output::Json {
        return print::json(&rows);
    }
    print::table(
        &["proto", "direction", "client", "frontend", "backend", "seen as", "service", "state", "packets", "idle"],
        rows.iter().map(|row| {
            vec![
                row.proto.clone(),
                row.direction.to_owned(),
                row.client.to_string(),
                row.frontend.to_string(),
                row.backend.to_string(),
                row.seen_as.map_or_else(|| "-".to_owned(), |seen| seen.to_string()),
                row.service.clone(),
                row.state.to_owned(),
                row.packets.to_string(),
                span(row.idle_seconds),
            ]
        }),
    )
}

pub(super) fn sockets(common: &Common, service: Option<&str>, client: Option<IpAddr>) -> Result<()> {
    let tables = view::open(&common.pin_dir)?;
    let mut rows = view::sockets(&tables, &view::read_names(&tables)?)?;
    let service = service.map(qualified);
    rows.retain(|row| {
        client.is_none_or(|client| row.client == client) && service.as_ref().is_none_or(|name| row.service == *name)
    });
    if common.output == Output::Json {
        return print::json(&rows);
    }
    print::table(
        &["client", "proto", "frontend", "service", "port", "pod", "backend", "cookie"],
        rows.iter().map(|row| {
            vec![
                row.client.to_string(),
                row.proto.clone(),
                row.frontend.to_string(),
                row.service.clone(),
                or_dash(Some(&row.port_name).filter(|name| !name.is_empty())),
                or_dash(row.pod.as_ref()),
                row.backend.to_string(),
                row.cookie.clone(),
            ]
        }),
    )
}

pub(super) fn flush(common: &Common, client: Option<IpAddr>, service: Option<&str>) -> Result<()> {
    let mut tables = view::open(&common.pin_dir)?;
    let names = view::read_names(&tables)?;
    let service = service.map(qualified);
    if let Some(name) = &service
        && !names.services.values().any(|port| port.service.to_string() == *name)
    {
        bail!("no service {name}: `affinity service list` shows those that are served");
    }
    let forgotten = flush::connections(&mut tables, |ip, id| {
        client.is_none_or(|client| client == ip) && service.as_ref().is_none_or(|name| names.service(id) == *name)
    })?;
    if common.output == Output::Json {
        return print::json(&json!({"forgotten": forgotten}));
    }
    line(format!(
        "forgot {forgotten} entries: one a direction, and one more where the node's own address stands for the client"
    ))
}

pub(super) fn monitor(common: &Common) -> Result<()> {
    let as_json = common.output == Output::Json;
    let show = |happening: &Happening| {
        let text = if as_json { serde_json::to_string(happening)? } else { describe(happening) };
        line(text).map_err(|error| error.downcast::<std::io::Error>().unwrap_or_else(std::io::Error::other))
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(monitor::run(&common.pin_dir, &common.state_dir, show))?)
}

/// `12.345  10.244.0.11:40000 -> default/web -> web-0 (10.244.0.101:8080)  affinity-failover, was web-1`; of who comes from
/// outside, `198.51.100.9:40000 outside -> default/web (NodePort) -> …`
fn describe(it: &Happening) -> String {
    let client = it.client_port.map_or_else(|| it.client.to_string(), |port| format!("{}:{port}", it.client));
    let address = or_dash(it.backend);
    let pod = it.pod.as_ref().map_or_else(|| address.clone(), |pod| format!("{pod} ({address})"));
    let previous = it.previous.as_ref().map_or_else(String::new, |previous| format!(", was {previous}"));
    let outside = if it.outside == Some(true) { " outside" } else { "" };
    let kind = it.frontend_kind.as_ref().filter(|kind| **kind != FrontendKind::ClusterIp.to_string());
    let kind = kind.map_or_else(String::new, |kind| format!(" ({kind})"));
    format!("{:12.3}  {client}{outside} -> {}{kind} -> {pod}  {}{previous}", it.time_seconds, it.service, it.reason)
}

pub(super) fn status(common: &Common) -> Result<()> {
    let daemon = StatusFile::read(&common.state_dir)?;
    let snapshot = match Snapshot::read(&common.pin_dir) {
        Ok(snapshot) => Some(snapshot),
        // A daemon that has just begun has something to tell all the same.
        Err(view::SnapshotError::Missing(_)) if daemon.is_some() => None,
        Err(error) => return Err(error.into()),
    };
    let all = common.output == Output::Wide;
    let counters = snapshot.as_ref().map(|snapshot| view::counters(snapshot, all)).unwrap_or_default();
    let maps = snapshot.as_ref().map(view::maps).unwrap_or_default();
    let collector = daemon.as_ref().and_then(|status| status.collector.as_ref());
    let collected = collector.map_or(0, |collector| collector.removed_in_all);
    let evictions = snapshot.as_ref().map(|snapshot| view::evictions(snapshot, collected));
    if common.output == Output::Json {
        return print::json(&json!({
            "daemon": daemon.as_ref().map_or_else(|| json!({"running": false}), described),
            "rejected": daemon.as_ref().map(|status| &status.rejected),
            "problems": daemon.as_ref().map(|status| &status.problems),
            "attachments": attachments(common, daemon.as_ref()),
            "attaching": daemon.as_ref().map(|status| &status.attaching),
            "node": daemon.as_ref().and_then(|status| status.node.as_ref()),
            "cgroup": cgroup(common, daemon.as_ref()),
            "collector": daemon.as_ref().and_then(|status| status.collector.as_ref()),
            "sockets": daemon.as_ref().and_then(|status| status.sockets.as_ref()),
            "duties": daemon.as_ref().and_then(|status| status.duties.as_ref()),
            "maps": maps,
            "evictions": evictions,
            "counters": counters,
        }));
    }
    match &daemon {
        None => line("daemon: not running; services are served as they were when it ended")?,
        Some(status) => {
            let state = match (status.ready, status.synced) {
                (true, _) => "ready",
                (false, true) => "synced, attaching",
                (false, false) => "waiting for its source",
            };
            line(format!(
                "daemon: {state}, version {}, pid {}, for {}",
                status.version,
                status.pid,
                span(age(status))
            ))?;
            if let Some(node) = &status.node {
                line(format!("node: {}", describe_node(node)))?;
            }
            line(format!("source: {} ({})", status.source.kind, status.source.detail))?;
            if let (Some(since), Some(error)) = (status.source.stale_since, &status.source.last_error) {
                line(format!("        STALE for {}: {error}", span(seconds_since(since))))?;
            }
            for it in status.duties.iter().flat_map(duties::lines) {
                line(it)?;
            }
            for it in &status.rejected {
                let field = if it.field.is_empty() { String::new() } else { format!("{}: ", it.field) };
                line(format!("rejected: {}: {field}{}", it.object, it.message))?;
            }
            for it in &status.problems {
                line(format!("problem: {}: {}", it.object, it.message))?;
            }
        }
    }
    print_attached(common, daemon.as_ref())?;
    line("")?;
    print::table(
        &["map", "entries", "room", "fill"],
        maps.iter().map(|map| {
            let warning = if map.is_nearly_full() { "  nearly full" } else { "" };
            vec![
                map.name.to_owned(),
                map.entries.to_string(),
                map.capacity.to_string(),
                format!("{:.1}%{warning}", map.fill * 100.0),
            ]
        }),
    )?;
    if let Some(evictions) = &evictions {
        print_evictions(evictions, all)?;
    }
    line("")?;
    print::table(
        &["program", "reason", "verdict", "packets", "bytes", "meaning"],
        counters.iter().map(|row| {
            vec![
                row.program.to_owned(),
                row.reason.to_owned(),
                row.verdict.to_owned(),
                row.packets.to_string(),
                row.bytes.to_string(),
                row.meaning.to_owned(),
            ]
        }),
    )
}

/// Its name and zone, or what it means that it has none.
pub(super) fn describe_node(node: &NodeStatus) -> String {
    let going = if node.going { "; about to go: load balancers are told to send it no new clients" } else { "" };
    let place = match (&node.zone, node.known) {
        (Some(zone), _) => format!("{}, zone {zone}", node.name),
        (None, true) => format!("{}, in no zone: hints for zones are not followed", node.name),
        (None, false) => format!("{}, of which no Node is known: hints for zones are not followed", node.name),
    };
    format!("{place}{going}")
}

/// What is attached where, and how sockets are looked after.
fn print_attached(common: &Common, daemon: Option<&StatusFile>) -> Result<()> {
    line("")?;
    let attached = attachments(common, daemon);
    let cell = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    print::table(
        &["interface", "index", "attached by"],
        attached.iter().map(|it| ["interface", "ifindex", "mode"].map(|field| cell(&it[field])).to_vec()),
    )?;
    if let Some(it) = daemon.map(|status| &status.attaching).filter(|it| it.interfaces > 0) {
        let millis = |seconds: f64| format!("{:.1} ms", seconds * 1000.0);
        let (p50, p99, longest) = (millis(it.p50_seconds), millis(it.p99_seconds), millis(it.longest_seconds));
        line(format!("attached after {p50}, 99% after {p99}, all after {longest}, of {} that came", it.interfaces))?;
    }
    line(match cgroup(common, daemon) {
        Some(CgroupAttachment { path: Some(path), .. }) => format!("sockets: those of the cgroup {}", path.display()),
        Some(CgroupAttachment { path: None, id }) => format!("sockets: those of the cgroup with the number {id}"),
        None => "sockets: none, all by their packets".to_owned(),
    })?;
    daemon.map_or(Ok(()), lines_of_threads)
}

/// Estimates, and said to be.
fn print_evictions(rows: &[EvictionRow], wide: bool) -> Result<()> {
    line("\nevicted since the maps were made, both families: inserted, less taken out, less present (an estimate)")?;
    let mut header = vec!["maps", "inserted", "taken out", "present", "evicted"];
    header.extend(wide.then_some("not certain, for"));
    print::table(
        &header,
        rows.iter().map(|row| {
            let evicted = match (row.certainty, row.evicted) {
                (Certainty::AtMost, 0) => "none".to_owned(),
                (certainty, evicted) => format!("{} {evicted}", certainty.name()),
            };
            let mut cells = vec![
                row.maps.to_owned(),
                row.inserted.to_string(),
                row.removed.to_string(),
                row.present.to_string(),
                evicted,
            ];
            cells.extend(wide.then(|| row.because.to_owned()));
            cells
        }),
    )
}

/// What the threads beside the daemon's have done.
fn lines_of_threads(status: &StatusFile) -> Result<()> {
    if let Some(it) = &status.sockets {
        let left = if it.left_to_tc > 0 { format!(", {} of them left to TC", it.left_to_tc) } else { String::new() };
        line(format!(
            "         of {} network namespaces{left}; {} open, {} ended",
            it.namespaces, it.refreshed, it.destroyed
        ))?;
        for problem in &it.problems {
            line(format!("problem: {problem}"))?;
        }
    }
    if let Some(it) = &status.collector {
        line(format!("connections that are over: {} of {} taken out lately", it.removed, it.looked_at))?;
    }
    Ok(())
}

fn described(status: &StatusFile) -> Value {
    json!({
        "running": true,
        "pid": status.pid,
        "version": status.version,
        "started_seconds_ago": age(status),
        "ready": status.ready,
        "synced": status.synced,
        "source": status.source,
    })
}

/// By the daemon's word, or by the pins where there is none.
fn attachments(common: &Common, daemon: Option<&StatusFile>) -> Vec<Value> {
    let attachments = match daemon {
        Some(status) => status.attachments.clone(),
        None => loader::attached(&common.pin_dir),
    };
    attachments.iter().map(|it| json!({"interface": it.interface, "ifindex": it.ifindex, "mode": it.mode})).collect()
}

/// By the daemon's word, or by the pins where there is none.
fn cgroup(common: &Common, daemon: Option<&StatusFile>) -> Option<CgroupAttachment> {
    match daemon {
        Some(status) => status.cgroup.clone(),
        None => loader::attached_cgroup(&common.pin_dir),
    }
}

fn age(status: &StatusFile) -> f64 {
    seconds_since(status.started)
}

fn seconds_since(time: i64) -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "seconds since 1970 are under 2^52")]
    let since = now - time as f64;
    since.max(0.0)
}

pub(super) fn programs(common: &Common, verifier_log: bool) -> Result<()> {
    let footprints = loader::footprints(verifier_log)?;
    if common.output == Output::Json {
        return print::json(&footprints);
    }
    print::table(
        &["program", "instructions", "verified", "stack", "machine code"],
        footprints.programs.iter().map(|it| {
            vec![
                it.program.to_owned(),
                it.instructions.to_string(),
                it.verified.to_string(),
                or_dash(it.stack),
                it.machine_code.to_string(),
            ]
        }),
    )?;
    line(format!(
        "\nLinux {}: instructions without those that are never reached; those that the verifier went through, of at most\n\
         1000000; bytes of stack, of at most 512, and of machine code",
        footprints.kernel
    ))
}

/// Removes every trace; where it is to stay, it then waits to be ended.
pub(super) fn cleanup(common: &Common, stay: bool) -> Result<()> {
    clean(common)?;
    if stay {
        let ends = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
        ends.thread_block()?;
        ends.wait()?;
    }
    Ok(())
}

fn clean(common: &Common) -> Result<()> {
    if let Some(status) = StatusFile::read(&common.state_dir)? {
        bail!("the daemon is running (pid {}): end it first, or it attaches again", status.pid);
    }
    let removed = loader::cleanup(&common.pin_dir, &common.state_dir).context("cleaning up")?;
    if common.output == Output::Json {
        return print::json(&json!({"removed": removed}));
    }
    if removed.is_empty() {
        return line("nothing was left to remove");
    }
    removed.iter().try_for_each(|it| line(format!("removed {it}")))
}
