//! What a service is reached by.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, SocketAddr},
};

use affinity_common::types::{Port, Proto};

use super::{ListedAddress, Service, ServicePort};

/// An address, port and protocol that a service is reached by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendAddress {
    /// The address.
    pub addr: IpAddr,
    /// The port.
    pub port: Port,
    /// The protocol.
    pub proto: Proto,
}

impl fmt::Display for FrontendAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", SocketAddr::new(self.addr, self.port.get()), self.proto)
    }
}

/// Which of a service's addresses a frontend is at. Where a service says the same address and port twice, the first of
/// these counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FrontendKind {
    /// One of `spec.clusterIPs`.
    ClusterIp,
    /// One of `spec.externalIPs`.
    ExternalIp,
    /// One of `status.loadBalancer.ingress`.
    LoadBalancer,
    /// One of the node's own, on a port's `nodePort`.
    NodePort,
}

impl FrontendKind {
    /// Whether somebody has written the address into a list of the service's, where any address can be.
    pub(super) const fn is_listed(self) -> bool {
        matches!(self, Self::ExternalIp | Self::LoadBalancer)
    }
}

impl fmt::Display for FrontendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::ClusterIp => "ClusterIP",
            Self::ExternalIp => "ExternalIP",
            Self::LoadBalancer => "LoadBalancer",
            Self::NodePort => "NodePort",
        })
    }
}

/// What of a service says that there is a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Source {
    pub kind: FrontendKind,
    /// The port's index in `spec.ports`.
    pub port: u16,
    /// The address' index in the list that it is in; 0 where there is nothing to tell apart.
    pub address: u16,
}

impl Source {
    /// The path of the field.
    pub fn field(self) -> String {
        let Self { kind, port, address } = self;
        match kind {
            FrontendKind::ClusterIp => format!("spec.ports[{port}].port"),
            FrontendKind::NodePort => format!("spec.ports[{port}].nodePort"),
            FrontendKind::ExternalIp => format!("spec.externalIPs[{address}]"),
            FrontendKind::LoadBalancer => format!("status.loadBalancer.ingress[{address}].ip"),
        }
    }
}

impl Service {
    /// What a port of it is to be reached by, on a node with these addresses for node ports. Of a family that it has no
    /// cluster IP of there is nothing, as with kube-proxy.
    pub(super) fn frontends<'a>(
        &'a self,
        port: &'a ServicePort,
        node_ports: &'a BTreeSet<IpAddr>,
    ) -> impl Iterator<Item = (FrontendAddress, Source)> + 'a {
        let index = u16::try_from(port.index).unwrap_or(u16::MAX);
        let at = move |addr, number, kind, address| {
            let frontend = FrontendAddress { addr, port: number, proto: port.proto };
            (frontend, Source { kind, port: index, address })
        };
        let cluster = self.cluster_ips.iter().map(move |addr| at(*addr, port.port, FrontendKind::ClusterIp, 0));
        let external = self.listed().map(move |(kind, it)| at(it.addr, port.port, kind, it.index));
        let node_ports = port
            .node_port
            .into_iter()
            .flat_map(move |number| node_ports.iter().map(move |addr| at(*addr, number, FrontendKind::NodePort, 0)));
        let from_outside = external.chain(node_ports).filter(|(frontend, _)| self.has_family_of(frontend.addr));
        cluster.chain(from_outside)
    }

    /// The addresses that somebody has written into one of its lists, of the families that it has.
    pub(super) fn listed(&self) -> impl Iterator<Item = (FrontendKind, ListedAddress)> {
        let all = self.external.iter().flat_map(|external| {
            let ips = external.ips.iter().map(|it| (FrontendKind::ExternalIp, *it));
            ips.chain(external.load_balancer_ips.iter().map(|it| (FrontendKind::LoadBalancer, *it)))
        });
        all.filter(|(_, it)| self.has_family_of(it.addr))
    }

    /// What says that it has a listed address, if it has.
    pub(super) fn source_of(&self, addr: IpAddr) -> Option<Source> {
        let (kind, it) = self.listed().find(|(_, it)| it.addr == addr)?;
        Some(Source { kind, port: 0, address: it.index })
    }

    fn has_family_of(&self, addr: IpAddr) -> bool {
        self.cluster_ips.iter().any(|ip| ip.is_ipv4() == addr.is_ipv4())
    }
}
