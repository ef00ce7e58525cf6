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
    if name.name.len() > LABEL_MAX {
        faults.invalid("metadata.name", Fault::Name(name.name.to_string()));
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
    if let Err(problem) = check_name(field, service, LABEL_MAX) {
        faults.invalid(problem.field, problem.fault);
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
    Err(Problem::new(field, Fault::Name(name.to_owned())))
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
