//! The Kubernetes objects that suites write, to an API server or as YAML.
//!
//! ```
//! use affinity_tests::objects::{Endpoint, ServiceObject, SliceObject, to_yaml};
//! let service = ServiceObject::new("web").cluster_ip("10.96.0.10").tcp("http", 80, 8080).affinity(600);
//! let slice = SliceObject::of("web", "a").tcp("http", 8080).endpoint("10.244.0.101", Endpoint::Ready);
//! assert!(to_yaml(&[&service.build()]).unwrap().contains("sessionAffinity: ClientIP"));
//! assert!(to_yaml(&[&slice.build()]).unwrap().contains("kubernetes.io/service-name: web"));
//! ```

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1::{
    ClientIPConfig, ObjectReference, Service, ServicePort, ServiceSpec, SessionAffinityConfig,
};
use k8s_openapi::api::discovery::v1::{Endpoint as SliceEndpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::Serialize;

/// The namespace of objects that name no other.
pub const NAMESPACE: &str = "default";
/// The label by which an `EndpointSlice` names its service.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// A Service to build; `ClusterIP` by default.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceObject(Service);

impl ServiceObject {
    /// A service without ports or address: the API server gives it one.
    pub fn new(name: &str) -> Self {
        Self(Service {
            metadata: metadata(name),
            spec: Some(ServiceSpec {
                type_: Some("ClusterIP".to_owned()),
                session_affinity: Some("None".to_owned()),
                ..ServiceSpec::default()
            }),
            status: None,
        })
    }

    /// Another namespace than [`NAMESPACE`].
    #[must_use]
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.0.metadata.namespace = Some(namespace.to_owned());
        self
    }

    /// Its address; `None` makes it headless.
    #[must_use]
    pub fn cluster_ip(self, address: &str) -> Self {
        self.change(|spec| {
            spec.cluster_ip = Some(address.to_owned());
            spec.cluster_ips = Some(vec![address.to_owned()]);
        })
    }

    /// Both addresses of a dual-stack service.
    #[must_use]
    pub fn cluster_ips(self, first: IpAddr, second: IpAddr) -> Self {
        self.cluster_ip(&first.to_string()).change(|spec| {
            spec.cluster_ips = Some(vec![first.to_string(), second.to_string()]);
            spec.ip_family_policy = Some("RequireDualStack".to_owned());
        })
    }

    /// A TCP port and the number of its target port.
    #[must_use]
    pub fn tcp(self, name: &str, port: u16, target: u16) -> Self {
        self.port("TCP", name, port, IntOrString::Int(target.into()))
    }

    /// A UDP port and the number of its target port.
    #[must_use]
    pub fn udp(self, name: &str, port: u16, target: u16) -> Self {
        self.port("UDP", name, port, IntOrString::Int(target.into()))
    }

    /// Any port; its target by number or by the name that the pods give it.
    #[must_use]
    pub fn port(self, protocol: &str, name: &str, port: u16, target: IntOrString) -> Self {
        let port = ServicePort {
            name: Some(name.to_owned()).filter(|name| !name.is_empty()),
            port: port.into(),
            protocol: Some(protocol.to_owned()),
            target_port: Some(target),
            ..ServicePort::default()
        };
        self.change(|spec| spec.ports.get_or_insert_default().push(port))
    }

    /// `ClientIP` affinity with this timeout in seconds. Nothing is checked here: the point may be a wrong one.
    #[must_use]
    pub fn affinity(self, seconds: i32) -> Self {
        self.change(|spec| {
            spec.session_affinity = Some("ClientIP".to_owned());
            spec.session_affinity_config =
                Some(SessionAffinityConfig { client_ip: Some(ClientIPConfig { timeout_seconds: Some(seconds) }) });
        })
    }

    /// No affinity.
    #[must_use]
    pub fn no_affinity(self) -> Self {
        self.change(|spec| {
            spec.session_affinity = Some("None".to_owned());
            spec.session_affinity_config = None;
        })
    }

    /// Whatever else its spec should say.
    #[must_use]
    pub fn change(mut self, change: impl FnOnce(&mut ServiceSpec)) -> Self {
        change(self.0.spec.get_or_insert_default());
        self
    }

    /// An annotation.
    #[must_use]
    pub fn annotation(mut self, name: &str, value: &str) -> Self {
        let annotations = self.0.metadata.annotations.get_or_insert_default();
        annotations.insert(name.to_owned(), value.to_owned());
        self
    }

    /// A label.
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        let labels = self.0.metadata.labels.get_or_insert_default();
        labels.insert(name.to_owned(), value.to_owned());
        self
    }

    /// The object.
    pub fn build(&self) -> Service {
        self.0.clone()
    }
}

