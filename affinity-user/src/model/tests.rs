//! The model: what is dirty, relists, last good states and conflicts.

use super::*;
use crate::sources::{SourceEvent, list_of};

/// A service by name, address and creation second; further fields of its spec go into `more`.
fn service(name: &str, ip: &str, created: u32, more: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\n\
         metadata: {{name: {name}, namespace: shop, creationTimestamp: '2026-01-01T00:00:{created:02}Z'}}\n\
         spec: {{clusterIP: {ip}, ports: [{{port: 80}}]{more}}}\n"
    )
}

fn slice(name: &str, service: &str, address: &str) -> String {
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
         metadata: {{name: {name}, namespace: shop, labels: {{kubernetes.io/service-name: {service}}}}}\n\
         ports: [{{port: 8080}}]\nendpoints: [{{addresses: ['{address}']}}]\n"
    )
}

fn list(model: &mut Model, yaml: &str) -> String {
    for event in list_of(yaml) {
        event.enter(model);
    }
    changes(model)
}

/// Single changes, without a list around them.
fn change(model: &mut Model, yaml: &str) -> String {
    for event in list_of(yaml) {
        if !matches!(event, SourceEvent::Init(_) | SourceEvent::InitDone(_)) {
            event.enter(model);
        }
    }
    changes(model)
}

fn delete(model: &mut Model, kind: Kind, name: &str) -> String {
    model.delete(kind, &ObjectName::new("shop", name));
    changes(model)
}

/// `dirty…`, `- rejection`, `+ accepted`.
fn changes(model: &mut Model) -> String {
    let Changes { dirty, rejected, accepted, .. } = model.take_changes();
    let dirty = dirty.iter().map(|name| format!("{} ", name.name));
    let rejected = rejected.iter().map(|rejection| format!("- {rejection} "));
    let accepted = accepted.iter().map(|subject| format!("+ {subject} "));
    dirty.chain(rejected).chain(accepted).collect::<Vec<_>>().concat().trim_end().to_owned()
}

fn rejections(model: &Model) -> Vec<String> {
    model.rejections().map(|rejection| rejection.to_string()).collect()
}

fn timeout(model: &Model, name: &str) -> Option<SessionAffinity> {
    model.service(&ObjectName::new("shop", name)).map(|view| view.service.session_affinity)
}

fn sticky(seconds: u32) -> SessionAffinity {
    SessionAffinity::ClientIp { timeout: affinity_common::types::Seconds::new(seconds) }
}

const STICKY: &str = ", sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}";
const TOO_STICKY: &str = ", sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 86401}}";

#[test]
fn a_change_makes_its_service_dirty_and_no_other() {
    let mut model = Model::default();
    let (web, api) = (service("web", "10.0.0.1", 1, ""), service("api", "10.0.0.2", 2, ""));
    assert!(!model.is_synced());
    assert_eq!(list(&mut model, &[web.as_str(), &api, &slice("web-1", "web", "10.1.0.1")].concat()), "api web");
    assert!(model.is_synced());
    assert_eq!(change(&mut model, &slice("web-1", "web", "10.1.0.2")), "web");
    assert_eq!(change(&mut model, &slice("web-1", "web", "10.1.0.2")), "", "nothing changed");
    assert_eq!(change(&mut model, &slice("web-2", "web", "10.1.0.3")), "web");
    assert_eq!(change(&mut model, &slice("web-2", "api", "10.1.0.3")), "api web", "the slice went over");
    assert_eq!(change(&mut model, &slice("db-1", "db", "10.1.0.4")), "", "a slice without its service");
    assert_eq!(change(&mut model, &service("db", "10.0.0.3", 3, "")), "db");
    let db = model.service(&ObjectName::new("shop", "db")).map(|view| view.slices().count());
    assert_eq!(db, Some(1), "the slice was there before its service");
    assert_eq!(delete(&mut model, Kind::EndpointSlice, "web-1"), "web");
    assert_eq!(delete(&mut model, Kind::EndpointSlice, "web-1"), "");
    assert_eq!(delete(&mut model, Kind::Service, "api"), "api");
    assert!(model.service(&ObjectName::new("shop", "api")).is_none());
    assert_eq!(delete(&mut model, Kind::EndpointSlice, "web-2"), "", "its service is gone already");
}

fn pod(name: &str, node: &str, address: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{nodeName: {node}}}\n\
         status: {{podIPs: [{{ip: {address}}}]}}\n"
    )
}

