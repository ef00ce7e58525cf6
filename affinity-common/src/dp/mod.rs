//! The datapath's logic: what is done with a packet, and nothing about how the kernel is asked to do it.
//!
//! The entry points of packets are [`tc::ingress`] and [`tc::egress`], those of sockets are in [`sock`]. Everything that they
//! touch comes by traits: [`Packet`], the bytes of one packet, or [`sock::Call`], what a socket asks for; and [`Env`], the
//! maps, the clock and the random numbers. `affinity-ebpf` has them
//! over the kernel's helpers, `testing` over plain collections with a fake clock and injected faults.

pub mod address;
pub mod affinity;
pub mod choice;
pub mod conntrack;
mod env;
pub mod fragment;
pub mod full;
pub mod hash;
pub mod icmp;
pub mod neighbour;
pub mod parse;
pub mod reject;
pub mod rewrite;
pub mod select;
pub mod slots;
pub mod snat;
pub mod sock;
pub mod step;
pub mod tc;

pub use env::{AffinityEntry, Checksum, ConntrackEntry, Env, Packet, Refused, RewriteError};
