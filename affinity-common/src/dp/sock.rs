//! Services at the socket: a socket is connected to a backend at once, so that its packets need no translation, and is
//! told what it has asked for wherever it asks.
//!
//! A client is the same one here and at TC, by one affinity entry. A socket knows its namespace only, and `netns_*` says
//! which address that has; where it does not, the socket is left alone, and TC translates its packets.

use super::{Env, Refused, address, affinity, choice::Choice, hash, slots};
use crate::{
    abi::{
        backends::BackendKey,
        events::Event,
        frontends::{Frontend, FrontendKey},
        netns::{NetnsClient, NetnsKey},
        sockets::{self, Socket, SocketCookie, SocketKey},
        source_ranges::RangeKey,
    },
    family::Family,
    reason::Reason,
    types::{BackendId, Nanos, Port, Proto, Ticks},
};

/// The maps of a family that only sockets need.
pub trait SocketEnv<F: Family>: Env<F> {
    /// A socket's entry in its place in the map. It may be evicted, and its memory reused, while it is held.
    type Socket: SocketEntry<F>;

    /// Who the sockets of a namespace are.
    fn netns(&self, key: &NetnsKey) -> Option<NetnsClient<F>>;
    /// Tells user space of a namespace that is not known, where what it was told last has been heard.
    fn tell_unknown(&self, key: &NetnsKey);
    /// What a socket was translated from.
    fn socket(&self, key: &SocketKey<F>) -> Option<Self::Socket>;
    /// Adds or replaces an entry; never [`Refused::Exists`].
    fn socket_put(&self, key: &SocketKey<F>, value: &Socket<F>) -> Result<(), Refused>;
    /// Removes an entry, if it is there.
    fn socket_remove(&self, key: &SocketKey<F>);
}

/// A socket's entry in place.
pub trait SocketEntry<F: Family> {
    /// What it holds.
    fn load(&self) -> Socket<F>;
    /// Sets [`Socket::due`].
    fn set_due(&self, at: Ticks);
}

/// A socket and the address that it names: where it connects or sends to, or whom it hears of.
pub trait Named<F: Family> {
    /// The socket.
    fn cookie(&self) -> SocketCookie;
    /// The address.
    fn addr(&self) -> F::Addr;
    /// The port.
    fn port(&self) -> Port;
    /// The socket's protocol.
    fn proto(&self) -> Proto;
}

/// A call by which a socket names an address, which can be changed.
pub trait Call<F: Family>: Named<F> {
    /// Names another address and port in place of it.
    fn rename(&mut self, addr: &F::Addr, port: Port);
}

/// A call by which a socket begins to talk to somebody.
pub trait Opening<F: Family>: Call<F> {
    /// The network namespace of the socket.
    fn netns(&self) -> NetnsKey;
    /// The address that the socket is bound to or sends from; zeroes where routing is to choose it.
    fn source(&self) -> F::Addr;
    /// The address that the socket is connected to already.
    fn peer_addr(&self) -> F::Addr;
    /// The port that it is connected to already; 0 where it is not connected.
    fn peer_port(&self) -> Port;
}

/// Ports that libraries connect a UDP socket to only to ask which source address it would have (RFC 6724): none, discard
/// (Go's `net/addrselect.go`) and the last one (musl's `lookup_name.c`). glibc's `getaddrinfo` takes the port that it was
/// asked for; refused, it sorts the address as one that can't be reached, as it would have sorted others of services.
const ASKING: [Port; 3] = [Port::new(0), Port::new(9), Port::new(65_535)];

/// A socket connects: to a backend of the service that it names. To another port of a service's address it is refused: by TCP
/// always; by UDP in the node's own namespace, whose packets nobody else would refuse.
#[inline(always)]
pub fn connect<F: Family, E: SocketEnv<F>, C: Opening<F>>(env: &E, call: &mut C) -> Reason {
    translate::<F, E, C, false>(env, call).unwrap_or_else(|reason| reason)
}

/// A UDP socket sends to an address that it names: to a backend of that service.
#[inline(always)]
pub fn sendmsg<F: Family, E: SocketEnv<F>, C: Opening<F>>(env: &E, call: &mut C) -> Reason {
    translate::<F, E, C, true>(env, call).unwrap_or_else(|reason| reason)
}

