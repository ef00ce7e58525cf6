//! A cluster that there is none of: any number of services and slices, as the JSON that an API server would send.

use std::net::Ipv4Addr;

use affinity_common::abi::frontends::FrontendKey;
use affinity_common::family::V4;
use affinity_common::types::{Port, Proto};

/// The port of every service.
const PORT: u16 = 80;
/// The first service's address; there is room for a million.
const SERVICES: Ipv4Addr = Ipv4Addr::new(10, 96, 1, 0);
/// The first pod's address.
const PODS: Ipv4Addr = Ipv4Addr::new(11, 0, 0, 0);
/// How many addresses each service's pods have between them.
const PODS_A_SERVICE: u32 = 8;

/// How many services there are, and what they are like.
#[derive(Clone, Copy, Debug)]
pub struct Cluster {
    /// How many services: one port each, one slice each.
    pub services: u32,
    /// How many endpoints each has: 1 to 6.
    pub endpoints: u32,
    /// Whether they have `sessionAffinity: ClientIP`.
    pub sticky: bool,
}

impl Cluster {
    /// The key of a service's frontend.
    pub fn frontend(service: u32) -> FrontendKey<V4> {
        FrontendKey::new(Self::address(service).octets(), Port::new(PORT), Proto::TCP)
    }

    /// A service's address.
    pub fn address(service: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(SERVICES) + service)
    }

    /// A service's name.
    pub fn name(service: u32) -> String {
        format!("service-{service:06}")
    }

    /// A service as JSON.
    pub fn service(self, service: u32) -> String {
        let (name, address) = (Self::name(service), Self::address(service));
        let affinity = if self.sticky {
            r#""sessionAffinity":"ClientIP","sessionAffinityConfig":{"clientIP":{"timeoutSeconds":10800}}"#
        } else {
            r#""sessionAffinity":"None""#
        };
        format!(
            r#"{{"kind":"Service","apiVersion":"v1","metadata":{{"name":"{name}","namespace":"default","uid":"6b2f7a3e-0000-4000-8000-{service:012}","resourceVersion":"1","creationTimestamp":"2026-01-01T00:00:00Z","labels":{{"app":"{name}"}}}},"spec":{{"ports":[{{"name":"http","protocol":"TCP","port":{PORT},"targetPort":8080}}],"selector":{{"app":"{name}"}},"clusterIP":"{address}","clusterIPs":["{address}"],"type":"ClusterIP",{affinity},"ipFamilies":["IPv4"],"ipFamilyPolicy":"SingleStack","internalTrafficPolicy":"Cluster"}},"status":{{"loadBalancer":{{}}}}}}"#
        )
    }

    /// A service's slice as JSON; every version has another first pod than the one before.
    pub fn slice(self, service: u32, version: u32) -> String {
        let name = Self::name(service);
        let endpoints: Vec<String> = (0..self.endpoints).map(|pod| Self::endpoint(service, pod, version)).collect();
        format!(
            r#"{{"kind":"EndpointSlice","apiVersion":"discovery.k8s.io/v1","metadata":{{"name":"{name}-x7k2p","generateName":"{name}-","namespace":"default","uid":"7c3f8b4e-0000-4000-8000-{service:012}","resourceVersion":"{}","generation":{},"creationTimestamp":"2026-01-01T00:00:00Z","labels":{{"app":"{name}","endpointslice.kubernetes.io/managed-by":"endpointslice-controller.k8s.io","kubernetes.io/service-name":"{name}"}},"ownerReferences":[{{"apiVersion":"v1","kind":"Service","name":"{name}","uid":"6b2f7a3e-0000-4000-8000-{service:012}","controller":true,"blockOwnerDeletion":true}}]}},"addressType":"IPv4","endpoints":[{}],"ports":[{{"name":"http","protocol":"TCP","port":8080}}]}}"#,
            version + 1,
            version + 1,
            endpoints.join(",")
        )
    }

    /// The address of a service's pod in a version of its slice.
    pub fn pod(service: u32, pod: u32, version: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(PODS) + service * PODS_A_SERVICE + Self::number(pod, version))
    }

    /// The first one is another in each version: two in turn.
    fn number(pod: u32, version: u32) -> u32 {
        if pod == 0 && version > 0 { 6 + version % 2 } else { pod }
    }

    fn endpoint(service: u32, pod: u32, version: u32) -> String {
        let (at, address) = (Self::number(pod, version), Self::pod(service, pod, version));
        let name = Self::name(service);
        format!(
            r#"{{"addresses":["{address}"],"conditions":{{"ready":true,"serving":true,"terminating":false}},"targetRef":{{"kind":"Pod","namespace":"default","name":"{name}-5d9f7c6b8{at}-abcd{at}","uid":"8d4f9c5e-0000-4000-8000-{service:012}"}},"nodeName":"node-{:04}","zone":"zone-a"}}"#,
            (service + pod) % 1000
        )
    }
}