#[test]
fn this_node_and_its_pods_are_known_and_no_others() {
    const NODES: &str = "---\napiVersion: v1\nkind: Node\nmetadata: {name: a, labels: {topology.kubernetes.io/zone: z}}\n\
                         ---\napiVersion: v1\nkind: Node\nmetadata: {name: b}\n";
    let pods = |model: &mut Model| {
        let changed = model.take_changes().pods;
        (changed, model.pods().map(|pod| pod.name.name.to_string()).collect::<Vec<_>>().join(" "))
    };
    let mut model = Model::new("a");
    list(&mut model, &[NODES, &pod("one", "a", "10.1.0.1"), &pod("two", "b", "10.1.0.2")].concat());
    assert_eq!(model.node().and_then(|node| node.zone.as_deref()), Some("z"));
    for event in list_of(&[NODES, &pod("one", "a", "10.1.0.1"), &pod("three", "a", "10.1.0.3")].concat()) {
        event.enter(&mut model);
    }
    assert_eq!(pods(&mut model), (true, "one three".to_owned()));
    for event in list_of(&[NODES, &pod("one", "b", "10.1.0.1"), &pod("three", "a", "10.1.0.3")].concat()) {
        event.enter(&mut model);
    }
    assert_eq!(pods(&mut model), (true, "three".to_owned()), "the other went to another node");
    for event in list_of(&pod("three", "a", "10.1.0.3")) {
        event.enter(&mut model);
    }
    assert_eq!(pods(&mut model), (false, "three".to_owned()));
    assert_eq!(model.node(), None);
}

#[test]
fn another_zone_touches_the_services_whose_endpoints_are_meant_for_zones() {
    let node = |labels: &str| format!("---\napiVersion: v1\nkind: Node\nmetadata: {{name: a, labels: {{{labels}}}}}\n");
    let hinted = |name: &str, service: &str, hints: &str| {
        slice(name, service, "10.1.0.1").replace("['10.1.0.1']", &format!("['10.1.0.1'], hints: {{{hints}}}"))
    };
    let objects = [
        service("web", "10.0.0.1", 1, ""),
        service("api", "10.0.0.2", 2, ""),
        service("db", "10.0.0.3", 3, ""),
        hinted("web-1", "web", "forZones: [{name: z}]"),
        hinted("api-1", "api", "forNodes: [{name: a}]"),
        slice("db-1", "db", "10.1.0.3"),
        hinted("orphan-1", "orphan", "forZones: [{name: z}]"),
    ];
    let mut model = Model::new("a");
    list(&mut model, &[&objects.concat(), node("").as_str()].concat());
    assert_eq!(change(&mut model, &node("topology.kubernetes.io/zone: z")), "web");
    assert_eq!(change(&mut model, &node("topology.kubernetes.io/zone: z, other: x")), "");
    assert_eq!(delete_node(&mut model), "web");
    assert_eq!(delete_node(&mut model), "");
}

fn delete_node(model: &mut Model) -> String {
    model.delete(Kind::Node, &ObjectName::new("", "a"));
    changes(model)
}

#[test]
fn what_is_not_essential_is_not_waited_for() {
    let mut model = Model::default();
    for kind in [Kind::Service, Kind::EndpointSlice, Kind::Node] {
        assert!(!model.is_synced());
        model.begin(kind);
        model.finish(kind);
    }
    model.give_up(Kind::Service);
    assert!(!model.is_synced(), "pods may still come");
    model.give_up(Kind::Pod);
    assert!(model.is_synced());
    let mut model = Model::default();
    for kind in Kind::ALL {
        model.give_up(kind);
    }
    assert!(!model.is_synced(), "services are essential");
}

#[test]
fn a_relist_takes_effect_as_a_whole_when_it_is_complete() {
    let mut model = Model::default();
    let [web, api, db] =
        [("web", "10.0.0.1"), ("api", "10.0.0.2"), ("db", "10.0.0.3")].map(|(name, ip)| service(name, ip, 1, ""));
    list(&mut model, &[web.as_str(), &api, &slice("api-1", "api", "10.1.0.1")].concat());

    let mut events = list_of(&[service("web", "10.0.0.9", 1, ""), db].concat());
    events.retain(|event| !matches!(event, SourceEvent::InitDone(_)));
    for event in events {
        event.enter(&mut model);
    }
    assert_eq!(changes(&mut model), "", "the relist is not complete");
    // It breaks, and the next one finds something else.
    assert_eq!(list(&mut model, &web), "api", "db was never there, web is as it was");
    assert_eq!(model.services().count(), 1);
    assert_eq!(list(&mut model, ""), "web");
}

