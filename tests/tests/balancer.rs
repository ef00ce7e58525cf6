//! Load balancer addresses on a real kube-apiserver: who is given which, and who is not, and why; and the Leases by which nodes
//! agree who does what.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use affinity_tests::apiserver::{ApiOptions, ApiServer};
use affinity_tests::wait;
use affinity_user::announce::agent;
use affinity_user::announce::announcer::{Announcement, Announcer, Place};
use affinity_user::announce::resource::{L2Announcement, L2AnnouncementSpec};
use affinity_user::announce::view::AnnouncementRow;
use affinity_user::duties::{Board, DutiesStatus, PoolStatus};
use affinity_user::ipam::pool::{LoadBalancerPool, LoadBalancerPoolSpec, Usage};
use affinity_user::ipam::{SERVICE_CONDITION, WANTED_ANNOTATION, controller};
use affinity_user::lease::{Claim, Election, Timing};
use anyhow::{Context as _, Result};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const SECOND: Duration = Duration::from_secs(1);
/// Longer than any backoff, on a machine with much to do.
const CONVERGES: Duration = Duration::from_mins(1);
/// Leases that are over soon.
const SHORT: Timing = Timing { duration: Duration::from_secs(4), renew: SECOND };

/// An API server that has the custom resources.
struct Site {
    api: ApiServer,
}

/// What goes on beside the test; it is cut off when this is dropped.
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Site {
    fn new() -> Result<Self> {
        let site = Self { api: ApiServer::start(ApiOptions::default())? };
        let api: Api<CustomResourceDefinition> = Api::all(site.api.client());
        for definition in [LoadBalancerPool::crd(), L2Announcement::crd()] {
            site.api.block_on(api.create(&PostParams::default(), &definition))?;
        }
        wait::until_ok("the custom resources", CONVERGES, || {
            site.api.block_on(site.pools().list(&ListParams::default()))?;
            let announcements: Api<L2Announcement> = Api::all(site.api.client());
            Ok(site.api.block_on(announcements.list(&ListParams::default()))?)
        })?;
        Ok(site)
    }

    fn pools(&self) -> Api<LoadBalancerPool> {
        Api::all(self.api.client())
    }

    fn services(&self) -> Api<Service> {
        Api::namespaced(self.api.client(), "default")
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) -> Task {
        self.api.block_on(async { Task(tokio::spawn(work)) })
    }

    /// One who gives addresses if it holds the Lease.
    fn controller(&self, node: &'static str) -> (Task, CancellationToken) {
        self.controller_telling(node, Arc::default())
    }

    /// One who gives addresses if it holds the Lease, and tells it.
    fn controller_telling(&self, node: &'static str, board: Arc<Board>) -> (Task, CancellationToken) {
        let (client, stop) = (self.api.client(), CancellationToken::new());
        let stopped = stop.clone();
        (self.spawn(async move { controller::run(client, "default", node, SHORT, &board, &stopped).await }), stop)
    }

    /// A pool of these blocks, or the one of that name with other ones.
    fn apply_pool(&self, name: &str, blocks: &Value) -> Result<()> {
        let spec: LoadBalancerPoolSpec = serde_json::from_value(json!({ "blocks": blocks }))?;
        self.api.block_on(async {
            let mut pool = LoadBalancerPool::new(name, spec);
            match self.pools().get_opt(name).await? {
                None => self.pools().create(&PostParams::default(), &pool).await,
                Some(present) => {
                    pool.metadata.resource_version = present.metadata.resource_version;
                    self.pools().replace(name, &PostParams::default(), &pool).await
                }
            }
        })?;
        Ok(())
    }

    fn pool(&self, name: &str) -> Result<LoadBalancerPool> {
        Ok(self.api.block_on(self.pools().get(name))?)
    }

    fn create(&self, name: &str, wanted: Option<&str>) -> Result<()> {
        let annotations: BTreeMap<&str, &str> = wanted.map(|wanted| (WANTED_ANNOTATION, wanted)).into_iter().collect();
        let service: Service = serde_json::from_value(json!({
            "metadata": { "name": name, "annotations": annotations },
            "spec": { "type": "LoadBalancer", "ports": [{ "port": 80 }], "allocateLoadBalancerNodePorts": false },
        }))?;
        self.api.block_on(self.services().create(&PostParams::default(), &service))?;
        Ok(())
    }

    fn service(&self, name: &str) -> Result<Service> {
        Ok(self.api.block_on(self.services().get(name))?)
    }

    /// Waits until a service has these addresses, and says this of itself.
    fn has(&self, name: &str, addresses: &[&str], reason: &str) -> Result<()> {
        let mut last = None;
        let wanted = (addresses.iter().map(|text| (*text).to_owned()).collect(), Some(reason.to_owned()));
        wait::until_true(&format!("{name}: {wanted:?}"), CONVERGES, || {
            let service = self.service(name)?;
            let now = (ips(&service), condition(&service).map(|(_, reason, _)| reason));
            let is_so = now == wanted;
            last = Some(service);
            Ok(is_so)
        })
        .with_context(|| format!("{:?}", last.map(|service| service.status)))
    }

    /// Waits until a condition of a pool has a status, and returns its message.
    fn pool_says(&self, name: &str, type_: &str, status: &str) -> Result<String> {
        let mut last = None;
        wait::until(&format!("pool {name}: {type_} {status}"), CONVERGES, || {
            last = self.pool(name)?.status;
            let conditions = last.iter().flat_map(|status| &status.conditions);
            let found = conditions.clone().find(|condition| condition.type_ == type_ && condition.status == status);
            Ok(found.map(|condition| condition.message.clone()))
        })
        .with_context(|| format!("{last:?}"))
    }

    /// Waits for an event of that reason about an object of that name, and returns its note.
    fn event(&self, name: &str, reason: &str) -> Result<String> {
        let events: Api<Event> = Api::all(self.api.client());
        wait::until(&format!("an event {reason} of {name}"), CONVERGES, || {
            let all = self.api.block_on(events.list(&ListParams::default()))?;
            let is_it = |event: &&Event| {
                let about = event.regarding.as_ref().and_then(|object| object.name.as_deref());
                about == Some(name) && event.reason.as_deref() == Some(reason)
            };
            Ok(all.items.iter().find(is_it).map(|event| event.note.clone().unwrap_or_default()))
        })
    }
}

