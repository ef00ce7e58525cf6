//! The Affinity datapath: two TC programs for a client's interface.
//!
//! Thin on purpose: what is done with a packet is in `affinity_common::dp`; here are the entry points, the maps and the
//! kernel's helpers behind its traits. All `unsafe` of the datapath is in [`env`] and [`skb`].
#![no_std]
#![no_main]
#![expect(missing_docs, reason = "the macros of aya make public functions beside the documented ones")]
#![feature(asm_experimental_arch)]

mod env;
mod maps;
mod skb;

use affinity_common::{
    dp::{parse, tc},
    family::{Family, V4},
    reason::{Program, Reason, Verdict},
};
use aya_ebpf::{bindings::TC_ACT_SHOT, macros::classifier, programs::TcContext};
use aya_log_ebpf::debug;

use crate::{env::Kernel, skb::Skb};

/// `TCX_NEXT`, and `TC_ACT_UNSPEC` of clsact: whoever comes after us goes on with the packet.
const NEXT: i32 = -1;

/// Packets from the clients on this interface.
#[classifier]
pub fn affinity_ingress(ctx: TcContext) -> i32 {
    run(ctx, Program::Ingress, |packet, ethertype| match ethertype {
        V4::ETHERTYPE => tc::ingress::<V4, _, _>(&Kernel, packet),
        _ => Reason::NotIp,
    })
}

/// Packets to the clients on this interface.
#[classifier]
pub fn affinity_egress(ctx: TcContext) -> i32 {
    run(ctx, Program::Egress, |packet, ethertype| match ethertype {
        V4::ETHERTYPE => tc::egress::<V4, _, _>(&Kernel, packet),
        _ => Reason::NotIp,
    })
}

#[inline(always)]
fn run(ctx: TcContext, program: Program, pipeline: impl FnOnce(&mut Skb, [u8; 2]) -> Reason) -> i32 {
    let bytes = ctx.len();
    let mut packet = Skb::new(ctx);
    let reason = match parse::ethertype(&packet) {
        Some(ethertype) => pipeline(&mut packet, ethertype),
        None => Reason::NotIp,
    };
    env::count(program, reason, bytes);
    // The verifier takes this out where the log level given at load is below it.
    debug!(packet.context(), "{}: {} bytes: {}", program.name(), bytes, reason.name());
    match reason.verdict() {
        Verdict::Pass => NEXT,
        Verdict::Drop => TC_ACT_SHOT,
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The helpers that we call are open to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
