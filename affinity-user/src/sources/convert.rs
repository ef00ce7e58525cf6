//! Kubernetes' objects in the model's terms, with every fault named by object and field.
//!
//! A fault takes with it as little as it can: an endpoint or a slice's port that makes no sense is left out, and the
//! rest goes on. A service is different, since it is what people edit: where a field of it is invalid the last good
//! version stays, and only a service that never had one is programmed as far as it makes sense. A port of a
//! protocol that is not supported is no mistake; it is left out and named.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use affinity_common::{
    abi::services::LABEL_MAX,
    types::{Port, Proto, Seconds},
};
use k8s_openapi::{
    api::{core::v1 as core, discovery::v1 as discovery},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use crate::model::{
    Checked, Endpoint, EndpointSlice, Fault, ObjectName, Problem, Service, ServiceName, ServicePort, SessionAffinity,
    TargetPort,
};

const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// What selects, on the API server's side, the objects that are for this service proxy: those without the labels that
/// name another one or mark headless services.
pub const LABEL_SELECTOR: &str = "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name";

/// The timeout where none is given: three hours.
const DEFAULT_TIMEOUT: u32 = 10800;

/// The longest name of an object.
const NAME_MAX: usize = 253;

/// The name that an object has by its metadata; without a namespace there, it is in `default`.
pub fn name(metadata: &ObjectMeta) -> Result<ObjectName, Problem> {
    let namespace = metadata.namespace.as_deref().unwrap_or("default");
    let name = metadata.name.as_deref().ok_or_else(|| Problem::new("metadata.name", Fault::Missing))?;
    check_name("metadata.namespace", namespace, LABEL_MAX)?;
    check_name("metadata.name", name, NAME_MAX)?;
    Ok(ObjectName::new(namespace, name))
}

/// A service; `None` if it is not for a service proxy, or for another one.
pub fn service(name: &ServiceName, object: &core::Service) -> Option<Checked<Service>> {
    let empty = core::ServiceSpec::default();
    let spec = object.spec.as_ref().unwrap_or(&empty);
    let first_ip = spec.cluster_ips.as_ref().and_then(|ips| ips.first()).or(spec.cluster_ip.as_ref());
    let headless = first_ip.is_some_and(|ip| ip == "None");
    if is_elsewhere(&object.metadata) || headless || spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }

    let mut faults = Faults::default();
    if let Err(Problem { field, fault }) = check_name("metadata.name", &name.name, LABEL_MAX) {
        faults.invalid(field, fault);
        return Some(faults.reject(name));
    }
    let cluster_ips = cluster_ips(spec, &mut faults);
    let ports = service_ports(spec, &mut faults);
    let Some(session_affinity) = session_affinity(spec, &mut faults) else { return Some(faults.reject(name)) };
    if cluster_ips.is_empty() || ports.is_empty() && faults.invalid {
        return Some(faults.reject(name));
    }
    let created = object.metadata.creation_timestamp.as_ref().map(|time| time.0);
    Some(faults.check(name, Service { name: name.clone(), created, cluster_ips, session_affinity, ports }))
}

/// A slice; `None` if it is not for a service proxy, or for another one.
pub fn endpoint_slice(name: &ObjectName, object: &discovery::EndpointSlice) -> Option<Checked<EndpointSlice>> {
    if is_elsewhere(&object.metadata) {
        return None;
    }
    let mut faults = Faults::default();
    let label = object.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME_LABEL));
    let field = format!("metadata.labels[{SERVICE_NAME_LABEL}]");
    let Some(service) = label else {
        faults.invalid(field, Fault::Missing);
        return Some(faults.reject(name));
    };
    if let Err(Problem { field, fault }) = check_name(field, service, LABEL_MAX) {
        faults.invalid(field, fault);
        return Some(faults.reject(name));
    }
    let address_type = match object.address_type.as_str() {
        "IPv4" => "IPv4",
        "IPv6" => "IPv6",
        other => {
            faults.invalid("addressType", Fault::AddressType(other.to_owned()));
            return Some(faults.reject(name));
        }
    };
    let slice = EndpointSlice {
        name: name.clone(),
        service: ServiceName { namespace: name.namespace.clone(), name: service.as_str().into() },
        ports: target_ports(object, &mut faults),
        endpoints: endpoints(object, address_type, &mut faults),
    };
    Some(faults.check(name, slice))
}

/// What is wrong with an object, as far as it has been read.
#[derive(Default)]
struct Faults {
    problems: Vec<Problem>,
    /// Whether an earlier good version is to be preferred to what can be made of this one.
    invalid: bool,
}

impl Faults {
    fn left_out(&mut self, field: impl Into<String>, fault: Fault) {
        self.problems.push(Problem::new(field, fault));
    }

