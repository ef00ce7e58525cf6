//! Sticky Kubernetes Services in eBPF, the user-space side: what the `affinity` daemon and its tools are made of.
//!
//! A change goes from stage to stage: [`sources`] turn objects into the terms of the [`model`], which knows what they
//! touch; [`plan`] says what the datapath ought to hold for one service; [`reconcile`] brings the [`tables`], which are
//! the BPF maps, to that with as few writes as it takes. The [`loader`] makes the maps, loads the programs and attaches
//! them. The [`daemon`] is these, wired together.
//!
//! Addresses for services of type `LoadBalancer` are given by [`ipam`], and [`announce`] says which node answers for them.
//!
//! What the maps hold is read by [`view`], and what happens by [`monitor`]; [`cli`] prints both.

pub mod announce;
pub mod causes;
pub mod cli;
pub mod collector;
pub mod crds;
pub mod daemon;
pub mod duties;
pub mod flush;
pub mod health;
pub mod health_checks;
pub mod ipam;
pub mod lease;
pub mod listen;
pub mod loader;
pub mod metrics;
pub mod mirror;
pub mod model;
pub mod monitor;
pub mod node_ports;
pub mod object;
mod packed;
pub mod plan;
pub mod reconcile;
pub mod selector;
pub mod server;
pub mod sockets;
pub mod sources;
pub mod status;
mod syscall;
pub mod tables;
pub mod view;
