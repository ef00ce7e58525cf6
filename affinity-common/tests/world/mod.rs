//! A small cluster for the tests: services of four backends each, at fixed addresses.
#![allow(dead_code, reason = "each test uses a part of it")]

pub mod cases;
pub mod checksums;

use affinity_common::abi::affinity::AffinityKey;
use affinity_common::abi::backends::{Backend, BackendKey, ELIGIBLE};
use affinity_common::abi::conntrack::ConntrackKey;
use affinity_common::abi::frontends::{Frontend, FrontendKey};
use affinity_common::family::Family;
use affinity_common::reason::{Program, Reason};
use affinity_common::testing::{FakeEnv, FakePacket, Offload, Segment, Wire, destination, run};
use affinity_common::types::{BackendId, Port, Proto, Seconds, ServiceId};

/// An address and a port, in either family: see [`Wire::addr`].
pub type End = ([u8; 4], u16);

/// What a backend is to its service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Eligible,
    Draining,
    Gone,
}

/// A service port as the maps have it.
#[derive(Clone, Debug)]
pub struct Service {
    pub id: u32,
    pub frontend: End,
    pub proto: Proto,
    pub timeout: u32,
    /// The service port that its affinity goes by, where that is another one.
    pub shares: Option<u32>,
    pub backends: Vec<State>,
}

impl Service {
    pub fn new(id: u32, proto: Proto, timeout: u32) -> Self {
        let host = u8::try_from(id).expect("few services");
        Self { id, frontend: ([10, 96, 0, host], 80), proto, timeout, shares: None, backends: vec![State::Eligible; 4] }
    }

    pub fn service_id(&self) -> ServiceId {
        ServiceId { id: self.id }
    }

    /// The service port that its affinity goes by.
    pub fn affinity_id(&self) -> ServiceId {
        ServiceId { id: self.shares.unwrap_or(self.id) }
    }

    /// The address of a backend by its place; services share their pods.
    pub fn address(index: usize) -> End {
        ([10, 244, 0, 101 + u8::try_from(index).expect("few backends")], 8080)
    }

    pub fn backend_id(&self, index: usize) -> BackendId {
        BackendId { id: self.affinity_id().id * 100 + u32::try_from(index).expect("few backends") }
    }

    pub fn backend_key(&self, index: usize) -> BackendKey {
        BackendKey { service: self.service_id(), backend: self.backend_id(index) }
    }

    /// The place of a backend by its address.
    pub fn index_of(address: End) -> Option<usize> {
        (0..4).find(|&index| Self::address(index) == address)
    }

    pub fn affinity_key<F: Wire>(&self, client: [u8; 4]) -> AffinityKey<F> {
        AffinityKey::new(F::addr(client), self.affinity_id(), 0)
    }

    pub fn forward<F: Wire>(&self, client: End) -> ConntrackKey<F> {
        let (ip, port) = self.frontend;
        ConntrackKey::forward(F::addr(client.0), Port::new(client.1), F::addr(ip), Port::new(port), self.proto)
    }

    pub fn reverse<F: Wire>(&self, client: End, index: usize) -> ConntrackKey<F> {
        let (ip, port) = Self::address(index);
        ConntrackKey::reverse(F::addr(client.0), Port::new(client.1), F::addr(ip), Port::new(port), self.proto)
    }

    pub fn frontend_key<F: Wire>(&self) -> FrontendKey<F> {
        FrontendKey::new(F::addr(self.frontend.0), Port::new(self.frontend.1), self.proto)
    }

    /// A packet of a client's.
    pub fn segment(&self, client: End, flags: u8) -> Segment {
        match self.proto {
            Proto::TCP => Segment::tcp(client, self.frontend, flags),
            _ => Segment::udp(client, self.frontend),
        }
    }

    /// A packet of a backend's.
    pub fn answer(&self, client: End, index: usize, flags: u8) -> Segment {
        match self.proto {
            Proto::TCP => Segment::tcp(Self::address(index), client, flags),
            _ => Segment::udp(Self::address(index), client),
        }
    }
}