    fn invalid(&mut self, field: impl Into<String>, fault: Fault) {
        self.left_out(field, fault);
        self.invalid = true;
    }

    fn reject<T>(self, name: &ObjectName) -> Checked<T> {
        Checked { name: name.clone(), object: None, replaces: false, problems: self.problems }
    }

    fn check<T>(self, name: &ObjectName, object: T) -> Checked<T> {
        Checked { name: name.clone(), object: Some(Arc::new(object)), replaces: !self.invalid, problems: self.problems }
    }
}

/// Whether another proxy sees to the object, or none.
fn is_elsewhere(metadata: &ObjectMeta) -> bool {
    metadata
        .labels
        .as_ref()
        .is_some_and(|labels| labels.contains_key(PROXY_NAME_LABEL) || labels.contains_key(HEADLESS_LABEL))
}

fn check_name(field: impl Into<String>, name: &str, max: usize) -> Result<(), Problem> {
    let legal = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
    if legal && (1..=max).contains(&name.len()) {
        return Ok(());
    }
    Err(Problem::new(field, Fault::Name { name: name.to_owned(), max }))
}

fn cluster_ips(spec: &core::ServiceSpec, faults: &mut Faults) -> Vec<IpAddr> {
    let (field, given) = match (&spec.cluster_ips, &spec.cluster_ip) {
        (Some(ips), _) if !ips.is_empty() => ("spec.clusterIPs", ips.as_slice()),
        (_, Some(ip)) if !ip.is_empty() => ("spec.clusterIP", std::slice::from_ref(ip)),
        _ => {
            faults.invalid("spec.clusterIPs", Fault::Missing);
            return Vec::new();
        }
    };
    let mut ips = Vec::with_capacity(given.len());
    for (i, text) in given.iter().enumerate() {
        match address(text) {
            Ok(ip) if !ips.contains(&ip) => ips.push(ip),
            Ok(_) => {}
            Err(fault) => faults.invalid(if given.len() > 1 { format!("{field}[{i}]") } else { field.into() }, fault),
        }
    }
    ips
}

fn service_ports(spec: &core::ServiceSpec, faults: &mut Faults) -> Vec<ServicePort> {
    let given = spec.ports.as_deref().unwrap_or_default();
    if given.is_empty() {
        faults.invalid("spec.ports", Fault::Missing);
    }
    let mut ports = Vec::with_capacity(given.len());
    let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    for (index, given) in given.iter().enumerate() {
        let field = |name: &str| format!("spec.ports[{index}].{name}");
        let proto = match proto(given.protocol.as_deref()) {
            Ok(proto) => proto,
            Err(fault @ Fault::UnsupportedProtocol(_)) => {
                faults.left_out(field("protocol"), fault);
                continue;
            }
            Err(fault) => {
                faults.invalid(field("protocol"), fault);
                continue;
            }
        };
        let port = match port(given.port) {
            Ok(port) => port,
            Err(fault) => {
                faults.invalid(field("port"), fault);
                continue;
            }
        };
        let name = given.name.as_deref().unwrap_or_default();
        if !name.is_empty()
            && let Err(Problem { field, fault }) = check_name(field("name"), name, LABEL_MAX)
        {
            faults.invalid(field, fault);
        } else if !names.insert((name, proto)) {
            faults.invalid(field("name"), Fault::DuplicatePortName(name.to_owned(), proto));
        } else if !numbers.insert((port, proto)) {
            faults.invalid(field("port"), Fault::DuplicatePort(port.get(), proto));
        } else {
            ports.push(ServicePort { index, name: name.into(), proto, port });
        }
    }
    ports
}

/// `None` if there is no knowing what is meant.
fn session_affinity(spec: &core::ServiceSpec, faults: &mut Faults) -> Option<SessionAffinity> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => Some(SessionAffinity::None),
        Some("ClientIP") => {
            let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
            let timeout = match config.and_then(|client_ip| client_ip.timeout_seconds) {
                None => DEFAULT_TIMEOUT,
                Some(seconds) => {
                    let Ok(valid @ 1..=86400) = u32::try_from(seconds) else {
                        let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
                        faults.invalid(field, Fault::Timeout(seconds));
                        return None;
                    };
                    valid
                }
            };
            Some(SessionAffinity::ClientIp { timeout: Seconds::new(timeout) })
        }
        Some(other) => {
            faults.invalid("spec.sessionAffinity", Fault::UnknownAffinity(other.to_owned()));
            None
        }
    }
}

