//! What the Affinity datapath and its user space agree on.
//!
//! - [`abi`]: the layout of every BPF map, one file a map.
//! - [`dp`]: the datapath's logic, generic over the address [`family`] and over the environment (maps, clock, random,
//!   packet bytes) that it runs in: the kernel's, by `affinity-ebpf`, or a test's, by `testing`.
//! - [`reason`]: what can become of a packet, and the verdict that each reason means.
//!
//! No aya and no Kubernetes here, and no allocation outside `testing`.
#![cfg_attr(not(any(test, feature = "testing")), no_std)]
#![forbid(unsafe_op_in_unsafe_fn)]

pub mod abi;
pub mod dp;
pub mod family;
mod pod;
pub mod reason;
#[cfg(feature = "testing")]
pub mod testing;
pub mod types;
