//! Verdicts on a node that is made up.

use super::*;
use crate::sockets::wiring::NodeInterface;

const V4: FamilyName = FamilyName::Ipv4;
const V6: FamilyName = FamilyName::Ipv6;

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn pod(name: &str, addresses: &[&str]) -> PodStatus {
    PodStatus {
        name: format!("default/{name}"),
        uid: format!("uid-{name}"),
        addresses: addresses.iter().map(|text| ip(text)).collect(),
        host_network: false,
        socket_lb: None,
    }
}

/// A namespace with one interface of a kind, known by its addresses.
fn namespace(name: &str, addresses: &[&str], kind: &str, other_end: Option<u32>) -> NamespaceView {
    let addresses: BTreeSet<IpAddr> = addresses.iter().map(|text| ip(text)).collect();
    NamespaceView {
        path: format!("/run/netns/{name}"),
        clients: addresses.iter().map(|ip| (FamilyName::from(*ip), false)).collect(),
        interfaces: vec![Interface {
            name: "eth0".to_owned(),
            addresses: addresses.clone(),
            kind: Some(kind.to_owned()),
            other_end,
            ..Interface::default()
        }],
        sight: Sight { addresses, ..Sight::default() },
    }
}

/// Programs at a cgroup and at veth5; veth6 is there too, and an uplink.
fn node(pods: Vec<PodStatus>, namespaces: Vec<NamespaceView>) -> NodeView {
    let interfaces =
        [(2, "up0", true), (5, "veth5", true), (6, "veth6", true), (7, "other7", true), (8, "veth8", false)];
    let named =
        |(index, name, is_ethernet): (u32, &str, bool)| (index, NodeInterface { name: name.to_owned(), is_ethernet });
    NodeView {
        sockets: true,
        pods: Some(pods),
        pods_are_served: true,
        patterns: Some(Vec::new()),
        own: [(V4, false)].into(),
        namespaces,
        node: Node { interfaces: interfaces.map(named).into(), routes: BTreeMap::new() },
        attached: [(5, Mode::Tcx)].into(),
        ..NodeView::default()
    }
}

fn only_row(view: &NodeView) -> PodRow {
    let rows = view.rows();
    assert_eq!(rows.len(), 1, "{rows:?}");
    rows.into_iter().next().expect("a row")
}

fn wired(view: &NodeView) -> (ServedBy, Option<Why>, Option<Why>) {
    let row = only_row(view);
    (row.served_by, row.socket.why, row.tc.why)
}

#[test]
fn a_pod_that_is_known_and_attached_is_served_by_both() {
    let view = node(vec![pod("a", &["10.0.0.1"])], vec![namespace("a", &["10.0.0.1"], "veth", Some(5))]);
    let row = only_row(&view);
    assert_eq!(row.served_by, ServedBy::Both);
    assert_eq!((row.socket.why, row.tc.why), (None, None));
    assert_eq!(row.pod.as_deref(), Some("default/a"));
    assert_eq!(row.netns.as_deref(), Some("/run/netns/a"));
    assert_eq!(row.interfaces, [NodeEnd { interface: "veth5".to_owned(), ifindex: 5, mode: Some(Mode::Tcx) }]);
}

