//! A Service, as far as the datapath is concerned.

use std::net::IpAddr;

use affinity_common::types::{Port, Proto, Seconds};
use jiff::Timestamp;

use super::{Kind, ServiceName, ServicePortName, Text, store::Object};

/// A service with an address of its own: headless ones and `ExternalName`s are not for a service proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: ServiceName,
    /// When it was created: of two services on one address and port, the older one has it. `None` is younger than any.
    pub created: Option<Timestamp>,
    /// `spec.clusterIPs`, each once.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.sessionAffinity` and its configuration.
    pub session_affinity: SessionAffinity,
    /// What clients are kept on their backends for: the annotation `affinity.dev/session-affinity-scope`.
    pub affinity_scope: AffinityScope,
    /// `spec.internalTrafficPolicy`: of its cluster IPs.
    pub internal_policy: TrafficPolicy,
    /// The ports of protocols that are supported; name and protocol are unique, port number and protocol too.
    pub ports: Vec<ServicePort>,
}

/// Whether clients are kept on their backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionAffinity {
    /// Each connection is on its own.
    None,
    /// By the client's address.
    ClientIp {
        /// How long a client is remembered after its last packet: 1..=86400 s.
        timeout: Seconds,
    },
}

/// What a client's affinity is to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AffinityScope {
    /// A port of the service: kube-proxy's scope.
    #[default]
    Port,
    /// The service: a client reaches one pod on all of its ports.
    Service,
}

/// Which endpoints clients may be led to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrafficPolicy {
    /// All of the cluster.
    #[default]
    Cluster,
    /// Those on the client's node.
    Local,
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Where it stands in `spec.ports`, for errors that name it.
    pub index: usize,
    /// Its name; empty where it has none.
    pub name: Text,
    /// Its protocol.
    pub proto: Proto,
    /// The port that clients use.
    pub port: Port,
}

impl Service {
    /// The name of one of its ports.
    pub fn port_name(&self, port: &ServicePort) -> ServicePortName {
        ServicePortName { service: self.name.clone(), port: port.name.clone(), proto: port.proto }
    }
}

impl Object for Service {
    const KIND: Kind = Kind::Service;

    fn name(&self) -> &ServiceName {
        &self.name
    }
}
