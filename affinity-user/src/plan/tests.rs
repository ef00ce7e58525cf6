//! Plans as text, from YAML.

use std::collections::{BTreeMap, BTreeSet};

use affinity_common::types::Proto;
use jiff::Timestamp;
use proptest::prelude::*;

use super::*;
use crate::{
    model::{
        Checked, Endpoint, EndpointSlice, External, Kind, ListedAddress, Model, NodePortAddresses, ObjectName, Service,
        ServicePort, TargetPort, TrafficPolicy,
    },
    sources::list_of,
};

fn model(yaml: &str) -> Model {
    let mut model = Model::default();
    for event in list_of(yaml) {
        event.enter(&mut model);
    }
    model
}

fn plans(yaml: &str) -> Vec<ServicePlan> {
    model(yaml).services().map(|view| plan(&view)).collect()
}

#[track_caller]
fn check(yaml: &str, expected: &str) {
    let dump: Vec<_> = plans(yaml).iter().map(ToString::to_string).collect();
    assert_eq!(dump.concat(), expected);
}

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIPs: [10.96.0.1]
  sessionAffinity: ClientIP
  ports: [{name: http, port: 80, targetPort: web}]
";

/// A slice of service web with these endpoints.
fn slice(name: &str, port: &str, endpoints: &[&str]) -> String {
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
         metadata: {{name: {name}, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}\n\
         ports: [{port}]\nendpoints: [{}]\n",
        endpoints.join(", ")
    )
}

fn pod(last: u8, conditions: &str) -> String {
    format!("{{addresses: [10.1.0.{last}], conditions: {{{conditions}}}, targetRef: {{kind: Pod, name: pod-{last}}}}}")
}

const HTTP: &str = "{name: http, port: 8080}";
const TERMINATING: &str = "ready: false, serving: true, terminating: true";

#[test]
fn a_service_is_its_frontends_and_sorted_backends() {
    let slices = [
        slice("a", HTTP, &[&pod(9, "ready: true"), &pod(3, "ready: true")]),
        slice("b", "{name: http, port: 9090}, {name: other, port: 1}", &[&pod(4, "")]),
    ];
    check(
        &[SERVICE, &slices[0], &slices[1]].concat(),
        "shop/web/http/TCP seed=e5ca05d1 affinity=10800s
  frontend 10.96.0.1:80/TCP
  backend +10.1.0.3:8080 pod-3
  backend +10.1.0.4:9090 pod-4
  backend +10.1.0.9:8080 pod-9
",
    );
}

#[test]
fn ports_are_matched_by_name_and_protocol() {
    let service = SERVICE.replace(
        "[{name: http, port: 80, targetPort: web}]",
        "[{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53}, {name: old, port: 7, protocol: SCTP}]",
    );
    let slice = slice(
        "a",
        "{name: dns, port: 5353, protocol: UDP}, {name: dns, port: 1}, {name: dns-tcp, port: 5354}, {name: dns-tcp}",
        &[&pod(1, "")],
    );
    check(
        &[service.replace("sessionAffinity: ClientIP", "sessionAffinity: None"), slice].concat(),
        "shop/web/dns/UDP seed=d95e316c affinity=none
  frontend 10.96.0.1:53/UDP
  backend +10.1.0.1:5353 pod-1
shop/web/dns-tcp/TCP seed=445adde2 affinity=none
  frontend 10.96.0.1:53/TCP
  backend +10.1.0.1:5354 pod-1
",
    );
}

#[test]
fn ports_without_a_name_match_each_other() {
    let service = SERVICE.replace("{name: http, port: 80, targetPort: web}", "{port: 80}");
    check(
        &[service, slice("a", "{port: 8080}, {name: '', port: 8081}, {name: x, port: 1}", &[&pod(1, "")])].concat(),
        "shop/web//TCP seed=072d2e41 affinity=10800s
  frontend 10.96.0.1:80/TCP
  backend +10.1.0.1:8080 pod-1
  backend +10.1.0.1:8081 pod-1
",
    );
}