fn ips(service: &Service) -> Vec<String> {
    let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = status.and_then(|status| status.ingress.as_ref());
    ingress.into_iter().flatten().filter_map(|one| one.ip.clone()).collect()
}

/// Status, reason and message.
fn condition(service: &Service) -> Option<(String, String, String)> {
    let conditions = service.status.as_ref()?.conditions.as_ref()?;
    let found = conditions.iter().find(|condition| condition.type_ == SERVICE_CONDITION)?;
    Some((found.status.clone(), found.reason.clone(), found.message.clone()))
}

#[test]
fn a_pool_gives_its_addresses_and_says_when_it_has_none_left() -> Result<()> {
    let site = Site::new()?;
    let board = Arc::new(Board::default());
    let (_task, _) = site.controller_telling("a", board.clone());
    site.apply_pool("lab", &json!([{ "cidr": "192.0.2.0/30" }]))?;
    site.create("one", None)?;
    site.has("one", &["192.0.2.1"], "Assigned")?;
    let ingress = site.service("one")?.status.and_then(|status| status.load_balancer?.ingress).context("ingress")?;
    assert_eq!(ingress[0].ip_mode.as_deref(), Some("VIP"));
    site.create("two", None)?;
    site.has("two", &["192.0.2.2"], "Assigned")?;
    site.create("three", None)?;
    site.has("three", &[], "PoolExhausted")?;
    assert_eq!(site.event("three", "PoolExhausted")?, "no IPv4 address is free in lab");
    wait::until_true("the pool's figures", CONVERGES, || {
        let status = site.pool("lab")?.status.unwrap_or_default();
        let figures = (status.ipv4.total, status.ipv4.used, status.ipv4.available, status.reserved.len());
        Ok(figures == (2, 2, 0, 0))
    })?;
    let ipv4 = Usage { total: 2, used: 2, available: 0 };
    let told = DutiesStatus {
        gives_addresses: true,
        pools: [("lab".to_owned(), PoolStatus { ipv4, ipv6: Usage::default() })].into(),
        unmet: [("PoolExhausted".to_owned(), 1)].into(),
        announced: Vec::new(),
    };
    wait::until_true("the node's own word of it", CONVERGES, || Ok(board.read() == told))?;
    // What becomes free is given.
    site.api.block_on(site.services().delete("one", &DeleteParams::default()))?;
    site.has("three", &["192.0.2.1"], "Assigned")?;
    // A service of another type has no such address, and nothing is said of it.
    let other = json!({ "spec": { "type": "ClusterIP", "allocateLoadBalancerNodePorts": null, "externalTrafficPolicy": null } });
    site.api.block_on(site.services().patch("two", &PatchParams::default(), &Patch::Merge(other)))?;
    wait::until_true("a service without an address", CONVERGES, || {
        let service = site.service("two")?;
        Ok(ips(&service).is_empty() && condition(&service).is_none())
    })
}

