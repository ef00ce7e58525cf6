//! Objects as YAML, and what becomes of them.

use affinity_common::family::{V4, V6};
use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{
    model::{External, ListedAddress, Node, Pod, SessionAffinity, SourceRanges},
    sources::documents::{Contents, Version},
};

/// What becomes of an object: nothing, or what is kept of it and the problems.
fn outcome(yaml: &str) -> String {
    let contents = Contents::parse(std::path::Path::new("a.yaml"), yaml);
    let problems = |problems: &[Problem]| problems.iter().map(|p| format!(" | {p}")).collect::<Vec<_>>().concat();
    let verdict = |object: bool, replaces: bool| match (object, replaces) {
        (true, true) => "good",
        (true, false) => "makeshift",
        (false, _) => "rejected",
    };
    let objects = contents.objects.iter().map(|object| match object {
        Version::Service(v) => verdict(v.object.is_some(), v.replaces).to_owned() + &problems(&v.problems),
        Version::EndpointSlice(v) => verdict(v.object.is_some(), v.replaces).to_owned() + &problems(&v.problems),
        Version::Node(v) => verdict(v.object.is_some(), v.replaces).to_owned() + &problems(&v.problems),
        Version::Pod(v) => verdict(v.object.is_some(), v.replaces).to_owned() + &problems(&v.problems),
    });
    objects.chain(contents.problems.iter().map(|problem| format!("file | {problem}"))).collect::<Vec<_>>().join("\n")
}

/// A service's metadata and spec, what is expected.
#[test]
fn services() {
    const TIMEOUT: &str = "rejected | spec.sessionAffinityConfig.clientIP.timeoutSeconds";
    const ONE: &str = "clusterIPs: [10.0.0.1], ports: [{port: 80}]";
    let two = |second: &str| format!("clusterIP: 10.0.0.1, ports: [{{name: a, port: 80}}, {second}]");
    let timeout = |value: &str| {
        format!("{ONE}, sessionAffinity: ClientIP, sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {value}}}}}")
    };
    let ips = |ips: &str| format!("clusterIPs: {ips}, ports: [{{port: 80}}]");
    for (metadata, spec, expected) in [
        ("", ONE.to_owned(), "good"),
        // Not for a service proxy, or for another.
        ("", ips("[None]"), ""),
        ("", "clusterIP: None".to_owned(), ""),
        ("", "type: ExternalName, externalName: example.com".to_owned(), ""),
        (", labels: {service.kubernetes.io/service-proxy-name: other}", ONE.to_owned(), ""),
        (", labels: {service.kubernetes.io/headless: ''}", ONE.to_owned(), ""),
        // Addresses.
        ("", ips("[]"), "rejected | spec.clusterIPs: is missing"),
        ("", ips("[10.0.0.256]"), "rejected | spec.clusterIPs: \"10.0.0.256\" is no IP address"),
        ("", ips("[10.0.0.1, x]"), "makeshift | spec.clusterIPs[1]: \"x\" is no IP address"),
        ("", ips("[10.0.0.1, 'fd00::1']"), "good"),
        ("", ips("[10.0.0.1, 10.0.0.1]"), "good"),
        (
            "",
            ips("['::ffff:10.0.0.1']"),
            "rejected | spec.clusterIPs: ::ffff:10.0.0.1 can't be the address of a service or an endpoint",
        ),
        ("", ips("[0.0.0.0]"), "rejected | spec.clusterIPs: 0.0.0.0 can't be the address of a service or an endpoint"),
        // Affinity.
        ("", format!("{ONE}, sessionAffinity: ClientIP"), "good"),
        ("", format!("{ONE}, sessionAffinity: ''"), "good"),
        (
            "",
            format!("{ONE}, sessionAffinity: Cookie"),
            "rejected | spec.sessionAffinity: \"Cookie\" is no session affinity: None or ClientIP",
        ),
        ("", timeout("1"), "good"),
        ("", timeout("86400"), "good"),
        ("", timeout("null"), "good"),
        ("", timeout("0"), &format!("{TIMEOUT}: 0 is no timeout: 1..=86400")),
        ("", timeout("-1"), &format!("{TIMEOUT}: -1 is no timeout: 1..=86400")),
        ("", timeout("86401"), &format!("{TIMEOUT}: 86401 is no timeout: 1..=86400")),
        ("", timeout("3000000000"), &format!("{TIMEOUT}: invalid i32 (a.yaml:1)")),
        (", annotations: {affinity.dev/session-affinity-scope: service}", ONE.to_owned(), "good"),
        (", annotations: {affinity.dev/session-affinity-scope: port}", ONE.to_owned(), "good"),
        (
            ", annotations: {affinity.dev/session-affinity-scope: pod}",
            ONE.to_owned(),
            "good | metadata.annotations[affinity.dev/session-affinity-scope]: \"pod\" is not known: one of port, service",
        ),
        // Traffic policy.
        ("", format!("{ONE}, internalTrafficPolicy: Local"), "good"),
        (
            "",
            format!("{ONE}, internalTrafficPolicy: Here"),
            "rejected | spec.internalTrafficPolicy: \"Here\" is no traffic policy: Cluster or Local",
        ),
        (
            "",
            format!("{ONE}, externalTrafficPolicy: Here"),
            "rejected | spec.externalTrafficPolicy: \"Here\" is no traffic policy: Cluster or Local",
        ),
        // Ports.
        ("", "clusterIP: 10.0.0.1".to_owned(), "rejected | spec.ports: is missing"),
        ("", two("{name: b, port: 0}"), "makeshift | spec.ports[1].port: 0 is no port: 1..=65535"),
        ("", two("{name: b, port: 65536}"), "makeshift | spec.ports[1].port: 65536 is no port: 1..=65535"),
        (
            "",
            two("{name: b, port: 81, protocol: SCTP}"),
            "good | spec.ports[1].protocol: SCTP is not supported: TCP and UDP are",
        ),
        (
            "",
            two("{name: b, port: 81, protocol: tcp}"),
            "makeshift | spec.ports[1].protocol: \"tcp\" is no protocol: TCP and UDP are supported",
        ),
        ("", two("{name: b, port: 80, protocol: UDP}"), "good"),
        (
            "",
            two("{name: b, port: 80}"),
            "makeshift | spec.ports[1].port: 80/TCP is another port of the service: remove one",
        ),
        (
            "",
            two("{name: a, port: 81}"),
            "makeshift | spec.ports[1].name: \"a\" is the name of another TCP port of the service: give each its own",
        ),
    ] {
        assert_service(metadata, &spec, expected);
    }
}