/// The endpoints' conditions, and what becomes of them: `+` eligible, `-` not.
#[test]
fn eligible_are_the_ready_ones_or_else_the_serving_terminating_ones() {
    const NOT_READY: &str = "ready: false, serving: false, terminating: false";
    const GONE: &str = "ready: false, serving: false, terminating: true";
    // What a service without readiness gates never has: serving but neither ready nor terminating.
    const ODD: &str = "ready: false, serving: true, terminating: false";
    // With publishNotReadyAddresses terminating endpoints are ready.
    const PUBLISHED: &str = "ready: true, serving: false, terminating: true";
    for (conditions, expected) in [
        (&["", "ready: true"][..], "++"),
        (&["ready: true", TERMINATING, NOT_READY, GONE, ODD], "+----"),
        (&[TERMINATING, NOT_READY, GONE, ODD], "+---"),
        (&["ready: false, terminating: true", TERMINATING], "-+"),
        (&[NOT_READY, GONE, ODD], "---"),
        (&[PUBLISHED, TERMINATING], "+-"),
        (&["terminating: true"], "+"),
        (&[], ""),
    ] {
        let pods: Vec<_> = (1..).zip(conditions).map(|(i, conditions)| pod(i, conditions)).collect();
        let pods: Vec<_> = pods.iter().map(String::as_str).collect();
        let plans = plans(&[SERVICE, &slice("a", HTTP, &pods)].concat());
        let eligible: String =
            plans[0].ports[0].v4.backends.iter().map(|b| if b.eligible.cluster { '+' } else { '-' }).collect();
        assert_eq!(eligible, expected, "{conditions:?}");
    }
}

#[test]
fn of_an_endpoint_in_several_slices_the_ready_one_counts() {
    for (first, second) in [(TERMINATING, "ready: true"), ("ready: true", TERMINATING)] {
        let slices = [slice("a", HTTP, &[&pod(1, first)]), slice("b", HTTP, &[&pod(1, second), &pod(2, TERMINATING)])];
        check(
            &[SERVICE, &slices[0], &slices[1]].concat(),
            "shop/web/http/TCP seed=e5ca05d1 affinity=10800s
  frontend 10.96.0.1:80/TCP
  backend +10.1.0.1:8080 pod-1
  backend -10.1.0.2:8080 pod-2
",
        );
    }
}

#[test]
fn families_are_kept_apart() {
    let service = SERVICE.replace("[10.96.0.1]", "['fd00::1', 10.96.0.1]");
    let six = slice("b", HTTP, &["{addresses: ['fd01::2']}", "{addresses: [10.9.9.9]}"]).replace("IPv4", "IPv6");
    let four = slice("a", HTTP, &[&pod(1, ""), "{addresses: ['fd01::9']}"]);
    check(
        &[&service, &four, &six].map(String::as_str).concat(),
        "shop/web/http/TCP seed=e5ca05d1 affinity=10800s
  frontend 10.96.0.1:80/TCP
  backend +10.1.0.1:8080 pod-1
  frontend [fd00::1]:80/TCP
  backend +[fd01::2]:8080 -
",
    );
    // A single-stack service has no use for the other family's slices.
    check(&[SERVICE, &six].concat(), "shop/web/http/TCP seed=e5ca05d1 affinity=10800s\n  frontend 10.96.0.1:80/TCP\n");
}

/// The plans of node `here`, in `zone-a`.
fn plans_here(yaml: &str) -> String {
    const NODE: &str = "---\napiVersion: v1\nkind: Node\n\
                        metadata: {name: here, labels: {topology.kubernetes.io/zone: zone-a}}\n";
    let mut model = Model::new("here");
    for event in list_of(&[yaml, NODE].concat()) {
        event.enter(&mut model);
    }
    model.services().map(|view| plan(&view).to_string()).collect::<Vec<_>>().concat()
}

