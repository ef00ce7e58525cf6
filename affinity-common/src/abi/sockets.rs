//! `sockets_v4`, `sockets_v6`: the sockets that were translated, and what they were translated from: for `getpeername`,
//! `recvmsg` and the refresh of affinity. Written by the datapath.

use super::{Kind, MapSpec};
use crate::pod::pod;
use crate::{
    family::Family,
    types::{BackendId, Port, Proto, ServiceId},
};

pod! {
    /// A socket's cookie (`SO_COOKIE`, `bpf_get_socket_cookie`), which no other one gets before the node's next boot. Its
    /// halves, the lower one first, as `sock_diag` has it, so that what it is a part of is aligned to four bytes.
    #[derive(Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct SocketCookie: 8 {
        /// The halves.
        pub halves: [u32; 2],
    }

    /// A socket and a backend that it talks to; an unconnected one may talk to many.
    #[derive(Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct SocketKey<F>: 16, 28 {
        /// The socket.
        pub cookie: SocketCookie,
        /// The backend's address.
        pub addr: F::Addr,
        /// The backend's port.
        pub port: Port,
        /// The protocol.
        pub proto: Proto,
        /// Zero.
        pub zero: u8,
    }

    /// What it has asked for.
    #[derive(Default, PartialEq, Eq, Hash)]
    pub struct Socket<F>: 20, 44 {
        /// The service port.
        pub service: ServiceId,
        /// The backend.
        pub backend: BackendId,
        /// The client that the socket counts as.
        pub client: F::Addr,
        /// The frontend's address.
        pub addr: F::Addr,
        /// The frontend's port.
        pub port: Port,
        /// Zero.
        pub zero: [u8; 2],
    }
}

impl SocketCookie {
    /// The cookie of the number that the kernel gives.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the two halves are what is wanted")]
    pub const fn new(cookie: u64) -> Self {
        Self { halves: [cookie as u32, (cookie >> 32) as u32] }
    }

    /// The number.
    #[inline(always)]
    pub const fn get(self) -> u64 {
        (self.halves[1] as u64) << 32 | self.halves[0] as u64
    }
}

impl<F: Family> SocketKey<F> {
    /// The key of a socket and a backend's address and port.
    #[inline(always)]
    pub fn new(cookie: SocketCookie, addr: F::Addr, port: Port, proto: Proto) -> Self {
        Self { cookie, addr, port, proto, zero: 0 }
    }
}

/// Default number of sockets and backends that they talk to.
pub const DEFAULT_SIZE: usize = 1 << 17;

/// The map of a family.
pub const fn spec<F: Family>() -> MapSpec {
    MapSpec {
        name: super::of_family::<F>("sockets_v4", "sockets_v6"),
        kind: Kind::LruHash,
        key_size: size_of::<SocketKey<F>>(),
        value_size: size_of::<Socket<F>>(),
        default_size: DEFAULT_SIZE,
        resizable: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_is_its_halves() {
        let cookie = SocketCookie::new(0x0102_0304_0506_0708);
        assert_eq!(cookie.halves, [0x0506_0708, 0x0102_0304]);
        assert_eq!(cookie.get(), 0x0102_0304_0506_0708);
    }
}
