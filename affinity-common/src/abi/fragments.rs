//! `fragments_v4`, `fragments_v6`: the ports of datagrams that come in fragments, of which only the first one has them.
//! Written by the datapath.

use super::{Kind, MapSpec};
use crate::{
    family::Family,
    pod::pod,
    types::{Port, Proto, Seconds, Ticks},
};

pod! {
    /// A datagram (RFC 791, section 2.3; RFC 8200, section 4.5). Its translation has other addresses, and so another key.
    #[derive(Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct FragmentsKey<F>: 16, 40 {
        /// The source address.
        pub src: F::Addr,
        /// The destination address.
        pub dst: F::Addr,
        /// The identification; of IPv4, two octets and then zeroes.
        pub id: [u8; 4],
        /// The protocol.
        pub proto: Proto,
        /// Zero.
        pub zero: [u8; 3],
    }

    /// What its first fragment has.
    #[derive(Default, PartialEq, Eq)]
    pub struct Fragments: 8 {
        /// The source port.
        pub src_port: Port,
        /// The destination port.
        pub dst_port: Port,
        /// When it was seen.
        pub at: Ticks,
    }
}

/// How long later fragments may be behind the first: as long as who puts them together waits for them (`ipfrag_time`, 30 s;
/// `ip6frag_time`, 60 s).
pub const LIFETIME: Seconds = Seconds::new(60);

/// Default number of datagrams of a family.
pub const DEFAULT_SIZE: usize = 1 << 13;

/// The map of a family.
pub const fn spec<F: Family>() -> MapSpec {
    MapSpec {
        name: super::of_family::<F>("fragments_v4", "fragments_v6"),
        kind: Kind::LruHash,
        key_size: size_of::<FragmentsKey<F>>(),
        value_size: size_of::<Fragments>(),
        default_size: DEFAULT_SIZE,
        resizable: true,
    }
}