#[track_caller]
fn assert_service(metadata: &str, spec: &str, expected: &str) {
    let yaml = format!(
        "{{apiVersion: v1, kind: Service, metadata: {{name: web, namespace: shop{metadata}}}, spec: {{{spec}}}}}"
    );
    assert_eq!(outcome(&yaml), expected, "{yaml}");
}

/// Of how it is reached from outside, what makes no sense is left out, and the rest goes on.
#[test]
fn faults_of_the_outside() {
    const ONE: &str = "clusterIPs: [10.0.0.1], ports: [{port: 80}]";
    for (spec, expected) in [
        (
            format!("{ONE}, type: Balancer"),
            "good | spec.type: \"Balancer\" is no type of a service: ClusterIP, NodePort, LoadBalancer or ExternalName",
        ),
        (
            format!("{ONE}, externalIPs: [0.0.0.0, x, 127.0.0.1, 224.0.0.1, 192.168.0.1]"),
            "good | spec.externalIPs[0]: 0.0.0.0 can't be the address of a service or an endpoint \
             | spec.externalIPs[1]: \"x\" is no IP address \
             | spec.externalIPs[2]: 127.0.0.1 can't be the address of a service or an endpoint \
             | spec.externalIPs[3]: 224.0.0.1 can't be the address of a service or an endpoint",
        ),
        (
            format!("{ONE}, loadBalancerSourceRanges: [' 10.0.0.0/8 ', 10.0.0.1, 10.0.0.0/33]"),
            "good | spec.loadBalancerSourceRanges[1]: \"10.0.0.1\" is no range of addresses, such as 192.168.0.0/16: \
             nobody is let in by it \
             | spec.loadBalancerSourceRanges[2]: \"10.0.0.0/33\" is no range of addresses, such as 192.168.0.0/16: \
             nobody is let in by it",
        ),
        (
            format!("{ONE}, type: LoadBalancer, healthCheckNodePort: 65536"),
            "good | spec.healthCheckNodePort: 65536 is no port: 1..=65535",
        ),
        (
            "type: NodePort, clusterIP: 10.0.0.1, ports: [{name: a, port: 80, nodePort: 30080}, \
             {name: b, port: 81, nodePort: 30080}, {name: c, port: 82, nodePort: -1}, {name: d, port: 83, nodePort: 0}, \
             {name: a, port: 80, nodePort: 30080, protocol: UDP}]"
                .to_owned(),
            "good | spec.ports[1].nodePort: 30080/TCP is another port of the service: remove one \
             | spec.ports[2].nodePort: -1 is no port: 1..=65535",
        ),
    ] {
        assert_service("", &spec, expected);
    }
}

