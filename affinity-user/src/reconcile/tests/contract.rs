//! What kube-proxy promises, and what a broken mirror of the API server could send: from objects in YAML to what the maps
//! say of services.

use std::fmt::Write as _;

use super::world::{SIZES, World};
use crate::{
    model::Model,
    plan::plan,
    reconcile::Change,
    sources::{SourceEvent, list_of},
    tables::{Table as _, memory::Sizes},
};

/// A node that follows a cluster.
struct Node {
    model: Model,
    world: World,
}

impl Node {
    fn new() -> Self {
        Self { model: Model::new("here"), world: World::new(&SIZES) }
    }

    /// The cluster is this, by a complete list. Returns the frontends that there are, and where they lead.
    fn sees(&mut self, yaml: &str) -> String {
        self.takes(list_of(yaml))
    }

    /// Objects come one by one.
    fn hears(&mut self, yaml: &str) -> String {
        let is_object = |event: &SourceEvent| !matches!(event, SourceEvent::Init(_) | SourceEvent::InitDone(_));
        self.takes(list_of(yaml).into_iter().filter(is_object))
    }

    fn takes(&mut self, events: impl IntoIterator<Item = SourceEvent>) -> String {
        for event in events {
            event.enter(&mut self.model);
            // As a daemon that is quick: each event is programmed before the next one comes.
            let changes: Vec<_> = self.model.take_changes().dirty.into_iter().collect();
            let changes = changes.into_iter().map(|name| match self.model.service(&name) {
                Some(view) => Change::Apply(plan(&view)),
                None => Change::Delete(name),
            });
            self.world.reconciler.reconcile(changes);
            if self.model.is_synced() {
                self.world.reconciler.synced();
            }
        }
        assert_eq!(self.world.problems(), [""; 0]);
        self.frontends()
    }

    fn frontends(&self) -> String {
        let mut text = String::new();
        for line in self.world.meaning() {
            let mut words = line.split_whitespace();
            if words.next() != Some("frontend") {
                continue;
            }
            let (at, name) = (words.next().expect("an address"), words.next().expect("a name"));
            write!(text, "{at} {name}").expect("a string takes all");
            for backend in words.skip(2) {
                write!(text, " {backend}").expect("a string takes all");
            }
            text.push('\n');
        }
        text
    }

    fn rejections(&self) -> Vec<String> {
        self.model.rejections().map(|rejection| rejection.to_string()).collect()
    }
}

/// A service of namespace `shop`, created at that second; `spec` without braces.
fn service(name: &str, created: u32, spec: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\n\
         metadata: {{name: {name}, namespace: shop, creationTimestamp: '2026-01-01T00:00:{created:02}Z'}}\n\
         spec: {{{spec}}}\n"
    )
}

/// A slice of a service; `more` are fields of the object.
fn slice(name: &str, service: &str, family: &str, more: &str) -> String {
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: {family}\n\
         metadata: {{name: {name}, namespace: shop, labels: {{kubernetes.io/service-name: {service}}}}}\n{more}\n"
    )
}

/// A slice with port 8080 and one ready pod.
fn pod(service: &str, address: &str) -> String {
    let more = format!("ports: [{{port: 8080}}]\nendpoints: [{{addresses: ['{address}']}}]");
    slice(&format!("{service}-1"), service, "IPv4", &more)
}

const IP: &str = "clusterIP: 10.96.0.1, ports: [{port: 80}]";

#[test]
fn a_cluster_ip_goes_over_to_another_service() {
    let (web, app) = (service("web", 1, IP), service("app", 2, IP));
    let pods = [pod("web", "10.1.0.1"), pod("app", "10.1.0.2")].concat();
    let (webs, apps) =
        ("10.96.0.1:80/TCP shop/web//TCP 10.1.0.1:8080\n", "10.96.0.1:80/TCP shop/app//TCP 10.1.0.2:8080\n");
    // The watch has missed all of it.
    let mut node = Node::new();
    assert_eq!(node.sees(&[web.as_str(), &pods].concat()), webs);
    assert_eq!(node.sees(&[app.as_str(), &pods].concat()), apps);
    // The new service is heard of before the old one's end: the older one has the address.
    let mut node = Node::new();
    assert_eq!(node.sees(&[web.as_str(), &pods].concat()), webs);
    assert_eq!(node.hears(&app), webs);
    assert_eq!(node.rejections().len(), 1, "{:?}", node.rejections());
    assert_eq!(node.sees(&[app.as_str(), &pods].concat()), apps);
    assert_eq!(node.rejections(), [""; 0]);
}

