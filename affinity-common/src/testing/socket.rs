//! A socket in plain memory.

use super::Wire;
use crate::{
    abi::{netns::NetnsKey, sockets::SocketCookie},
    dp::sock::{Call, Named, Opening},
    family::Family,
    types::{Port, Proto},
};

/// A socket as a call finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FakeSocket<F: Family> {
    /// Its cookie.
    pub cookie: u64,
    /// Its namespace.
    pub netns: NetnsKey,
    /// The address that it names.
    pub addr: F::Addr,
    /// The port that it names.
    pub port: Port,
    /// TCP or UDP.
    pub proto: Proto,
    /// The address that it is bound to; zeroes where it is not.
    pub source: F::Addr,
    /// Whom it is connected to; zeroes where it is not.
    pub peer: (F::Addr, Port),
}

impl<F: Wire> FakeSocket<F> {
    /// A socket that is not bound, nor connected, and names an address.
    pub fn to(cookie: u64, netns: NetnsKey, proto: Proto, (addr, port): ([u8; 4], u16)) -> Self {
        let nobody = (F::Addr::default(), Port::default());
        Self { cookie, netns, addr: F::addr(addr), port: Port::new(port), proto, source: nobody.0, peer: nobody }
    }

    /// What it names, as tests call it.
    pub fn names(&self) -> ([u8; 4], u16) {
        (F::name(&self.addr), self.port.get())
    }
}

impl<F: Family> Named<F> for FakeSocket<F> {
    fn cookie(&self) -> SocketCookie {
        SocketCookie::new(self.cookie)
    }

    fn addr(&self) -> F::Addr {
        self.addr
    }

    fn port(&self) -> Port {
        self.port
    }

    fn proto(&self) -> Proto {
        self.proto
    }
}

impl<F: Family> Call<F> for FakeSocket<F> {
    fn rename(&mut self, addr: &F::Addr, port: Port) {
        (self.addr, self.port) = (*addr, port);
    }
}

impl<F: Family> Opening<F> for FakeSocket<F> {
    fn netns(&self) -> NetnsKey {
        self.netns
    }

    fn source(&self) -> F::Addr {
        self.source
    }

    fn peer_addr(&self) -> F::Addr {
        self.peer.0
    }

    fn peer_port(&self) -> Port {
        self.peer.1
    }
}