/// How a service is reached from outside, by its spec and status.
#[test]
fn what_is_said_of_the_outside() {
    const PORT: &str = "ports: [{port: 80, nodePort: 30080}]";
    let external = |spec: &str, status: &str| {
        let yaml = format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: web}}, spec: {{clusterIP: 10.0.0.1, {spec}}}, \
             status: {status}}}"
        );
        let Some(Version::Service(Checked { object: Some(service), problems, .. })) = version(&yaml) else {
            panic!("{yaml}");
        };
        let ports: Vec<_> = service.ports.iter().map(|port| port.node_port.map_or(0, Port::get)).collect();
        (ports, service.external.clone().map(|it| *it), problems.len())
    };
    let none = || Some(External::default());
    assert_eq!(external(PORT, "null"), (vec![0], None, 0), "a ClusterIP has no node port");
    assert_eq!(external(&format!("type: NodePort, {PORT}"), "null"), (vec![30080], none(), 0));
    assert_eq!(external(&format!("type: LoadBalancer, {PORT}"), "null"), (vec![30080], none(), 0));
    // Without node ports and addresses there is nothing.
    let bare = "type: LoadBalancer, allocateLoadBalancerNodePorts: false, ports: [{port: 80}]";
    assert_eq!(external(bare, "{loadBalancer: {}}"), (vec![0], None, 0));

    let listed = |index, addr: &str| ListedAddress { index, addr: addr.parse().expect("an address") };
    let ingress = "{loadBalancer: {ingress: [{hostname: a.example}, {ip: 203.0.113.1}, {ip: 203.0.113.2, ipMode: Proxy}, \
                   {ip: 'fd00::1', ipMode: VIP}, {ip: 203.0.113.1}, {ip: 203.0.113.4, ipMode: Odd}, {ip: ''}]}}";
    let (_, found, problems) = external(bare, ingress);
    let load_balancer_ips = vec![listed(1, "203.0.113.1"), listed(3, "fd00::1")];
    assert_eq!((found, problems), (Some(External { load_balancer_ips, ..External::default() }), 1));

    // Who is let in: all, some, nobody.
    let ranges = |given: &str| {
        let spec = format!("{bare}, externalIPs: [x, 198.51.100.1], loadBalancerSourceRanges: {given}");
        let (_, found, _) = external(&spec, "null");
        let found = found.expect("an address");
        assert_eq!(found.ips, [listed(1, "198.51.100.1")]);
        let SourceRanges { ranges, .. } = &found.source_ranges;
        let restricted = [found.source_ranges.restrict::<V4>(), found.source_ranges.restrict::<V6>()];
        (ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "), restricted)
    };
    let all = || (String::new(), [false; 2]);
    assert_eq!(ranges("null"), all());
    assert_eq!(ranges("[]"), all());
    let sorted = "10.0.0.0/8 192.168.0.0/16 fd00::/8";
    assert_eq!(ranges("['fd00::/8', '\t192.168.7.1/16', 10.0.0.0/8, 10.1.2.3/8]"), (sorted.to_owned(), [true; 2]));
    // Each family by its own ranges.
    assert_eq!(ranges("[10.0.0.0/8]"), ("10.0.0.0/8".to_owned(), [true, false]));
    assert_eq!(ranges("['fd00::/8']"), ("fd00::/8".to_owned(), [false, true]));
    // What makes no sense opens nothing, and the others hold.
    assert_eq!(ranges("[x]"), (String::new(), [true; 2]));
    assert_eq!(ranges("[10.0.0.0/33, 10.0.0.0/8]"), ("10.0.0.0/8".to_owned(), [true; 2]));

    let port = |spec: &str| external(&format!("{spec}, {PORT}, healthCheckNodePort: 32000"), "null").1;
    let asks = |spec: &str| port(spec).expect("a node port").health_check_port;
    assert_eq!(asks("type: LoadBalancer, externalTrafficPolicy: Local"), Some(Port::new(32000)));
    assert_eq!(asks("type: LoadBalancer, externalTrafficPolicy: Cluster"), None);
    assert_eq!(asks("type: NodePort, externalTrafficPolicy: Local"), None);
}