/// A UDP socket hears who has sent to it: a backend is named as the service that was asked.
#[inline(always)]
pub fn recvmsg<F: Family, E: SocketEnv<F>, C: Call<F>>(env: &E, call: &mut C) -> Reason {
    if show(env, call) { Reason::Reply } else { Reason::NotReply }
}

/// A socket hears whom it is connected to: a backend is named as the service that was asked.
#[inline(always)]
pub fn getpeername<F: Family, E: SocketEnv<F>, C: Call<F>>(env: &E, call: &mut C) -> Reason {
    if show(env, call) { Reason::Reply } else { Reason::NotService }
}

/// A socket that is connected as it says is closed: its client was there until now.
#[inline(always)]
pub fn release<F: Family, E: SocketEnv<F>, N: Named<F>>(env: &E, socket: &N) -> Reason {
    let key = SocketKey::new(socket.cookie(), socket.addr(), socket.port(), socket.proto());
    let Some(entry) = env.socket(&key) else { return Reason::NotService };
    touch(env, key.proto, &entry.load());
    env.socket_remove(&key);
    Reason::Closed
}

/// The client of a socket is there: its affinity is refreshed, if it is the socket's backend's. Returns whether there was
/// affinity to look after: whether the frontend is still the same service's, and keeps its clients.
#[inline(always)]
pub fn touch<F: Family, E: SocketEnv<F>>(env: &E, proto: Proto, socket: &Socket<F>) -> bool {
    let Some(frontend) = env.frontend(&FrontendKey::new(socket.addr, socket.port, proto)) else { return false };
    if frontend.service != socket.service || !frontend.has_affinity() {
        return false;
    }
    affinity::touch(env, &frontend, &socket.client, socket.backend, env.now());
    true
}

#[inline(always)]
fn show<F: Family, E: SocketEnv<F>, C: Call<F>>(env: &E, call: &mut C) -> bool {
    let key = SocketKey::new(call.cookie(), call.addr(), call.port(), call.proto());
    let Some(entry) = env.socket(&key) else { return false };
    let asked = entry.load();
    call.rename(&asked.addr, asked.port);
    true
}

/// Names a backend in place of a service. `SENDS`: the socket need not be connected, and may talk to several.
#[inline(always)]
fn translate<F: Family, E: SocketEnv<F>, C: Opening<F>, const SENDS: bool>(
    env: &E,
    call: &mut C,
) -> Result<Reason, Reason> {
    let asked = FrontendKey::new(call.addr(), call.port(), call.proto());
    if !address::is_like_service(env, &asked.addr) {
        return Err(Reason::NotService);
    }
    let Some(frontend) = env.frontend(&asked) else {
        let refused = address::is_service(env, &asked.addr) && is_refused::<F, E, C, SENDS>(env, call);
        return Err(if refused { Reason::NoSuchPort } else { Reason::NotService });
    };
    let cookie = call.cookie();
    let now = env.now();
    let connected = connection(env, call, cookie);
    if let Some((peer, entry)) = &connected
        && entry.load().stands(&asked, &frontend, now.ticks())
    {
        call.rename(&peer.addr, peer.port);
        return Ok(Reason::Established);
    }
    let client = client(env, call, connected.as_ref().map(|(_, entry)| entry.load().client))?;
    let choice = choose(env, &frontend, &asked, &client, cookie, now)?;
    let backend = SocketKey::new(cookie, choice.backend.addr, choice.backend.port, asked.proto);
    let value = Socket {
        service: frontend.service,
        backend: choice.id,
        client,
        addr: asked.addr,
        port: asked.port,
        zero: [0; 2],
        first_slot: frontend.first_slot,
        due: sockets::stands_until(frontend.timeout, choice.used, now),
    };
    let known = match connected {
        Some((peer, entry)) if peer == backend => Some(entry),
        _ if SENDS => env.socket(&backend),
        // It is new, or has talked to another one: that is a new connection.
        _ => None,
    };
    let is_known = note(env, &backend, known, &value, now)?;
    call.rename(&backend.addr, backend.port);
    if is_known {
        return Ok(Reason::Established);
    }
    env.count_connection(&BackendKey { service: frontend.service, backend: choice.id });
    if env.wants_events(now) {
        env.emit(event(&asked, &client, &frontend, &choice, now));
    }
    Ok(choice.reason)
}