fn target_ports(object: &discovery::EndpointSlice, faults: &mut Faults) -> Vec<TargetPort> {
    let mut ports = Vec::new();
    for (i, given) in object.ports.iter().flatten().enumerate() {
        // No number means all ports, which is for others than service proxies.
        let Some(number) = given.port else { continue };
        match (proto(given.protocol.as_deref()), port(number)) {
            (Err(fault), _) => faults.left_out(format!("ports[{i}].protocol"), fault),
            (_, Err(fault)) => faults.left_out(format!("ports[{i}].port"), fault),
            (Ok(proto), Ok(port)) => {
                ports.push(TargetPort { name: given.name.as_deref().unwrap_or_default().into(), proto, port });
            }
        }
    }
    ports
}

fn endpoints(object: &discovery::EndpointSlice, address_type: &'static str, faults: &mut Faults) -> Vec<Endpoint> {
    let mut endpoints = Vec::with_capacity(object.endpoints.len());
    // Neighbours are often on one node.
    let mut last_node: Option<Arc<str>> = None;
    for (i, given) in object.endpoints.iter().enumerate() {
        let Some(text) = given.addresses.first() else {
            faults.left_out(format!("endpoints[{i}].addresses"), Fault::Missing);
            continue;
        };
        let address = match address(text) {
            Ok(address) if address.is_ipv4() == (address_type == "IPv4") => address,
            Ok(address) => {
                let fault = Fault::WrongFamily { address, address_type };
                faults.left_out(format!("endpoints[{i}].addresses[0]"), fault);
                continue;
            }
            Err(fault) => {
                faults.left_out(format!("endpoints[{i}].addresses[0]"), fault);
                continue;
            }
        };
        let node_name = given.node_name.as_deref().map(|node| match &last_node {
            Some(last) if **last == *node => last.clone(),
            _ => Arc::from(node),
        });
        if node_name.is_some() {
            last_node.clone_from(&node_name);
        }
        // What is not given reads as the API says: ready, serving as ready, not terminating.
        let conditions = given.conditions.as_ref();
        let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
        endpoints.push(Endpoint {
            address,
            ready,
            serving: conditions.and_then(|c| c.serving).unwrap_or(ready),
            terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
            node_name,
            target: given.target_ref.as_ref().and_then(|target| target.name.as_deref()).map(Arc::from),
        });
    }
    endpoints
}

fn address(text: &str) -> Result<IpAddr, Fault> {
    let ip: IpAddr = text.parse().map_err(|_| Fault::NotAnAddress(text.to_owned()))?;
    let mapped = matches!(ip, IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some());
    if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() || mapped {
        return Err(Fault::UnusableAddress(ip));
    }
    Ok(ip)
}

fn port(number: i32) -> Result<Port, Fault> {
    match u16::try_from(number) {
        Ok(port @ 1..) => Ok(Port::new(port)),
        _ => Err(Fault::Port(number)),
    }
}

fn proto(name: Option<&str>) -> Result<Proto, Fault> {
    match name {
        None | Some("" | "TCP") => Ok(Proto::TCP),
        Some("UDP") => Ok(Proto::UDP),
        Some(sctp @ "SCTP") => Err(Fault::UnsupportedProtocol(sctp.to_owned())),
        Some(other) => Err(Fault::UnknownProtocol(other.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sources::documents::{Contents, Version};

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
        });
        objects
            .chain(contents.problems.iter().map(|problem| format!("file | {problem}")))
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// A service's metadata and spec, what is expected.
    #[test]
    fn services() {
        const TIMEOUT: &str = "rejected | spec.sessionAffinityConfig.clientIP.timeoutSeconds";
        const ONE: &str = "clusterIPs: [10.0.0.1], ports: [{port: 80}]";
        let two = |second: &str| format!("clusterIP: 10.0.0.1, ports: [{{name: a, port: 80}}, {second}]");
        let timeout = |value: &str| {
            format!(
                "{ONE}, sessionAffinity: ClientIP, sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {value}}}}}"
            )
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
            (
                "",
                ips("[0.0.0.0]"),
                "rejected | spec.clusterIPs: 0.0.0.0 can't be the address of a service or an endpoint",
            ),
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
            let yaml = format!(
                "{{apiVersion: v1, kind: Service, metadata: {{name: web, namespace: shop{metadata}}}, spec: {{{spec}}}}}"
            );
            assert_eq!(outcome(&yaml), expected, "{yaml}");
        }
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
            let endpoints = endpoints(&object, "IPv4", &mut Faults::default());
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
                    labels: Some([(SERVICE_NAME_LABEL.to_owned(), "web".to_owned())].into()),
                    ..ObjectMeta::default()
                },
                ports: ports.map(|ports| ports.into_iter().map(|(name, port, protocol)| {
                    discovery::EndpointPort { name, port: Some(port >> 15), protocol, app_protocol: None }
                }).collect()),
            };
            endpoint_slice(&name, &object);
        }
    }
}