/// A slice's fields, what is expected.
#[test]
fn slices() {
    const LABEL: &str = "labels: {kubernetes.io/service-name: web}";
    for (label, fields, expected) in [
        (LABEL, "addressType: IPv4, endpoints: [{addresses: [10.1.0.1]}]", "good"),
        (LABEL, "addressType: IPv4, endpoints: null", "good"),
        (
            "labels: {kubernetes.io/service-name: web, service.kubernetes.io/headless: ''}",
            "addressType: IPv4, endpoints: []",
            "",
        ),
        (
            "labels: {}",
            "addressType: IPv4, endpoints: []",
            "rejected | metadata.labels[kubernetes.io/service-name]: is missing",
        ),
        (
            LABEL,
            "addressType: FQDN, endpoints: []",
            "rejected | addressType: \"FQDN\" is not supported: IPv4 and IPv6 are",
        ),
        (
            LABEL,
            "addressType: IPv4, endpoints: [{addresses: [x]}, {addresses: ['fd00::1']}, {addresses: []}, \
             {addresses: [10.1.0.1]}]",
            "good | endpoints[0].addresses[0]: \"x\" is no IP address \
             | endpoints[1].addresses[0]: fd00::1 is not of the slice's addressType IPv4 \
             | endpoints[2].addresses: is missing",
        ),
        (
            LABEL,
            "addressType: IPv4, endpoints: [], ports: [{port: 0}, {port: 1, protocol: SCTP}, {}, {port: 8080}]",
            "good | ports[0].port: 0 is no port: 1..=65535 \
             | ports[1].protocol: SCTP is not supported: TCP and UDP are",
        ),
    ] {
        let yaml = format!(
            "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {{name: a, {label}}}, {fields}}}"
        );
        assert_eq!(outcome(&yaml), expected, "{yaml}");
    }
}

/// The one object of a document.
fn version(yaml: &str) -> Option<Version> {
    Contents::parse(std::path::Path::new("a.yaml"), yaml).objects.pop()
}

#[test]
fn nodes() {
    for (labels, zone) in [
        ("{topology.kubernetes.io/zone: zone-a, other: x}", Some("zone-a")),
        ("{topology.kubernetes.io/zone: ''}", None),
        ("{}", None),
        ("null", None),
    ] {
        let yaml = format!("{{apiVersion: v1, kind: Node, metadata: {{name: node-1.example, labels: {labels}}}}}");
        let node = Node { zone: zone.map(Into::into), ..plain_node() };
        assert_eq!(version(&yaml), Some(Version::Node(Checked::good(node))));
    }
}

fn plain_node() -> Node {
    Node { name: ObjectName::new("", "node-1.example"), zone: None, internal_ips: Vec::new(), is_going: false }
}

