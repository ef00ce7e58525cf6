//! The programs that others hand packets over to: each with a stack of its own, for what is seldom.

use affinity_common::abi::tail_calls::Stage;
use aya_ebpf::{macros::classifier, programs::TcContext};

use crate::pipeline;

macro_rules! stages {
    ($($(#[doc = $doc:literal])+ $program:ident = $stage:ident;)+) => {$(
        $(#[doc = $doc])+
        #[classifier]
        pub fn $program(ctx: TcContext) -> i32 {
            pipeline::go_on(&ctx, Stage::$stage)
        }
    )+};
}

stages! {
    /// Answers packets that are refused.
    affinity_refuse = Refuse;
    /// Packets from the clients of which both ends may have to be translated.
    affinity_request = Request;
    /// Packets to the clients of which both ends have to be translated.
    affinity_reply = Reply;
    /// Fragments from the clients.
    affinity_fragment_in = FragmentIn;
    /// Fragments to the clients.
    affinity_fragment_out = FragmentOut;
    /// ICMP from the clients.
    affinity_icmp_in = IcmpIn;
    /// ICMP to the clients.
    affinity_icmp_out = IcmpOut;
    /// Packets from outside to backends elsewhere.
    affinity_snat = Snat;
    /// The answers to those.
    affinity_snat_reply = SnatReply;
    /// Those to which the node has no port left.
    affinity_snat_refuse = SnatRefuse;
    /// Questions of ARP.
    affinity_arp = Arp;
}
