//! Plans as text, from YAML.

use proptest::prelude::*;

use super::*;
use crate::{model::Model, sources::list_of};

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
            plans[0].ports[0].v4.backends.iter().map(|b| if b.eligible { '+' } else { '-' }).collect();
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
        plans(&[service, slice("a", HTTP, &pods)].concat())[0].ports[0].slots::<V4>()
    };
    assert_eq!(slots("sessionAffinity: None"), [0, 2]);
    let table = slots("sessionAffinity: ClientIP");
    assert_eq!(table.len(), 251);
    assert!(table.iter().all(|&backend| backend == 0 || backend == 2));
    assert!(plans(SERVICE)[0].ports[0].slots::<V4>().is_empty());
    assert!(plans(SERVICE)[0].ports[0].slots::<V6>().is_empty());
}

#[test]
fn the_seed_is_fnv_1a() {
    // The published test vectors need the bare hash: "a" is 0xe40c292c, "foobar" 0xbf9cf968.
    assert_eq!(fnv1a("a".bytes()), 0xe40c_292c);
    assert_eq!(fnv1a("foobar".bytes()), 0xbf9c_f968);
}

proptest! {
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
        prop_assert_eq!(one[0].ports[0].slots::<V4>(), two[0].ports[0].slots::<V4>());
        prop_assert_eq!(one[0].ports[0].v4.backends.len(), pods.len());
    }
}
