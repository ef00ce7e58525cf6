//! The daemon on a real kube-apiserver: what is created, changed and deleted, and what happens when one of the two is away.

use std::collections::BTreeSet;
use std::time::Duration;

use affinity_tests::apiproxy::{ApiProxy, Door};
use affinity_tests::apiserver::{ApiOptions, ApiServer};
use affinity_tests::daemon::{Cli, Daemon, DaemonOptions, Source};
use affinity_tests::objects::{Endpoint, ServiceObject, SliceObject};
use affinity_tests::privilege::require_root;
use affinity_tests::topology::{Lab, LabOptions, NODE_IP};
use affinity_tests::traffic::{Backend, ClientOptions, http_get};
use affinity_tests::wait;
use affinity_user::ipam::pool::{LoadBalancerPool, LoadBalancerPoolSpec};
use anyhow::{Context as _, Result};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::{discovery::v1 as discovery, events::v1::Event};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::CustomResourceExt as _;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::json;

const SECOND: Duration = Duration::from_secs(1);
/// Longer than any backoff of the watch.
const CONVERGES: Duration = Duration::from_secs(45);
const POD_PORT: u16 = 8080;
const WEB: &str = "10.96.0.10:80";
/// As whom a daemon comes that is no administrator.
const USER: &str = "node-daemon";

/// A lab and an API server with a door between them. The daemon is started by [`Site::daemon`].
struct Site {
    pods: Vec<Backend>,
    lab: Lab,
    door: ApiProxy,
    kubeconfig: std::path::PathBuf,
    api: ApiServer,
}

impl Site {
    fn new(options: ApiOptions) -> Result<Self> {
        require_root();
        let api = ApiServer::start(options)?;
        let lab = Lab::new(LabOptions::default())?;
        let pods = lab.backends.iter().map(|host| Backend::start(host, POD_PORT)).collect::<Result<_>>()?;
        let (door, kubeconfig) = api.proxy(Some(&lab.node.netns))?;
        Ok(Self { pods, lab, door, kubeconfig, api })
    }

    /// The daemon is no administrator, but who it is by `kind/deploy`.
    fn with_the_daemons_rights() -> Result<Self> {
        let mut site = Self::new(ApiOptions::default())?;
        site.kubeconfig = site.api.kubeconfig_of(USER, &site.door)?;
        site.api.let_work(USER)?;
        Ok(site)
    }

    fn daemon(&self) -> Result<Daemon> {
        Daemon::start(&self.lab.node, DaemonOptions::new(Source::Kubeconfig(self.kubeconfig.clone())))
    }

    /// A sticky service of the first `count` pods.
    fn apply_web(&self, count: usize) -> Result<()> {
        self.api.apply(&web("web", "10.96.0.10").affinity(600).build())?;
        self.apply_slice("web", 0..count)
    }

    fn apply_slice(&self, service: &str, pods: std::ops::Range<usize>) -> Result<()> {
        let mut slice = SliceObject::of(service, "1").tcp("http", POD_PORT);
        for host in &self.lab.backends[pods] {
            slice = slice.endpoint(host.ip(), Endpoint::Ready).pod(&host.name);
        }
        self.api.apply(&slice.build())?;
        Ok(())
    }

    fn ask(&self, client: usize, service: &str) -> Result<String> {
        let options = ClientOptions::default().within(3 * SECOND);
        Ok(http_get(&self.lab.clients[client].netns, service.parse()?, &options)?.backend)
    }

    fn one_pod_each(&self, requests: usize) -> Result<Vec<String>> {
        let mut reached = vec![BTreeSet::new(); self.lab.clients.len()];
        for _ in 0..requests {
            for (client, pods) in reached.iter_mut().enumerate() {
                pods.insert(self.ask(client, WEB)?);
            }
        }
        assert!(reached.iter().all(|pods| pods.len() == 1), "{reached:?}");
        Ok(reached.into_iter().flatten().collect())
    }
}

fn web(name: &str, ip: &str) -> ServiceObject {
    ServiceObject::new(name).cluster_ip(ip).tcp("http", 80, POD_PORT)
}