/// In what state an endpoint is, as its three conditions say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// Ready and serving.
    Ready,
    /// Neither ready nor serving: it has failed its readiness probe, or not passed it yet.
    NotReady,
    /// Its pod is being deleted, and still passes its readiness probe.
    TerminatingServing,
    /// Its pod is being deleted and serves no more.
    Terminating,
    /// None of the conditions is there: to be read as ready.
    Unknown,
}

impl Endpoint {
    fn conditions(self) -> Option<EndpointConditions> {
        let [ready, serving, terminating] = match self {
            Self::Ready => [true, true, false],
            Self::NotReady => [false, false, false],
            Self::TerminatingServing => [false, true, true],
            Self::Terminating => [false, false, true],
            Self::Unknown => return None,
        };
        Some(EndpointConditions { ready: Some(ready), serving: Some(serving), terminating: Some(terminating) })
    }
}

/// An `EndpointSlice` to build. Its address type is that of its first endpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct SliceObject(EndpointSlice);

impl SliceObject {
    /// An empty slice `SERVICE-SUFFIX` of a service.
    pub fn of(service: &str, suffix: &str) -> Self {
        let mut metadata = metadata(&format!("{service}-{suffix}"));
        metadata.labels = Some(BTreeMap::from([(SERVICE_NAME.to_owned(), service.to_owned())]));
        Self(EndpointSlice { address_type: "IPv4".to_owned(), metadata, ..EndpointSlice::default() })
    }

    /// Another namespace than [`NAMESPACE`].
    #[must_use]
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.0.metadata.namespace = Some(namespace.to_owned());
        self
    }

    /// A TCP port; its name is that of the service's port.
    #[must_use]
    pub fn tcp(self, name: &str, port: u16) -> Self {
        self.port("TCP", name, port)
    }

    /// A UDP port; its name is that of the service's port.
    #[must_use]
    pub fn udp(self, name: &str, port: u16) -> Self {
        self.port("UDP", name, port)
    }

    fn port(mut self, protocol: &str, name: &str, port: u16) -> Self {
        self.0.ports.get_or_insert_default().push(EndpointPort {
            name: Some(name.to_owned()),
            port: Some(port.into()),
            protocol: Some(protocol.to_owned()),
            ..EndpointPort::default()
        });
        self
    }

    /// One more endpoint. The address is not checked: the point may be a wrong one.
    #[must_use]
    #[expect(clippy::needless_pass_by_value, reason = "so that texts and addresses are written alike")]
    pub fn endpoint(mut self, address: impl ToString, state: Endpoint) -> Self {
        let address = address.to_string();
        if self.0.endpoints.is_empty() && address.contains(':') {
            "IPv6".clone_into(&mut self.0.address_type);
        }
        self.0.endpoints.push(SliceEndpoint {
            addresses: vec![address],
            conditions: state.conditions(),
            ..SliceEndpoint::default()
        });
        self
    }

    /// Says which pod the last endpoint is.
    #[must_use]
    pub fn pod(mut self, name: &str) -> Self {
        let namespace = self.0.metadata.namespace.clone();
        if let Some(endpoint) = self.0.endpoints.last_mut() {
            endpoint.target_ref = Some(ObjectReference {
                kind: Some("Pod".to_owned()),
                name: Some(name.to_owned()),
                namespace,
                ..ObjectReference::default()
            });
        }
        self
    }

    /// One endpoint each, all in one state.
    #[must_use]
    pub fn endpoints<A: ToString>(self, addresses: impl IntoIterator<Item = A>, state: Endpoint) -> Self {
        let each = |slice: Self, address: A| slice.endpoint(address, state);
        addresses.into_iter().fold(self, each)
    }

    /// Whatever else it should say.
    #[must_use]
    pub fn change(mut self, change: impl FnOnce(&mut EndpointSlice)) -> Self {
        change(&mut self.0);
        self
    }

    /// The object.
    pub fn build(&self) -> EndpointSlice {
        self.0.clone()
    }
}

/// An object that can be written as a document of a YAML file.
pub trait Document {
    /// The object as plain data.
    ///
    /// # Errors
    /// Where it cannot be.
    fn to_json(&self) -> Result<serde_json::Value>;
}

impl<T: Serialize> Document for T {
    fn to_json(&self) -> Result<serde_json::Value> {
        Ok(serde_json::to_value(self)?)
    }
}

/// Several objects as the documents of one YAML file, as people write them.
///
/// # Errors
/// Where one cannot be serialised.
pub fn to_yaml(objects: &[&dyn Document]) -> Result<String> {
    let documents = objects.iter().map(|object| {
        let text = serde_saphyr::to_string(&object.to_json()?).context("YAML")?;
        Ok(format!("{}\n", text.trim_end()))
    });
    Ok(documents.collect::<Result<Vec<_>>>()?.join("---\n"))
}

fn metadata(name: &str) -> ObjectMeta {
    ObjectMeta { name: Some(name.to_owned()), namespace: Some(NAMESPACE.to_owned()), ..ObjectMeta::default() }
}