#[test]
fn an_address_that_is_asked_for_is_given_and_a_shrunk_pool_takes_none_away() -> Result<()> {
    let site = Site::new()?;
    let (_task, _) = site.controller("a");
    site.apply_pool("lab", &json!([{ "cidr": "192.0.2.0/24" }, { "start": "2001:db8::10", "stop": "2001:db8::20" }]))?;
    site.create("first", Some("192.0.2.77"))?;
    site.has("first", &["192.0.2.77"], "Assigned")?;
    site.create("second", Some("192.0.2.77"))?;
    site.has("second", &[], "AddressTaken")?;
    assert!(site.event("second", "AddressTaken")?.contains("taken by Service default/first"));
    site.create("third", Some("10.9.9.9"))?;
    site.has("third", &[], "OutsidePools")?;
    // The pool shrinks.
    site.apply_pool("lab", &json!([{ "cidr": "192.0.2.0/28" }]))?;
    let message = site.pool_says("lab", "Outside", "True")?;
    assert_eq!(message, "no pool has any more what services have: 192.0.2.77 of default/first");
    site.has("first", &["192.0.2.77"], "OutsidePools")?;
    assert_eq!(site.event("lab", "PoolShrunk")?, message);
    // A younger one that overlaps is not used.
    std::thread::sleep(SECOND);
    site.apply_pool("more", &json!([{ "cidr": "192.0.2.0/24" }]))?;
    let message = site.pool_says("more", "Conflict", "True")?;
    assert_eq!(message, "overlaps pool lab, which is older: none of this one's addresses is given");
    site.has("first", &["192.0.2.77"], "OutsidePools")?;
    Ok(())
}

#[test]
fn what_is_no_pool_is_refused_by_the_api_server() -> Result<()> {
    let site = Site::new()?;
    for (blocks, message) in [
        (json!([]), "should have at least 1 items"),
        (json!([{}]), "either cidr, or start and stop"),
        (
            json!([{ "cidr": "192.0.2.0/24", "start": "192.0.2.1", "stop": "192.0.2.2" }]),
            "either cidr, or start and stop",
        ),
        (json!([{ "start": "192.0.2.1" }]), "either cidr, or start and stop"),
        (json!([{ "cidr": "192.0.2.0" }]), "no CIDR"),
        (json!([{ "start": "192.0.2.1", "stop": "x" }]), "no IP address"),
    ] {
        let error = site.apply_pool("bad", &blocks).expect_err("it is refused");
        assert!(format!("{error:#}").contains(message), "{blocks}: {error:#}");
    }
    Ok(())
}