fn has(cli: &Cli, name: &str, eligible: usize) -> Result<()> {
    cli.wait_for_service(name, CONVERGES, |row| row.is_some_and(|row| row.eligible == eligible))
}

fn is_gone(cli: &Cli, name: &str) -> Result<()> {
    cli.wait_for_service(name, CONVERGES, |row| row.is_none())
}

/// The main promise from a real API server: 1,000 requests of three clients to a service of five replicas.
#[test]
fn three_clients_keep_their_pods_among_five() -> Result<()> {
    let site = Site::new(ApiOptions::default())?;
    site.apply_web(5)?;
    let daemon = site.daemon()?;
    has(daemon.cli(), "default/web", 5)?;
    let pods = site.one_pod_each(334)?;
    assert!(pods.iter().collect::<BTreeSet<_>>().len() >= 2, "{pods:?}");
    let served: usize = site.pods.iter().map(|pod| pod.http.requests()).sum();
    assert_eq!(served, 3 * 334);
    Ok(())
}

#[test]
fn objects_are_followed_as_they_change() -> Result<()> {
    let site = Site::new(ApiOptions::default())?;
    let daemon = site.daemon()?;
    let cli = daemon.cli();
    site.apply_web(2)?;
    has(cli, "default/web", 2)?;
    site.one_pod_each(2)?;
    // A second slice of the same service.
    let second = SliceObject::of("web", "2").tcp("http", POD_PORT).endpoint(site.lab.backends[2].ip(), Endpoint::Ready);
    site.api.apply(&second.build())?;
    has(cli, "default/web", 3)?;
    // Affinity and timeout.
    site.api.apply(&web("web", "10.96.0.10").no_affinity().build())?;
    cli.wait_for_service("default/web", CONVERGES, |row| {
        row.is_some_and(|row| row.affinity_timeout_seconds.is_none())
    })?;
    site.api.apply(&web("web", "10.96.0.10").affinity(77).build())?;
    cli.wait_for_service("default/web", CONVERGES, |row| {
        row.is_some_and(|row| row.affinity_timeout_seconds == Some(77))
    })?;
    // Another port.
    site.api
        .apply(&ServiceObject::new("web").cluster_ip("10.96.0.10").tcp("http", 8000, POD_PORT).affinity(77).build())?;
    wait::until("the service at its new port", CONVERGES, || Ok(site.ask(0, "10.96.0.10:8000").ok()))?;
    site.ask(0, WEB).expect_err("its old port is no service's");
    // Away.
    site.api.delete(&second.build())?;
    has(cli, "default/web", 2)?;
    site.api.delete(&web("web", "10.96.0.10").build())?;
    is_gone(cli, "default/web")?;
    site.ask(0, "10.96.0.10:8000").expect_err("the service is gone");
    Ok(())
}

/// The node's zone, as its Node says, decides which of the endpoints that are meant for zones are used.
#[test]
fn hints_are_followed_as_the_nodes_zone_changes() -> Result<()> {
    let site = Site::new(ApiOptions::default())?;
    let nodes: Api<Node> = Api::all(site.api.client());
    let zone = |zone: Option<&str>| {
        let patch = json!({"metadata": {"labels": {"topology.kubernetes.io/zone": zone}}});
        site.api.block_on(nodes.patch("lab-node", &PatchParams::default(), &Patch::Merge(patch)))
    };
    let mut node = Node::default();
    node.metadata.name = Some("lab-node".to_owned());
    site.api.block_on(nodes.create(&PostParams::default(), &node))?;
    zone(Some("zone-a"))?;

    let options = DaemonOptions::new(Source::Kubeconfig(site.kubeconfig.clone()));
    let daemon = Daemon::start(&site.lab.node, options.arguments(["--node-name", "lab-node"]))?;
    let mut slice = SliceObject::of("web", "1").tcp("http", POD_PORT);
    for (host, zone) in site.lab.backends.iter().zip(["zone-a", "zone-b", "zone-b"]) {
        slice = slice.endpoint(host.ip(), Endpoint::Ready).change(|slice| {
            let for_zones = Some(vec![discovery::ForZone { name: zone.to_owned() }]);
            let hints = discovery::EndpointHints { for_zones, ..discovery::EndpointHints::default() };
            slice.endpoints.last_mut().expect("it was added").hints = Some(hints);
        });
    }
    site.api.apply(&web("web", "10.96.0.10").affinity(600).build())?;
    site.api.apply(&slice.build())?;
    let cli = daemon.cli();
    has(cli, "default/web", 1)?;
    assert_eq!(site.ask(0, WEB)?, site.lab.backends[0].name);
    zone(Some("zone-b"))?;
    has(cli, "default/web", 2)?;
    assert_ne!(site.ask(0, WEB)?, site.lab.backends[0].name, "its pod is meant for another zone now");
    zone(None)?;
    has(cli, "default/web", 3)?;
    site.api.block_on(nodes.delete("lab-node", &DeleteParams::default()))?;
    Ok(())
}