#[test]
fn a_relist_keeps_what_was_rejected_in_it() {
    let mut model = Model::default();
    list(&mut model, &service("web", "10.0.0.1", 1, STICKY));
    let broken = service("web", "10.0.0.1", 1, TOO_STICKY);
    let rejection =
        "Service shop/web: spec.sessionAffinityConfig.clientIP.timeoutSeconds: 86401 is no timeout: 1..=86400";
    assert_eq!(list(&mut model, &broken), format!("- {rejection}"));
    assert_eq!(list(&mut model, &broken), "", "it is told once");
    assert_eq!(timeout(&model, "web"), Some(sticky(60)));
    assert_eq!(list(&mut model, ""), "web + Service shop/web");
    assert_eq!(rejections(&model), [""; 0]);
}

#[test]
fn the_last_good_state_stays_until_there_is_a_better_one() {
    let mut model = Model::default();
    let rejection =
        "Service shop/web: spec.sessionAffinityConfig.clientIP.timeoutSeconds: 86401 is no timeout: 1..=86400";
    assert_eq!(list(&mut model, &service("web", "10.0.0.1", 1, TOO_STICKY)), format!("- {rejection}"));
    assert_eq!(timeout(&model, "web"), None, "there never was a good state");
    assert!(model.is_withheld(&ObjectName::new("shop", "web")), "but an earlier daemon may have known one");
    assert_eq!(change(&mut model, &service("web", "10.0.0.1", 1, STICKY)), "web + Service shop/web");
    assert_eq!(change(&mut model, &service("web", "10.0.0.1", 1, TOO_STICKY)), format!("- {rejection}"));
    assert_eq!(timeout(&model, "web"), Some(sticky(60)));
    assert_eq!(rejections(&model), [rejection]);
    assert_eq!(change(&mut model, &service("web", "10.0.0.1", 1, "")), "web + Service shop/web");
    assert_eq!(timeout(&model, "web"), Some(SessionAffinity::None));
    change(&mut model, &service("web", "10.0.0.1", 1, TOO_STICKY));
    assert_eq!(delete(&mut model, Kind::Service, "web"), "web + Service shop/web");
    assert_eq!(rejections(&model), [""; 0]);
}

#[test]
fn a_service_that_never_was_good_is_saved_as_far_as_it_goes() {
    let ports = |list: &str| service("web", "10.0.0.1", 1, "").replace("[{port: 80}]", list);
    let has = |model: &Model| -> Vec<u16> {
        model.services().flat_map(|view| view.service.ports.iter().map(|port| port.port.get())).collect()
    };
    let mut model = Model::default();
    list(&mut model, &ports("[{name: a, port: 80}, {name: b, port: 0}]"));
    assert_eq!(has(&model), [80]);
    change(&mut model, &ports("[{name: a, port: 81}, {name: b, port: 0}]"));
    assert_eq!(has(&model), [81], "a makeshift is no state to hold on to");
    change(&mut model, &ports("[{name: a, port: 82}, {name: b, port: 443}]"));
    change(&mut model, &ports("[{name: a, port: 83}, {name: b, port: 65536}]"));
    assert_eq!(has(&model), [82, 443], "a good one is");
    change(&mut model, &ports("[{name: a, port: 84}, {name: b, port: 443, protocol: SCTP}]"));
    assert_eq!(has(&model), [84], "SCTP is no mistake: the version counts");
    assert_eq!(
        rejections(&model),
        ["Service shop/web: spec.ports[1].protocol: SCTP is not supported: TCP and UDP are"]
    );
}

