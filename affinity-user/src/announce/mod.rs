//! Services' addresses on the node's links: one node answers for each, by ARP and neighbour discovery.
//!
//! [`resource`] is the custom resource that says which addresses, on which nodes and interfaces; [`candidates`] the pure step from
//! those to what this node may answer for. For each address one of the nodes that may holds a Lease: the [`agent`] takes part
//! in that. The [`announcer`] writes what is won into the maps from which the programs on the uplinks answer, and tells
//! neighbours unasked, by [`frames`] on a [`link`].
//!
//! While a daemon is away its node goes on answering for what it held; when that is longer than the Lease lasts, another node
//! does so too.

pub mod agent;
pub mod announcer;
pub mod candidates;
pub mod frames;
pub mod link;
pub mod resource;
pub mod view;

/// What the Leases of addresses are for: the value of [`crate::lease::LABEL`].
pub const PURPOSE: &str = "l2";
/// The annotation of such a Lease that has the address.
pub const ADDRESS_ANNOTATION: &str = "affinity.dev/address";
/// The annotation that has the service, `NAMESPACE/NAME`.
pub const SERVICE_ANNOTATION: &str = "affinity.dev/service";
/// The annotation that has the names of the holder's interfaces, with commas between them.
pub const INTERFACES_ANNOTATION: &str = "affinity.dev/interfaces";
