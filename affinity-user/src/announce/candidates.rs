//! Which addresses a node may answer for. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::announcer::Place;
use super::resource::L2AnnouncementSpec;
use crate::ipam::request::LbService;
use crate::loader::interfaces::Patterns;
use crate::model::{ServiceName, Text, shared};

/// The longest wait of a node before it takes an address that nobody has.
const DELAY_MAX: Duration = Duration::from_millis(500);
/// The label of a slice that names its service.
pub(super) const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// On which nodes a slice's endpoints are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nodes {
    /// The service's name.
    pub service: Text,
    /// Those with one that is ready.
    pub ready: BTreeSet<Text>,
    /// Those with one that serves, though it may be about to end.
    pub serving: BTreeSet<Text>,
}

impl Nodes {
    /// Those of a slice.
    pub fn read(slice: &EndpointSlice, _: Option<&Self>) -> Option<Self> {
        let service = slice.metadata.labels.as_ref()?.get(SERVICE_LABEL)?;
        let mut nodes = Self { service: shared(service), ..Self::default() };
        for endpoint in &slice.endpoints {
            let (Some(node), conditions) = (&endpoint.node_name, endpoint.conditions.clone().unwrap_or_default())
            else {
                continue;
            };
            let is_ready = conditions.ready.unwrap_or(true);
            if is_ready {
                nodes.ready.insert(shared(node));
            }
            if conditions.serving.unwrap_or(is_ready) {
                nodes.serving.insert(shared(node));
            }
        }
        Some(nodes)
    }
}

/// Whether a node has endpoints of a service that are used: ready ones, or, where the service has none, serving ones that
/// end (KEP-1669).
pub fn has_endpoints<'a>(node: &str, slices: impl Iterator<Item = &'a Nodes> + Clone) -> bool {
    let is_any_ready = slices.clone().any(|nodes| !nodes.ready.is_empty());
    slices.into_iter().any(|nodes| (if is_any_ready { &nodes.ready } else { &nodes.serving }).contains(node))
}

/// An address that the node may answer for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The oldest service that has it.
    pub service: ServiceName,
    /// The interfaces, by index, with their names.
    pub interfaces: BTreeMap<u32, String>,
}

/// What a node may answer for, and what it may not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Candidates {
    /// What it may.
    pub addresses: BTreeMap<IpAddr, Candidate>,
    /// Every address that some service has, on whichever node it is answered for.
    pub known: BTreeSet<IpAddr>,
    /// The resources that select the node, and no interface of it.
    pub without_interface: BTreeSet<String>,
    /// Addresses that would be answered for, and are the node's own.
    pub own: BTreeMap<IpAddr, ServiceName>,
}

/// Says what a node may answer for: by resources, the node's labels, services, and which of those have endpoints here.
pub fn candidates(
    resources: &BTreeMap<String, L2AnnouncementSpec>,
    labels: &BTreeMap<String, String>,
    services: &BTreeMap<ServiceName, LbService>,
    is_here: impl Fn(&ServiceName) -> bool,
    place: &Place,
) -> Candidates {
    let mut found = Candidates::default();
    let ours = resources.iter().filter(|(_, spec)| spec.node_selector.as_ref().is_none_or(|it| it.matches(labels)));
    let ours: Vec<_> = ours.map(|(name, spec)| (name, spec, interfaces(spec))).collect();
    for (name, _, patterns) in &ours {
        if !place.v4.values().chain(place.v6.values()).any(|interface| patterns.matches(interface)) {
            found.without_interface.insert((*name).clone());
        }
    }
    let mut sorted: Vec<_> = services.iter().collect();
    sorted.sort_by_key(|(name, service)| (service.created, *name));
    for (name, service) in sorted {
        found.known.extend(service.vips.iter().chain(&service.external_ips));
        let selecting = ours.iter().filter(|(_, spec, _)| {
            spec.service_selector.as_ref().is_none_or(|selector| selector.matches(name, &service.labels))
        });
        let selecting: Vec<_> = selecting.collect();
        if selecting.is_empty() || service.is_local && !is_here(name) {
            continue;
        }
        for (_, spec, patterns) in selecting {
            let balancer = service.vips.iter().filter(|_| spec.load_balancer_ips);
            let external = service.external_ips.iter().filter(|_| spec.external_ips);
            for address in balancer.chain(external) {
                if place.own.contains(address) {
                    found.own.entry(*address).or_insert_with(|| name.clone());
                    continue;
                }
                let uplinks = place.uplinks(*address).iter().filter(|(_, interface)| patterns.matches(interface));
                let uplinks: Vec<_> = uplinks.map(|(index, interface)| (*index, interface.clone())).collect();
                if uplinks.is_empty() {
                    continue;
                }
                let new = || Candidate { service: name.clone(), interfaces: BTreeMap::new() };
                found.addresses.entry(*address).or_insert_with(new).interfaces.extend(uplinks);
            }
        }
    }
    found
}

