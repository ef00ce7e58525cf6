//! `tail_calls`: the programs that another one hands a packet over to. Written by user space.

use super::{Kind, MapSpec};
use crate::reason::{Program, Reason};

macro_rules! stages {
    ($($(#[doc = $doc:literal])+ $stage:ident: $program:literal, or $reason:ident;)+) => {
        /// A program that another one hands a packet over to: for what is seldom, and wants a stack of its own.
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Stage { $($(#[doc = $doc])+ $stage,)+ }

        impl Stage {
            /// Every one, in the order of its index.
            pub const ALL: [Self; [$(Self::$stage,)+].len()] = [$(Self::$stage,)+];

            /// The name of the program in the object.
            pub const fn program(self) -> &'static str {
                match self { $(Self::$stage => $program,)+ }
            }

            /// What becomes of a packet where there is no such program: only while the first of all daemons starts.
            #[inline(always)]
            pub const fn without(self) -> Reason {
                match self { $(Self::$stage => Reason::$reason,)+ }
            }
        }
    };
}

impl Stage {
    /// The program that it is a part of, and counts for.
    #[inline(always)]
    pub const fn of(self) -> Program {
        match self {
            Self::Refuse | Self::Request | Self::FragmentIn | Self::IcmpIn | Self::SnatReply | Self::Arp => {
                Program::Ingress
            }
            Self::Reply | Self::FragmentOut | Self::IcmpOut | Self::Snat | Self::SnatRefuse => Program::Egress,
        }
    }
}

stages! {
    /// Answers a packet that is refused.
    Refuse: "affinity_refuse", or NoBackendDropped;
    /// From a client, and more than its destination changes: see [`crate::dp::full`].
    Request: "affinity_request", or NotService;
    /// To a client, and more than its source changes.
    Reply: "affinity_reply", or NotReply;
    /// A fragment from a client.
    FragmentIn: "affinity_fragment_in", or Fragment;
    /// A fragment to a client.
    FragmentOut: "affinity_fragment_out", or Fragment;
    /// ICMP from a client.
    IcmpIn: "affinity_icmp_in", or OtherProtocol;
    /// ICMP to a client.
    IcmpOut: "affinity_icmp_out", or OtherProtocol;
    /// From outside to a backend elsewhere: see [`crate::dp::snat`].
    Snat: "affinity_snat", or NotReply;
    /// The answer to such a packet.
    SnatReply: "affinity_snat_reply", or NotService;
    /// From outside to a backend elsewhere to which the node has no port left: answered.
    SnatRefuse: "affinity_snat_refuse", or SnatExhaustedDropped;
    /// A question of ARP.
    Arp: "affinity_arp", or NotIp;
}

/// Number of programs.
pub const SIZE: usize = Stage::ALL.len();

/// The map.
pub const SPEC: MapSpec = MapSpec {
    name: "tail_calls",
    kind: Kind::ProgArray,
    key_size: 4,
    value_size: 4,
    default_size: SIZE,
    resizable: false,
};