/// Neither knows of the other: what keeps them apart is what they write.
#[test]
fn two_who_give_at_once_give_no_address_twice() -> Result<()> {
    const SERVICES: usize = 24;
    let site = Site::new()?;
    site.apply_pool("lab", &json!([{ "cidr": "192.0.2.0/26" }]))?;
    let give = |node: &'static str| {
        let client = site.api.client();
        site.spawn(async move { controller::give(client, node).await })
    };
    let tasks = [give("a"), give("b"), give("c")];
    for number in 0..SERVICES {
        site.create(&format!("s{number}"), None)?;
    }
    wait::until_true("an address for every service, no two the same", CONVERGES * 2, || {
        let services = site.api.block_on(site.services().list(&ListParams::default()))?;
        let given: Vec<String> = services.iter().flat_map(ips).collect();
        let different: BTreeSet<&String> = given.iter().collect();
        assert_eq!(given.len(), different.len(), "{given:?}");
        Ok(given.len() == SERVICES)
    })?;
    drop(tasks);
    Ok(())
}

/// Somebody has reserved addresses, and has not lived to write them into the services' status.
#[test]
fn what_was_reserved_is_given_to_whom_it_was_reserved_for() -> Result<()> {
    let site = Site::new()?;
    site.apply_pool("lab", &json!([{ "cidr": "192.0.2.0/24" }]))?;
    for name in ["one", "two"] {
        site.create(name, None)?;
    }
    let reserved = json!({ "status": { "reserved": [
        { "ip": "192.0.2.9", "namespace": "default", "name": "two" },
        { "ip": "192.0.2.1", "namespace": "default", "name": "gone" },
    ] } });
    site.api.block_on(site.pools().patch_status("lab", &PatchParams::default(), &Patch::Merge(reserved)))?;
    let (_task, _) = site.controller("a");
    site.has("two", &["192.0.2.9"], "Assigned")?;
    site.has("one", &["192.0.2.1"], "Assigned")?;
    wait::until_true("nothing to be reserved", CONVERGES, || {
        Ok(site.pool("lab")?.status.is_some_and(|status| status.reserved.is_empty() && status.ipv4.used == 2))
    })
}

#[test]
fn a_daemon_gives_on_when_another_has_gone() -> Result<()> {
    let site = Site::new()?;
    site.apply_pool("lab", &json!([{ "cidr": "192.0.2.0/24" }]))?;
    let leases: Api<Lease> = Api::namespaced(site.api.client(), "default");
    let holder = || -> Result<Option<String>> {
        let lease = site.api.block_on(leases.get_opt(controller::LEASE))?;
        Ok(lease.and_then(|lease| lease.spec?.holder_identity))
    };
    let (first, _) = site.controller("a");
    wait::until_true("a holder", CONVERGES, || Ok(holder()?.as_deref() == Some("a")))?;
    let (_second, stop) = site.controller("b");
    site.create("one", None)?;
    site.has("one", &["192.0.2.1"], "Assigned")?;
    assert_eq!(holder()?.as_deref(), Some("a"));
    // It dies.
    drop(first);
    site.create("two", None)?;
    site.has("two", &["192.0.2.2"], "Assigned")?;
    assert_eq!(holder()?.as_deref(), Some("b"));
    site.has("one", &["192.0.2.1"], "Assigned")?;
    // It ends.
    stop.cancel();
    wait::until_true("no holder", CONVERGES, || Ok(holder()?.is_none()))
}