#[test]
fn what_is_left_to_tc_says_why() {
    let left = |change: fn(&mut NodeView)| {
        let mut namespace = namespace("a", &["10.0.0.1"], "veth", Some(5));
        namespace.clients = [(V4, true)].into();
        let mut view = node(vec![pod("a", &["10.0.0.1"])], vec![namespace]);
        change(&mut view);
        wired(&view)
    };
    assert_eq!(
        left(|view| view.pods.as_mut().expect("pods")[0].socket_lb = Some(false)),
        (ServedBy::Tc, Some(Why::Annotation), None)
    );
    assert_eq!(left(|view| view.pods_are_served = false), (ServedBy::Tc, Some(Why::PodsOff), None));
    let several = |view: &mut NodeView| view.namespaces[0].sight.addresses.extend([ip("10.0.0.9")]);
    assert_eq!(left(several), (ServedBy::Tc, Some(Why::SeveralAddresses { family: V4 }), None));
    assert_eq!(left(|_| {}), (ServedBy::Tc, Some(Why::MayBeAnother), None));
    let unknown = |view: &mut NodeView| view.namespaces[0].clients.clear();
    assert_eq!(left(unknown), (ServedBy::Tc, Some(Why::NamespaceNotKnown { family: V4 }), None));
    assert_eq!(left(|view| view.sockets = false), (ServedBy::Tc, Some(Why::SocketsOff), None));
}

#[test]
fn what_the_maps_hold_goes_before_what_pods_want() {
    // The annotation has just come: its sockets are served still.
    let mut one = pod("a", &["10.0.0.1"]);
    one.socket_lb = Some(false);
    let view = node(vec![one], vec![namespace("a", &["10.0.0.1"], "veth", Some(5))]);
    assert_eq!(wired(&view), (ServedBy::Both, None, None));
}

#[test]
fn a_pod_without_an_end_on_the_node_is_served_by_its_sockets_alone() {
    for kind in ["macvlan", "ipvlan"] {
        let mut namespace = namespace("a", &["10.0.0.1"], kind, None);
        namespace.interfaces[0].part_of = Some(2);
        let row = only_row(&node(vec![pod("a", &["10.0.0.1"])], vec![namespace]));
        assert_eq!(row.served_by, ServedBy::Socket);
        assert_eq!(row.tc.message, Some(format!("its eth0 is {kind} on up0, with no end on the node")));
        assert_eq!(row.interfaces, []);
    }
    let mut namespace = namespace("a", &["10.0.0.1"], "", None);
    namespace.interfaces[0].kind = None;
    namespace.interfaces[0].device = Some("0000:3b:02.1".to_owned());
    let row = only_row(&node(vec![pod("a", &["10.0.0.1"])], vec![namespace]));
    assert_eq!(row.served_by, ServedBy::Socket);
    assert!(row.tc.message.as_deref().is_some_and(|text| text.contains("0000:3b:02.1 (SR-IOV")), "{row:?}");
}

#[test]
fn an_interface_that_is_not_attached_to_says_why() {
    let end = |index, change: fn(&mut NodeView)| {
        let mut namespace = namespace("a", &["10.0.0.1"], "veth", Some(index));
        namespace.clients = [(V4, true)].into();
        let mut one = pod("a", &["10.0.0.1"]);
        one.socket_lb = Some(false);
        let mut view = node(vec![one], vec![namespace]);
        change(&mut view);
        let (served_by, socket, tc) = wired(&view);
        assert_eq!((served_by, socket), (ServedBy::None, Some(Why::Annotation)));
        tc.expect("a reason")
    };
    assert!(matches!(end(7, |_| {}), Why::NoPattern { interface, patterns }
        if interface == "other7" && patterns == crate::loader::interfaces::DEFAULT_PATTERNS));
    assert_eq!(end(8, |_| {}), Why::NoEthernet { interface: "veth8".to_owned() });
    assert_eq!(end(6, |_| {}), Why::NotAttached { interface: "veth6".to_owned() });
    let failed = |view: &mut NodeView| view.failed.extend([("veth6".to_owned(), "no room".to_owned())]);
    assert_eq!(end(6, failed), Why::Failed { interface: "veth6".to_owned(), error: "no room".to_owned() });
    // Without a daemon nobody knows the patterns.
    assert_eq!(end(7, |view| view.patterns = None), Why::NotAttached { interface: "other7".to_owned() });
}