#[test]
fn of_two_services_on_one_address_the_older_has_it() {
    let mut model = Model::default();
    let lost = |loser: &str, winner: &str| {
        format!(
            "Service shop/{loser}: spec.ports[0].port: 10.0.0.1:80/TCP belongs to Service shop/{winner}, \
             which is older: change the address or the port of one of them"
        )
    };
    let holder = |model: &Model| -> Vec<String> {
        let frontend = FrontendAddress {
            addr: IpAddr::from([10, 0, 0, 1]),
            port: affinity_common::types::Port::new(80),
            proto: affinity_common::types::Proto::TCP,
        };
        let holds = |view: &ServiceView<'_>| {
            view.service.ports.iter().any(|port| view.frontends(port).any(|held| held.at == frontend))
        };
        model.services().filter(holds).map(|view| view.service.name.name.to_string()).collect()
    };
    list(&mut model, &service("b", "10.0.0.1", 5, ""));
    assert_eq!(change(&mut model, &service("a", "10.0.0.1", 6, "")), format!("a - {}", lost("a", "b")));
    assert_eq!(holder(&model), ["b"]);
    assert_eq!(rejections(&model), [lost("a", "b")]);
    // An older one appears: both of the others have lost to it.
    let changed = change(&mut model, &service("c", "10.0.0.1", 4, ""));
    assert_eq!(changed, format!("b c - {} - {}", lost("b", "c"), lost("a", "c")));
    assert_eq!(holder(&model), ["c"]);
    // The winner goes elsewhere.
    assert_eq!(
        change(&mut model, &service("c", "10.0.0.9", 4, "")),
        format!("b c - {} + Service shop/b", lost("a", "b"))
    );
    assert_eq!(holder(&model), ["b"]);
    assert_eq!(delete(&mut model, Kind::Service, "b"), "a b + Service shop/a");
    assert_eq!(holder(&model), ["a"]);
    assert_eq!(rejections(&model), [""; 0]);
    // Of the same age, the name decides.
    change(&mut model, &service("b", "10.0.0.1", 6, ""));
    assert_eq!(holder(&model), ["a"]);
    // A loser that goes takes its rejection with it.
    assert_eq!(delete(&mut model, Kind::Service, "b"), "b + Service shop/b");
    assert_eq!(rejections(&model), [""; 0]);
}

/// What services are reached by, the cluster IPs' left out.
fn reached(model: &Model) -> Vec<String> {
    let mut lines = Vec::new();
    for view in model.services() {
        for held in view.service.ports.iter().flat_map(|port| view.frontends(port)) {
            if held.kind != FrontendKind::ClusterIp {
                let alone = if held.port_alone { " alone" } else { "" };
                lines.push(format!("{} {} {}{alone}", view.service.name.name, held.at, held.kind));
            }
        }
    }
    lines
}

fn node(addresses: &[&str]) -> String {
    let addresses: Vec<_> = addresses.iter().map(|it| format!("{{type: InternalIP, address: '{it}'}}")).collect();
    format!(
        "---\napiVersion: v1\nkind: Node\nmetadata: {{name: a}}\nstatus: {{addresses: [{}]}}\n",
        addresses.join(", ")
    )
}

fn own(model: &mut Model, addresses: &[&str]) -> String {
    model.set_node_addresses(addresses.iter().map(|it| it.parse().expect("an address")).collect());
    changes(model)
}

const NODE_PORT: &str = ", type: NodePort, ports: [{port: 80, nodePort: 30080}]";

/// The same with other ports than `service` makes.
fn with_ports(name: &str, ip: &str, created: u32, more: &str) -> String {
    service(name, ip, created, more).replacen(", ports: [{port: 80}]", "", 1)
}

#[test]
fn node_ports_are_at_the_nodes_addresses_wherever_those_come_from() {
    let mut model = Model::new("a");
    let web = with_ports("web", "10.0.0.1", 1, NODE_PORT);
    list(&mut model, &[web.as_str(), &service("api", "10.0.0.2", 2, "")].concat());
    assert_eq!(reached(&model), [""; 0], "no Node is known");
    assert_eq!(change(&mut model, &node(&["192.168.0.5", "192.168.0.6", "fd00::5"])), "web");
    // It has no IPv6.
    assert_eq!(reached(&model), ["web 192.168.0.5:30080/TCP NodePort alone"]);
    assert_eq!(own(&mut model, &["192.168.0.5", "192.168.0.7"]), "", "those of the Node count");
    assert_eq!(change(&mut model, &node(&["192.168.0.6"])), "web");
    assert_eq!(reached(&model), ["web 192.168.0.6:30080/TCP NodePort alone"]);

    let mut model = Model::new("a").with_node_port_addresses(vec![NodePortAddresses::All]);
    list(&mut model, &web);
    assert_eq!(own(&mut model, &["192.168.0.5", "127.0.0.1", "169.254.0.1"]), "web");
    assert_eq!(reached(&model), ["web 192.168.0.5:30080/TCP NodePort alone"]);
    assert_eq!(own(&mut model, &["192.168.0.5", "127.0.0.1"]), "");
    assert_eq!(own(&mut model, &[]), "web");
    assert_eq!(reached(&model), [""; 0]);
}

