//! The Affinity datapath: two TC programs for a client's interface and those that they hand over to, and the programs of
//! sockets.
//!
//! Thin on purpose: what is done with a packet is in `affinity_common::dp`; here are the entry points, the maps and the
//! kernel's helpers behind its traits. All `unsafe` of the datapath is in [`env`], [`skb`] and
//! [`sock`].
#![no_std]
#![no_main]
#![expect(missing_docs, reason = "the macros of aya make public functions beside the documented ones")]
#![expect(clippy::needless_pass_by_value, reason = "the kernel's context, as the macro passes it")]
#![feature(asm_experimental_arch)]

mod clock;
mod env;
mod maps;
mod object;
mod pipeline;
mod skb;
mod sock;
mod stages;
mod touch;

use aya_ebpf::{macros::classifier, programs::TcContext};

/// Packets from the clients on this interface.
#[classifier]
pub fn affinity_ingress(ctx: TcContext) -> i32 {
    pipeline::ingress(&ctx)
}

/// Packets to the clients on this interface.
#[classifier]
pub fn affinity_egress(ctx: TcContext) -> i32 {
    pipeline::egress(&ctx)
}
