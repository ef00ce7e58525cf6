//! `lifetimes`: one element; how long a connection may be silent before it counts as gone. Written by user space.

use super::{
    Kind, MapSpec,
    conntrack::{BACKEND_FIN, CLIENT_FIN, REPLIED, RESET, STREAM},
};
use crate::pod::pod;
use crate::types::{Proto, Seconds};

pod! {
    /// A lifetime for each state; 0 stands for the one of [`Lifetimes::DEFAULT`].
    #[derive(Default, PartialEq, Eq)]
    pub struct Lifetimes: 24 {
        /// TCP that was not answered yet.
        pub tcp_syn_sent: Seconds,
        /// TCP that was answered.
        pub tcp_established: Seconds,
        /// TCP that one side or both have closed.
        pub tcp_fin_wait: Seconds,
        /// TCP that was reset.
        pub tcp_close: Seconds,
        /// UDP that was not answered yet, or was asked and answered within a second.
        pub udp: Seconds,
        /// UDP that was answered and has gone on since.
        pub udp_stream: Seconds,
    }
}

impl Lifetimes {
    /// `nf_conntrack`'s defaults, but for an established TCP connection, which is kept for 6 hours rather than for 5 days, as
    /// Cilium does: the table is an LRU, a quiet connection's packets are translated by its entry however old that is, and
    /// what was taken out is rebuilt.
    pub const DEFAULT: Self = Self {
        tcp_syn_sent: Seconds::new(120),
        tcp_established: Seconds::new(21_600),
        tcp_fin_wait: Seconds::new(120),
        tcp_close: Seconds::new(10),
        udp: Seconds::new(30),
        udp_stream: Seconds::new(120),
    };

    /// That of a connection of which `seen` was seen.
    #[inline(always)]
    pub fn of(&self, proto: Proto, seen: u8) -> Seconds {
        const CLOSED: u8 = CLIENT_FIN | BACKEND_FIN;
        let default = Self::DEFAULT;
        let (set, default) = if proto == Proto::TCP {
            if seen & RESET != 0 {
                (self.tcp_close, default.tcp_close)
            } else if seen & CLOSED != 0 {
                (self.tcp_fin_wait, default.tcp_fin_wait)
            } else if seen & REPLIED != 0 {
                (self.tcp_established, default.tcp_established)
            } else {
                (self.tcp_syn_sent, default.tcp_syn_sent)
            }
        } else if seen & STREAM != 0 {
            (self.udp_stream, default.udp_stream)
        } else {
            (self.udp, default.udp)
        };
        if set.secs == 0 { default } else { set }
    }
}

/// The map.
pub const SPEC: MapSpec = MapSpec {
    name: "lifetimes",
    kind: Kind::Array,
    key_size: 4,
    value_size: size_of::<Lifetimes>(),
    default_size: 1,
    resizable: false,
};
