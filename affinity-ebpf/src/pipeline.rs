//! A packet through a pipeline: from the kernel's context to its verdict, counted.

use affinity_common::{
    abi::tail_calls,
    dp::{parse, tc},
    family::{Family, V4, V6},
    reason::{Program, Reason, Verdict},
};
use aya_ebpf::{
    bindings::{__sk_buff, TC_ACT_SHOT},
    helpers::generated::bpf_redirect,
    programs::TcContext,
};
use aya_log_ebpf::debug;

use crate::{
    env::{self, Kernel},
    maps::TAIL_CALLS,
    skb::Skb,
};

/// `TCX_NEXT`, and `TC_ACT_UNSPEC` of clsact: whoever comes after us goes on with the packet.
pub const NEXT: i32 = -1;

/// A packet from a client.
#[inline(always)]
pub fn ingress(ctx: &TcContext) -> i32 {
    let mut reason = by_family(ctx.skb.skb, tc::ingress::<V4, _, _>, tc::ingress::<V6, _, _>);
    if reason.verdict() == Verdict::Reject {
        // SAFETY: the context is this program's own.
        unsafe { TAIL_CALLS.tail_call(ctx, tail_calls::REFUSE) };
        // There is no such program: only while the first of all daemons starts.
        reason = Reason::NoBackendDropped;
    }
    end(ctx, Program::Ingress, reason)
}

/// A packet from a client that is refused. In a program of its own, for the answer's parts want a stack of their own.
#[inline(always)]
pub fn refuse(ctx: &TcContext) -> i32 {
    let v4 = |_: &Kernel, packet: &mut Skb| tc::refuse::<V4, _>(packet);
    let v6 = |_: &Kernel, packet: &mut Skb| tc::refuse::<V6, _>(packet);
    let reason = by_family(ctx.skb.skb, v4, v6);
    end(ctx, Program::Ingress, reason)
}

/// A packet to a client.
#[inline(always)]
pub fn egress(ctx: &TcContext) -> i32 {
    let reason = by_family(ctx.skb.skb, tc::egress::<V4, _, _>, tc::egress::<V6, _, _>);
    end(ctx, Program::Egress, reason)
}

#[inline(always)]
fn by_family(
    skb: *mut __sk_buff,
    v4: impl FnOnce(&Kernel, &mut Skb) -> Reason,
    v6: impl FnOnce(&Kernel, &mut Skb) -> Reason,
) -> Reason {
    let mut packet = Skb::new(TcContext::new(skb));
    match parse::ethertype(&packet) {
        Some(V4::ETHERTYPE) => v4(&Kernel, &mut packet),
        Some(V6::ETHERTYPE) => v6(&Kernel, &mut packet),
        _ => Reason::NotIp,
    }
}

/// Counts the packet; returns what the kernel is to do with it.
#[inline(always)]
fn end(ctx: &TcContext, program: Program, reason: Reason) -> i32 {
    let bytes = ctx.len();
    env::count(program, reason, bytes);
    // The verifier takes this out where the log level given at load is below it.
    debug!(ctx, "{}: {} bytes: {}", program.name(), bytes, reason.name());
    match reason.verdict() {
        Verdict::Pass => NEXT,
        Verdict::Drop => TC_ACT_SHOT,
        Verdict::Reject => send_back(ctx),
    }
}

/// Sends the packet out by the interface that it has come by.
#[inline(always)]
fn send_back(ctx: &TcContext) -> i32 {
    // SAFETY: a field of the context.
    let interface = unsafe { (*ctx.skb.skb).ifindex };
    // SAFETY: takes two numbers.
    let verdict = unsafe { bpf_redirect(interface, 0) };
    i32::try_from(verdict).unwrap_or(TC_ACT_SHOT)
}