#[test]
fn a_local_service_leads_to_its_nodes_endpoints() {
    let service = SERVICE.replace("sessionAffinity: ClientIP", "internalTrafficPolicy: Local");
    let on = |last: u8, node: &str| pod(last, "").replace("conditions", &format!("nodeName: {node}, conditions"));
    let (here, there, nowhere) = (on(1, "here"), on(2, "there"), pod(3, ""));
    let plans = plans_here(&[service.as_str(), &slice("a", HTTP, &[&here, &there, &nowhere])].concat());
    assert_eq!(
        plans,
        "shop/web/http/TCP seed=e5ca05d1 affinity=none
  frontend 10.96.0.1:80/TCP local
  backend l10.1.0.1:8080 pod-1
  backend -10.1.0.2:8080 pod-2
  backend -10.1.0.3:8080 pod-3
"
    );
    // Endpoints elsewhere: dropped. None at all: refused.
    let plans = plans_here(&[service.as_str(), &slice("a", HTTP, &[&there])].concat());
    assert!(plans.ends_with("  backend -10.1.0.2:8080 pod-2\n  others l\n"), "{plans}");
    let plans = plans_here(&service);
    assert!(plans.ends_with("  frontend 10.96.0.1:80/TCP local\n"), "{plans}");
}

/// A service that is reached in all ways, with an endpoint here and one elsewhere, on a node that has node ports at
/// 192.168.0.5; `more` are fields of its spec.
fn reached_in_all_ways(more: &str) -> String {
    const STATUS: &str = "status: {loadBalancer: {ingress: [{ip: 203.0.113.1}, {ip: 203.0.113.2, ipMode: Proxy}]}}\n";
    const NODE: &str = "---\napiVersion: v1\nkind: Node\nmetadata: {name: here}\n\
                        status: {addresses: [{type: InternalIP, address: 192.168.0.5}]}\n";
    let service = SERVICE
        .replace("sessionAffinity: ClientIP", &format!("type: LoadBalancer\n  externalIPs: [198.51.100.1]{more}"))
        .replace("port: 80,", "port: 80, nodePort: 30080,");
    let on = |last: u8, node: &str| pod(last, "").replace("conditions", &format!("nodeName: {node}, conditions"));
    let mut model = Model::new("here");
    for event in list_of(&[&service, STATUS, &slice("a", HTTP, &[&on(1, "here"), &on(2, "there")]), NODE].concat()) {
        event.enter(&mut model);
    }
    assert_eq!(model.rejections().map(|it| it.to_string()).collect::<Vec<_>>(), [""; 0]);
    model.services().map(|view| plan(&view).to_string()).collect()
}

/// kube-proxy's rules for both traffic policies: whom each address leads to which endpoints. `parts`: outsiders are sent to
/// the line that says `outside`.
#[test]
fn each_traffic_policy_is_of_its_own_addresses() {
    const HEAD: &str = "shop/web/http/TCP seed=e5ca05d1 affinity=none\n";
    const BOTH: &str = "  backend *10.1.0.1:8080 pod-1\n  backend +10.1.0.2:8080 pod-2\n";
    for (more, frontends, backends) in [
        (
            "",
            "10.96.0.1:80/TCP
             192.168.0.5:30080/TCP NodePort alone
             198.51.100.1:80/TCP ExternalIP
             203.0.113.1:80/TCP LoadBalancer",
            "  backend +10.1.0.1:8080 pod-1\n  backend +10.1.0.2:8080 pod-2\n",
        ),
        (
            "\n  internalTrafficPolicy: Local",
            "10.96.0.1:80/TCP local
             192.168.0.5:30080/TCP NodePort alone
             198.51.100.1:80/TCP ExternalIP
             203.0.113.1:80/TCP LoadBalancer",
            BOTH,
        ),
        (
            "\n  externalTrafficPolicy: Local",
            "10.96.0.1:80/TCP
             192.168.0.5:30080/TCP NodePort parts alone
             192.168.0.5:30080/TCP NodePort outside local alone
             198.51.100.1:80/TCP ExternalIP parts
             198.51.100.1:80/TCP ExternalIP outside local
             203.0.113.1:80/TCP LoadBalancer parts
             203.0.113.1:80/TCP LoadBalancer outside local",
            BOTH,
        ),
        (
            "\n  externalTrafficPolicy: Local\n  internalTrafficPolicy: Local",
            "10.96.0.1:80/TCP local
             192.168.0.5:30080/TCP NodePort parts alone
             192.168.0.5:30080/TCP NodePort outside local alone
             198.51.100.1:80/TCP ExternalIP parts
             198.51.100.1:80/TCP ExternalIP outside local
             203.0.113.1:80/TCP LoadBalancer parts
             203.0.113.1:80/TCP LoadBalancer outside local",
            BOTH,
        ),
    ] {
        let lines = frontends.lines().map(|line| format!("  frontend {}\n", line.trim())).collect::<Vec<_>>().concat();
        assert_eq!(reached_in_all_ways(more), format!("{HEAD}{lines}{backends}"), "{more}");
    }
}