#[test]
fn nodes_have_addresses_and_are_about_to_go() {
    let node = |metadata: &str, fields: &str| {
        let yaml = format!("{{apiVersion: v1, kind: Node, metadata: {{name: node-1.example{metadata}}}, {fields}}}");
        let Some(Version::Node(version)) = version(&yaml) else { panic!("{yaml}") };
        let problems: Vec<_> = version.problems.iter().map(ToString::to_string).collect();
        (version.object.expect("a node").as_ref().clone(), problems)
    };
    let addresses = "status: {addresses: [{type: Hostname, address: n}, {type: InternalIP, address: 192.168.0.5}, \
                     {type: ExternalIP, address: 203.0.113.5}, {type: InternalIP, address: x}, \
                     {type: InternalIP, address: 'fd00::5'}]}";
    let internal_ips = ["192.168.0.5", "fd00::5"].map(|it| it.parse().expect("an address")).to_vec();
    let (found, problems) = node("", addresses);
    assert_eq!(found, Node { internal_ips, ..plain_node() });
    assert_eq!(problems.len(), 1);
    assert!(problems[0].starts_with("status.addresses[3].address"));

    let taint = |key: &str| format!("spec: {{taints: [{{key: other, effect: NoSchedule}}, {{key: {key}}}]}}");
    assert!(!node("", &taint("node.kubernetes.io/unschedulable")).0.is_going);
    assert!(node("", &taint("ToBeDeletedByClusterAutoscaler")).0.is_going);
    assert!(node(", deletionTimestamp: '2026-01-01T00:00:00Z'", "spec: {}").0.is_going);
}

#[test]
fn pods() {
    const RUNS: &str = "spec: {nodeName: node-1, containers: [{name: a}]}, \
                        status: {phase: Running, podIP: 10.1.0.1, podIPs: [{ip: 10.1.0.1}, {ip: 'fd00::1'}]}";
    const ON: &str = ", annotations: {affinity.dev/socket-lb: 'on'}";
    const OFF: &str = ", annotations: {affinity.dev/socket-lb: 'off'}";
    let pod = |metadata: &str, fields: &str| {
        format!("{{apiVersion: v1, kind: Pod, metadata: {{name: web-0, uid: u-1{metadata}}}, {fields}}}")
    };
    let good = Pod {
        name: ObjectName::new("default", "web-0"),
        uid: "u-1".into(),
        node: "node-1".into(),
        addresses: vec![[10, 1, 0, 1].into(), "fd00::1".parse().expect("an address")],
        host_network: false,
        finished: false,
        socket_lb: None,
    };
    for (yaml, expected) in [
        (pod("", RUNS), good.clone()),
        (pod(ON, RUNS), Pod { socket_lb: Some(true), ..good.clone() }),
        (pod(OFF, RUNS), Pod { socket_lb: Some(false), ..good.clone() }),
        (
            pod("", "spec: {nodeName: node-1, hostNetwork: true}, status: {phase: Succeeded}"),
            Pod { host_network: true, finished: true, addresses: Vec::new(), ..good.clone() },
        ),
        (pod("", "spec: {nodeName: node-1}"), Pod { addresses: Vec::new(), ..good.clone() }),
    ] {
        assert_eq!(version(&yaml), Some(Version::Pod(Checked::good(expected))), "{yaml}");
    }
    for (yaml, expected) in [
        // Not scheduled yet.
        (pod("", "spec: {containers: []}"), ""),
        (pod("", "spec: {nodeName: ''}"), ""),
        (pod("", "status: null"), ""),
        (
            pod(", annotations: {affinity.dev/socket-lb: 'no'}", "spec: {nodeName: node-1}"),
            "good | metadata.annotations[affinity.dev/socket-lb]: \"no\" is not known: one of on, off",
        ),
        (
            pod("", "spec: {nodeName: node-1}, status: {podIPs: [{ip: x}, {}, {ip: 10.1.0.1}]}"),
            "good | status.podIPs[0].ip: \"x\" is no IP address | status.podIPs[1].ip: is missing",
        ),
        (pod("", "spec: {nodeName: [1]}"), "rejected | spec.nodeName"),
    ] {
        let outcome = outcome(&yaml);
        assert!(outcome.starts_with(expected) && (expected.is_empty() == outcome.is_empty()), "{yaml}: {outcome}");
    }
}

