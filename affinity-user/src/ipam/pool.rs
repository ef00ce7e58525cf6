//! The custom resource `LoadBalancerPool`.
#![expect(clippy::duplicated_attributes, reason = "columns have names and types of their own")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::selector::ServiceSelector;

/// Addresses that services of type `LoadBalancer` are given.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "affinity.dev",
    version = "v1alpha1",
    kind = "LoadBalancerPool",
    shortname = "lbpool",
    category = "affinity",
    status = "LoadBalancerPoolStatus",
    derive = "PartialEq",
    doc = "Addresses that services of type LoadBalancer are given.",
    printcolumn(name = "Blocks", type_ = "string", json_path = ".spec.blocks"),
    printcolumn(name = "IPv4 used", type_ = "integer", json_path = ".status.ipv4.used"),
    printcolumn(name = "IPv4 available", type_ = "integer", json_path = ".status.ipv4.available"),
    printcolumn(name = "IPv6 used", type_ = "integer", json_path = ".status.ipv6.used"),
    printcolumn(name = "IPv6 available", type_ = "integer", json_path = ".status.ipv6.available"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].status"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct LoadBalancerPoolSpec {
    /// What it is made of: CIDRs and ranges, of either family.
    #[schemars(length(min = 1, max = 64))]
    pub blocks: Vec<Block>,
    /// Which services are given its addresses; every one where this is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_selector: Option<ServiceSelector>,
    /// No more addresses are given; those that services have they keep.
    #[serde(default)]
    pub disabled: bool,
}

/// Addresses in a row.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[x_kube(
    validation = Rule::new("has(self.cidr) ? !has(self.start) && !has(self.stop) : has(self.start) && has(self.stop)")
        .message("either cidr, or start and stop")
)]
pub struct Block {
    /// `192.0.2.0/24`: all of them but, of IPv4 ones, the first and the last one, unless there are two or fewer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    #[x_kube(validation = Rule::new("isCIDR(self)").message("no CIDR"))]
    pub cidr: Option<String>,
    /// The first address of a range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    #[x_kube(validation = Rule::new("isIP(self)").message("no IP address"))]
    pub start: Option<String>,
    /// Its last address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    #[x_kube(validation = Rule::new("isIP(self)").message("no IP address"))]
    pub stop: Option<String>,
}

/// What has become of a pool.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LoadBalancerPoolStatus {
    /// Its IPv4 addresses.
    #[serde(default)]
    pub ipv4: Usage,
    /// Its IPv6 addresses.
    #[serde(default)]
    pub ipv6: Usage,
    /// Addresses that are being given: a service's status has them next. Who gives addresses writes them here first, and is
    /// refused where another has done so since it looked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reserved: Vec<Reservation>,
    /// `Ready`: addresses are given. `Conflict`: an older pool has some of the addresses, so none of this one is given.
    /// `Outside`: services have addresses that were this pool's, by all appearances, and are no pool's any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "conditions_schema")]
    pub conditions: Vec<Condition>,
}

/// How many addresses of a family there are; a number that has no room is the largest one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Usage {
    /// All of them.
    pub total: i64,
    /// Those that a service has.
    pub used: i64,
    /// Those that no service has.
    pub available: i64,
}

/// An address that is being given to a service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub struct Reservation {
    /// The address.
    pub ip: String,
    /// The service's namespace.
    pub namespace: String,
    /// The service's name.
    pub name: String,
}

/// `metav1.Condition`, by the fields that it has.
fn conditions_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "required": ["lastTransitionTime", "message", "reason", "status", "type"],
            "properties": {
                "type": { "type": "string" },
                "status": { "type": "string", "enum": ["True", "False", "Unknown"] },
                "reason": { "type": "string" },
                "message": { "type": "string" },
                "observedGeneration": { "type": "integer", "format": "int64" },
                "lastTransitionTime": { "type": "string", "format": "date-time" },
            },
        },
    })
}