/// Pods of the API server, by their status: one that has an address, one that has none yet, and one in the node's namespace.
#[test]
fn each_pod_of_the_node_is_told_of_as_it_comes() -> Result<()> {
    const NODE: &str = "lab-node";
    let site = Site::new(ApiOptions::default())?;
    site.api.apply(&serde_json::from_value::<ServiceAccount>(json!({"metadata": named("default")}))?)?;
    let make = |name: &str, node: &str, host_network: bool| -> Result<()> {
        let spec = json!({
            "nodeName": node, "hostNetwork": host_network, "automountServiceAccountToken": false,
            "containers": [{"name": "one", "image": "one"}],
        });
        site.api.apply(&serde_json::from_value::<Pod>(json!({"metadata": named(name), "spec": spec}))?)?;
        Ok(())
    };
    let pods: Api<Pod> = Api::default_namespaced(site.api.client());
    let tell = |name: &str, status: serde_json::Value| -> Result<()> {
        let patch = Patch::Merge(json!({"status": status}));
        site.api.block_on(pods.patch_status(name, &PatchParams::default(), &patch))?;
        Ok(())
    };
    let addresses = |ip: &str| json!({"podIP": ip, "podIPs": [{"ip": ip}]});
    make("client", NODE, false)?;
    make("system", NODE, true)?;
    make("elsewhere", "another-node", false)?;
    tell("system", addresses("198.51.100.11"))?;
    let options = DaemonOptions::new(Source::Kubeconfig(site.kubeconfig.clone()));
    let daemon = Daemon::start(&site.lab.node, options.arguments(["--node-name", NODE]))?;

    let wait_for = |wanted: &[(&str, &str, &str, &str)]| {
        let mut last = serde_json::Value::Null;
        let told = wait::until_true("the node's pods", CONVERGES, || {
            last = daemon.cli().json(&["status", "--pods"])?;
            let rows = last["pods"].as_array().context("rows")?.iter().filter(|row| !row["pod"].is_null());
            let rows = rows.map(|row| {
                let texts = [&row["pod"], &row["served_by"], &row["socket"]["why"]["code"], &row["tc"]["why"]["code"]];
                let [pod, by, socket, tc] = texts.map(|text| text.as_str().unwrap_or_default());
                (pod, by, socket, tc)
            });
            Ok(last["pods_are_known"] == true && rows.collect::<Vec<_>>() == wanted)
        });
        told.with_context(|| last.to_string())
    };
    let system = ("default/system", "none", "sockets-off", "host-network");
    wait_for(&[("default/client", "none", "no-address", "no-address"), system])?;
    // The daemon sees no namespace of the lab: what is left is the route to the pod.
    tell("client", addresses(&site.lab.clients[0].ip().to_string()))?;
    wait_for(&[("default/client", "tc", "sockets-off", ""), system])?;
    tell("client", json!({"phase": "Succeeded"}))?;
    wait_for(&[system])
}

fn named(name: &str) -> serde_json::Value {
    json!({"name": name, "namespace": "default"})
}

