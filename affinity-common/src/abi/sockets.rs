//! `sockets_v4`, `sockets_v6`: the sockets that were translated, and what they were translated from: for `getpeername`,
//! `recvmsg` and the refresh of affinity. Written by the datapath.

use super::{
    Kind, MapSpec,
    affinity::refresh_after,
    frontends::{Frontend, FrontendKey},
};
use crate::pod::pod;
use crate::{
    family::Family,
    types::{BackendId, Nanos, Port, Proto, Seconds, ServiceId, TICK_SHIFT, Ticks},
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
    pub struct Socket<F>: 28, 52 {
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
        /// The frontend's [`Frontend::first_slot`] when the backend was chosen.
        pub first_slot: u32,
        /// When the choice is to be looked into again: [`stands_until`].
        pub due: Ticks,
    }
}

/// How long a choice stands at most without a look at what it was made by.
///
/// Slots that a service leaves rest for a second before another run of its may begin with the same one, so that within
/// this time the same first slot means the same slots. (But for a daemon that ends in between and whose successor is there,
/// synced and has another change within that time.)
const STANDS: Nanos = Nanos(Nanos::SECOND.0 / 2);

/// Until when a choice stands for a socket that asks again, while its frontend has the slots that it had: until the
/// client's affinity, which was `used` last, can be stale, and not for longer than half a second. A client whose affinity
/// a person has taken out may keep its backend for that time, by a socket that is connected to it anyway.
#[inline(always)]
pub const fn stands_until(timeout: Seconds, used: Ticks, now: Nanos) -> Ticks {
    let mut wait = STANDS.0;
    if timeout.secs != 0 {
        let fresh = (refresh_after(timeout).0 + (1 << TICK_SHIFT)).saturating_sub(used.age(now).0);
        if fresh < wait {
            wait = fresh;
        }
    }
    Nanos(now.0 + wait).ticks()
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

impl<F: Family> Socket<F> {
    /// Whether a socket that is connected to this backend already, and asks again, need not be given one anew: it asks for
    /// the same, which is still the same service's, with the same slots, so that the backend has not lost its sessions; and
    /// no look at its client's affinity is due.
    #[inline(always)]
    pub fn stands(&self, asked: &FrontendKey<F>, frontend: &Frontend, now: Ticks) -> bool {
        self.addr == asked.addr
            && self.port == asked.port
            && self.service == frontend.service
            && self.first_slot == frontend.first_slot
            // Without slots there is no first one.
            && frontend.slot_count != 0
            && !self.due.is_due(now)
    }

    /// Whether it says the same of a socket and its backend.
    #[inline(always)]
    pub fn leads_as(&self, other: &Self) -> bool {
        self.service == other.service
            && self.backend == other.backend
            && self.client == other.client
            && self.addr == other.addr
            && self.port == other.port
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
