//! kube-proxy's own table for `CategorizeEndpoints` (`pkg/proxy/topology_test.go` of Kubernetes 1.37), but for the row
//! about a feature gate that is off.

use std::sync::Arc;

use affinity_common::family::V4;

use super::*;
use crate::model::{Hints, ObjectName, TargetPort};

struct Case {
    name: &'static str,
    node: &'static str,
    zone: Option<&'static str>,
    /// The last octet of the address, then words: `ready`, `draining` (serving and terminating) or neither; `local`;
    /// `zone=a,b`; `node=a`.
    endpoints: &'static [&'static str],
    /// The last octets of those that are used by the policy Cluster; `None` where the service does not use it.
    cluster: Option<&'static [u8]>,
    /// The same of Local.
    local: Option<&'static [u8]>,
}

const IN_A: Case = Case { name: "", node: "here", zone: Some("zone-a"), endpoints: &[], cluster: None, local: None };
const NO_ZONE: Case = Case { zone: None, ..IN_A };

const HINTED: &[&str] = &["3 ready zone=zone-a", "4 ready zone=zone-b", "5 ready zone=zone-c", "6 ready zone=zone-a"];
const HALF_LOCAL: &[&str] =
    &["3 ready zone=zone-a local", "4 ready zone=zone-b local", "5 ready zone=zone-c", "6 ready zone=zone-a"];
const FOR_NODES: &[&str] = &[
    "3 ready zone=zone-a node=node-1",
    "4 ready zone=zone-b node=node-2",
    "5 ready zone=zone-c node=node-3",
    "6 ready zone=zone-a node=node-4",
];
const FOR_ZONE_A: &[&str] = &["3 ready zone=zone-a"];
const REMOTE: &[&str] = &["0 ready", "1 ready"];
const ONE_LOCAL: &[&str] = &["0 ready local", "1 ready"];
const REMOTE_DRAINING: &[&str] = &["0 draining", "1 draining"];

const CASES: &[Case] = &[
    Case {
        name: "all endpoints have hints, and there are some for the zone",
        endpoints: HINTED,
        cluster: Some(&[3, 6]),
        ..IN_A
    },
    Case {
        name: "externalTrafficPolicy: Local, topology ignored for Local endpoints",
        endpoints: HALF_LOCAL,
        cluster: Some(&[3, 6]),
        local: Some(&[3, 4]),
        ..IN_A
    },
    Case { name: "no node labels", endpoints: FOR_ZONE_A, cluster: Some(&[3]), ..NO_ZONE },
    Case { name: "empty zone label", zone: Some(""), endpoints: FOR_ZONE_A, cluster: Some(&[3]), ..IN_A },
    Case { name: "node in another zone", zone: Some("zone-b"), endpoints: FOR_ZONE_A, cluster: Some(&[3]), ..IN_A },
    Case {
        name: "unready endpoint",
        endpoints: &["3 ready zone=zone-a", "4 ready zone=zone-b", "5 ready zone=zone-c", "6 zone=zone-a"],
        cluster: Some(&[3]),
        ..IN_A
    },
    Case {
        name: "only unready endpoints in the zone",
        endpoints: &["3 zone=zone-a", "4 ready zone=zone-b", "5 ready zone=zone-c", "6 zone=zone-a"],
        cluster: Some(&[4, 5]),
        ..IN_A
    },
    Case {
        name: "a ready endpoint without hints",
        endpoints: &["3 ready zone=zone-a", "4 ready zone=zone-b", "5 ready", "6 ready zone=zone-a"],
        cluster: Some(&[3, 4, 5, 6]),
        ..IN_A
    },
    Case {
        name: "several hints for an endpoint",
        zone: Some("zone-c"),
        endpoints: &[
            "3 ready zone=zone-a,zone-b,zone-c",
            "4 ready zone=zone-b,zone-c",
            "5 ready zone=zone-b,zone-d",
            "6 ready zone=zone-c",
        ],
        cluster: Some(&[3, 4, 6]),
        ..IN_A
    },
    Case { name: "PreferSameNode", node: "node-1", endpoints: FOR_NODES, cluster: Some(&[3]), ..IN_A },
    Case {
        name: "PreferSameNode is ignored if some endpoints have no hints",
        node: "node-1",
        endpoints: &[
            "3 ready zone=zone-a node=node-1",
            "4 ready",
            "5 ready zone=zone-c node=node-3",
            "6 ready zone=zone-a node=node-4",
        ],
        cluster: Some(&[3, 4, 5, 6]),
        ..IN_A
    },
    Case {
        name: "PreferSameNode falls back to the zone if there is no endpoint for the node",
        node: "node-0",
        endpoints: FOR_NODES,
        cluster: Some(&[3, 6]),
        ..IN_A
    },
    Case {
        name: "topology and localness differ",
        endpoints: &[
            "0 ready zone=zone-a local",
            "1 ready zone=zone-b local",
            "2 ready zone=zone-a",
            "3 ready zone=zone-b",
        ],
        cluster: Some(&[0, 2]),
        local: Some(&[0, 1]),
        ..IN_A
    },
    Case { name: "Local, no endpoints", local: Some(&[]), ..NO_ZONE },
    Case { name: "Local, all endpoints are remote", endpoints: REMOTE, local: Some(&[]), ..NO_ZONE },
    Case {
        name: "Local, all endpoints are local",
        endpoints: &["0 ready local", "1 ready local"],
        local: Some(&[0, 1]),
        ..NO_ZONE
    },
    Case {
        name: "Local, some endpoints are local",
        endpoints: ONE_LOCAL,
        cluster: Some(&[0, 1]),
        local: Some(&[0]),
        ..NO_ZONE
    },
    Case { name: "Cluster, none is ready", endpoints: &["0", "1"], cluster: Some(&[]), ..NO_ZONE },
    Case { name: "Cluster, one is ready", endpoints: &["0", "1 ready"], cluster: Some(&[1]), ..NO_ZONE },
    Case {
        name: "Cluster, all terminate",
        endpoints: &["0 draining local", "1 draining"],
        cluster: Some(&[0, 1]),
        ..NO_ZONE
    },
    Case {
        name: "both policies, all endpoints are remote",
        endpoints: REMOTE,
        cluster: Some(&[0, 1]),
        local: Some(&[]),
        ..NO_ZONE
    },
    Case {
        name: "both policies, all endpoints are remote and terminate",
        endpoints: REMOTE_DRAINING,
        cluster: Some(&[0, 1]),
        local: Some(&[]),
        ..NO_ZONE
    },
    Case {
        name: "each policy falls back to terminating endpoints on its own",
        endpoints: &["0 ready", "1 local", "2 draining local", "3 draining"],
        cluster: Some(&[0]),
        local: Some(&[2]),
        ..NO_ZONE
    },
    Case { name: "neither ready nor serving nor terminating", endpoints: &["0"], cluster: Some(&[]), ..IN_A },
];

