//! Services' addresses on the node's links: one node answers for each, by ARP and neighbour discovery.
//!
//! [`resource`] is the custom resource that says which addresses, on which nodes and interfaces.

pub mod resource;
