//! Addresses for services of type `LoadBalancer`, from pools that are custom resources.
//!
//! [`pool`] is the resource; [`block`] the addresses that one of its blocks has; [`request`] what a service wants and has;
//! [`allocate`] the pure step from pools and services to who gets what, or why not. [`controller`] writes that into
//! services' and pools' status, in the one daemon that holds a Lease.

pub mod allocate;
pub mod block;
pub mod controller;
pub mod pool;
pub mod report;
pub mod request;
pub mod view;

/// The `loadBalancerClass` of services that are for this; those without a class are, too.
pub const CLASS: &str = "affinity.dev/affinity";
/// The annotation of a service that names the addresses that it wants, with commas between them, one a family.
pub const WANTED_ANNOTATION: &str = "affinity.dev/load-balancer-ips";
/// The condition of a service that says whether it has the addresses that it is to have.
pub const SERVICE_CONDITION: &str = "affinity.dev/LoadBalancerIPs";
