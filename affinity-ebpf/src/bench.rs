//! The datapath's pipelines for measuring: `BPF_PROG_TEST_RUN` runs a program over and over on one packet, so a wrapper
//! makes the packet anew before each run. What a pipeline costs is its program's time less that of [`bench_wrapper`].
//!
//! A first packet is one only where its connection is not known yet. Either each run has another source, and meets
//! table rows that no cache holds, as on a busy node; or the wrapper forgets the connection of the run before, and a stop
//! watch in it leaves that out.
//!
//! The frame brings what the wrapper needs in its payload, so that it needs no map: see [`Run`].
#![no_std]
#![no_main]
#![expect(missing_docs, reason = "the macros of aya make public functions beside the documented ones")]
#![expect(clippy::cast_possible_truncation, reason = "a word is taken apart into its halves")]
#![expect(clippy::needless_pass_by_value, reason = "the kernel's context, as the macro passes it")]
#![feature(asm_experimental_arch)]

mod clock;
mod env;
mod maps;
mod object;
mod pipeline;
mod skb;
mod stages;
mod wire;

use affinity_common::{
    abi::{affinity::AffinityKey, conntrack::ConntrackKey, frontends::FrontendKey},
    dp::{
        ConntrackEntry as _, Env,
        parse::{self, Headers, Parse as _},
    },
    family::{Family, V4},
};
use aya_ebpf::{bindings::__sk_buff, helpers::bpf_ktime_get_ns, macros::classifier, programs::TcContext};

use crate::{
    env::Kernel,
    maps::Maps as _,
    pipeline::NEXT,
    skb::{Skb, bounds},
    wire::{load_u16, load_u32, load_u64, store_u16, store_u32, store_u64},
};

/// What calling a program costs.
#[classifier]
pub fn bench_empty(_ctx: TcContext) -> i32 {
    NEXT
}

/// What reading the headers costs.
#[classifier]
pub fn bench_parse(ctx: TcContext) -> i32 {
    let packet = Skb::new(ctx);
    if parse::ethertype(&packet) != Some(V4::ETHERTYPE) {
        return NEXT;
    }
    // The result depends on every field, so that none is left out.
    let mut h = Headers::<V4>::default();
    if V4::parse(&packet, &mut h).is_err() {
        return NEXT;
    }
    let ports = i32::from(h.src_port.get() ^ h.dst_port.get());
    i32::from_ne_bytes(h.src) ^ i32::from_ne_bytes(h.dst) ^ ports ^ i32::from(h.flags) ^ i32::from(h.proto.number)
}

/// What the wrapper costs.
#[classifier]
pub fn bench_wrapper(ctx: TcContext) -> i32 {
    let run = Run::start(ctx.skb.skb);
    let verdict = NEXT;
    run.end();
    verdict
}

/// The wrapper around the ingress pipeline.
#[classifier]
pub fn bench_ingress(ctx: TcContext) -> i32 {
    let run = Run::start(ctx.skb.skb);
    let verdict = pipeline::ingress(&ctx);
    run.end();
    verdict
}

/// The wrapper around the egress pipeline.
#[classifier]
pub fn bench_egress(ctx: TcContext) -> i32 {
    let run = Run::start(ctx.skb.skb);
    let verdict = pipeline::egress(&ctx);
    run.end();
    verdict
}

const IP: usize = 14;
const TRANSPORT: usize = IP + 20;
const PAYLOAD: usize = TRANSPORT + 20;
const END: usize = PAYLOAD + 40;

