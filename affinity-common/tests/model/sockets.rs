//! Sockets: who asks for a service talks to a backend, as the client that its packets would be, and sees the service.

use affinity_common::abi::sockets::SocketKey;
use affinity_common::dp::sock;
use affinity_common::reason::Reason;
use affinity_common::testing::{FakeSocket, Wire};
use affinity_common::types::Proto;

use crate::model::{Model, SECOND, TICK, netns, port};
use crate::step::{Namespace, SocketCall};
use crate::world::{End, Service, State};

/// The host whose sockets, once connected, have another address than its namespace's: where routing chooses by the way.
const NODE: u8 = 13;

/// For how long a socket's choice may stand without a look, whatever the timeout.
const STANDS: u64 = SECOND / 2;

/// What a socket has asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    pub service: usize,
    pub client: [u8; 4],
}

/// A socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    pub cookie: u64,
    host: u8,
    proto: Proto,
    bound: bool,
    /// Whom it is connected to, as its packets have it.
    peer: Option<End>,
}

impl Slot {
    /// The address that it is bound to, or was given when it was connected.
    fn source(&self) -> Option<[u8; 4]> {
        match (self.bound, self.peer) {
            (true, _) => Some([10, 244, 7, self.host]),
            (false, Some(_)) if self.host == NODE => Some([10, 244, 8, self.host]),
            (false, Some(_)) => Some(self.address()),
            (false, None) => None,
        }
    }

    /// That of its namespace.
    fn address(&self) -> [u8; 4] {
        [10, 244, 0, self.host]
    }

    fn call<F: Wire>(&self, to: End) -> FakeSocket<F> {
        let mut call = FakeSocket::to(self.cookie, netns(self.host), self.proto, to);
        call.source = self.source().map(F::addr).unwrap_or_default();
        call.peer = self.peer.map(|(addr, number)| (F::addr(addr), port(number))).unwrap_or_default();
        call
    }
}

/// An entry's key as the model has it.
pub fn asked_key<F: Wire>(key: &SocketKey<F>) -> (u64, usize, Proto) {
    let pod = (F::name(&key.addr), key.port.get());
    (key.cookie.get(), Service::index_of(pod).expect("a backend"), key.proto)
}

impl<F: Wire> Model<F> {
    pub fn socket(&mut self, call: &SocketCall) {
        let entries = self.world.env.conntrack_entries();
        match call {
            SocketCall::Connect { socket, host, service, bound } => {
                let of = self.world.services[*service].clone();
                let slot = self.open(*socket, *host, of.proto, *bound);
                let peer = self.names_service(slot, *service, false, sock::connect);
                if let Some(peer) = peer {
                    self.slots[*socket] = Some(Slot { peer: Some(peer), ..slot });
                }
            }
            SocketCall::Send { socket, host, service, bound } => {
                if self.world.services[*service].proto == Proto::UDP {
                    let slot = self.open(*socket, *host, Proto::UDP, *bound);
                    self.names_service(slot, *service, true, sock::sendmsg);
                }
            }
            SocketCall::Receive { socket, place } => {
                if let Some(slot) = self.slots[*socket].filter(|slot| slot.proto == Proto::UDP) {
                    self.is_shown(slot, Service::address(*place), sock::recvmsg, Reason::NotReply);
                }
            }
            SocketCall::PeerName { socket } => {
                if let Some((slot, peer)) = self.slots[*socket].and_then(|slot| Some((slot, slot.peer?))) {
                    self.is_shown(slot, peer, sock::getpeername, Reason::NotService);
                }
            }
            SocketCall::Release { socket } => self.release(*socket),
            SocketCall::Touch { nth } => self.touch(*nth),
            SocketCall::NoPort { socket, host, service } => {
                let of = self.world.services[*service].clone();
                let slot = self.open(*socket, *host, of.proto, false);
                let mut call = slot.call::<F>((of.frontend.0, 81));
                let asked = call;
                // Who connects a datagram's socket may only want to know its own address.
                let refused = if of.proto == Proto::TCP { Reason::NoSuchPort } else { Reason::NotService };
                assert_eq!((sock::connect(&self.world.env, &mut call), call), (refused, asked));
            }
            SocketCall::Past { socket, host, place } => {
                let slot = self.open(*socket, *host, Proto::UDP, false);
                let pod = Service::address(*place);
                let mut call = slot.call::<F>(pod);
                let asked = call;
                assert_eq!((sock::connect(&self.world.env, &mut call), call), (Reason::NotService, asked));
                self.slots[*socket] = Some(Slot { peer: Some(pod), ..slot });
            }
        }
        assert_eq!(self.world.env.conntrack_entries(), entries, "a socket's packets need no entries");
    }

    /// The socket in a slot: of UDP the one that is there, which can connect again, if it is such a one.
    fn open(&mut self, socket: usize, host: u8, proto: Proto, bound: bool) -> Slot {
        if let Some(slot) = self.slots[socket]
            && (slot.host, slot.proto, slot.bound) == (host, proto, bound)
            && (proto == Proto::UDP || slot.peer.is_none())
        {
            return slot;
        }
        self.release(socket);
        self.cookies += 1;
        let slot = Slot { cookie: self.cookies, host, proto, bound, peer: None };
        self.slots[socket] = Some(slot);
        slot
    }

    /// The client that a socket counts as: what it is bound to, or its namespace's address. An address that it was given as
    /// it was connected is not one that it is bound to, as far as can be told.
    fn client_of(&self, slot: &Slot) -> [u8; 4] {
        let known = slot.peer.and_then(Service::index_of);
        let known = known.and_then(|place| self.asked.get(&(slot.cookie, place, slot.proto)));
        match slot.source() {
            Some(source) if source != slot.address() => known.map_or(source, |asked| asked.client),
            _ => slot.address(),
        }
    }

