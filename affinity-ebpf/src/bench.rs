//! The datapath's pipelines for measuring: `BPF_PROG_TEST_RUN` runs a program over and over on one packet, so a wrapper
//! makes the packet anew before each run. What a pipeline costs is its program's time less that of the wrapper alone.
//!
//! A first packet is one only where its connection is not known yet. Either each run has another source, and meets
//! table rows that no cache holds, as on a busy node; or the wrapper forgets the connection of the run before, and a stop
//! watch in it leaves that out.
//!
//! The frame brings what the wrapper needs in its payload, so that it asks no map: see [`Run`].
#![no_std]
#![no_main]
#![expect(missing_docs, reason = "the macros of aya make public functions beside the documented ones")]
#![expect(clippy::cast_possible_truncation, reason = "a word is taken apart into its halves")]
#![feature(asm_experimental_arch)]

mod clock;
mod env;
mod maps;
mod object;
mod pipeline;
mod skb;
mod stages;
mod wire;

use core::marker::PhantomData;

use affinity_common::{
    abi::{affinity::AffinityKey, conntrack::ConntrackKey, tail_calls::Stage, work::Work},
    dp::{
        Env,
        parse::{self, Headers, Parse},
    },
    family::{Family as _, V4, V6},
};
use aya_ebpf::{
    bindings::__sk_buff,
    helpers::bpf_ktime_get_ns,
    macros::{cgroup_sock_addr, classifier},
    programs::{SockAddrContext, TcContext},
};
use bytemuck::Pod;

use crate::{
    env::Kernel,
    maps::Maps,
    pipeline::NEXT,
    skb::{Skb, bounds},
    wire::{load_u16, load_u32, load_u64, store_u16, store_u32, store_u64},
};

/// What calling a program costs.
#[classifier]
pub fn bench_empty(_ctx: TcContext) -> i32 {
    NEXT
}

/// The programs of a family: reading the headers, the wrapper alone, and the wrapper around each pipeline.
macro_rules! programs {
    ($($family:ident: $parse:ident, $wrapper:ident, $ingress:ident, $egress:ident;)+) => {$(
        /// What reading the headers costs.
        #[classifier]
        pub fn $parse(ctx: TcContext) -> i32 {
            read::<$family>(ctx);
            NEXT
        }

        /// What the wrapper costs.
        #[classifier]
        pub fn $wrapper(ctx: TcContext) -> i32 {
            Run::<$family>::start(ctx.skb.skb).end();
            NEXT
        }

        /// The wrapper around the ingress pipeline.
        #[classifier]
        pub fn $ingress(ctx: TcContext) -> i32 {
            let run = Run::<$family>::start(ctx.skb.skb);
            let verdict = pipeline::ingress(&ctx);
            run.end();
            verdict
        }

        /// The wrapper around the egress pipeline.
        #[classifier]
        pub fn $egress(ctx: TcContext) -> i32 {
            let run = Run::<$family>::start(ctx.skb.skb);
            let verdict = pipeline::egress(&ctx);
            run.end();
            verdict
        }
    )+};
}

programs! {
    V4: bench_parse4, bench_wrapper4, bench_ingress4, bench_egress4;
    V6: bench_parse6, bench_wrapper6, bench_ingress6, bench_egress6;
}

/// As `affinity_snat`, in whose place it is: ends the run that the program before it has begun.
#[classifier]
pub fn bench_snat(ctx: TcContext) -> i32 {
    let skb = ctx.skb.skb;
    let verdict = pipeline::go_on(&ctx, Stage::Snat);
    match parse::ethertype(&Skb::new(ctx)) {
        Some(V4::ETHERTYPE) => Run::<V4>::resume(skb).end(),
        Some(V6::ETHERTYPE) => Run::<V6>::resume(skb).end(),
        _ => {}
    }
    verdict
}

/// What calling a program of a socket costs, at each hook that is measured.
macro_rules! empty_programs {
    ($($program:ident($hook:ident),)+) => {$(
        /// Lets the socket have its way.
        #[cgroup_sock_addr($hook)]
        pub fn $program(_ctx: SockAddrContext) -> i32 {
            1
        }
    )+};
}