fn endpoint(text: &str, here: &str) -> Endpoint {
    let mut words = text.split(' ');
    let last: u8 = words.next().and_then(|word| word.parse().ok()).expect("an octet");
    let (mut hints, mut has_hints) = (Hints::default(), false);
    let mut endpoint = Endpoint {
        address: [10, 1, 2, last].into(),
        ready: false,
        serving: false,
        terminating: false,
        node_name: None,
        hints: None,
        target: None,
    };
    for word in words {
        match word {
            "ready" => (endpoint.ready, endpoint.serving) = (true, true),
            "draining" => (endpoint.serving, endpoint.terminating) = (true, true),
            "local" => endpoint.node_name = Some(here.into()),
            _ => {
                let (kind, names) = word.split_once('=').expect("a hint");
                let names = names.split(',').map(Into::into);
                let hinted = if kind == "zone" { &mut hints.zones } else { &mut hints.nodes };
                hinted.extend(names);
                has_hints = true;
            }
        }
    }
    endpoint.hints = has_hints.then(|| Arc::new(hints));
    endpoint
}

#[test]
fn endpoints_are_chosen_as_kube_proxy_chooses_them() {
    for Case { name, node, zone, endpoints, cluster, local } in CASES {
        let slice = EndpointSlice {
            name: ObjectName::new("shop", "web-1"),
            service: ObjectName::new("shop", "web"),
            ports: vec![TargetPort { name: "".into(), proto: Proto::TCP, port: Port::new(80) }],
            endpoints: endpoints.iter().map(|text| endpoint(text, node)).collect(),
        };
        for (scope, expected) in [(Scope::Cluster, cluster), (Scope::Local, local)] {
            let Some(expected) = expected else { continue };
            let place = Place { node, zone: *zone };
            let (backends, others) =
                backends::<V4>([&slice].into_iter(), "", Proto::TCP, Scopes::from_iter([scope]), place);
            assert_eq!(backends.len(), endpoints.len(), "{name}: the others keep the flows that they have");
            let used: Vec<u8> =
                backends.iter().filter(|backend| backend.eligible.has(scope)).map(|backend| backend.addr[3]).collect();
            assert_eq!(used, *expected, "{name}, {scope:?}");
            // Of those that nobody may use: whether there are any that answer.
            let answers = slice.endpoints.iter().any(|endpoint| Fitness::of(&endpoint) != Fitness::Unfit);
            assert_eq!(others.has(scope), used.is_empty() && answers, "{name}, {scope:?}");
            // The other scope is not in use.
            let other = if scope == Scope::Local { Scope::Cluster } else { Scope::Local };
            assert!(!others.has(other) && !backends.iter().any(|backend| backend.eligible.has(other)), "{name}");
            // Each is as it is alone where both are in use.
            let both = Scopes { cluster: true, local: true };
            let (together, others_together) = super::backends::<V4>([&slice].into_iter(), "", Proto::TCP, both, place);
            assert!(
                together.iter().zip(&backends).all(|(a, b)| a.eligible.has(scope) == b.eligible.has(scope)),
                "{name}"
            );
            assert_eq!(others_together.has(scope), others.has(scope), "{name}");
        }
    }
}

#[test]
fn a_proxy_without_a_node_has_no_local_endpoints() {
    let mut nameless = endpoint("1 ready", "");
    for node_name in [None, Some("".into()), Some("here".into())] {
        nameless.node_name = node_name;
        assert!(!Place::default().has(&nameless));
    }
    let place = Place { node: "here", zone: None };
    assert!(place.has(&nameless));
    nameless.node_name = None;
    assert!(!place.has(&nameless));
}