/// Whether a socket is refused that names a service's address, but none of its ports.
#[inline(always)]
fn is_refused<F: Family, E: SocketEnv<F>, C: Opening<F>, const SENDS: bool>(env: &E, call: &C) -> bool {
    let (port, proto) = (call.port(), call.proto());
    if SENDS || proto == Proto::TCP {
        return port != Port::default() && (proto == Proto::TCP || proto == Proto::UDP);
    }
    proto == Proto::UDP && !ASKING.contains(&port) && env.netns(&call.netns()).is_some_and(|netns| netns.is_node())
}

/// The backend that the socket is connected to already by a service.
#[inline(always)]
fn connection<F: Family, E: SocketEnv<F>, C: Opening<F>>(
    env: &E,
    call: &C,
    cookie: SocketCookie,
) -> Option<(SocketKey<F>, E::Socket)> {
    let port = call.peer_port();
    if port == Port::default() {
        return None;
    }
    let key = SocketKey::new(cookie, call.peer_addr(), port, call.proto());
    let entry = env.socket(&key)?;
    Some((key, entry))
}

/// Notes what a socket was translated from. Returns whether that was known.
#[inline(always)]
fn note<F: Family, E: SocketEnv<F>>(
    env: &E,
    key: &SocketKey<F>,
    known: Option<E::Socket>,
    value: &Socket<F>,
    now: Nanos,
) -> Result<bool, Reason> {
    let held = known.as_ref().map(SocketEntry::load);
    let is_known = held.is_some_and(|held| held.leads_as(value));
    match (known, held) {
        (Some(entry), Some(held)) if is_known && held.first_slot == value.first_slot => {
            if held.due.is_due(now.ticks()) {
                entry.set_due(value.due);
            }
        }
        _ => env.socket_put(key, value).map_err(|_| Reason::SocketRefused)?,
    }
    Ok(is_known)
}

/// The address of the client that a socket counts as: what it is bound to or, where routing chooses, its namespace's. A
/// namespace must be known even for a bound socket: it may be one that is left to TC. `connected`: the client of its
/// connection.
#[inline(always)]
fn client<F: Family, E: SocketEnv<F>, C: Opening<F>>(
    env: &E,
    call: &C,
    connected: Option<F::Addr>,
) -> Result<F::Addr, Reason> {
    let key = call.netns();
    let Some(netns) = env.netns(&key) else {
        env.tell_unknown(&key);
        return Err(Reason::UnknownClient);
    };
    if netns.is_tc_only() {
        return Err(Reason::LeftToTc);
    }
    let source = call.source();
    if source == F::Addr::default() || source == netns.addr {
        return Ok(netns.addr);
    }
    // The address may be what routing has chosen when it was connected: then it goes on as who it was.
    Ok(connected.unwrap_or(source))
}

/// The backend of a socket. Without affinity, one and the same for all that it sends.
#[inline(always)]
fn choose<F: Family, E: SocketEnv<F>>(
    env: &E,
    frontend: &Frontend,
    asked: &FrontendKey<F>,
    client: &F::Addr,
    cookie: SocketCookie,
    now: Nanos,
) -> Result<Choice<F>, Reason> {
    if frontend.has_ranges() && !env.lets_in(&RangeKey::of_client(frontend.service, *client)) {
        return Err(Reason::NotAllowed);
    }
    if frontend.has_affinity() {
        return affinity::choose(env, frontend, client, now);
    }
    let hash = hash::socket(cookie.get(), asked.port, asked.proto, frontend.seed);
    let (id, backend) = slots::at(env, frontend, hash)?;
    Ok(Choice { id, backend, previous: BackendId::default(), used: now.ticks(), reason: Reason::Hashed })
}

/// The port of the client's is not known yet: the kernel chooses it later.
#[inline(always)]
fn event<F: Family>(
    asked: &FrontendKey<F>,
    client: &F::Addr,
    frontend: &Frontend,
    choice: &Choice<F>,
    now: Nanos,
) -> Event {
    Event {
        at: now.0,
        service: frontend.service,
        backend: choice.id,
        previous: choice.previous,
        client_port: Port::default(),
        frontend_port: asked.port,
        proto: asked.proto,
        version: F::VERSION,
        reason: choice.reason as u8,
        outside: 0,
        frontend_flags: frontend.flags,
        zero: [0; 2],
        client: F::octets16(client),
    }
}
