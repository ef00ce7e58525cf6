//! A packet through a pipeline: from the kernel's context to its verdict, counted.

use affinity_common::{
    dp::{parse, tc},
    family::{Family, V4, V6},
    reason::{Program, Reason, Verdict},
};
use aya_ebpf::{bindings::TC_ACT_SHOT, programs::TcContext};
use aya_log_ebpf::debug;

use crate::{
    env::{self, Kernel},
    skb::Skb,
};

/// `TCX_NEXT`, and `TC_ACT_UNSPEC` of clsact: whoever comes after us goes on with the packet.
pub const NEXT: i32 = -1;

/// A packet from a client.
#[inline(always)]
pub fn ingress(ctx: TcContext) -> i32 {
    run(ctx, Program::Ingress, tc::ingress::<V4, _, _>, tc::ingress::<V6, _, _>)
}

/// A packet to a client.
#[inline(always)]
pub fn egress(ctx: TcContext) -> i32 {
    run(ctx, Program::Egress, tc::egress::<V4, _, _>, tc::egress::<V6, _, _>)
}

#[inline(always)]
fn run(
    ctx: TcContext,
    program: Program,
    v4: impl FnOnce(&Kernel, &mut Skb) -> Reason,
    v6: impl FnOnce(&Kernel, &mut Skb) -> Reason,
) -> i32 {
    let bytes = ctx.len();
    let mut packet = Skb::new(ctx);
    let reason = match parse::ethertype(&packet) {
        Some(V4::ETHERTYPE) => v4(&Kernel, &mut packet),
        Some(V6::ETHERTYPE) => v6(&Kernel, &mut packet),
        _ => Reason::NotIp,
    };
    env::count(program, reason, bytes);
    // The verifier takes this out where the log level given at load is below it.
    debug!(packet.context(), "{}: {} bytes: {}", program.name(), bytes, reason.name());
    match reason.verdict() {
        Verdict::Pass => NEXT,
        Verdict::Drop => TC_ACT_SHOT,
    }
}