#[test]
fn what_is_not_programmed_is_told_by_an_event_of_the_object() -> Result<()> {
    let site = Site::with_the_daemons_rights()?;
    let _daemon = site.daemon()?;
    let service = web("web", "10.96.0.10").port("SCTP", "old", 7, IntOrString::Int(7)).build();
    let service = site.api.apply(&service)?.metadata.uid;
    let slice = SliceObject::of("web", "names").tcp("http", POD_PORT);
    let slice = slice.change(|slice| slice.address_type = "FQDN".to_owned()).build();
    let slice = site.api.apply(&slice)?.metadata.uid;
    let events: Api<Event> = Api::default_namespaced(site.api.client());
    for (uid, note) in [
        (service, "spec.ports[1].protocol: SCTP is not supported: TCP and UDP are"),
        (slice, "addressType: \"FQDN\" is not supported: IPv4 and IPv6 are"),
    ] {
        let event = wait::until(note, CONVERGES, || {
            let all = site.api.block_on(events.list(&ListParams::default()))?;
            Ok(all.into_iter().find(|event| event.regarding.as_ref().is_some_and(|object| object.uid == uid)))
        })?;
        assert_eq!((event.type_.as_deref(), event.reason.as_deref()), (Some("Warning"), Some("NotProgrammed")));
        assert_eq!(event.note.as_deref(), Some(note));
        assert_eq!(event.reporting_controller.as_deref(), Some("affinity"));
    }
    Ok(())
}

#[test]
fn a_daemon_tells_of_the_pools_that_it_gives_from() -> Result<()> {
    let site = Site::new(ApiOptions::default())?;
    let definitions: Api<CustomResourceDefinition> = Api::all(site.api.client());
    site.api.block_on(definitions.create(&PostParams::default(), &LoadBalancerPool::crd()))?;
    let spec: LoadBalancerPoolSpec = serde_json::from_value(json!({"blocks": [{"cidr": "203.0.113.0/31"}]}))?;
    let pools: Api<LoadBalancerPool> = Api::all(site.api.client());
    wait::until_ok("a pool", CONVERGES, || {
        Ok(site.api.block_on(pools.create(&PostParams::default(), &LoadBalancerPool::new("lab", spec.clone())))?)
    })?;
    for (i, name) in ["one", "two", "three"].iter().enumerate() {
        let service = web(name, &format!("10.96.0.{}", 10 + i));
        site.api.apply(&service.change(|spec| spec.type_ = Some("LoadBalancer".to_owned())).build())?;
    }
    let daemon = site.daemon()?;
    let status = wait::until("the pool in status", CONVERGES, || {
        let status = daemon.cli().text(&["status"])?;
        Ok(status.contains("pool lab: 2 of 2 IPv4 addresses used, 0 free").then_some(status))
    })?;
    assert!(status.contains("services without the addresses that they ask for: 1 (PoolExhausted)"), "{status}");
    let duties = &daemon.cli().json(&["status"])?["duties"];
    assert_eq!((&duties["gives_addresses"], &duties["pools"]["lab"]["ipv4"]["used"]), (&json!(true), &json!(2)));
    Ok(())
}