#[test]
fn a_service_of_the_same_name_is_another_one() {
    let (web, pods) = (service("web", 1, IP), pod("web", "10.1.0.1"));
    let mut node = Node::new();
    node.sees(&[web.as_str(), &pods].concat());
    let first = node.world.service_ids();
    assert_eq!(node.sees(&pods), "", "its slice is left");
    let again = service("web", 9, &IP.replace("10.96.0.1", "10.96.0.2"));
    assert_eq!(node.hears(&again), "10.96.0.2:80/TCP shop/web//TCP 10.1.0.1:8080\n");
    let second = node.world.service_ids();
    assert!(first.keys().eq(second.keys()));
    assert!(first.values().ne(second.values()), "no client of the first one has affinity to the second");
}

#[test]
fn a_service_that_is_for_others_or_for_nobody_goes_and_comes_back() {
    let pods = pod("web", "10.1.0.1");
    let served = service("web", 1, IP);
    let mut node = Node::new();
    for other in [
        service("web", 1, "type: ExternalName, externalName: example.com"),
        service("web", 1, "clusterIP: None, ports: [{port: 80}]"),
        served.replace("name: web,", "name: web, labels: {service.kubernetes.io/service-proxy-name: other},"),
        served.replace("name: web,", "name: web, labels: {service.kubernetes.io/headless: ''},"),
    ] {
        let serves = "10.96.0.1:80/TCP shop/web//TCP 10.1.0.1:8080\n";
        assert_eq!(node.sees(&[served.as_str(), &pods].concat()), serves);
        assert_eq!(node.sees(&[other.as_str(), &pods].concat()), "", "{other}");
    }
    assert_eq!(node.rejections(), [""; 0]);
}

#[test]
fn a_service_without_selector_leads_to_what_people_say() {
    // Without pods, nodes and conditions: a slice as people write it.
    let slice = slice(
        "mine",
        "web",
        "IPv4",
        "ports: [{name: '', port: 5432, protocol: TCP}]\nendpoints: [{addresses: [192.168.1.5]}, {addresses: [192.168.1.6]}]",
    );
    let mut node = Node::new();
    let led = node.sees(&[service("web", 1, IP), slice].concat());
    assert_eq!(led, "10.96.0.1:80/TCP shop/web//TCP 192.168.1.5:5432 192.168.1.6:5432\n");
}

#[test]
fn ports_are_those_of_each_slice() {
    let spec = "clusterIP: 10.96.0.1, ports: [{name: http, port: 80, targetPort: web}, {name: dns, port: 53, protocol: UDP}, \
                {name: dns-tcp, port: 53}, {name: old, port: 7, protocol: SCTP}]";
    let old = "ports: [{name: http, port: 8080}, {name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53}, \
               {name: old, port: 7, protocol: SCTP}]\nendpoints: [{addresses: [10.1.0.1]}]";
    // A rolling update has moved the named port, and this pod has no DNS.
    let new = "ports: [{name: http, port: 9090}]\nendpoints: [{addresses: [10.1.0.2]}]";
    let mut node = Node::new();
    let led =
        node.sees(&[service("web", 1, spec), slice("a", "web", "IPv4", old), slice("b", "web", "IPv4", new)].concat());
    assert_eq!(
        led,
        "10.96.0.1:53/TCP shop/web/dns-tcp/TCP 10.1.0.1:53\n\
         10.96.0.1:53/UDP shop/web/dns/UDP 10.1.0.1:53\n\
         10.96.0.1:80/TCP shop/web/http/TCP 10.1.0.1:8080 10.1.0.2:9090\n"
    );
    assert_eq!(
        node.rejections(),
        [
            "Service shop/web: spec.ports[3].protocol: SCTP is not supported: TCP and UDP are",
            "EndpointSlice shop/a: ports[3].protocol: SCTP is not supported: TCP and UDP are",
        ]
    );
}

#[test]
fn both_families_in_either_order_and_slices_of_other_types() {
    let pods = [
        pod("web", "10.1.0.1"),
        slice("web-6", "web", "IPv6", "ports: [{port: 8080}]\nendpoints: [{addresses: ['fd01::1']}]"),
        slice("web-n", "web", "FQDN", "ports: [{port: 8080}]\nendpoints: [{addresses: [example.com]}]"),
    ]
    .concat();
    let (four, six) =
        ("10.96.0.1:80/TCP shop/web//TCP 10.1.0.1:8080\n", "fd00::1:80/TCP shop/web//TCP [fd01::1]:8080\n");
    let mut node = Node::new();
    for (ips, led) in [
        ("[10.96.0.1, 'fd00::1']", [four, six].concat()),
        ("['fd00::1', 10.96.0.1]", [four, six].concat()),
        ("[10.96.0.1]", four.to_owned()),
        ("['fd00::1']", six.to_owned()),
    ] {
        let spec = format!("clusterIPs: {ips}, ports: [{{port: 80}}]");
        assert_eq!(node.sees(&[service("web", 1, &spec), pods.clone()].concat()), led, "{ips}");
    }
}

