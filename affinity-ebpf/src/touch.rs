//! The program that user space runs to refresh a client's affinity, by the datapath's own compare-and-exchange.

use affinity_common::{
    abi::sockets::{Socket, SocketKey},
    dp::{parse, sock},
    family::{Family as _, V4, V6},
};
use aya_ebpf::{macros::classifier, programs::TcContext};

use crate::{env::Kernel, maps::Maps, skb::Skb};

/// Where the socket is in the frame: behind the Ethernet header.
const AT: usize = 14;

/// The client of a socket is there. Run by `BPF_PROG_TEST_RUN` on a frame of the family's ethertype, with a
/// [`SocketKey`] and a [`Socket`] of the family in place of a packet. Returns 1 where there was affinity to look after
/// (`affinity_common::dp::sock::touch`), otherwise 0.
#[classifier]
pub fn affinity_touch(ctx: TcContext) -> i32 {
    let touched = match parse::ethertype(&Skb::new(TcContext::new(ctx.skb.skb))) {
        Some(V4::ETHERTYPE) => touch::<V4>(&ctx),
        Some(V6::ETHERTYPE) => touch::<V6>(&ctx),
        _ => false,
    };
    i32::from(touched)
}

#[inline(always)]
fn touch<F: Maps>(ctx: &TcContext) -> bool {
    let Ok(key) = ctx.load::<SocketKey<F>>(AT) else { return false };
    let Ok(socket) = ctx.load::<Socket<F>>(AT + size_of::<SocketKey<F>>()) else { return false };
    sock::touch(&Kernel, key.proto, &socket)
}