/// Which node answers for a load balancer's address is known from its Lease, where the API server can be asked.
#[test]
fn a_service_is_shown_with_the_node_that_answers_for_it() -> Result<()> {
    let site = Site::new(ApiOptions::default())?;
    let daemon = site.daemon()?;
    let service = web("web", "10.96.0.10").change(|spec| spec.type_ = Some("LoadBalancer".to_owned())).build();
    site.api.apply(&service)?;
    let services: Api<Service> = Api::default_namespaced(site.api.client());
    let status = Patch::Merge(json!({"status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.7"}]}}}));
    site.api.block_on(services.patch_status("web", &PatchParams::default(), &status))?;
    let lease: Lease = serde_json::from_value(json!({
        "metadata": {
            "name": "affinity-l2-203-0-113-7",
            "labels": {"affinity.dev/lease": "l2"},
            "annotations": {"affinity.dev/address": "203.0.113.7", "affinity.dev/service": "default/web"},
        },
        "spec": {
            "holderIdentity": "edge", "leaseDurationSeconds": 600,
            "renewTime": format!("{:.6}", jiff::Timestamp::now()),
        },
    }))?;
    let leases: Api<Lease> = Api::default_namespaced(site.api.client());
    site.api.block_on(leases.create(&PostParams::default(), &lease))?;
    let shown = |more: &[&str]| -> Result<Option<serde_json::Value>> {
        let service = daemon.cli().json(&[&["service", "get", "web"], more].concat())?;
        let frontends = service["ports"][0]["frontend_details"].as_array().context("frontends")?;
        Ok(frontends.iter().find(|it| it["kind"] == "LoadBalancer").map(|it| it["announced_by"].clone()))
    };
    wait::until_ok("the address", CONVERGES, || shown(&[])?.context("no such frontend"))?;
    assert_eq!(shown(&[])?, Some(json!(null)), "nobody was asked");
    let kubeconfig = site.kubeconfig.to_str().context("a path")?;
    let asked = ["--kubeconfig", kubeconfig];
    assert_eq!(shown(&asked)?, Some(json!("edge")));
    let table = daemon.cli().text(&[&["service", "get", "web"][..], &asked].concat())?;
    assert!(table.contains("ANNOUNCED BY") && table.contains("edge"), "{table}");
    Ok(())
}

/// Who does not get an address that another service has, or gets one that is the node's too, is told so.
#[test]
fn addresses_that_somebody_has_already_are_told_by_events() -> Result<()> {
    let site = Site::new(ApiOptions::default())?;
    let _daemon = site.daemon()?;
    let own = NODE_IP[0].to_string();
    let service = |name: &str, ip: &str, addresses: &[&str]| {
        let addresses = addresses.iter().map(|it| (*it).to_owned()).collect();
        web(name, ip).change(|spec| spec.external_ips = Some(addresses)).build()
    };
    site.api.apply(&service("first", "10.96.0.10", &["203.0.113.1"]))?;
    let uid = site.api.apply(&service("second", "10.96.0.11", &["203.0.113.1", &own]))?.metadata.uid;
    let events: Api<Event> = Api::default_namespaced(site.api.client());
    for (reason, note) in [
        ("NotProgrammed", "spec.externalIPs[0]: 203.0.113.1:80/TCP belongs to Service default/first, which is older"),
        ("NodesOwnAddress", &format!("spec.externalIPs[1]: {own} is the node's own address")),
    ] {
        let about = |event: &Event| event.regarding.as_ref().is_some_and(|object| object.uid == uid);
        let event = wait::until(reason, CONVERGES, || {
            let all = site.api.block_on(events.list(&ListParams::default()))?;
            Ok(all.into_iter().find(|event| about(event) && event.reason.as_deref() == Some(reason)))
        })?;
        assert!(event.note.as_ref().is_some_and(|told| told.starts_with(note)), "{event:?}");
    }
    Ok(())
}

/// The API server is away, and what has changed meanwhile is seen when it is back.
#[test]
fn a_watch_that_breaks_misses_nothing() -> Result<()> {
    let site = Site::new(ApiOptions::default())?;
    site.apply_web(3)?;
    site.api.apply(&web("old", "10.96.0.11").build())?;
    let daemon = site.daemon()?;
    let cli = daemon.cli();
    has(cli, "default/web", 3)?;
    let pods = site.one_pod_each(2)?;
    site.door.set(Door::Shut);
    assert!(site.door.cut() > 0, "no connection was open");
    site.api.delete(&web("old", "10.96.0.11").build())?;
    site.api.apply(&web("new", "10.96.0.12").build())?;
    site.apply_slice("new", 0..1)?;
    assert_eq!(site.one_pod_each(3)?, pods, "the datapath goes on");
    wait::until_true("a source that is known to be stale", CONVERGES, || {
        Ok(cli.json(&["status"])?.to_string().contains("stale_since"))
    })?;
    site.door.set(Door::Open);
    has(cli, "default/new", 1)?;
    is_gone(cli, "default/old")?;
    assert_eq!(site.one_pod_each(3)?, pods);
    Ok(())
}

