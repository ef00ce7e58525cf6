//! The custom resource `L2Announcement`.
#![expect(clippy::duplicated_attributes, reason = "columns have names and types of their own")]

use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use crate::selector::{LabelSelector, ServiceSelector};

/// Which services' addresses are answered for on links, by which nodes and on which of their interfaces.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "affinity.dev",
    version = "v1alpha1",
    kind = "L2Announcement",
    category = "affinity",
    derive = "PartialEq",
    doc = "Which services' addresses are answered for on links, by which nodes and on which of their interfaces.",
    printcolumn(name = "Interfaces", type_ = "string", json_path = ".spec.interfaces"),
    printcolumn(name = "LB IPs", type_ = "boolean", json_path = ".spec.loadBalancerIPs"),
    printcolumn(name = "External IPs", type_ = "boolean", json_path = ".spec.externalIPs"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct L2AnnouncementSpec {
    /// Which services; every one where this is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_selector: Option<ServiceSelector>,
    /// Which nodes; every one where this is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<LabelSelector>,
    /// Which interfaces, of those by which a node talks to what is outside of it: `*` and `?` stand for text, `!PATTERN` leaves
    /// out; all of them where there is no pattern.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub interfaces: Vec<String>,
    /// The services' external IPs.
    #[serde(default, rename = "externalIPs")]
    pub external_ips: bool,
    /// The services' load balancer IPs.
    #[serde(default = "by_default", rename = "loadBalancerIPs")]
    pub load_balancer_ips: bool,
}

const fn by_default() -> bool {
    true
}