#[test]
fn conditions_that_are_not_given_read_as_the_api_says() {
    let read = |conditions| {
        let conditions = Some(conditions);
        let object = discovery::EndpointSlice {
            address_type: "IPv4".into(),
            endpoints: vec![discovery::Endpoint {
                addresses: vec!["10.1.0.1".into()],
                conditions,
                ..discovery::Endpoint::default()
            }],
            ..discovery::EndpointSlice::default()
        };
        let endpoints = slice::endpoints(&object, "IPv4", &mut Faults::default());
        (endpoints[0].ready, endpoints[0].serving, endpoints[0].terminating)
    };
    let given = |ready, serving, terminating| discovery::EndpointConditions { ready, serving, terminating };
    assert_eq!(read(given(None, None, None)), (true, true, false));
    assert_eq!(read(given(Some(false), None, None)), (false, false, false));
    assert_eq!(read(given(Some(false), Some(true), Some(true))), (false, true, true));
    assert_eq!(read(given(None, Some(false), None)), (true, false, false));
}

#[test]
fn names_that_are_none_are_the_files_problem() {
    let long = "x".repeat(64);
    for (metadata, expected) in [
        ("{}", "file | line 1: metadata.name: is missing"),
        ("{name: a/b}", "file | line 1: metadata.name: \"a/b\" is no name"),
        (&format!("{{name: {long}}}"), "rejected | metadata.name: \"xxx"),
        (&format!("{{name: a, namespace: {long}}}"), "file | line 1: metadata.namespace: \"xxx"),
    ] {
        let outcome = outcome(&format!("{{apiVersion: v1, kind: Service, metadata: {metadata}}}"));
        assert!(outcome.starts_with(expected), "{outcome}");
    }
}

fn text() -> impl Strategy<Value = Option<String>> {
    prop::option::of(prop_oneof![
        Just("None".to_owned()),
        Just("ClientIP".to_owned()),
        Just("UDP".to_owned()),
        Just("IPv6".to_owned()),
        Just("fd00::1".to_owned()),
        "10\\.0\\.0\\.[0-9]{1,3}",
        ".{0,4}",
    ])
}

proptest! {
    /// Whatever an object holds: no panic, and what is kept of it is within the bounds that later stages rely on.
    #[test]
    fn nothing_panics(
        ips in prop::option::of(prop::collection::vec(text(), 0..3)),
        affinity in text(),
        timeout in any::<Option<i32>>(),
        ports in prop::option::of(prop::collection::vec((text(), any::<i32>(), text()), 0..4)),
        address_type in text(),
    ) {
        let name = ObjectName::new("shop", "web");
        let ips = ips.map(|ips| ips.into_iter().flatten().collect::<Vec<_>>());
        let client_ip = Some(core::ClientIPConfig { timeout_seconds: timeout });
        let object = core::Service {
            spec: Some(core::ServiceSpec {
                cluster_ips: ips.clone(),
                session_affinity: affinity,
                session_affinity_config: Some(core::SessionAffinityConfig { client_ip }),
                ports: ports.clone().map(|ports| ports.into_iter().map(|(name, port, protocol)| {
                    core::ServicePort { name, port: port >> 15, protocol, ..core::ServicePort::default() }
                }).collect()),
                ..core::ServiceSpec::default()
            }),
            ..core::Service::default()
        };
        if let Some(version) = service(&name, &object) {
            prop_assert!(version.object.is_some() || !version.problems.is_empty());
            if let Some(service) = version.object {
                prop_assert!(!service.cluster_ips.is_empty());
                prop_assert!(service.ports.iter().all(|port| port.port.get() != 0));
                if let SessionAffinity::ClientIp { timeout } = service.session_affinity {
                    prop_assert!((1..=86400).contains(&timeout.secs));
                }
            }
        }
        let object = discovery::EndpointSlice {
            address_type: address_type.unwrap_or_default(),
            endpoints: vec![discovery::Endpoint {
                addresses: ips.unwrap_or_default(),
                ..discovery::Endpoint::default()
            }],
            metadata: ObjectMeta {
                labels: Some([(slice::SERVICE_NAME_LABEL.to_owned(), "web".to_owned())].into()),
                ..ObjectMeta::default()
            },
            ports: ports.map(|ports| ports.into_iter().map(|(name, port, protocol)| {
                discovery::EndpointPort { name, port: Some(port >> 15), protocol, app_protocol: None }
            }).collect()),
        };
        endpoint_slice(&name, &object);
    }
}