#[test]
fn all_that_services_are_reached_by_can_be_wanted_by_another() {
    let mut model = Model::new("a");
    let lost = |loser: &str, field: &str, at: &str, winner: &str| {
        format!(
            "Service shop/{loser}: {field}: {at} belongs to Service shop/{winner}, which is older: \
             change the address or the port of one of them"
        )
    };
    let ingress = "status: {loadBalancer: {ingress: [{hostname: lb.example}, {ip: 203.0.113.1}]}}\n";
    let objects = [
        node(&["192.168.0.5"]),
        with_ports("a", "10.0.0.1", 1, NODE_PORT),
        service("b", "10.0.0.2", 2, ", externalIPs: [203.0.113.1, 10.0.0.4]"),
        // A node port that is taken, and an address that is.
        with_ports("c", "10.0.0.3", 3, &NODE_PORT.replace("NodePort,", "LoadBalancer,")) + ingress,
        // A cluster IP that an older service has as its external one.
        service("d", "10.0.0.4", 4, ", externalIPs: [192.168.0.5, 203.0.113.1]").replace("port: 80", "port: 30080"),
    ];
    list(&mut model, &objects.concat());
    assert_eq!(
        rejections(&model),
        [
            lost("c", "spec.ports[0].nodePort", "192.168.0.5:30080/TCP", "a"),
            lost("d", "spec.externalIPs[0]", "192.168.0.5:30080/TCP", "a"),
            lost("c", "status.loadBalancer.ingress[1].ip", "203.0.113.1:80/TCP", "b"),
        ]
    );
    assert_eq!(
        reached(&model),
        [
            "a 192.168.0.5:30080/TCP NodePort alone",
            "b 203.0.113.1:80/TCP ExternalIP",
            "b 10.0.0.4:80/TCP ExternalIP",
            "d 203.0.113.1:30080/TCP ExternalIP",
        ]
    );
    // The node's address moves: what was lost for it is settled, and lost anew.
    let moved = change(&mut model, &node(&["192.168.0.6"]));
    assert!(moved.starts_with("a c d ") && moved.contains("+ Service shop/d"), "{moved}");
    assert_eq!(rejections(&model).len(), 2);
    assert!(delete(&mut model, Kind::Service, "a").contains("+ Service shop/c"));
    assert_eq!(rejections(&model), [lost("c", "status.loadBalancer.ingress[1].ip", "203.0.113.1:80/TCP", "b")]);
}

#[test]
fn a_service_that_says_one_thing_twice_contests_nothing() {
    let mut model = Model::new("a");
    let ports = "ports: [{name: a, port: 80, nodePort: 30080}, {name: b, port: 30080}]";
    let twice = with_ports("web", "10.0.0.1", 1, &format!(", type: LoadBalancer, externalIPs: [203.0.113.1], {ports}"))
        + "status: {loadBalancer: {ingress: [{ip: 203.0.113.1}]}}\n";
    list(&mut model, &[twice.as_str(), &node(&["192.168.0.5"])].concat());
    assert_eq!(rejections(&model), [""; 0]);
    assert_eq!(reached(&model).iter().filter(|line| line.contains("203.0.113.1:80/TCP ExternalIP")).count(), 1);
    assert_eq!(reached(&model).iter().filter(|line| line.contains("LoadBalancer")).count(), 0);
    // But two ports that want one.
    let both = twice.replace("externalIPs: [203.0.113.1]", "externalIPs: [192.168.0.5]");
    change(&mut model, &both);
    assert_eq!(
        rejections(&model),
        ["Service shop/web: spec.ports[0].nodePort: 30080/TCP is another port of the service: remove one"]
    );
}

