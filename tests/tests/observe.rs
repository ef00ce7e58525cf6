//! What a daemon tells over HTTP, on real listeners.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use affinity_tests::daemon::{Daemon, DaemonOptions, Source, SourceDir};
use affinity_tests::netns::Netns;
use affinity_tests::objects::{Document, Endpoint, ServiceObject, SliceObject};
use affinity_tests::privilege::require_root;
use affinity_tests::topology::{Host, Lab, LabOptions, NODE_IP};
use affinity_tests::traffic::{Backend, ClientOptions, http_get};
use affinity_tests::wait;
use anyhow::{Context as _, Result, ensure};
use jiff::{SignedDuration, Timestamp};

const SECOND: Duration = Duration::from_secs(1);
const METRICS: &str = "127.0.0.1:10249";
const HEALTH: &str = "127.0.0.1:10256";
const STICKY: &str = "10.96.0.10:80";
const POD_PORT: u16 = 8080;
const NODE_PORT: u16 = 30_080;

fn small_lab() -> Result<Lab> {
    require_root();
    Lab::new(LabOptions { clients: 1, backends: 2, ..LabOptions::default() })
}

/// Status and body of an answer to a GET.
fn get(netns: &Netns, address: &str, path: &str, accept: &str) -> Result<(u16, String)> {
    let address: SocketAddr = address.parse()?;
    let answer = netns.enter(|| {
        let mut stream = TcpStream::connect_timeout(&address, 5 * SECOND)?;
        stream.set_read_timeout(Some(10 * SECOND))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nAccept: {accept}\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer with a header")?;
    let status = head.split(' ').nth(1).context("a status line")?;
    Ok((status.parse()?, body.to_owned()))
}

/// The samples of `/metrics`, by name and labels as they are written.
fn samples(netns: &Netns) -> Result<BTreeMap<String, f64>> {
    let (status, text) = get(netns, METRICS, "/metrics", "text/plain")?;
    ensure!(status == 200, "{status}: {text}");
    let samples = text.lines().filter(|line| !line.starts_with('#')).map(|line| {
        let (series, value) = line.rsplit_once(' ').context("a value")?;
        Ok((series.to_owned(), value.parse()?))
    });
    samples.collect()
}

#[test]
fn a_daemon_tells_of_health_and_metrics() -> Result<()> {
    let lab = small_lab()?;
    let _pods: Vec<_> = lab.backends.iter().map(|host| Backend::start(host, POD_PORT)).collect::<Result<_>>()?;
    let source = SourceDir::new()?;
    let service = ServiceObject::new("sticky").cluster_ip("10.96.0.10").tcp("http", 80, POD_PORT).affinity(60).build();
    let slice = SliceObject::of("sticky", "1").tcp("http", POD_PORT);
    let slice = slice.endpoints(lab.backends.iter().map(Host::ip), Endpoint::Ready).build();
    source.write("sticky", &[&service as &dyn Document, &slice])?;
    let _daemon = Daemon::start(&lab.node, DaemonOptions::new(source.source()))?;
    let node = &lab.node.netns;

    for (address, path, status, says) in [
        (HEALTH, "/healthz", 200, "ok"),
        (HEALTH, "/livez", 200, "ok"),
        (HEALTH, "/metrics", 404, "/readyz"),
        (METRICS, "/healthz", 200, "ok"),
        (METRICS, "/nothing", 404, "/metrics"),
    ] {
        let answer = get(node, address, path, "*/*")?;
        assert!(answer.0 == status && answer.1.contains(says), "{address}{path}: {answer:?}");
    }
    wait::until_true("readiness", 10 * SECOND, || Ok(get(node, HEALTH, "/readyz", "*/*")?.0 == 200))?;
    let (_, open) = get(node, METRICS, "/metrics", "application/openmetrics-text; version=1.0.0")?;
    assert!(open.ends_with("# EOF\n"));

    for _ in 0..3 {
        http_get(&lab.clients[0].netns, STICKY.parse()?, &ClientOptions::default())?;
    }
    // What is read of the maps' entries is kept for some seconds.
    let seen = wait::until("a client in the metrics", 20 * SECOND, || {
        let seen = samples(node)?;
        Ok((seen["affinity_sessions{family=\"ipv4\",state=\"live\"}"] > 0.0).then_some(seen))
    })?;
    for (series, value) in [
        ("affinity_synced", 1.0),
        ("affinity_ready", 1.0),
        ("affinity_service_ports", 1.0),
        ("affinity_frontends{family=\"ipv4\"}", 1.0),
        ("affinity_frontends{family=\"ipv6\"}", 0.0),
        ("affinity_backends{family=\"ipv4\",state=\"eligible\"}", 2.0),
        ("affinity_map_entries{map=\"backends_v4\"}", 2.0),
        ("affinity_selections_total{reason=\"affinity-new\"}", 1.0),
        ("affinity_selections_total{reason=\"affinity-hit\"}", 2.0),
        // A client, two pods and the uplink.
        ("affinity_attached_interfaces{mode=\"tcx\"}", 4.0),
        ("affinity_rejected_objects", 0.0),
        ("affinity_source_stale_seconds{kind=\"Service\"}", 0.0),
    ] {
        assert_eq!(seen.get(series), Some(&value), "{series}: {seen:#?}");
    }
    assert!(seen["affinity_sync_duration_seconds_count"] >= 1.0);

    // What a change answers, by its annotation: now, in an hour, and no time at all.
    let in_an_hour = Timestamp::now() + SignedDuration::from_hours(1);
    for (i, trigger) in [Timestamp::now().to_string(), in_an_hour.to_string(), "soon".to_owned()].iter().enumerate() {
        let slice = SliceObject::of("sticky", "1").tcp("http", POD_PORT);
        let slice = slice.endpoints(lab.backends.iter().take(1).map(Host::ip), Endpoint::Ready);
        let slice = slice.endpoint(format!("10.244.0.{}", 201 + i), Endpoint::NotReady);
        let slice = slice.change(|slice| {
            let annotation = ("endpoints.kubernetes.io/last-change-trigger-time".to_owned(), trigger.clone());
            slice.metadata.annotations = Some([annotation].into());
        });
        source.write("sticky", &[&service as &dyn Document, &slice.build()])?;
        wait::until_true("the change in the metrics", 20 * SECOND, || {
            let seen = samples(node)?;
            let programmed = seen["affinity_network_programming_duration_seconds_count"];
            let ignored = ["future", "unreadable"]
                .map(|why| seen[&format!("affinity_network_programming_ignored_total{{why=\"{why}\"}}")]);
            let expected = [(1.0, [0.0, 0.0]), (1.0, [1.0, 0.0]), (1.0, [1.0, 1.0])][i];
            Ok((programmed, ignored) == expected)
        })?;
    }
    assert!(seen["process_resident_memory_bytes"] > 1e6);
    Ok(())
}

#[test]
fn a_node_port_that_a_process_has_bound_is_told_until_it_has_let_go() -> Result<()> {
    let lab = small_lab()?;
    let taken = lab.node.netns.enter(|| Ok(TcpListener::bind("0.0.0.0:30080")?))?;
    let source = SourceDir::new()?;
    let service = with_node_port(ServiceObject::new("web").cluster_ip("10.96.0.10").tcp("http", 80, POD_PORT));
    source.write("web", &[&service.build() as &dyn Document])?;
    let options = DaemonOptions::new(source.source());
    let options = options.arguments(["--nodeport-addresses", "all", "--audit-interval", "1"]);
    let daemon = Daemon::start(&lab.node, options)?;
    let problems = || -> Result<Vec<String>> {
        let status = daemon.cli().json(&["status"])?;
        let problems = status["problems"].as_array().context("problems")?.clone();
        Ok(problems.iter().map(|it| format!("{}: {}", it["object"], it["message"]).replace('"', "")).collect())
    };
    wait::until_true("a problem", 10 * SECOND, || {
        let told = problems()?;
        let is_told = |it: &String| {
            it.starts_with("Service default/web: spec.ports[0].nodePort: ") && it.contains("has bound 0.0.0.0:30080")
        };
        Ok(!told.is_empty() && told.iter().all(is_told))
    })?;
    let services = daemon.cli().text(&["service", "list"])?;
    assert!(services.contains(":30080/TCP (NodePort)"), "it is served all the same: {services}");
    drop(taken);
    wait::until_true("no problem", 10 * SECOND, || Ok(problems()?.is_empty()))
}

/// Who comes from outside is told apart from a pod, also where both ask for the same.
#[test]
fn the_monitor_says_who_comes_from_outside_and_by_what() -> Result<()> {
    let lab = small_lab()?;
    let _pods: Vec<_> = lab.backends.iter().map(|host| Backend::start(host, POD_PORT)).collect::<Result<_>>()?;
    let source = SourceDir::new()?;
    let service = ServiceObject::new("sticky").cluster_ip("10.96.0.10").tcp("http", 80, POD_PORT).affinity(60);
    let service = with_node_port(service).build();
    let slice = SliceObject::of("sticky", "1").tcp("http", POD_PORT);
    let slice = slice.endpoints(lab.backends.iter().map(Host::ip), Endpoint::Ready).build();
    source.write("sticky", &[&service as &dyn Document, &slice])?;
    let options = DaemonOptions::new(source.source()).arguments(["--nodeport-addresses", "all"]);
    let daemon = Daemon::start(&lab.node, options)?;
    let directory = tempfile::tempdir()?;
    let (cluster, node_port) = (STICKY.parse()?, SocketAddr::new(NODE_IP[0], NODE_PORT));
    for (format, outside, pod) in [
        ("json", r#""outside":true,"frontend_kind":"NodePort""#, r#""outside":false,"frontend_kind":"ClusterIP""#),
        ("table", " outside -> default/sticky (NodePort) -> ", " -> default/sticky -> "),
    ] {
        let log = directory.path().join(format);
        let mut monitor = daemon.cli().start(&["monitor", "-o", format], &log)?;
        for (host, frontend, says) in [(&lab.outside, node_port, outside), (&lab.clients[0], cluster, pod)] {
            let line = wait::until("a line", 10 * SECOND, || {
                http_get(&host.netns, frontend, &ClientOptions::default())?;
                monitor.must_run()?;
                let text = fs::read_to_string(&log)?;
                Ok(text.lines().find(|line| line.contains(&host.ip().to_string())).map(str::to_owned))
            })?;
            assert!(line.contains(says) && line.contains("outside -> ") == says.contains("outside -> "), "{line}");
        }
    }
    Ok(())
}

/// The same with a node port.
fn with_node_port(service: ServiceObject) -> ServiceObject {
    service.change(|spec| {
        spec.type_ = Some("NodePort".to_owned());
        spec.ports.iter_mut().flatten().for_each(|port| port.node_port = Some(NODE_PORT.into()));
    })
}

#[test]
fn a_taken_port_is_an_error_that_says_what_to_do() -> Result<()> {
    let lab = small_lab()?;
    let taken = lab.node.netns.enter(|| Ok(TcpListener::bind(METRICS)?))?;
    let source = SourceDir::new()?;
    let mut daemon = Daemon::stopped(&lab.node, DaemonOptions::new(source.source()))?;
    daemon.launch()?;
    assert!(!daemon.wait_end()?.success());
    let log = daemon.log();
    let last = log.lines().last().unwrap_or_default();
    assert!(last.contains("--metrics-address 127.0.0.1:10249: ") && last.contains("`off`"), "{log}");
    drop(taken);
    // Nothing of it is left, and it can be done without.
    daemon.options().arguments = ["--metrics-address", "off", "--health-address", "off"].map(str::to_owned).to_vec();
    daemon.resume()?;
    assert!(get(&lab.node.netns, METRICS, "/healthz", "*/*").is_err());
    Ok(())
}

#[test]
fn a_daemon_without_its_source_is_alive_and_says_what_it_waits_for() -> Result<()> {
    let lab = small_lab()?;
    let directory = tempfile::tempdir()?;
    let kubeconfig = directory.path().join("kubeconfig");
    fs::write(
        &kubeconfig,
        "{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c, user: u}}], \
         clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}], users: [{name: u, user: {}}]}",
    )?;
    let mut daemon = Daemon::stopped(&lab.node, DaemonOptions::new(Source::Kubeconfig(kubeconfig)))?;
    daemon.launch()?;
    let node = &lab.node.netns;
    let seen = wait::until("failures in the metrics", 20 * SECOND, || {
        // Nobody listens before the datapath is loaded.
        let Ok(seen) = samples(node) else { return Ok(None) };
        let failures = seen.get("affinity_source_failures_total{kind=\"Service\"}");
        Ok(failures.is_some_and(|failures| *failures >= 2.0).then_some(seen))
    });
    let seen = seen.with_context(|| daemon.log())?;
    assert!(seen["affinity_source_stale_seconds{kind=\"EndpointSlice\"}"] > 0.0, "{seen:#?}");
    assert_eq!((seen["affinity_synced"], seen["affinity_ready"]), (0.0, 0.0));
    assert_eq!(get(node, HEALTH, "/healthz", "*/*")?, (200, "ok\n".to_owned()));
    let (status, body) = get(node, HEALTH, "/readyz", "*/*")?;
    assert!(status == 503 && body.contains("[-]synced: kubernetes") && body.contains("127.0.0.1:1"), "{body}");
    Ok(())
}