/// A run of a pipeline, by what the packet's payload says.
///
/// Behind Ethernet, an IPv4 header of 20 bytes and 20 more bytes (all of a TCP header), the frame carries, without
/// alignment:
///
/// | bytes | what | order |
/// |---|---|---|
/// | 8 | the source: address * 2^16 + port | the machine's |
/// | 8 | what is added to the source for each run: 0, 1 (another port) or 2^16 (another address) | the machine's |
/// | 4, 2 | the destination: address, port | the wire's |
/// | 2 | the IPv4 header's checksum | the wire's |
/// | 2, 2 | the words that the checksums of UDP and of TCP lie in | the wire's |
/// | 4 | what is forgotten before each run: 0 nothing, 1 the connection, 2 the client too | the machine's |
/// | 8 | where anything is forgotten: the pipeline's nanoseconds in all runs | the machine's |
struct Run {
    skb: *mut __sk_buff,
    /// When the pipeline started, where it is timed.
    start: Option<u64>,
}

impl Run {
    /// Makes the packet's addresses, ports and checksums what its payload says, having stepped its source, and forgets
    /// what is to be forgotten.
    #[inline(always)]
    fn start(skb: *mut __sk_buff) -> Self {
        let forgets = restore(&TcContext::new(skb)).unwrap_or(0);
        if forgets != 0 {
            forget(skb, forgets > 1);
        }
        Self { skb, start: (forgets != 0).then(nanos) }
    }

    /// Adds the pipeline's time to the packet's stop watch, where it is timed.
    #[inline(always)]
    fn end(self) {
        let Some(start) = self.start else { return };
        let ran = nanos() - start;
        let ctx = TcContext::new(self.skb);
        let (frame, end) = bounds(&ctx);
        let watch = frame + PAYLOAD + 32;
        if watch + size_of::<u64>() <= end {
            store_u64(watch, load_u64(watch).wrapping_add(ran));
        }
    }
}

#[inline(always)]
fn nanos() -> u64 {
    // SAFETY: takes nothing, returns a number.
    unsafe { bpf_ktime_get_ns() }
}

/// Makes the packet anew; returns what is forgotten before each run.
#[inline(always)]
fn restore(ctx: &TcContext) -> Option<u32> {
    let (frame, end) = bounds(ctx);
    if frame + END > end {
        return None;
    }
    let source = load_u64(frame + PAYLOAD).wrapping_add(load_u64(frame + PAYLOAD + 8));
    store_u64(frame + PAYLOAD, source);
    let destination_port = load_u16(frame + PAYLOAD + 20);
    store_u16(frame + IP + 10, load_u16(frame + PAYLOAD + 22));
    store_u32(frame + IP + 12, ((source >> 16) as u32).to_be());
    store_u32(frame + IP + 16, load_u32(frame + PAYLOAD + 16));
    store_u32(frame + TRANSPORT, u32::from((source as u16).to_be()) | u32::from(destination_port) << 16);
    store_u16(frame + TRANSPORT + 6, load_u16(frame + PAYLOAD + 24));
    store_u16(frame + TRANSPORT + 16, load_u16(frame + PAYLOAD + 26));
    Some(load_u32(frame + PAYLOAD + 28))
}

/// Forgets the connection that the packet is the first of, and its client where that is wanted.
#[inline(always)]
fn forget(skb: *mut __sk_buff, client_too: bool) {
    let mut h = Headers::<V4>::default();
    if V4::parse(&Skb::new(TcContext::new(skb)), &mut h).is_err() {
        return;
    }
    let forward = ConntrackKey::<V4>::forward(h.src, h.src_port, h.dst, h.dst_port, h.proto);
    if let Some(entry) = Kernel.conntrack(&forward) {
        let held = entry.load();
        let reverse = ConntrackKey::<V4>::reverse(h.src, h.src_port, held.addr, held.port, h.proto);
        Kernel.conntrack_remove(&reverse);
        Kernel.conntrack_remove(&forward);
    }
    if client_too && let Some(frontend) = Kernel.frontend(&FrontendKey::<V4>::new(h.dst, h.dst_port, h.proto)) {
        // There is none before the first run.
        let _ = V4::affinity().remove(AffinityKey::new(h.src, frontend.service, frontend.scope));
    }
}