#[test]
fn an_address_that_is_somebody_elses_too_is_the_services_by_its_ports_alone() {
    let mut model = Model::new("a");
    let (one, other) = ("web 10.1.0.9:80/TCP ExternalIP", "web 192.168.0.9:80/TCP ExternalIP");
    let alone = |line: &str| format!("{line} alone");
    let web = service("web", "10.0.0.1", 1, ", externalIPs: [10.1.0.9, 192.168.0.9]");
    list(&mut model, &[web.as_str(), &service("api", "10.0.0.2", 2, ""), &slice("api-1", "api", "10.1.0.1")].concat());
    assert_eq!(reached(&model), [one, other]);
    assert_eq!(change(&mut model, &slice("api-1", "api", "10.1.0.9")), "api web");
    assert_eq!(reached(&model), [alone(one), other.to_owned()]);
    assert_eq!(own(&mut model, &["192.168.0.9"]), "web");
    assert_eq!(reached(&model), [alone(one), alone(other)]);
    assert_eq!(change(&mut model, &slice("api-2", "api", "10.1.0.9")), "api");
    assert_eq!(delete(&mut model, Kind::EndpointSlice, "api-1"), "api");
    assert_eq!(reached(&model), [alone(one), alone(other)], "there is the other slice");
    assert_eq!(delete(&mut model, Kind::EndpointSlice, "api-2"), "api web");
    assert_eq!(own(&mut model, &[]), "web");
    assert_eq!(reached(&model), [one, other]);
}

/// A node's own address, too, is the service's by its ports, as with kube-proxy; but it is told.
#[test]
fn the_nodes_own_address_is_the_services_and_is_told() {
    let told = |model: &Model| model.notices().iter().map(ToString::to_string).collect::<Vec<_>>();
    let notice = |field: &str, addr: &str| {
        format!(
            "Service shop/web: {field}: {addr} is the node's own address: there the service's ports are the service's, and \
             no process of the node is reached by them"
        )
    };
    let mut model = Model::new("a");
    // It has no IPv6.
    let web =
        service("web", "10.0.0.1", 1, ", type: LoadBalancer, externalIPs: [198.51.100.1, 192.168.0.5, 'fd00::5']")
            + "status: {loadBalancer: {ingress: [{hostname: lb.example}, {ip: 192.168.0.6}]}}\n";
    list(&mut model, &[web.as_str(), &node(&["192.168.0.5", "fd00::5"])].concat());
    assert_eq!(told(&model), [notice("spec.externalIPs[1]", "192.168.0.5")]);
    own(&mut model, &["192.168.0.6", "192.168.0.5"]);
    assert_eq!(
        told(&model),
        [notice("spec.externalIPs[1]", "192.168.0.5"), notice("status.loadBalancer.ingress[1].ip", "192.168.0.6")]
    );
    assert_eq!(
        reached(&model),
        [
            "web 198.51.100.1:80/TCP ExternalIP",
            "web 192.168.0.5:80/TCP ExternalIP alone",
            "web 192.168.0.6:80/TCP LoadBalancer alone",
        ]
    );
    assert_eq!(rejections(&model), [""; 0]);
    delete_node(&mut model);
    own(&mut model, &[]);
    assert_eq!(told(&model), [""; 0]);
}

#[test]
fn a_pods_own_address_is_no_services() {
    let rejection = |field: &str, addr: &str, pod: &str| {
        format!(
            "Service shop/web: {field}: {addr} is the own address of Pod shop/{pod}, which would no longer be reached there: \
             the service does not get it"
        )
    };
    let (by_list, by_status) = ("web 10.1.0.8:80/TCP ExternalIP", "web 10.1.0.9:80/TCP LoadBalancer");
    let web = service("web", "10.0.0.1", 1, ", type: LoadBalancer, externalIPs: [10.1.0.8]")
        + "status: {loadBalancer: {ingress: [{ip: 10.1.0.9}]}}\n";
    let mut model = Model::new("a");
    let objects = [web.as_str(), &service("api", "10.0.0.2", 2, ""), &pod("one", "a", "10.1.0.8")];
    let first = rejection("spec.externalIPs[0]", "10.1.0.8", "one");
    assert_eq!(list(&mut model, &objects.concat()), format!("api web - {first}"));
    assert_eq!((rejections(&model), reached(&model)), (vec![first.clone()], vec![by_status.to_owned()]));
    let second = rejection("status.loadBalancer.ingress[0].ip", "10.1.0.9", "two");
    assert_eq!(change(&mut model, &pod("two", "a", "10.1.0.9")), format!("web - {second}"));
    assert_eq!(reached(&model), [""; 0]);
    assert_eq!(change(&mut model, &pod("two", "a", "10.1.0.9")), "", "it is told once");
    // Pods that have ended have no address any more, and those in the node's namespace the node's.
    let ended = pod("one", "a", "10.1.0.8").replace("status: {", "status: {phase: Succeeded, ");
    assert_eq!(change(&mut model, &ended), "web", "the other address is still a pod's");
    assert_eq!(reached(&model), [by_list]);
    let of_node = pod("two", "a", "10.1.0.9").replace("nodeName: a", "nodeName: a, hostNetwork: true");
    assert_eq!(change(&mut model, &of_node), "web + Service shop/web");
    assert_eq!((rejections(&model), reached(&model)), (vec![], vec![by_list.to_owned(), by_status.to_owned()]));
    // Another service that comes for a pod's address.
    change(&mut model, &pod("three", "a", "10.1.0.10"));
    let api = service("api", "10.0.0.2", 2, ", externalIPs: [10.1.0.10]");
    let third = rejection("spec.externalIPs[0]", "10.1.0.10", "three").replace("shop/web", "shop/api");
    assert_eq!(change(&mut model, &api), format!("api - {third}"));
    assert_eq!(change(&mut model, &service("api", "10.0.0.2", 2, "")), "api + Service shop/api");
}

