//! An `EndpointSlice`: some of the endpoints behind a service.

use std::{net::IpAddr, sync::Arc};

use affinity_common::types::{Port, Proto};

use super::{Endpoints, Hints, Kind, ServiceName, SliceName, Text, store::Object};

/// A slice of a service's endpoints, all of one address family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Its name.
    pub name: SliceName,
    /// The service that it is for, by the label `kubernetes.io/service-name`.
    pub service: ServiceName,
    /// The target ports of all its endpoints.
    pub ports: Vec<TargetPort>,
    /// The endpoints.
    pub endpoints: Endpoints,
}

/// Where the endpoints of a slice serve the service port of this name and protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetPort {
    /// The service port's name; empty where it has none.
    pub name: Text,
    /// Its protocol.
    pub proto: Proto,
    /// The port on the pod.
    pub port: Port,
}

/// One endpoint: usually a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its address. The API gives no meaning to further ones.
    pub address: IpAddr,
    /// Takes new connections.
    pub ready: bool,
    /// Answers, whether it terminates or not.
    pub serving: bool,
    /// Is about to go.
    pub terminating: bool,
    /// The node that it is on, where that is known; in the model, only where it is this one.
    pub node_name: Option<Text>,
    /// Where it is meant to be used, if anything is said of that; endpoints of a slice share what is the same.
    pub hints: Option<Arc<Hints>>,
    /// The name of the pod, where there is one.
    pub target: Option<Text>,
}

impl EndpointSlice {
    /// Whether the node's zone may matter to its endpoints.
    pub fn has_zone_hints(&self) -> bool {
        self.endpoints.have_zone_hints()
    }
}

impl Object for EndpointSlice {
    const KIND: Kind = Kind::EndpointSlice;

    fn name(&self) -> &SliceName {
        &self.name
    }
}
