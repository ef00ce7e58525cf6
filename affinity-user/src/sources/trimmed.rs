//! Nodes and Pods as far as they are read. Both are large, and what a service proxy has to know of them is little: the
//! rest is not even decoded.

use std::borrow::Cow;

use k8s_openapi::{api::core::v1 as core, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::Resource;
use serde::Deserialize;

/// A Node: its name and labels, its addresses and those of its pods, and whether it is about to go.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Node {
    /// Its metadata.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// What was asked for.
    pub spec: Option<NodeSpec>,
    /// What the kubelet says.
    pub status: Option<NodeStatus>,
}

/// What was asked for.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeSpec {
    /// What keeps pods off it.
    pub taints: Option<Vec<Taint>>,
}

/// What keeps pods off a node.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Taint {
    /// Its name.
    #[serde(default)]
    pub key: String,
}

/// What the kubelet says.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct NodeStatus {
    /// How the node is reached.
    pub addresses: Option<Vec<NodeAddress>>,
}

/// An address of a node, or a name.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct NodeAddress {
    /// `InternalIP`, `ExternalIP`, `Hostname` and others.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// The address.
    #[serde(default)]
    pub address: String,
}

/// A Pod: where it is, its addresses and how far it has come.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Pod {
    /// Its metadata.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// What was asked for.
    pub spec: Option<PodSpec>,
    /// What the kubelet says.
    pub status: Option<PodStatus>,
}

/// What was asked for.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodSpec {
    /// The node, once the pod is scheduled.
    pub node_name: Option<String>,
    /// Whether it is in the node's own network namespace.
    pub host_network: Option<bool>,
}

/// What the kubelet says.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    /// `Pending`, `Running`, `Succeeded`, `Failed`.
    pub phase: Option<String>,
    /// One address a family.
    #[serde(rename = "podIPs")]
    pub pod_ips: Option<Vec<PodIp>>,
}

/// An address of a pod.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct PodIp {
    /// The address.
    pub ip: Option<String>,
}

macro_rules! trimmed {
    ($($trimmed:ty = $whole:ty;)+) => {$(
        impl Resource for $trimmed {
            type DynamicType = ();
            type Scope = <$whole as Resource>::Scope;

            fn kind((): &()) -> Cow<'_, str> {
                <$whole>::kind(&())
            }

            fn group((): &()) -> Cow<'_, str> {
                <$whole>::group(&())
            }

            fn version((): &()) -> Cow<'_, str> {
                <$whole>::version(&())
            }

            fn plural((): &()) -> Cow<'_, str> {
                <$whole>::plural(&())
            }

            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    )+};
}

trimmed! {
    Node = core::Node;
    Pod = core::Pod;
}
