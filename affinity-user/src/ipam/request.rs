//! What a service wants of addresses from outside, and what it has.

use std::collections::BTreeMap;
use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::api::core::v1 as core;

use super::block::IpFamily;
use super::{CLASS, SERVICE_CONDITION, WANTED_ANNOTATION};
use crate::model::{ServiceName, shared};

/// A service, as far as addresses from outside concern it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LbService {
    /// Its `resourceVersion`.
    pub version: String,
    /// Its uid.
    pub uid: String,
    /// When it was made.
    pub created: Option<Timestamp>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Whether its type is `LoadBalancer`, and its class none, or [`CLASS`].
    pub is_ours: bool,
    /// The families that it is to have addresses of, its first one first.
    pub families: Vec<IpFamily>,
    /// Whether it is nothing worth without an address of each of them.
    pub needs_all_families: bool,
    /// The addresses that it asks for; an address of a family where none of it is asked for.
    pub wanted: Vec<IpAddr>,
    /// What it asks for that is no address.
    pub not_addresses: Vec<String>,
    /// The addresses in its status, whoever has written them.
    pub has: Vec<IpAddr>,
    /// Those of them that nodes are to answer for (`ipMode: VIP`, the default).
    pub vips: Vec<IpAddr>,
    /// `spec.externalIPs`, as far as they are addresses.
    pub external_ips: Vec<IpAddr>,
    /// Whether its `externalTrafficPolicy` is `Local`.
    pub is_local: bool,
    /// Status, reason and message of the condition that this project writes, if it has.
    pub condition: Option<(String, String, String)>,
}

impl LbService {
    /// What it says of itself, with its name.
    pub fn read(object: &core::Service) -> Option<(ServiceName, Self)> {
        let metadata = &object.metadata;
        let name = ServiceName::new(shared(metadata.namespace.as_deref()?), shared(metadata.name.as_deref()?));
        let spec = object.spec.clone().unwrap_or_default();
        let status = object.status.clone().unwrap_or_default();
        let is_balancer = spec.type_.as_deref() == Some("LoadBalancer");
        let is_class_ours = spec.load_balancer_class.as_deref().is_none_or(|class| class == CLASS);
        let annotation = metadata.annotations.as_ref().and_then(|all| all.get(WANTED_ANNOTATION));
        let asked = annotation.or(spec.load_balancer_ip.as_ref()).map(String::as_str).unwrap_or_default();
        let (mut wanted, mut not_addresses) = (Vec::new(), Vec::new());
        for text in asked.split(',').map(str::trim).filter(|text| !text.is_empty()) {
            match text.parse() {
                Ok(address) if !wanted.contains(&address) => wanted.push(address),
                Ok(_) => {}
                Err(_) => not_addresses.push(text.to_owned()),
            }
        }
        let ingress = status.load_balancer.and_then(|it| it.ingress).unwrap_or_default();
        let parsed = |is_counted: fn(&core::LoadBalancerIngress) -> bool| {
            let counted = ingress.iter().filter(|one| is_counted(one));
            counted.filter_map(|one| one.ip.as_ref()?.parse().ok()).collect::<Vec<IpAddr>>()
        };
        let conditions = status.conditions.unwrap_or_default();
        let condition = conditions.into_iter().find(|condition| condition.type_ == SERVICE_CONDITION);
        let service = Self {
            version: metadata.resource_version.clone().unwrap_or_default(),
            uid: metadata.uid.clone().unwrap_or_default(),
            created: metadata.creation_timestamp.as_ref().map(|time| time.0),
            labels: metadata.labels.clone().unwrap_or_default(),
            is_ours: is_balancer && is_class_ours && metadata.deletion_timestamp.is_none(),
            families: families(&spec),
            needs_all_families: spec.ip_family_policy.as_deref() == Some("RequireDualStack"),
            wanted,
            not_addresses,
            has: if is_balancer { parsed(|_| true) } else { Vec::new() },
            vips: if is_balancer { parsed(|one| one.ip_mode.as_deref() != Some("Proxy")) } else { Vec::new() },
            external_ips: spec.external_ips.iter().flatten().filter_map(|ip| ip.parse().ok()).collect(),
            is_local: spec.external_traffic_policy.as_deref() == Some("Local"),
            condition: condition.map(|condition| (condition.status, condition.reason, condition.message)),
        };
        Some((name, service))
    }
}

/// Those that the API server has given it; of one from before dual stack, those of its cluster addresses.
fn families(spec: &core::ServiceSpec) -> Vec<IpFamily> {
    let mut families = Vec::new();
    for text in spec.ip_families.iter().flatten() {
        match text.as_str() {
            "IPv4" => families.push(IpFamily::V4),
            "IPv6" => families.push(IpFamily::V6),
            _ => {}
        }
    }
    if families.is_empty() {
        let ips = spec.cluster_ips.clone().unwrap_or_else(|| spec.cluster_ip.iter().cloned().collect());
        families = ips.iter().filter_map(|ip| ip.parse().ok()).map(IpFamily::of).collect();
    }
    families
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(yaml: &str) -> LbService {
        let object: core::Service = serde_saphyr::from_str(yaml).expect("a service");
        LbService::read(&object).expect("a named one").1
    }

    #[test]
    fn what_a_service_wants_and_has_is_read() {
        let service = read(
            "metadata: {name: web, namespace: shop, annotations: {affinity.dev/load-balancer-ips: '192.0.2.7, x,192.0.2.7'}}\n\
             spec: {type: LoadBalancer, ipFamilies: [IPv6, IPv4], ipFamilyPolicy: RequireDualStack, \
             externalTrafficPolicy: Local, externalIPs: [198.51.100.1], loadBalancerIP: 192.0.2.1}\n\
             status: {loadBalancer: {ingress: [{ip: 192.0.2.9, ipMode: VIP}, {ip: 192.0.2.8, ipMode: Proxy}, {hostname: a}]}}",
        );
        assert!(service.is_ours && service.is_local && service.needs_all_families);
        assert_eq!(service.families, [IpFamily::V6, IpFamily::V4]);
        assert_eq!(service.wanted, ["192.0.2.7".parse::<IpAddr>().unwrap()]);
        assert_eq!(service.not_addresses, ["x"]);
        assert_eq!(service.has.len(), 2);
        assert_eq!(service.vips, ["192.0.2.9".parse::<IpAddr>().unwrap()]);
        assert_eq!(service.external_ips, ["198.51.100.1".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn the_old_field_asks_for_an_address_too() {
        let service = read(
            "metadata: {name: web, namespace: shop}\n\
             spec: {type: LoadBalancer, clusterIP: 10.96.0.1, loadBalancerIP: 192.0.2.1}",
        );
        assert_eq!((service.wanted.len(), service.families), (1, vec![IpFamily::V4]));
    }

    #[test]
    fn others_are_not_ours() {
        for spec in ["{type: ClusterIP}", "{type: LoadBalancer, loadBalancerClass: example.com/lb}"] {
            assert!(!read(&format!("metadata: {{name: web, namespace: shop}}\nspec: {spec}")).is_ours, "{spec}");
        }
        let ours = "{type: LoadBalancer, loadBalancerClass: affinity.dev/affinity}";
        assert!(read(&format!("metadata: {{name: web, namespace: shop}}\nspec: {ours}")).is_ours);
    }
}