#[test]
fn addresses_that_are_not_ready_are_published() {
    // The controller says that they are ready; the pod's own state is in the other conditions.
    let conditions = "{ready: true, serving: false, terminating: true}";
    let more = format!("ports: [{{port: 8080}}]\nendpoints: [{{addresses: [10.1.0.1], conditions: {conditions}}}]");
    let spec = format!("{IP}, publishNotReadyAddresses: true");
    let mut node = Node::new();
    let led = node.sees(&[service("web", 1, &spec), slice("a", "web", "IPv4", &more)].concat());
    assert_eq!(led, "10.96.0.1:80/TCP shop/web//TCP 10.1.0.1:8080\n");
}

#[test]
fn a_local_service_follows_its_nodes_endpoints_over_a_rolling_update() {
    let endpoint = |last: u8, node: &str, conditions: &str| {
        format!("{{addresses: [10.1.0.{last}], nodeName: {node}, conditions: {{{conditions}}}}}")
    };
    let spec = format!("{IP}, internalTrafficPolicy: Local");
    let of = |endpoints: &[String]| {
        let more = format!("ports: [{{port: 8080}}]\nendpoints: [{}]", endpoints.join(", "));
        [service("web", 1, &spec), slice("a", "web", "IPv4", &more)].concat()
    };
    let there = endpoint(9, "there", "");
    let draining = "ready: false, serving: true, terminating: true";
    let mut node = Node::new();
    let led = "10.96.0.1:80/TCP shop/web//TCP";
    for (here, expected) in [
        (vec![endpoint(1, "here", "")], " 10.1.0.1:8080"),
        (vec![endpoint(1, "here", draining), endpoint(2, "here", "ready: false")], " 10.1.0.1:8080"),
        (vec![endpoint(1, "here", draining), endpoint(2, "here", "")], " 10.1.0.2:8080"),
        (vec![], ""),
    ] {
        let endpoints: Vec<_> = here.into_iter().chain([there.clone()]).collect();
        assert_eq!(node.sees(&of(&endpoints)), format!("{led}{expected}\n"));
    }
    let others = |node: &Node| {
        let frontends = node.world.memory.v4.frontends.entries().expect("a map");
        frontends.iter().map(|(_, value)| value.has_others()).collect::<Vec<_>>()
    };
    assert_eq!(others(&node), [true], "dropped, not refused");
    node.sees(&of(&[]));
    assert_eq!(others(&node), [false], "refused: there is none anywhere");
}

/// By port: the service port that affinity goes by, and the id of each pod. Ids that are not to be seen are left out.
fn affinities(node: &Node) -> Vec<(u16, u32, Vec<u32>)> {
    let family = &node.world.memory.v4;
    let backends = family.backends.entries().expect("a map");
    let frontends = family.frontends.entries().expect("a map").into_iter().map(|(key, value)| {
        let of_port = backends.iter().filter(|(key, _)| key.service == value.service);
        let mut pods: Vec<_> = of_port.map(|(key, row)| (row.addr, key.backend.id)).collect();
        pods.sort_unstable();
        (key.port.get(), value.affinity.id, pods.into_iter().map(|(_, id)| id).collect())
    });
    frontends.collect()
}

#[test]
fn ports_that_share_affinity_have_the_same_ids_for_the_same_pods() {
    const PORTS: &str = "{name: a, port: 80}, {name: b, port: 81}";
    let web = |scope: &str, ports: &str| {
        let spec = format!("clusterIP: 10.96.0.1, sessionAffinity: ClientIP, ports: [{ports}]");
        let annotation = format!("name: web, annotations: {{affinity.dev/session-affinity-scope: {scope}}},");
        service("web", 1, &spec).replace("name: web,", &annotation)
    };
    let pods = |pods: &str| {
        let pods: Vec<_> = pods.split(' ').map(|pod| format!("{{addresses: [10.1.0.{pod}]}}")).collect();
        let ports = "[{name: a, port: 8080}, {name: b, port: 8081}, {name: c, port: 8082}]";
        slice("web-1", "web", "IPv4", &format!("ports: {ports}\nendpoints: [{}]", pods.join(", ")))
    };
    let mut node = Node::new();
    node.sees(&[web("port", PORTS), pods("1 2")].concat());
    assert_eq!(affinities(&node), [(80, 1, vec![1, 2]), (81, 2, vec![3, 4])]);
    // One port after the other comes to have the ids of the first.
    node.sees(&[web("service", PORTS), pods("1 2")].concat());
    assert_eq!(affinities(&node), [(80, 1, vec![1, 2]), (81, 1, vec![1, 2])]);
    let three = format!("{PORTS}, {{name: c, port: 82}}");
    node.sees(&[web("service", &three), pods("1 2 3")].concat());
    assert_eq!(affinities(&node), [(80, 1, vec![1, 2, 5]), (81, 1, vec![1, 2, 5]), (82, 1, vec![1, 2, 5])]);
    // Another daemon takes over, and nothing is written.
    let before = node.world.meaning();
    node.world.restart();
    node.model = Model::new("here");
    node.world.written();
    node.sees(&[web("service", &three), pods("1 2 3")].concat());
    assert_eq!(node.world.written(), [""; 0]);
    assert_eq!(node.world.meaning(), before);
    // The port that gave its name goes; a pod too.
    node.sees(&[web("service", "{name: b, port: 81}, {name: c, port: 82}"), pods("2 3")].concat());
    assert_eq!(affinities(&node), [(81, 2, vec![2, 5]), (82, 2, vec![2, 5])]);
    // Each for itself again; what was chosen together is of no use.
    node.sees(&[web("port", "{name: b, port: 81}, {name: c, port: 82}"), pods("2 3 4")].concat());
    let apart = affinities(&node);
    assert_eq!((apart[0].1, apart[1].1), (2, 3));
    assert_ne!(apart[0].2[2], apart[1].2[2], "a new pod has an id for each port");
}

