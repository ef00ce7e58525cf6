//! Kubernetes' objects in the model's terms, with every fault named by object and field.
//!
//! A fault takes with it as little as it can: an endpoint or a slice's port that makes no sense is left out, and the
//! rest goes on. A service is different, since it is what people edit: where a field of it is invalid the last good
//! version stays, and only a service that never had one is programmed as far as it makes sense. A port of a
//! protocol that is not supported is no mistake; it is left out and named.

mod node;
mod pod;
mod service;
mod slice;
#[cfg(test)]
mod tests;

use std::{net::IpAddr, sync::Arc};

use affinity_common::{
    abi::services::LABEL_MAX,
    types::{Port, Proto},
};
use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

pub use self::{node::node, pod::pod, service::service, slice::endpoint_slice};
use crate::model::{Checked, Fault, Kind, ObjectName, Problem, Trigger, shared};

const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// What selects, on the API server's side, the services and slices that are for this service proxy: those without the
/// labels that name another one or mark headless services.
pub const LABEL_SELECTOR: &str = "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name";

/// The longest name of an object.
const NAME_MAX: usize = 253;

/// The name that an object of a kind has by its metadata; without a namespace there, it is in `default`.
pub fn name(kind: Kind, metadata: &ObjectMeta) -> Result<ObjectName, Problem> {
    let name = metadata.name.as_deref().ok_or_else(|| Problem::new("metadata.name", Fault::Missing))?;
    let namespace = if kind.is_namespaced() {
        let namespace = metadata.namespace.as_deref().unwrap_or("default");
        check_name("metadata.namespace", namespace, LABEL_MAX)?;
        namespace
    } else {
        ""
    };
    check_name("metadata.name", name, NAME_MAX)?;
    // Slices name their services.
    let name = if kind == Kind::Service { shared(name) } else { name.into() };
    Ok(ObjectName::new(shared(namespace), name))
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
        Checked { object: None, replaces: false, ..self.checked(name) }
    }

    fn check<T>(self, name: &ObjectName, object: T) -> Checked<T> {
        Checked { object: Some(Arc::new(object)), replaces: !self.invalid, ..self.checked(name) }
    }

    fn checked<T>(self, name: &ObjectName) -> Checked<T> {
        Checked {
            name: name.clone(),
            object: None,
            replaces: false,
            problems: self.problems,
            trigger: Trigger::Unknown,
        }
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

fn address(text: &str) -> Result<IpAddr, Fault> {
    let ip: IpAddr = text.parse().map_err(|_| Fault::NotAnAddress(text.to_owned()))?;
    let mapped = matches!(ip, IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some());
    if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() || mapped {
        return Err(Fault::UnusableAddress(ip));
    }
    Ok(ip)
}

/// A range of addresses; white space around it is let pass, as by kube-proxy.
fn range(text: &str) -> Result<IpNet, Fault> {
    text.trim().parse().map(|range: IpNet| range.trunc()).map_err(|_| Fault::NotARange(text.to_owned()))
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