/// As by kube-proxy, which takes each family's ranges by themselves, and closes nothing where a family has none
/// (`newBaseServiceInfo` in its pkg/proxy/serviceport.go, `MapCIDRsByIPFamily`, and `usesFWChain` in its proxiers). A range that
/// makes no sense opens nothing here, while kube-proxy goes on as if it were not there.
#[test]
fn ranges_are_of_the_load_balancers_addresses_alone() {
    for (more, ranges, frontends) in [
        (
            "\n  loadBalancerSourceRanges: [' 10.0.0.7/8 ', 10.0.0.0/8, 'fd00::/8']",
            "  range 10.0.0.0/8\n",
            "  frontend 203.0.113.1:80/TCP LoadBalancer ranges\n",
        ),
        (
            "\n  externalTrafficPolicy: Local\n  loadBalancerSourceRanges: [10.0.0.0/8]",
            "  range 10.0.0.0/8\n",
            "  frontend 203.0.113.1:80/TCP LoadBalancer parts ranges\n  \
             frontend 203.0.113.1:80/TCP LoadBalancer outside local ranges\n",
        ),
        // Ranges of the other family are no matter of this one.
        ("\n  loadBalancerSourceRanges: ['fd00::/8']", "", "  frontend 203.0.113.1:80/TCP LoadBalancer\n"),
    ] {
        let plan = reached_in_all_ways(more);
        assert!(plan.contains(&format!("{frontends}{ranges}  backend")), "{plan}");
        assert_eq!(plan.matches("ranges").count(), frontends.matches("ranges").count(), "{plan}");
    }
}

#[test]
fn without_local_endpoints_outsiders_find_others_and_the_cluster_all() {
    let mut model = Model::new("nowhere");
    let service =
        SERVICE.replace("[10.96.0.1]", "[10.96.0.1]\n  externalIPs: [198.51.100.1]\n  externalTrafficPolicy: Local");
    for event in list_of(&[service, slice("a", HTTP, &[&pod(1, "")])].concat()) {
        event.enter(&mut model);
    }
    let plan = model.services().map(|view| plan(&view).to_string()).collect::<String>();
    assert!(plan.ends_with("  backend +10.1.0.1:8080 pod-1\n  others l\n"), "{plan}");
}

#[test]
fn health_checks_count_ready_endpoints_here() {
    const HERE: &str = ", nodeName: here";
    const DRAINING: &str = ", nodeName: here, conditions: {ready: false, serving: true, terminating: true}";
    let health = |plan: &str| plan.lines().find(|line| line.starts_with("health")).map(str::to_owned);
    let more = "\n  healthCheckNodePort: 32000";
    assert_eq!(health(&reached_in_all_ways(more)), None, "by the policy Cluster, load balancers need not ask");
    let more = format!("{more}\n  externalTrafficPolicy: Local");
    assert_eq!(health(&reached_in_all_ways(&more)).as_deref(), Some("health 32000 local=1"));
    let count = |endpoints: &[(&str, &str)]| {
        let endpoints = endpoints.iter().map(|(address, more)| format!("{{addresses: ['{address}']{more}}}"));
        let (four, six): (Vec<_>, Vec<_>) = endpoints.partition(|endpoint| endpoint.contains("10."));
        let of = |endpoints: &[String]| slice("a", HTTP, &endpoints.iter().map(String::as_str).collect::<Vec<_>>());
        let six = of(&six).replace("name: a,", "name: b,").replace("addressType: IPv4", "addressType: IPv6");
        let service = SERVICE.replace("[10.96.0.1]", &format!("[10.96.0.1]\n  type: LoadBalancer{more}"));
        let mut model = Model::new("here");
        for event in list_of(&[service, of(&four), six].concat()) {
            event.enter(&mut model);
        }
        let plans: Vec<_> = model.services().map(|view| plan(&view)).collect();
        plans[0].health.map(|health| health.local_endpoints)
    };
    assert_eq!(count(&[]), Some(0));
    assert_eq!(count(&[("10.1.0.1", HERE), ("10.1.0.2", ""), ("10.1.0.3", DRAINING), ("10.1.0.4", HERE)]), Some(2));
    assert_eq!(count(&[("10.1.0.1", HERE), ("fd00::1", HERE), ("fd00::2", HERE)]), Some(2), "not three pods");
}