#[test]
fn a_lease_is_taken_over_at_once_or_when_it_is_over() -> Result<()> {
    let site = Site::new()?;
    let leases: Api<Lease> = Api::namespaced(site.api.client(), "default");
    let start = |node: &str| site.api.block_on(async { Election::start(leases.clone(), "test", node, SHORT) });
    let claims = || BTreeMap::from([("x".to_owned(), Claim::default())]);
    let run = |election: &Arc<Election>| {
        let election = election.clone();
        site.spawn(async move { election.run(|| {}).await })
    };
    let elections = ["a", "b", "c"].map(|node| Arc::new(start(node)));
    let [first, second, third] = &elections;
    first.want(claims(), |_| true);
    let first_task = run(first);
    wait::until_true("a first holder", CONVERGES, || Ok(first.holds("x")))?;
    second.want(claims(), |_| true);
    let second_task = run(second);
    std::thread::sleep(SHORT.duration + SECOND);
    assert!(first.holds("x") && !second.holds("x"), "it is held for as long as it is renewed");
    // It ends.
    drop(first_task);
    let ended = Instant::now();
    site.api.block_on(first.resign());
    assert!(!first.holds("x"));
    wait::until_true("the second to hold it", CONVERGES, || Ok(second.holds("x")))?;
    assert!(ended.elapsed() < SECOND, "{:?}", ended.elapsed());
    // It dies.
    third.want(claims(), |_| true);
    let _third_task = run(third);
    std::thread::sleep(SECOND);
    drop(second_task);
    let died = Instant::now();
    wait::until_true("the third to hold it", CONVERGES, || {
        assert!(!(second.holds("x") && third.holds("x")), "never two");
        Ok(third.holds("x"))
    })?;
    assert!(died.elapsed() <= SHORT.duration + SECOND, "{:?}", died.elapsed());
    let lease = site.api.block_on(leases.get("x"))?.spec.context("a spec")?;
    assert_eq!((lease.holder_identity.as_deref(), lease.lease_transitions), (Some("c"), Some(2)));
    // Nobody needs it any more.
    third.want(BTreeMap::new(), |_| false);
    wait::until_true("no Lease", CONVERGES, || Ok(site.api.block_on(leases.get_opt("x"))?.is_none()))
}

/// Who answers without a network.
struct Fake {
    place: Place,
    answered: Arc<Mutex<BTreeSet<IpAddr>>>,
}

impl Announcer for Fake {
    fn place(&mut self) -> std::io::Result<Place> {
        Ok(self.place.clone())
    }

    fn set(&mut self, announcements: &[Announcement]) {
        *self.answered.lock().expect("not poisoned") = announcements.iter().map(|one| one.addr).collect();
    }
}

/// A node that takes part in answering for addresses.
struct Agent {
    answered: Arc<Mutex<BTreeSet<IpAddr>>>,
    stop: CancellationToken,
    _task: Task,
}

impl Agent {
    fn start(site: &Site, node: &'static str, own: &[&str]) -> Result<Self> {
        let labels = if node == "other" { json!({}) } else { json!({ "lb": "yes" }) };
        let object: Node = serde_json::from_value(json!({ "metadata": { "name": node, "labels": labels } }))?;
        let nodes: Api<Node> = Api::all(site.api.client());
        site.api.block_on(nodes.create(&PostParams::default(), &object))?;
        let answered: Arc<Mutex<BTreeSet<IpAddr>>> = Arc::default();
        let stop = CancellationToken::new();
        let own = own.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
        let v4 = BTreeMap::from([(2, "eth0".to_owned())]);
        let mut fake = Fake { place: Place { v4, own, ..Place::default() }, answered: answered.clone() };
        let (client, stopped) = (site.api.client(), stop.clone());
        let task = site.spawn(async move {
            agent::run(client, "default", node, SHORT, &mut fake, &stopped).await;
        });
        Ok(Self { answered, stop, _task: task })
    }

    fn answered(&self) -> BTreeSet<IpAddr> {
        self.answered.lock().expect("not poisoned").clone()
    }
}

