//! A packet through a pipeline: from the kernel's context to its verdict, counted.

use affinity_common::{
    abi::tail_calls::Stage,
    dp::{neighbour, parse, step::Step, tc},
    family::{Family, V4, V6},
    reason::{Program, Reason, Verdict},
};
use aya_ebpf::{
    bindings::TC_ACT_SHOT,
    helpers::generated::{bpf_redirect, bpf_redirect_neigh},
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

/// What a function, generic over the family, does with a packet of its family. A macro, for a closure need not be inlined.
/// What has none ends, but for what else is named.
macro_rules! by_family {
    ($ctx:ident, $function:path $(, $more:expr)? $(; $other:pat => $step:expr)?) => {{
        use $function as function;
        let mut packet = Skb::new(TcContext::new($ctx.skb.skb));
        match parse::ethertype(&packet) {
            Some(V4::ETHERTYPE) => function::<V4, _, _>(&Kernel, &mut packet $(, $more)?),
            Some(V6::ETHERTYPE) => function::<V6, _, _>(&Kernel, &mut packet $(, $more)?),
            $($other => $step,)?
            _ => Step::Ends(Reason::NotIp),
        }
    }};
}

/// A packet from a client.
#[inline(always)]
pub fn ingress(ctx: &TcContext) -> i32 {
    let step = by_family!(ctx, tc::ingress; Some(neighbour::ARP) => Step::HandsOver(Stage::Arp));
    end(ctx, Program::Ingress, step)
}

/// A packet to a client.
#[inline(always)]
pub fn egress(ctx: &TcContext) -> i32 {
    end(ctx, Program::Egress, by_family!(ctx, tc::egress))
}

/// A packet that one of those has handed over.
#[inline(always)]
pub fn go_on(ctx: &TcContext, stage: Stage) -> i32 {
    if stage == Stage::Arp {
        let mut packet = Skb::new(TcContext::new(ctx.skb.skb));
        return end(ctx, stage.of(), Step::Ends(neighbour::arp(&Kernel, &mut packet)));
    }
    end(ctx, stage.of(), by_family!(ctx, tc::go_on, stage))
}

/// Hands the packet over, or counts it; returns what the kernel is to do with it.
#[inline(always)]
fn end(ctx: &TcContext, program: Program, step: Step) -> i32 {
    let reason = match step {
        Step::Ends(reason) => reason,
        Step::HandsOver(stage) => {
            // SAFETY: the context is this program's own.
            unsafe { TAIL_CALLS.tail_call(ctx, stage as u32) };
            stage.without()
        }
    };
    let bytes = ctx.len();
    env::count(program, reason, bytes);
    // The verifier takes this out where the log level given at load is below it.
    debug!(ctx, "{}: {} bytes: {}", program.name(), bytes, reason.name());
    match reason.verdict() {
        Verdict::Pass => NEXT,
        Verdict::Drop => TC_ACT_SHOT,
        Verdict::SendBack => send_back(ctx, program),
    }
}

/// Sends the packet out by the interface that it has come by.
#[inline(always)]
fn send_back(ctx: &TcContext, program: Program) -> i32 {
    let skb = ctx.skb.skb;
    let verdict = if program == Program::Egress {
        // SAFETY: a field of the context.
        let interface = unsafe { (*skb).ingress_ifindex };
        // The frame is addressed to who is behind the interface that it was about to leave by: the kernel finds its neighbour.
        // SAFETY: takes numbers, and no next hop of ours.
        unsafe { bpf_redirect_neigh(interface, core::ptr::null_mut(), 0, 0) }
    } else {
        // SAFETY: a field of the context.
        let interface = unsafe { (*skb).ifindex };
        // SAFETY: takes two numbers.
        unsafe { bpf_redirect(interface, 0) }
    };
    i32::try_from(verdict).unwrap_or(TC_ACT_SHOT)
}
