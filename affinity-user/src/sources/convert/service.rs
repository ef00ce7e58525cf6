//! A Service in the model's terms.

mod external;

use std::{collections::BTreeSet, net::IpAddr};

use affinity_common::{abi::services::LABEL_MAX, types::Seconds};
use k8s_openapi::{api::core::v1 as core, apimachinery::pkg::apis::meta::v1::ObjectMeta};

use super::{Faults, address, check_name, is_elsewhere, port, proto};
use crate::model::{
    AffinityScope, Checked, Fault, Problem, Service, ServiceName, ServicePort, SessionAffinity, TrafficPolicy, shared,
};

/// What a client's affinity is to: `port`, or `service`.
const AFFINITY_SCOPE_ANNOTATION: &str = "affinity.dev/session-affinity-scope";

/// The timeout where none is given: three hours.
const DEFAULT_TIMEOUT: u32 = 10800;

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
    let kind = ServiceType::of(spec, &mut faults);
    let cluster_ips = cluster_ips(spec, &mut faults);
    let ports = service_ports(spec, kind, &mut faults);
    let Some(session_affinity) = session_affinity(spec, &mut faults) else { return Some(faults.reject(name)) };
    let (internal, external) = (spec.internal_traffic_policy.as_deref(), spec.external_traffic_policy.as_deref());
    let internal = policy_of("spec.internalTrafficPolicy", internal, &mut faults);
    let external = policy_of("spec.externalTrafficPolicy", external, &mut faults);
    let (Some(internal_policy), Some(policy)) = (internal, external) else { return Some(faults.reject(name)) };
    let external = external::external(object, kind, policy, &ports, &mut faults);
    let affinity_scope = affinity_scope(&object.metadata, &mut faults);
    if cluster_ips.is_empty() || ports.is_empty() && faults.invalid {
        return Some(faults.reject(name));
    }
    let created = object.metadata.creation_timestamp.as_ref().map(|time| time.0);
    let service = Service {
        name: name.clone(),
        created,
        cluster_ips,
        session_affinity,
        affinity_scope,
        internal_policy,
        ports,
        external: external.map(Box::new),
    };
    Some(faults.check(name, service))
}

/// `spec.type`, of those that are for a service proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ServiceType {
    ClusterIp,
    NodePort,
    LoadBalancer,
}

impl ServiceType {
    /// What it is not known to be reached by, it is not reached by.
    fn of(spec: &core::ServiceSpec, faults: &mut Faults) -> Self {
        match spec.type_.as_deref() {
            None | Some("" | "ClusterIP") => Self::ClusterIp,
            Some("NodePort") => Self::NodePort,
            Some("LoadBalancer") => Self::LoadBalancer,
            Some(other) => {
                faults.left_out("spec.type", Fault::UnknownType(other.to_owned()));
                Self::ClusterIp
            }
        }
    }
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

fn service_ports(spec: &core::ServiceSpec, kind: ServiceType, faults: &mut Faults) -> Vec<ServicePort> {
    let given = spec.ports.as_deref().unwrap_or_default();
    if given.is_empty() {
        faults.invalid("spec.ports", Fault::Missing);
    }
    let mut ports = Vec::with_capacity(given.len());
    let (mut names, mut numbers, mut node_ports) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
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
            let wanted = given.node_port.filter(|number| kind != ServiceType::ClusterIp && *number != 0);
            let node_port = wanted.map(super::port).transpose().and_then(|wanted| match wanted {
                Some(port) if !node_ports.insert((port, proto)) => Err(Fault::DuplicatePort(port.get(), proto)),
                wanted => Ok(wanted),
            });
            let node_port = node_port.unwrap_or_else(|fault| {
                faults.left_out(field("nodePort"), fault);
                None
            });
            ports.push(ServicePort { index, name: shared(name), proto, port, node_port });
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

/// `None` if there is no knowing what is meant.
fn policy_of(field: &str, policy: Option<&str>, faults: &mut Faults) -> Option<TrafficPolicy> {
    match policy {
        None | Some("" | "Cluster") => Some(TrafficPolicy::Cluster),
        Some("Local") => Some(TrafficPolicy::Local),
        Some(other) => {
            faults.invalid(field, Fault::UnknownPolicy(other.to_owned()));
            None
        }
    }
}

/// A value without meaning is named, and the scope is the usual one.
fn affinity_scope(metadata: &ObjectMeta, faults: &mut Faults) -> AffinityScope {
    let annotations = metadata.annotations.as_ref();
    match annotations.and_then(|annotations| annotations.get(AFFINITY_SCOPE_ANNOTATION)).map(String::as_str) {
        None | Some("port") => AffinityScope::Port,
        Some("service") => AffinityScope::Service,
        Some(other) => {
            let fault = Fault::Annotation { value: other.to_owned(), known: "port, service" };
            faults.left_out(format!("metadata.annotations[{AFFINITY_SCOPE_ANNOTATION}]"), fault);
            AffinityScope::Port
        }
    }
}