empty_programs! {
    bench_connect4(connect4),
    bench_connect6(connect6),
    bench_sendmsg4(sendmsg4),
    bench_sendmsg6(sendmsg6),
}

#[inline(always)]
fn read<F: Maps + Parse>(ctx: TcContext) {
    let packet = Skb::new(ctx);
    if parse::ethertype(&packet) != Some(F::ETHERTYPE) {
        return;
    }
    let mut h = Headers::<F>::default();
    if F::parse(&packet, &mut h).is_ok() {
        // Every field is wanted, so that none is left out.
        <Kernel as Env<F>>::in_memory(&Kernel, &h);
    }
}

/// Where a frame's parts are.
const IP: usize = 14;
/// In the payload, the stop watch.
const WATCH: usize = 32;
/// In the payload, when the pipeline started.
const START: usize = 68;
/// In the payload, the keys of what is forgotten.
const KEYS: usize = 76;

/// What of the frame differs by family.
trait Anew: Maps + Parse {
    /// Where the transport's header is.
    const TRANSPORT: usize;
    /// Where the payload is that says what a packet is like.
    const PAYLOAD: usize = Self::TRANSPORT + 20;
    /// Makes the IP header's addresses anew, and the sum over it. `source`: the last 32 bits of that address.
    fn renew_addresses(frame: usize, source: u32);
}

impl Anew for V4 {
    const TRANSPORT: usize = IP + 20;

    #[inline(always)]
    fn renew_addresses(frame: usize, source: u32) {
        store_u16(frame + IP + 10, load_u16(frame + Self::PAYLOAD + 22));
        store_u32(frame + IP + 12, source.to_be());
        store_u32(frame + IP + 16, load_u32(frame + Self::PAYLOAD + 52));
    }
}

impl Anew for V6 {
    const TRANSPORT: usize = IP + 40;

    #[inline(always)]
    fn renew_addresses(frame: usize, source: u32) {
        store_u64(frame + IP + 8, load_u64(frame + Self::PAYLOAD + 40));
        store_u32(frame + IP + 16, load_u32(frame + Self::PAYLOAD + 48));
        store_u32(frame + IP + 20, source.to_be());
        store_u64(frame + IP + 24, load_u64(frame + Self::PAYLOAD + 52));
        store_u64(frame + IP + 32, load_u64(frame + Self::PAYLOAD + 60));
    }
}

/// A run of a pipeline, by what the packet's payload says.
///
/// Behind Ethernet, an IP header without options or extensions and 20 more bytes (all of a TCP header), the frame carries,
/// without alignment:
///
/// | bytes | what | order |
/// |---|---|---|
/// | 8 | the source: the last 32 bits of the address * 2^16 + port | the machine's |
/// | 8 | what is added to the source for each run: 0, 1 (another port) or 2^16 (another address) | the machine's |
/// | 2 | the destination's port | the wire's |
/// | 2, 2 | the words that the checksums of UDP and of TCP lie in | the wire's |
/// | 2 | the IPv4 header's checksum; 0 for IPv6 | the wire's |
/// | 4 | what is forgotten before each run: 0 nothing, 1 the connection, 2 the client too | the machine's |
/// | 4 | nothing | |
/// | 8 | where anything is forgotten: the pipeline's nanoseconds in all runs | the machine's |
/// | 12 | the first 96 bits of an IPv6 source | the wire's |
/// | 16 | the destination's address; an IPv4 one is the first 4 | the wire's |
/// | 8 | where anything is forgotten: when the pipeline started, for the stage that ends the run | the machine's |
/// | | the keys of what is forgotten: two of the connection's, and the client's | the machine's |
struct Run<F> {
    skb: *mut __sk_buff,
    /// When the pipeline started, where it is timed.
    start: Option<u64>,
    family: PhantomData<F>,
}