    /// A socket names a service. `sends`: it may talk to several; otherwise it is connected, and has a new connection where
    /// it was not with this backend. Returns whom it talks to then, if it does.
    fn names_service(
        &mut self,
        slot: Slot,
        service: usize,
        sends: bool,
        names: impl Fn(&affinity_common::testing::FakeEnv<F>, &mut FakeSocket<F>) -> Reason,
    ) -> Option<End> {
        let of = self.world.services[service].clone();
        let mut call = slot.call::<F>(of.frontend);
        let asked = call;
        let reason = names(&self.world.env, &mut call);
        if reason == Reason::Established
            && let Some(place) = Service::index_of(call.names())
            && slot.peer == Some(call.names())
            && self.may_go_on(service, (slot.cookie, place, slot.proto))
        {
            return Some(call.names());
        }
        let left = match self.namespaces[&slot.host] {
            Namespace::Address => None,
            Namespace::TcOnly => Some(Reason::LeftToTc),
            Namespace::Nothing => Some(Reason::UnknownClient),
        };
        if let Some(left) = left {
            assert_eq!((reason, call), (left, asked), "its packets are TC's");
            return Some(of.frontend);
        }
        if of.backends.iter().all(|state| *state != State::Eligible) {
            assert_eq!((reason, call), (Reason::NoBackend, asked));
            return None;
        }
        let client = self.client_of(&slot);
        if reason == Reason::SocketRefused {
            assert!(self.faults.sockets_full);
            assert_eq!(call, asked, "its packets are TC's");
            // What was chosen stands: whom the packets find.
            self.adopt(service, client);
            return Some(of.frontend);
        }
        let pod = call.names();
        let place = Service::index_of(pod).expect("a backend");
        assert_eq!(FakeSocket { addr: asked.addr, port: asked.port, ..call }, asked, "nothing else is changed");
        let key = (slot.cookie, place, slot.proto);
        let is_known = slot.proto == Proto::UDP
            && self.asked.get(&key) == Some(&Asked { service, client })
            && (sends || slot.peer == Some(pod));
        assert_eq!(reason == Reason::Established, is_known, "{reason:?}");
        let hashed =
            if of.timeout == 0 { *self.hashed_sockets.entry((service, slot.cookie)).or_insert(place) } else { place };
        self.selected(service, client, place, false, (!is_known).then_some(reason), hashed);
        if !is_known {
            *self.given.entry((service, place)).or_default() += 1;
        }
        self.asked.insert(key, Asked { service, client });
        self.called.insert(key, self.now());
        Some(pod)
    }

    /// Whether a socket that asks again for what it is connected to may go on so without a look at anything: it has asked not
    /// long ago, the backend takes sessions, and its client's entry, if it is this backend's, is not due to be refreshed.
    fn may_go_on(&mut self, service: usize, key: (u64, usize, Proto)) -> bool {
        let Some(asked) = self.asked.get(&key).copied().filter(|asked| asked.service == service) else { return false };
        let called = self.called.insert(key, self.now()).unwrap_or_default();
        let has_affinity = self.world.services[service].timeout > 0;
        let bound = if has_affinity { self.refresh_bound(service).min(STANDS) } else { STANDS };
        let kept =
            self.clients.get(&(service, asked.client)).copied().filter(|kept| has_affinity && kept.place == key.1);
        self.state(service, key.1) == State::Eligible
            && self.now() - called <= bound + 2 * TICK
            && kept.is_none_or(|kept| self.now() - kept.used <= self.refresh_bound(service) + 2 * TICK)
            && self.observed(service, asked.client) == self.clients.get(&(service, asked.client)).copied()
    }

    /// A backend is shown as the service that the socket has asked for, if it has.
    fn is_shown(
        &self,
        slot: Slot,
        peer: End,
        shows: impl Fn(&affinity_common::testing::FakeEnv<F>, &mut FakeSocket<F>) -> Reason,
        otherwise: Reason,
    ) {
        let mut call = slot.call::<F>(peer);
        let reason = shows(&self.world.env, &mut call);
        let asked = Service::index_of(peer).and_then(|place| self.asked.get(&(slot.cookie, place, slot.proto)));
        let expected =
            asked.map_or((otherwise, peer), |asked| (Reason::Reply, self.world.services[asked.service].frontend));
        assert_eq!((reason, call.names()), expected);
    }

    /// A socket is closed: it was in use until now.
    fn release(&mut self, socket: usize) {
        let Some(slot) = self.slots[socket].take() else { return };
        let call = slot.call::<F>(slot.peer.unwrap_or_default());
        let reason = sock::release(&self.world.env, &call);
        let key = slot.peer.and_then(Service::index_of).map(|place| (slot.cookie, place, slot.proto));
        let Some((key, asked)) = key.and_then(|key| Some((key, self.asked.remove(&key)?))) else {
            return assert_eq!(reason, Reason::NotService);
        };
        assert_eq!(reason, Reason::Closed);
        self.touched(asked.service, asked.client, key.1, true);
    }

    /// User space has seen that a socket is alive.
    fn touch(&mut self, nth: usize) {
        let entries = self.world.env.socket_entries();
        let Some((key, held)) = entries.get(nth % entries.len().max(1)) else { return };
        let has_affinity = sock::touch(&self.world.env, key.proto, held);
        let key = asked_key::<F>(key);
        let Asked { service, client } = self.asked[&key];
        assert_eq!(has_affinity, self.world.services[service].timeout > 0);
        self.touched(service, client, key.1, true);
    }
}
