//! Where the daemon is, and whose clients it serves.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::model::{Model, Pod};

/// The node that the daemon is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub name: String,
    /// Whether there is a Node object of that name, as far as it can be had.
    pub known: bool,
    /// Its zone, where it has one.
    pub zone: Option<String>,
    /// Whether it is about to go, by its Node: `/healthz` says so to load balancers.
    #[serde(default)]
    pub going: bool,
}

impl NodeStatus {
    /// The node that a model is of.
    pub fn of(model: &Model) -> Self {
        let node = model.node();
        Self {
            name: model.node_name().to_owned(),
            known: node.is_some(),
            zone: node.and_then(|node| node.zone.as_deref()).map(str::to_owned),
            going: node.is_some_and(|node| node.is_going),
        }
    }
}

/// What clients are recognised by: what the daemon was told at its start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientsStatus {
    /// `--interface`: see [`crate::loader::interfaces::Patterns`].
    pub interfaces: Vec<String>,
    /// `--netns-dir`.
    pub netns_directories: Vec<PathBuf>,
    /// `--socket-lb-pods`: whether the sockets of pods that say nothing are served.
    pub pods_are_served: bool,
}

/// A pod of the node that has not finished.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodStatus {
    /// `namespace/name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
    /// `status.podIPs`.
    pub addresses: Vec<IpAddr>,
    /// Whether it is in the node's network namespace.
    pub host_network: bool,
    /// Its annotation `affinity.dev/socket-lb`, as far as it has one.
    pub socket_lb: Option<bool>,
}

impl From<&Pod> for PodStatus {
    fn from(pod: &Pod) -> Self {
        Self {
            name: pod.name.to_string(),
            uid: pod.uid.to_string(),
            addresses: pod.addresses.clone(),
            host_network: pod.host_network,
            socket_lb: pod.socket_lb,
        }
    }
}