/// Those of all uplinks, where no pattern is given.
fn interfaces(spec: &L2AnnouncementSpec) -> Patterns {
    if spec.interfaces.iter().any(|pattern| !pattern.starts_with('!')) {
        return Patterns::new(&spec.interfaces);
    }
    let all = ["*".to_owned()];
    Patterns::new(&all.iter().chain(&spec.interfaces).collect::<Vec<_>>())
}

/// The name of an address's Lease.
pub fn lease_name(address: IpAddr) -> String {
    let text = match address {
        IpAddr::V4(address) => address.octets().map(|octet| octet.to_string()).join("-"),
        // In full: a name can't end with a dash, as `2001:db8::` would.
        IpAddr::V6(address) => address.segments().map(|segment| format!("{segment:x}")).join("-"),
    };
    format!("affinity-l2-{text}")
}

/// How long a node waits before it takes an address that nobody has: its hash of both. Who waits the shortest is first, which
/// is rendezvous hashing without a roll call, so that addresses spread over the nodes that are there.
pub fn delay(address: IpAddr, node: &str) -> Duration {
    let mut hasher = DefaultHasher::new();
    (address, node).hash(&mut hasher);
    DELAY_MAX * u32::try_from(hasher.finish() >> 48).unwrap_or_default() / (1 << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn place() -> Place {
        let links = |names: &[(u32, &str)]| names.iter().map(|(index, name)| (*index, (*name).to_owned())).collect();
        Place {
            v4: links(&[(2, "eth0"), (3, "eth1")]),
            v6: links(&[(2, "eth0")]),
            own: [ip("192.0.2.100"), ip("127.0.0.1")].into(),
        }
    }

    fn spec(yaml: &str) -> L2AnnouncementSpec {
        serde_saphyr::from_str(yaml).expect("a spec")
    }

    fn services(yaml: &[(&str, LbService)]) -> BTreeMap<ServiceName, LbService> {
        yaml.iter().map(|(name, service)| (ServiceName::new("default", *name), service.clone())).collect()
    }

    fn vip(address: &str) -> LbService {
        LbService { vips: vec![ip(address)], ..LbService::default() }
    }

    /// Addresses with their interfaces.
    fn told(specs: &[&str], services: &BTreeMap<ServiceName, LbService>, here: &[&str]) -> Vec<(String, Vec<u32>)> {
        let resources = specs.iter().enumerate().map(|(index, yaml)| (format!("r{index}"), spec(yaml))).collect();
        let labels = [("zone".to_owned(), "a".to_owned())].into();
        let is_here = |name: &ServiceName| here.contains(&&*name.name);
        let found = candidates(&resources, &labels, services, is_here, &place());
        let told =
            |(address, it): (&IpAddr, &Candidate)| (address.to_string(), it.interfaces.keys().copied().collect());
        found.addresses.iter().map(told).collect()
    }

    #[test]
    fn resources_select_services_nodes_and_interfaces() {
        let labelled = LbService {
            labels: [("app".to_owned(), "web".to_owned())].into(),
            external_ips: vec![ip("198.51.100.7")],
            ..vip("192.0.2.1")
        };
        let services = services(&[("web", labelled), ("six", vip("2001:db8::1"))]);
        for (specs, expected) in [
            (vec!["{}"], vec![("192.0.2.1", vec![2, 3]), ("2001:db8::1", vec![2])]),
            (vec!["{interfaces: ['!eth0']}"], vec![("192.0.2.1", vec![3])]),
            (
                vec!["{interfaces: [eth0]}", "{interfaces: [eth1]}"],
                vec![("192.0.2.1", vec![2, 3]), ("2001:db8::1", vec![2])],
            ),
            (vec!["{serviceSelector: {matchLabels: {app: web}}}"], vec![("192.0.2.1", vec![2, 3])]),
            (vec!["{externalIPs: true, loadBalancerIPs: false}"], vec![("198.51.100.7", vec![2, 3])]),
            (vec!["{nodeSelector: {matchLabels: {zone: b}}}"], vec![]),
            (
                vec![
                    "{nodeSelector: {matchExpressions: [{key: zone, operator: In, values: [a]}]}, interfaces: [eth1]}",
                ],
                vec![("192.0.2.1", vec![3])],
            ),
            (vec!["{interfaces: [wlan*]}"], vec![]),
        ] {
            let expected: Vec<_> =
                expected.into_iter().map(|(text, at): (&str, Vec<u32>)| (text.to_owned(), at)).collect();
            assert_eq!(told(&specs, &services, &[]), expected, "{specs:?}");
        }
    }

    #[test]
    fn local_services_are_answered_for_where_they_are() {
        let local = LbService { is_local: true, ..vip("192.0.2.1") };
        let services = services(&[("web", local)]);
        assert_eq!(told(&["{}"], &services, &[]).len(), 0);
        assert_eq!(told(&["{}"], &services, &["web"]).len(), 1);
    }

    #[test]
    fn the_nodes_own_addresses_are_never_answered_for() {
        let resources = [("all".to_owned(), spec("{}")), ("none".to_owned(), spec("{interfaces: [wlan0]}"))].into();
        let services = services(&[("web", vip("192.0.2.100"))]);
        let found = candidates(&resources, &BTreeMap::new(), &services, |_| true, &place());
        assert!(found.addresses.is_empty());
        assert_eq!(found.own, [(ip("192.0.2.100"), ServiceName::new("default", "web"))].into());
        assert_eq!(found.without_interface, ["none".to_owned()].into());
        assert!(found.known.contains(&ip("192.0.2.100")));
    }

    #[test]
    fn endpoints_that_end_count_where_none_is_ready() {
        let slice = |yaml: &str| {
            let text = format!(
                "metadata: {{name: web-1, labels: {{kubernetes.io/service-name: web}}}}\naddressType: IPv4\nendpoints: {yaml}"
            );
            Nodes::read(&serde_saphyr::from_str(&text).expect("a slice"), None).expect("a service's")
        };
        let ending =
            "{addresses: [10.0.0.1], nodeName: n1, conditions: {ready: false, serving: true, terminating: true}}";
        let first = slice(&format!("[{ending}]"));
        assert!(has_endpoints("n1", [&first].into_iter()));
        assert!(!has_endpoints("n2", [&first].into_iter()));
        let second = slice(
            "[{addresses: [10.0.0.2], nodeName: n2}, {addresses: [10.0.0.3], nodeName: n3, conditions: {ready: false}}]",
        );
        assert!(!has_endpoints("n1", [&first, &second].into_iter()), "another node has ready ones");
        assert!(has_endpoints("n2", [&first, &second].into_iter()));
        assert!(!has_endpoints("n3", [&first, &second].into_iter()));
    }

    #[test]
    fn leases_have_names_that_the_api_server_takes() {
        assert_eq!(lease_name(ip("192.0.2.1")), "affinity-l2-192-0-2-1");
        assert_eq!(lease_name(ip("2001:db8::")), "affinity-l2-2001-db8-0-0-0-0-0-0");
    }

    #[test]
    fn addresses_spread_over_nodes() {
        let nodes = ["a", "b", "c", "d"];
        let mut first = BTreeMap::new();
        for last in 0..=255 {
            let address = IpAddr::from([192, 0, 2, last]);
            let node = nodes.into_iter().min_by_key(|node| delay(address, node)).expect("a node");
            assert!(delay(address, node) <= DELAY_MAX);
            *first.entry(node).or_insert(0) += 1;
        }
        assert!(first.len() == 4 && first.values().all(|count| (32..=96).contains(count)), "{first:?}");
    }
}