#[test]
fn hints_lead_to_the_nodes_zone() {
    let hinted = |last: u8, zone: &str| {
        pod(last, "").replace("conditions", &format!("hints: {{forZones: [{{name: {zone}}}]}}, conditions"))
    };
    let (a, b) = (hinted(1, "zone-a"), hinted(2, "zone-b"));
    let plans = plans_here(&[SERVICE, &slice("a", HTTP, &[&a, &b])].concat());
    assert!(plans.ends_with("  backend +10.1.0.1:8080 pod-1\n  backend -10.1.0.2:8080 pod-2\n"), "{plans}");
    let plans = plans_here(&[SERVICE, &slice("a", HTTP, &[&a, &b, &pod(3, "")])].concat());
    assert!(!plans.contains("backend -"), "one without hints makes all of them void: {plans}");
}

#[test]
fn a_port_that_an_older_service_has_is_not_planned() {
    let ports = "[{name: http, port: 80}, {name: admin, port: 81}]";
    let other = SERVICE.replace("name: web,", "name: app,").replace("[{name: http, port: 80, targetPort: web}]", ports);
    check(
        &[SERVICE, "---", &other].concat(),
        "shop/app/admin/TCP seed=caf31679 affinity=10800s
  frontend 10.96.0.1:81/TCP
shop/app/http/TCP seed=2e6cf3ea affinity=10800s
  frontend 10.96.0.1:80/TCP
",
    );
}

#[test]
fn slots_name_eligible_backends_alone() {
    let pods = [pod(1, "ready: true"), pod(2, TERMINATING), pod(3, "ready: true")];
    let pods: Vec<_> = pods.iter().map(String::as_str).collect();
    let slots = |affinity: &str| {
        let service = SERVICE.replace("sessionAffinity: ClientIP", affinity);
        plans(&[service, slice("a", HTTP, &pods)].concat())[0].ports[0].slots::<V4>(Scope::Cluster)
    };
    assert_eq!(slots("sessionAffinity: None"), [0, 2]);
    let table = slots("sessionAffinity: ClientIP");
    assert_eq!(table.len(), 251);
    assert!(table.iter().all(|&backend| backend == 0 || backend == 2));
    assert!(plans(SERVICE)[0].ports[0].slots::<V4>(Scope::Cluster).is_empty());
    assert!(plans(SERVICE)[0].ports[0].slots::<V6>(Scope::Cluster).is_empty());
}

#[test]
fn ports_that_share_affinity_choose_alike() {
    let ports = "[{name: http, port: 80}, {name: https, port: 443}]";
    let service = SERVICE
        .replace("name: web,", "name: web, annotations: {affinity.dev/session-affinity-scope: service},")
        .replace("[{name: http, port: 80, targetPort: web}]", ports);
    let pods: Vec<_> = (1..9).map(|last| pod(last, "")).collect();
    let pods: Vec<_> = pods.iter().map(String::as_str).collect();
    let slice = slice("a", "{name: http, port: 8080}, {name: https, port: 8443}", &pods);
    let plans_of = |service: &str| plans(&[service, &slice].concat());
    let shared = plans_of(&service);
    let [http, https] = &shared[0].ports[..] else { panic!("{}", shared[0]) };
    assert!(shared[0].to_string().starts_with("shop/web/http/TCP seed="), "{}", shared[0]);
    assert!(http.shares_affinity && http.seed == https.seed);
    assert_eq!(http.slots::<V4>(Scope::Cluster), https.slots::<V4>(Scope::Cluster));
    // Without affinity there is nothing to share.
    let spread = plans_of(&service.replace("sessionAffinity: ClientIP", "sessionAffinity: None"));
    assert!(!spread[0].ports[0].shares_affinity && spread[0].ports[0].seed != spread[0].ports[1].seed);
    let usual = plans_of(&service.replace("scope: service", "scope: port"));
    assert_ne!(usual[0].ports[0].slots::<V4>(Scope::Cluster), usual[0].ports[1].slots::<V4>(Scope::Cluster));
}