impl<F: Anew> Run<F> {
    /// Makes the packet's addresses, ports and checksums what its payload says, having stepped its source, and forgets
    /// what is to be forgotten.
    #[inline(always)]
    fn start(skb: *mut __sk_buff) -> Self {
        let forgets = restore::<F>(&TcContext::new(skb)).unwrap_or(0);
        if forgets != 0 {
            forget::<F>(skb, forgets > 1);
        }
        let start = (forgets != 0).then(nanos);
        if let (Some(start), Some(at)) = (start, Self::word(skb, START)) {
            store_u64(at, start);
        }
        Self { skb, start, family: PhantomData }
    }

    /// The run that another program has begun.
    #[inline(always)]
    fn resume(skb: *mut __sk_buff) -> Self {
        let start = Self::word(skb, START).map(load_u64).filter(|start| *start != 0);
        Self { skb, start, family: PhantomData }
    }

    /// Where a word of eight bytes of the payload is.
    #[inline(always)]
    fn word(skb: *mut __sk_buff, offset: usize) -> Option<usize> {
        let (frame, end) = bounds(&TcContext::new(skb));
        let at = frame + F::PAYLOAD + offset;
        (at + size_of::<u64>() <= end).then_some(at)
    }

    /// Adds the pipeline's time to the packet's stop watch, where it is timed.
    #[inline(always)]
    fn end(self) {
        let Some(start) = self.start else { return };
        let ran = nanos() - start;
        if let Some(watch) = Self::word(self.skb, WATCH) {
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
fn restore<F: Anew>(ctx: &TcContext) -> Option<u32> {
    let (frame, end) = bounds(ctx);
    if frame + F::PAYLOAD + KEYS > end {
        return None;
    }
    let source = load_u64(frame + F::PAYLOAD).wrapping_add(load_u64(frame + F::PAYLOAD + 8));
    store_u64(frame + F::PAYLOAD, source);
    F::renew_addresses(frame, (source >> 16) as u32);
    let destination_port = load_u16(frame + F::PAYLOAD + 16);
    store_u32(frame + F::TRANSPORT, u32::from((source as u16).to_be()) | u32::from(destination_port) << 16);
    store_u16(frame + F::TRANSPORT + 6, load_u16(frame + F::PAYLOAD + 18));
    store_u16(frame + F::TRANSPORT + 16, load_u16(frame + F::PAYLOAD + 20));
    Some(load_u32(frame + F::PAYLOAD + 24))
}

/// Forgets the connection that the packet is the first of, and its client where that is wanted, by the keys that the
/// frame brings. They lie in the CPU's memory meanwhile: the stack is the pipeline's.
#[inline(always)]
fn forget<F: Anew>(skb: *mut __sk_buff, client_too: bool) {
    let ctx = TcContext::new(skb);
    let (frame, end) = bounds(&ctx);
    let keys = frame + F::PAYLOAD + KEYS;
    if keys + size_of::<[ConntrackKey<F>; 2]>() + size_of::<AffinityKey<F>>() > end {
        return;
    }
    let Some(work) = <Kernel as Env<F>>::work(&Kernel) else { return };
    let place = &raw mut *work;
    for number in 0..2 {
        copy::<ConntrackKey<F>>(keys + number * size_of::<ConntrackKey<F>>(), place.cast());
        Kernel.conntrack_remove(&work.key);
    }
    if client_too {
        const { assert!(size_of::<AffinityKey<F>>() <= size_of::<Work<F>>() && align_of::<Work<F>>() >= 4) };
        let place = place.cast::<AffinityKey<F>>();
        copy(keys + size_of::<[ConntrackKey<F>; 2]>(), place);
        // There is none before the first run.
        // SAFETY: the CPU's own memory, where the key was just written.
        let key = unsafe { &*place };
        let _ = F::affinity().remove(key);
    }
}

/// Copies a key from the packet, a word at a time.
#[inline(always)]
fn copy<K: Pod>(from: usize, to: *mut K) {
    const { assert!(size_of::<K>().is_multiple_of(size_of::<u32>())) };
    for at in (0..size_of::<K>()).step_by(size_of::<u32>()) {
        store_u32(to as usize + at, load_u32(from + at));
    }
}