#[test]
fn one_node_answers_for_each_address_and_others_take_over() -> Result<()> {
    const SERVICES: usize = 8;
    let site = Site::new()?;
    site.apply_pool("lab", &json!([{ "cidr": "192.0.2.0/27" }]))?;
    let (_task, _) = site.controller("giver");
    for number in 0..SERVICES {
        site.create(&format!("s{number}"), None)?;
    }
    site.has("s7", &["192.0.2.8"], "Assigned")?;
    let announcements: Api<L2Announcement> = Api::all(site.api.client());
    let spec: L2AnnouncementSpec = serde_json::from_value(json!({
        "nodeSelector": { "matchLabels": { "lb": "yes" } }, "interfaces": ["eth*"],
    }))?;
    site.api.block_on(announcements.create(&PostParams::default(), &L2Announcement::new("all", spec)))?;
    let [a, b, c, other] = ["a", "b", "c", "other"].map(|node| Agent::start(&site, node, &["192.0.2.1"]));
    let (a, b, c, other) = (a?, b?, c?, other?);
    let all = |agents: &[&Agent]| -> BTreeSet<IpAddr> {
        let answered: Vec<IpAddr> = agents.iter().flat_map(|agent| agent.answered()).collect();
        let different: BTreeSet<IpAddr> = answered.iter().copied().collect();
        assert_eq!(answered.len(), different.len(), "two answer for one: {answered:?}");
        different
    };
    // Not for what is a node's own.
    wait::until_true("seven answers", CONVERGES, || Ok(all(&[&a, &b, &c, &other]).len() == SERVICES - 1))?;
    assert!(site.event("s0", "NodesOwnAddress")?.contains("192.0.2.1"));
    assert!(other.answered().is_empty(), "it is not selected");
    let leases: Api<Lease> = Api::namespaced(site.api.client(), "default");
    let lease = site.api.block_on(leases.get("affinity-l2-192-0-2-8"))?;
    let row = AnnouncementRow::of(&lease, jiff::Timestamp::now()).context("a row")?;
    assert_eq!((row.service.as_str(), row.interfaces.as_slice()), ("default/s7", ["eth0".to_owned()].as_slice()));
    // One ends.
    let before = a.answered();
    a.stop.cancel();
    wait::until_true("it to end", CONVERGES, || Ok(a.answered().is_empty()))?;
    let ended = Instant::now();
    wait::until_true("the others to answer", CONVERGES, || Ok(all(&[&b, &c]).len() == SERVICES - 1))?;
    assert!(ended.elapsed() < SECOND, "{:?} for {before:?}", ended.elapsed());
    // A service whose policy is Local is answered for where its endpoints are, and moves with them.
    let local = json!({ "spec": { "externalTrafficPolicy": "Local" } });
    site.api.block_on(site.services().patch("s3", &PatchParams::default(), &Patch::Merge(local)))?;
    let address: IpAddr = "192.0.2.4".parse()?;
    wait::until_true("nobody to answer", CONVERGES, || Ok(!all(&[&b, &c]).contains(&address)))?;
    let slices: Api<EndpointSlice> = Api::namespaced(site.api.client(), "default");
    for (node, agent) in [("b", &b), ("c", &c), ("b", &b)] {
        let slice: EndpointSlice = serde_json::from_value(json!({
            "metadata": { "name": "s3-1", "labels": { "kubernetes.io/service-name": "s3" } },
            "addressType": "IPv4",
            "endpoints": [{ "addresses": ["10.244.0.9"], "nodeName": node, "conditions": { "ready": true } }],
        }))?;
        let _ = site.api.block_on(slices.delete("s3-1", &DeleteParams::default()));
        site.api.block_on(slices.create(&PostParams::default(), &slice))?;
        wait::until_true(&format!("{node} to answer"), CONVERGES, || {
            all(&[&b, &c]);
            Ok(agent.answered().contains(&address))
        })?;
    }
    // A service goes, and with it its Lease.
    site.api.block_on(site.services().delete("s7", &DeleteParams::default()))?;
    wait::until_true("no Lease", CONVERGES, || {
        Ok(site.api.block_on(leases.get_opt("affinity-l2-192-0-2-8"))?.is_none())
    })?;
    // Nobody is to answer any more.
    site.api.block_on(announcements.delete("all", &DeleteParams::default()))?;
    wait::until_true("no answers", CONVERGES, || Ok(all(&[&b, &c]).is_empty()))
}

#[test]
fn a_node_without_such_an_interface_says_so() -> Result<()> {
    let site = Site::new()?;
    let announcements: Api<L2Announcement> = Api::all(site.api.client());
    let spec: L2AnnouncementSpec = serde_json::from_value(json!({ "interfaces": ["wlan*"] }))?;
    site.api.block_on(announcements.create(&PostParams::default(), &L2Announcement::new("radio", spec)))?;
    let _agent = Agent::start(&site, "a", &[])?;
    assert_eq!(site.event("radio", "NoInterface")?, "node a has no uplink that this selects");
    Ok(())
}