#[test]
fn a_killed_api_server_loses_nothing_and_what_was_deleted_is_gone() -> Result<()> {
    let mut site = Site::new(ApiOptions::default())?;
    site.apply_web(3)?;
    site.api.apply(&web("old", "10.96.0.11").build())?;
    let daemon = site.daemon()?;
    let cli = daemon.cli();
    has(cli, "default/old", 0)?;
    has(cli, "default/web", 3)?;
    let pods = site.one_pod_each(2)?;
    site.api.kill()?;
    assert_eq!(site.one_pod_each(3)?, pods, "the datapath goes on");
    // Changed under the daemon's nose: it is let in only afterwards.
    site.door.set(Door::Shut);
    site.door.cut();
    site.api.resume()?;
    site.api.delete(&web("old", "10.96.0.11").build())?;
    site.apply_slice("web", 0..2)?;
    site.door.set(Door::Open);
    is_gone(cli, "default/old")?;
    has(cli, "default/web", 2)?;
    Ok(())
}

/// The server has forgotten the version that the daemon's watch would go on from.
#[test]
fn a_version_that_is_gone_is_listed_anew() -> Result<()> {
    let site = Site::new(ApiOptions { watch_cache: false, ..ApiOptions::default() })?;
    site.apply_web(3)?;
    site.api.apply(&web("old", "10.96.0.11").build())?;
    let daemon = site.daemon()?;
    let cli = daemon.cli();
    has(cli, "default/old", 0)?;
    let version = site.api.resource_version()?;
    site.door.set(Door::Shut);
    site.door.cut();
    site.api.delete(&web("old", "10.96.0.11").build())?;
    site.apply_slice("web", 0..2)?;
    site.api.compact()?;
    assert!(site.api.watch_is_gone(&version)?, "the server still knows {version}");
    site.door.set(Door::Open);
    is_gone(cli, "default/old")?;
    has(cli, "default/web", 2)?;
    Ok(())
}

#[test]
fn a_daemon_that_is_killed_catches_up() -> Result<()> {
    let site = Site::new(ApiOptions::default())?;
    site.apply_web(5)?;
    site.api.apply(&web("old", "10.96.0.11").build())?;
    let mut daemon = site.daemon()?;
    has(daemon.cli(), "default/old", 0)?;
    has(daemon.cli(), "default/web", 5)?;
    let pods = site.one_pod_each(2)?;
    let ids = |cli: &Cli| -> Result<BTreeSet<(u32, String)>> {
        Ok(cli
            .backends()?
            .into_iter()
            .filter(|row| row.service == "default/web")
            .map(|row| (row.id, row.address))
            .collect())
    };
    let before = ids(daemon.cli())?;
    daemon.kill()?;
    site.api.delete(&web("old", "10.96.0.11").build())?;
    site.api.apply(&web("new", "10.96.0.12").build())?;
    site.apply_slice("new", 0..1)?;
    assert_eq!(site.one_pod_each(2)?, pods, "without a daemon");
    daemon.resume()?;
    is_gone(daemon.cli(), "default/old")?;
    has(daemon.cli(), "default/new", 1)?;
    assert_eq!(site.one_pod_each(2)?, pods);
    assert_eq!(ids(daemon.cli())?, before, "ids are adopted");
    // A pod less while it is away: its clients move, and only they.
    daemon.kill()?;
    let lost = site.lab.backends.iter().position(|host| host.name == pods[0]).context("a pod")?;
    let mut slice = SliceObject::of("web", "1").tcp("http", POD_PORT);
    for (index, host) in site.lab.backends.iter().enumerate() {
        if index != lost {
            slice = slice.endpoint(host.ip(), Endpoint::Ready).pod(&host.name);
        }
    }
    site.api.apply(&slice.build())?;
    daemon.resume()?;
    has(daemon.cli(), "default/web", 4)?;
    for (before, after) in pods.iter().zip(site.one_pod_each(2)?) {
        assert_eq!(*before == after, *before != pods[0]);
    }
    Ok(())
}