#[test]
fn the_seed_is_fnv_1a() {
    // The published test vectors need the bare hash: "a" is 0xe40c292c, "foobar" 0xbf9cf968.
    assert_eq!(fnv1a("a".bytes()), 0xe40c_292c);
    assert_eq!(fnv1a("foobar".bytes()), 0xbf9c_f968);
}

/// A change of the cluster.
#[derive(Clone, Debug)]
enum Change {
    Service {
        name: u8,
        ip: u8,
        age: u8,
        sticky: bool,
        /// An external IP that others may want or endpoints have, and a node port.
        outside: Option<(u8, bool)>,
    },
    /// The node's addresses are these.
    Addresses(Vec<u8>),
    Slice {
        name: u8,
        service: u8,
        pods: Vec<u8>,
    },
    DeleteService(u8),
    DeleteSlice(u8),
    /// The next changes are a complete list, until this again.
    Relist(Kind),
}

fn change() -> impl Strategy<Value = Change> {
    let few = 0u8..4;
    prop_oneof![
        4 => (few.clone(), few.clone(), few.clone(), any::<bool>(), prop::option::of((few.clone(), any::<bool>())))
            .prop_map(|(name, ip, age, sticky, outside)| Change::Service { name, ip, age, sticky, outside }),
        1 => prop::collection::vec(few.clone(), 0..3).prop_map(Change::Addresses),
        4 => (few.clone(), few.clone(), prop::collection::vec(few.clone(), 0..3))
            .prop_map(|(name, service, pods)| Change::Slice { name, service, pods }),
        2 => few.clone().prop_map(Change::DeleteService),
        2 => few.prop_map(Change::DeleteSlice),
        1 => prop_oneof![Just(Kind::Service), Just(Kind::EndpointSlice)].prop_map(Change::Relist),
    ]
}

fn an_object(kind: char, name: u8) -> ObjectName {
    ObjectName::new("shop", format!("{kind}{name}"))
}

fn a_service(name: u8, ip: u8, age: u8, sticky: bool, outside: Option<(u8, bool)>) -> Service {
    let timeout = Seconds::new(60);
    let node_port = outside.filter(|(_, has_node_port)| *has_node_port).map(|(n, _)| Port::new(30_000 + u16::from(n)));
    let external = outside.map(|(n, has_node_port)| External {
        ips: vec![ListedAddress { index: 0, addr: [10, 1, 0, n].into() }],
        policy: if has_node_port { TrafficPolicy::Local } else { TrafficPolicy::Cluster },
        ..External::default()
    });
    Service {
        name: an_object('s', name),
        created: Timestamp::from_second(age.into()).ok(),
        cluster_ips: vec![[10, 0, 0, ip].into()],
        session_affinity: if sticky { SessionAffinity::ClientIp { timeout } } else { SessionAffinity::None },
        affinity_scope: AffinityScope::Port,
        internal_policy: TrafficPolicy::Cluster,
        ports: vec![ServicePort { index: 0, name: "".into(), proto: Proto::TCP, port: Port::new(80), node_port }],
        external: external.map(Box::new),
    }
}

fn a_slice(name: u8, service: u8, pods: &[u8]) -> EndpointSlice {
    let endpoint = |last: &u8| Endpoint {
        address: [10, 1, 0, *last].into(),
        ready: last.is_multiple_of(2),
        serving: true,
        terminating: true,
        node_name: None,
        hints: None,
        target: None,
    };
    EndpointSlice {
        name: an_object('e', name),
        service: an_object('s', service),
        ports: vec![TargetPort { name: "".into(), proto: Proto::TCP, port: Port::new(8080) }],
        endpoints: pods.iter().map(endpoint).collect(),
    }
}