/// Objects in which every field is set that is read.
const WHOLE: [&str; 4] = [
    r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a", "namespace": "shop",
        "creationTimestamp": "2026-01-01T00:00:00Z", "labels": {"a": "b"}, "annotations": {"a": "b"}},
        "spec": {"clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1", "fd00::1"],
        "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
        "type": "LoadBalancer", "internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local",
        "externalIPs": ["192.168.0.1"], "loadBalancerSourceRanges": ["10.0.0.0/8"], "healthCheckNodePort": 32000,
        "ports": [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080}]},
        "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1", "ipMode": "VIP"}]}}}"#,
    r#"{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": "a", "namespace": "shop",
        "labels": {"kubernetes.io/service-name": "a"}}, "addressType": "IPv4",
        "ports": [{"name": "http", "port": 80, "protocol": "TCP"}], "endpoints": [{"addresses": ["10.1.0.1"],
        "conditions": {"ready": true, "serving": true, "terminating": false}, "nodeName": "n",
        "hints": {"forZones": [{"name": "z"}], "forNodes": [{"name": "n"}]},
        "targetRef": {"kind": "Pod", "name": "a-0"}}]}"#,
    r#"{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n", "labels": {"topology.kubernetes.io/zone": "z"}},
        "spec": {"podCIDRs": ["10.1.0.0/24"], "taints": [{"key": "a", "effect": "NoSchedule"}]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.168.0.5"}]}}"#,
    r#"{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a-0", "namespace": "shop", "uid": "u",
        "annotations": {"affinity.dev/socket-lb": "off"}}, "spec": {"nodeName": "n", "hostNetwork": false},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.1.0.1"}]}}"#,
];

const SOUND: &str = r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "sound"},
    "spec": {"clusterIP": "10.0.0.9", "ports": [{"port": 80}]}}"#;

/// What may stand where something else should.
fn stray_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        Just(json!([])),
        Just(json!({})),
        Just(json!([null])),
        Just(json!([{}])),
        any::<bool>().prop_map(Value::from),
        prop_oneof![Just(0), Just(-1), Just(65_536), any::<i64>()].prop_map(Value::from),
        prop_oneof![Just(String::new()), Just("None".to_owned()), Just("::".to_owned()), "[ -~]{0,300}"]
            .prop_map(Value::from),
    ]
}

/// The ways (RFC 6901) to all that a value holds.
fn ways(value: &Value) -> Vec<String> {
    let below: Vec<(String, &Value)> = match value {
        Value::Object(fields) => {
            fields.iter().map(|(name, value)| (name.replace('~', "~0").replace('/', "~1"), value)).collect()
        }
        Value::Array(items) => items.iter().enumerate().map(|(i, value)| (i.to_string(), value)).collect(),
        _ => Vec::new(),
    };
    let further =
        below.iter().flat_map(|(name, value)| ways(value).into_iter().map(move |way| format!("/{name}{way}")));
    std::iter::once(String::new()).chain(further).collect()
}

proptest! {
    /// Whatever stands in whichever field: no panic, the object is used as far as it goes or its fault is named, and the
    /// others of the file are none the worse for it.
    #[test]
    fn one_broken_object_is_one_broken_object(
        whole in 0..WHOLE.len(),
        strays in prop::collection::vec((any::<prop::sample::Index>(), stray_value()), 1..4),
    ) {
        let mut object: Value = serde_json::from_str(WHOLE[whole]).expect("JSON");
        for (place, stray) in strays {
            let ways = ways(&object);
            *object.pointer_mut(&ways[place.index(ways.len())]).expect("a way to it") = stray;
        }
        let text = format!("{{\"kind\": \"List\", \"apiVersion\": \"v1\", \"items\": [{object}, {SOUND}]}}");
        for file in ["a.json", "a.yaml"] {
            let contents = Contents::parse(std::path::Path::new(file), &text);
            let Some(Version::Service(sound)) = contents.objects.last() else {
                panic!("{object}: {contents:?}");
            };
            prop_assert_eq!(sound.name.to_string(), "default/sound");
            prop_assert!(sound.object.is_some() && sound.problems.is_empty());
            if let [Version::Service(Checked { object: None, problems, .. }), _] = &contents.objects[..] {
                prop_assert!(!problems.is_empty());
            }
        }
    }
}