/// The cluster and its node.
pub struct World<F: Family> {
    pub env: FakeEnv<F>,
    pub services: Vec<Service>,
    next_slot: u32,
}

impl<F: Wire> World<F> {
    pub fn new(lru_size: usize, services: Vec<Service>) -> Self {
        let mut world = Self { env: FakeEnv::new(lru_size), services, next_slot: 0 };
        for index in 0..world.services.len() {
            world.program(index);
        }
        world
    }

    /// Writes a service to the maps in the daemon's order.
    pub fn program(&mut self, index: usize) {
        let service = self.services[index].clone();
        let flags = |state| if state == State::Eligible { ELIGIBLE } else { 0 };
        for (place, state) in service.backends.iter().enumerate() {
            let (addr, port) = Service::address(place);
            let value = Backend { addr: F::addr(addr), port: Port::new(port), flags: flags(*state), zero: 0 };
            match state {
                State::Gone => self.env.remove_backend(&service.backend_key(place)),
                _ => self.env.set_backend(service.backend_key(place), value),
            }
        }
        let eligible: Vec<BackendId> = (0..service.backends.len())
            .filter(|&place| service.backends[place] == State::Eligible)
            .map(|place| service.backend_id(place))
            .collect();
        let rounds = if service.timeout == 0 { 1 } else { 8 };
        let slots: Vec<BackendId> = eligible.iter().copied().cycle().take(eligible.len() * rounds).collect();
        self.env.set_slots(self.next_slot, &slots);
        let count = u32::try_from(slots.len()).expect("few slots");
        let frontend = Frontend {
            service: service.service_id(),
            affinity: service.affinity_id(),
            seed: service.id * 77,
            first_slot: self.next_slot,
            slot_count: count,
            timeout: Seconds::new(service.timeout),
            scope: affinity_common::abi::frontends::CLUSTER,
            flags: 0,
        };
        self.next_slot += count;
        self.env.set_frontend(service.frontend_key(), frontend);
    }

    /// A packet of a client's goes through ingress; returns why it ended as it did, and what left.
    pub fn ingress(&self, segment: &Segment) -> (Reason, Vec<u8>) {
        let mut packet = FakePacket::new::<F>(segment, Offload::None);
        let reason = run(&self.env, Program::Ingress, &mut packet);
        (reason, packet.sent())
    }

    /// A packet to a client goes through egress.
    pub fn egress(&self, segment: &Segment) -> (Reason, Vec<u8>) {
        let mut packet = FakePacket::new::<F>(segment, Offload::None);
        let reason = run(&self.env, Program::Egress, &mut packet);
        (reason, packet.sent())
    }

    /// Sends a packet of a client's to a service, which must pass; returns why, and the place of the backend.
    pub fn send(&self, service: usize, client: End, flags: u8) -> (Reason, usize) {
        let segment = self.services[service].segment(client, flags);
        let (reason, sent) = self.ingress(&segment);
        let place = backend_of::<F>(&sent).unwrap_or_else(|| panic!("{reason:?}: not translated"));
        assert_eq!(sent, Segment { dst: Service::address(place), ..segment }.build::<F>(), "{reason:?}");
        (reason, place)
    }

    /// Sends a backend's packet to a client, who must see the frontend.
    pub fn reply(&self, service: usize, client: End, place: usize, flags: u8) {
        let segment = self.services[service].answer(client, place, flags);
        let (reason, sent) = self.egress(&segment);
        assert_eq!(reason, Reason::Reply);
        assert_eq!(sent, Segment { src: self.services[service].frontend, ..segment }.build::<F>());
    }
}

/// The place of the backend that a packet goes to.
pub fn backend_of<F: Wire>(packet: &[u8]) -> Option<usize> {
    destination::<F>(packet).and_then(Service::index_of)
}

/// Makes a test of each function for each family.
#[macro_export]
macro_rules! in_both_families {
    ($($name:ident),+ $(,)?) => {
        mod v4 { $(#[test] fn $name() { super::$name::<affinity_common::family::V4>(); })+ }
        mod v6 { $(#[test] fn $name() { super::$name::<affinity_common::family::V6>(); })+ }
    };
}