#[test]
fn what_is_wrong_is_named_and_the_rest_is_served() {
    let broken = [
        service("no-ports", 1, "clusterIP: 10.96.0.2"),
        service("port-0", 1, "clusterIP: 10.96.0.3, ports: [{port: 0}]"),
        service("no-ip", 1, "clusterIP: 10.96.0.300, ports: [{port: 80}]"),
        "---\napiVersion: v1\nkind: Service\nmetadata: {name: no-spec, namespace: shop}\n".to_owned(),
        pod("nobodys", "10.1.0.7"),
        service("lonely", 1, "clusterIP: 10.96.0.4, ports: [{port: 80}]"),
        slice("a", "web", "IPv4", "ports: [{port: 0}]\nendpoints: [{addresses: [10.1.0.8]}]"),
        slice("b", "web", "IPv4", "ports: null\nendpoints: [{addresses: [10.1.0.8]}]"),
        slice("c", "web", "IPv4", "ports: [{port: 8080}]\nendpoints: [{addresses: [10.1.0]}, {addresses: [10.1.0.2]}]"),
    ];
    let mut node = Node::new();
    let led = node.sees(&[broken.concat(), service("web", 1, IP), pod("web", "10.1.0.1")].concat());
    assert_eq!(led, "10.96.0.1:80/TCP shop/web//TCP 10.1.0.1:8080 10.1.0.2:8080\n10.96.0.4:80/TCP shop/lonely//TCP\n");
    assert_eq!(
        node.rejections(),
        [
            "Service shop/no-ip: spec.clusterIP: \"10.96.0.300\" is no IP address",
            "Service shop/no-ports: spec.ports: is missing",
            "Service shop/no-spec: spec.clusterIPs: is missing",
            "Service shop/no-spec: spec.ports: is missing",
            "Service shop/port-0: spec.ports[0].port: 0 is no port: 1..=65535",
            "EndpointSlice shop/a: ports[0].port: 0 is no port: 1..=65535",
            "EndpointSlice shop/c: endpoints[0].addresses[0]: \"10.1.0\" is no IP address",
        ]
    );
}

#[test]
fn ten_thousand_endpoints_in_a_hundred_slices_are_one_service() {
    let sizes = Sizes { backends: 16_384, slots: 65_536, ..SIZES };
    let mut node = Node { model: Model::new("here"), world: World::unwatched(&sizes) };
    let mut yaml = service("web", 1, IP);
    for n in 0..100 {
        let mut more = "ports: [{port: 8080}]\nendpoints:\n".to_owned();
        for i in 0..100 {
            writeln!(more, "- {{addresses: [10.1.{n}.{i}]}}").expect("a string takes all");
        }
        yaml += &slice(&format!("web-{n}"), "web", "IPv4", &more);
    }
    let led = node.sees(&yaml);
    assert_eq!(led.split_whitespace().count(), 2 + 10_000);
    assert_eq!(node.world.memory.v4.backends.len().expect("a map"), 10_000);
    // One of them goes, and nothing else is written than what that takes.
    let before = node.world.reconciler.counts();
    let led = node.sees(&yaml.replace("- {addresses: [10.1.7.7]}\n", ""));
    assert_eq!(led.split_whitespace().count(), 2 + 9_999);
    let after = node.world.reconciler.counts();
    assert!(after.written - before.written <= 10_002, "its slots and its frontend");
    assert!(after.removed - before.removed <= 3, "its entry, name and counter");
}