#[test]
fn a_clusterip_given_to_another_service_in_one_relist_is_no_conflict() {
    let mut model = Model::default();
    list(&mut model, &service("old", "10.0.0.1", 1, ""));
    assert_eq!(list(&mut model, &service("new", "10.0.0.1", 2, "")), "new old");
    assert_eq!(rejections(&model), [""; 0]);
}

#[test]
fn files_have_rejections_too() {
    let mut model = Model::default();
    let problem = Problem::new("line 3", Fault::Undecodable("no YAML".into()));
    model.report_file(Path::new("/etc/web.yaml"), vec![problem.clone()]);
    model.report_file(Path::new("/etc/web.yaml"), vec![problem]);
    assert_eq!(changes(&mut model), "- /etc/web.yaml: line 3: no YAML");
    assert!(model.is_withheld(&ObjectName::new("shop", "web")), "it may be in that file");
    let rejection = model.rejections().next();
    assert_eq!(
        rejection.and_then(|rejection| serde_json::to_string(&rejection).ok()).as_deref(),
        Some(r#"{"object":"/etc/web.yaml","field":"line 3","message":"no YAML"}"#)
    );
    model.report_file(Path::new("/etc/web.yaml"), vec![]);
    assert_eq!(changes(&mut model), "+ /etc/web.yaml");
    assert!(!model.is_withheld(&ObjectName::new("shop", "web")));
}

#[test]
fn of_what_slices_answer_the_oldest_counts() {
    let mut model = Model::default();
    let answers = |slice_name: &str, address: &str, time: &str| {
        let annotation =
            format!("annotations: {{endpoints.kubernetes.io/last-change-trigger-time: '{time}'}}, namespace");
        slice(slice_name, "web", address).replace("namespace", &annotation)
    };
    let enter = |model: &mut Model, yaml: &str| {
        for event in list_of(yaml) {
            if !matches!(event, SourceEvent::Init(_) | SourceEvent::InitDone(_)) {
                event.enter(model);
            }
        }
    };
    list(&mut model, &[service("web", "10.0.0.1", 1, ""), slice("web-1", "web", "10.1.0.1")].concat());
    let (late, early) = ("2026-01-01T00:00:02Z", "2026-01-01T00:00:01.5Z");
    enter(&mut model, &answers("web-1", "10.1.0.2", late));
    enter(&mut model, &answers("web-2", "10.1.0.3", early));
    enter(&mut model, &answers("web-2", "10.1.0.4", late));
    enter(&mut model, &answers("web-3", "10.1.0.5", "yesterday"));
    let changes = model.take_changes();
    let web = ObjectName::new("shop", "web");
    assert_eq!(changes.triggers, BTreeMap::from([(web, early.parse().expect("a time"))]));
    assert_eq!((changes.unreadable_triggers, changes.rejected.len()), (1, 0));
    // No change, nothing to measure; a slice without its service neither.
    enter(&mut model, &answers("web-1", "10.1.0.2", early));
    enter(&mut model, &answers("db-1", "10.1.0.9", early).replace("service-name: web", "service-name: db"));
    assert_eq!(model.take_changes(), Changes::default());
}