#[test]
fn families_and_interfaces_of_which_some_are_served_say_so_of_the_others() {
    let addresses = ["10.0.0.1", "fd00::1", "fd00::2"];
    let mut namespace = namespace("a", &addresses, "veth", Some(5));
    namespace.clients.insert(V6, true);
    namespace.interfaces.push(Interface {
        name: "net1".to_owned(),
        addresses: [ip("fd00::2")].into(),
        kind: Some("macvlan".to_owned()),
        ..Interface::default()
    });
    let view = node(vec![pod("a", &addresses)], vec![namespace]);
    let (served_by, socket, tc) = wired(&view);
    assert_eq!((served_by, socket), (ServedBy::Both, Some(Why::SeveralAddresses { family: V6 })));
    assert!(matches!(tc, Some(Why::NoEnd { interface, .. }) if interface == "net1"));
    // A further interface that the pod's status does not know is none of its ways to services.
    let view = node(vec![pod("a", &["10.0.0.1"])], view.namespaces);
    assert_eq!(wired(&view), (ServedBy::Both, None, None));
}

#[test]
fn pods_of_the_nodes_namespace_have_the_nodes_sockets() {
    let mut one = pod("a", &["198.51.100.1"]);
    one.host_network = true;
    let view = node(vec![one], Vec::new());
    assert_eq!(wired(&view), (ServedBy::Socket, None, Some(Why::HostNetwork)));
    let view = NodeView { sockets: false, ..view };
    assert_eq!(wired(&view), (ServedBy::None, Some(Why::SocketsOff), Some(Why::HostNetwork)));
}

#[test]
fn a_pod_whose_namespace_is_not_seen_is_found_by_a_route_to_it() {
    let mut view = node(vec![pod("a", &["10.0.0.1"])], Vec::new());
    assert_eq!(wired(&view), (ServedBy::None, Some(Why::NamespaceNotSeen), Some(Why::NamespaceNotSeen)));
    view.node.routes = [(ip("10.0.0.1"), 5)].into();
    assert_eq!(wired(&view), (ServedBy::Tc, Some(Why::NamespaceNotSeen), None));
    let view = node(vec![pod("a", &[])], Vec::new());
    assert_eq!(wired(&view), (ServedBy::None, Some(Why::NoAddress), Some(Why::NoAddress)));
}

#[test]
fn a_namespace_is_whose_address_it_has_and_else_whose_process_is_in_it() {
    let mut young = namespace("young", &["10.0.0.2"], "veth", Some(6));
    young.sight.uids = ["uid-b".to_owned()].into();
    let mut inner = namespace("inner", &["172.17.0.1"], "veth", None);
    inner.sight.uids = ["uid-a".to_owned()].into();
    let of_a = namespace("a", &["10.0.0.1"], "veth", Some(5));
    let nobodys = namespace("container", &["172.18.0.2"], "veth", Some(7));
    let empty = namespace("empty", &[], "veth", None);
    let view = node(vec![pod("b", &[]), pod("a", &["10.0.0.1"])], vec![nobodys, inner, young, of_a, empty]);
    let rows = view.rows();
    let seen: Vec<_> = rows
        .iter()
        .map(|row| (row.pod.as_deref(), row.netns.as_deref().expect("a namespace"), row.served_by))
        .collect();
    assert_eq!(
        seen,
        [
            (Some("default/a"), "/run/netns/a", ServedBy::Both),
            (Some("default/b"), "/run/netns/young", ServedBy::Socket),
            (None, "/run/netns/container", ServedBy::Socket),
        ]
    );
    assert_eq!(rows[1].addresses, [ip("10.0.0.2")]);
}

#[test]
fn where_nobody_knows_pods_their_namespaces_are_told_of() {
    let view = NodeView { pods: None, ..node(Vec::new(), vec![namespace("x", &["10.0.0.1"], "veth", Some(5))]) };
    let row = only_row(&view);
    assert_eq!((row.pod, row.netns.as_deref(), row.served_by), (None, Some("/run/netns/x"), ServedBy::Both));
}
