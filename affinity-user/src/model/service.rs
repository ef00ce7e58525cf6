//! A Service, as far as the datapath is concerned.

use std::net::IpAddr;

use affinity_common::{
    family::Family,
    types::{Port, Proto, Seconds},
};
use ipnet::IpNet;
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
    /// How it is reached from outside, if it is: most are not.
    pub external: Option<Box<External>>,
}

/// How a service is reached from outside, beside its ports' `nodePort`s.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct External {
    /// `spec.externalIPs`, each once.
    pub ips: Vec<ListedAddress>,
    /// `status.loadBalancer.ingress[].ip`, each once, but for those of `ipMode: Proxy`.
    pub load_balancer_ips: Vec<ListedAddress>,
    /// `spec.externalTrafficPolicy`: of node ports and these addresses.
    pub policy: TrafficPolicy,
    /// `spec.loadBalancerSourceRanges`: who is let in at [`Self::load_balancer_ips`].
    pub source_ranges: SourceRanges,
    /// `spec.healthCheckNodePort` of a load balancer's service with the policy `Local`.
    pub health_check_port: Option<Port>,
}

/// Who is let in at an address: of a family that no range is of, everybody is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceRanges {
    /// Those that make sense, in order, each once.
    pub ranges: Vec<IpNet>,
    /// Whether there are some that don't. Nobody knows of which family they were to be, so without another range neither
    /// family is open to everybody.
    pub has_faulty: bool,
}

impl SourceRanges {
    /// Whether some clients of a family alone are let in, or none.
    pub fn restrict<F: Family>(&self) -> bool {
        self.has_faulty || self.ranges.iter().any(|range| F::from_ip(range.network()).is_some())
    }
}

/// An address of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListedAddress {
    /// Where it stands in the list, for errors that name it.
    pub index: u16,
    /// The address.
    pub addr: IpAddr,
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
    /// The port that they use at the node's own addresses, if there is one.
    pub node_port: Option<Port>,
}

impl Service {
    /// Whether it has ports at the node's own addresses.
    pub fn has_node_ports(&self) -> bool {
        self.ports.iter().any(|port| port.node_port.is_some())
    }

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