/// Why the daemon's source is stale, by its status; none where it is not.
fn stale(cli: &Cli) -> Result<Option<String>> {
    let status = cli.json(&["status"])?;
    let source = &status["daemon"]["source"];
    let since = source["stale_since"].as_i64();
    Ok(since.and(source["last_error"].as_str().map(str::to_owned)))
}

fn wait_stale(cli: &Cli, why: &str) -> Result<()> {
    let told = wait::until(why, CONVERGES, || Ok(stale(cli).ok().flatten().filter(|error| error.contains(why))));
    told.map(drop).with_context(|| format!("{:?}", stale(cli)))
}

/// Who may not read any more is told so; what was known goes on, until it may again.
#[test]
fn rights_that_are_taken_away_leave_everything_as_it_was() -> Result<()> {
    let site = Site::with_the_daemons_rights()?;
    site.apply_web(3)?;
    site.api.apply(&web("old", "10.96.0.11").build())?;
    let daemon = site.daemon()?;
    let cli = daemon.cli();
    has(cli, "default/web", 3)?;
    has(cli, "default/old", 0)?;
    let pods = site.one_pod_each(2)?;
    site.api.let_work_no_more(USER)?;
    // Rights are looked at when a watch begins.
    site.door.cut();
    wait_stale(cli, "forbidden")?;
    site.api.delete(&web("old", "10.96.0.11").build())?;
    site.apply_slice("web", 0..2)?;
    assert_eq!(site.one_pod_each(3)?, pods, "the datapath goes on");
    has(cli, "default/web", 3)?;
    site.api.let_work(USER)?;
    is_gone(cli, "default/old")?;
    has(cli, "default/web", 2)?;
    wait::until_true("a fresh source", CONVERGES, || Ok(stale(cli)?.is_none()))
}

/// A network that says nothing for a while, during which everything changes.
#[test]
fn a_silent_network_misses_nothing() -> Result<()> {
    let site = Site::new(ApiOptions::default())?;
    site.apply_web(3)?;
    site.api.apply(&web("old", "10.96.0.11").build())?;
    let daemon = site.daemon()?;
    let cli = daemon.cli();
    has(cli, "default/web", 3)?;
    let pods = site.one_pod_each(2)?;
    site.door.set(Door::Silent);
    site.api.delete(&web("old", "10.96.0.11").build())?;
    site.apply_slice("web", 0..2)?;
    assert_eq!(site.one_pod_each(3)?, pods, "the datapath goes on");
    site.door.set(Door::Open);
    is_gone(cli, "default/old")?;
    has(cli, "default/web", 2)
}

/// A daemon that starts with a kubeconfig that leads nowhere serves what its predecessor has left, says why it can't follow,
/// and follows as soon as that is put right.
#[test]
fn a_kubeconfig_that_leads_nowhere_harms_nothing() -> Result<()> {
    let site = Site::new(ApiOptions::default())?;
    site.apply_web(3)?;
    let mut daemon = site.daemon()?;
    has(daemon.cli(), "default/web", 3)?;
    let pods = site.one_pod_each(2)?;
    daemon.terminate()?;
    let good = std::fs::read_to_string(&site.kubeconfig)?;
    let config: serde_json::Value = serde_json::from_str(&good)?;
    let mut closed = config.clone();
    closed["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1".into();
    let mut expired = config;
    expired["users"][0]["user"] = serde_json::json!({ "token": "that was good once" });
    let bad = [
        ("no kubeconfig".to_owned(), "kubeconfig"),
        (closed.to_string(), "127.0.0.1:1"),
        (expired.to_string(), "Unauthorized"),
    ];
    for (text, why) in bad {
        std::fs::write(&site.kubeconfig, text)?;
        daemon.launch()?;
        wait_stale(daemon.cli(), why)?;
        assert_eq!(site.one_pod_each(2)?, pods, "{why}");
        has(daemon.cli(), "default/web", 3)?;
        std::fs::write(&site.kubeconfig, &good)?;
        daemon.wait_ready(CONVERGES)?;
        has(daemon.cli(), "default/web", 3)?;
        daemon.terminate()?;
    }
    assert_eq!(site.one_pod_each(2)?, pods);
    Ok(())
}