proptest! {
    /// Whoever plans again what is said to be dirty, and nothing else, has the plans of the whole cluster; they do not
    /// depend on how it came to be what it is.
    #[test]
    fn dirty_is_all_that_has_changed(changes in prop::collection::vec(change(), 1..40)) {
        let settings = || vec![NodePortAddresses::All];
        let mut model = Model::default().with_node_port_addresses(settings());
        let mut own: BTreeSet<std::net::IpAddr> = BTreeSet::new();
        let mut kept: BTreeMap<ServiceName, ServicePlan> = BTreeMap::new();
        let mut services: BTreeMap<u8, Service> = BTreeMap::new();
        let mut slices: BTreeMap<u8, EndpointSlice> = BTreeMap::new();
        let mut relists: BTreeSet<Kind> = BTreeSet::new();
        for change in changes {
            match change {
                Change::Service { name, ip, age, sticky, outside } => {
                    let service = a_service(name, ip, age, sticky, outside);
                    model.apply_service(Checked::good(service.clone()));
                    services.insert(name, service);
                }
                Change::Slice { name, service, pods } => {
                    let slice = a_slice(name, service, &pods);
                    model.apply_slice(Checked::good(slice.clone()));
                    slices.insert(name, slice);
                }
                Change::Addresses(last) => {
                    own = last.into_iter().map(|n| [10, 1, 0, n].into()).collect();
                    model.set_node_addresses(own.clone());
                }
                Change::DeleteService(name) => {
                    model.delete(Kind::Service, &an_object('s', name));
                    services.remove(&name);
                }
                Change::DeleteSlice(name) => {
                    model.delete(Kind::EndpointSlice, &an_object('e', name));
                    slices.remove(&name);
                }
                Change::Relist(kind) if relists.remove(&kind) => model.finish(kind),
                Change::Relist(kind) => {
                    model.begin(kind);
                    relists.insert(kind);
                    match kind {
                        Kind::Service => services.clear(),
                        Kind::EndpointSlice => slices.clear(),
                        Kind::Node | Kind::Pod => {}
                    }
                }
            }
            for name in model.take_changes().dirty {
                match model.service(&name) {
                    Some(view) => kept.insert(name, plan(&view)),
                    None => kept.remove(&name),
                };
            }
            let whole: Vec<_> = model.services().map(|view| plan(&view)).collect();
            prop_assert!(kept.values().eq(&whole), "{:?}\n{:?}", kept, whole);
        }
        for kind in relists {
            model.finish(kind);
        }
        let mut anew = Model::default().with_node_port_addresses(settings());
        anew.set_node_addresses(own);
        for service in services.into_values() {
            anew.apply_service(Checked::good(service));
        }
        for slice in slices.into_values() {
            anew.apply_slice(Checked::good(slice));
        }
        model.take_changes();
        anew.take_changes();
        let whole: Vec<_> = model.services().map(|view| plan(&view)).collect();
        let fresh: Vec<_> = anew.services().map(|view| plan(&view)).collect();
        prop_assert_eq!(whole, fresh);
        let rejections = |model: &Model| model.rejections().map(|rejection| rejection.to_string()).collect::<Vec<_>>();
        prop_assert_eq!(rejections(&model), rejections(&anew));
    }

    /// However the endpoints are cut into slices and ordered, the plan is the same.
    #[test]
    fn slicing_does_not_matter(
        pods in prop::collection::btree_map(1u8..40, any::<(bool, bool, bool)>(), 0..20).prop_map(Vec::from_iter),
        shuffled in any::<prop::sample::Index>(),
        cut in any::<prop::sample::Index>(),
    ) {
        let pods: Vec<_> = pods.into_iter().map(|(last, (ready, serving, terminating))| {
            pod(last, &format!("ready: {ready}, serving: {serving}, terminating: {terminating}"))
        }).collect();
        let as_one: Vec<_> = pods.iter().map(String::as_str).collect();
        let mut turned = as_one.clone();
        if !turned.is_empty() {
            turned.rotate_left(shuffled.index(pods.len()));
        }
        let (a, b) = turned.split_at(cut.index(pods.len() + 1));
        let one = plans(&[SERVICE, &slice("a", HTTP, &as_one)].concat());
        let two = plans(&[SERVICE, &slice("a", HTTP, a), &slice("b", HTTP, b)].concat());
        prop_assert_eq!(&one, &two);
        prop_assert_eq!(one[0].ports[0].slots::<V4>(Scope::Cluster), two[0].ports[0].slots::<V4>(Scope::Cluster));
        prop_assert_eq!(one[0].ports[0].v4.backends.len(), pods.len());
    }
}
