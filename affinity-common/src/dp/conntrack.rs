//! The entries of a connection: one for each direction, made together, looked after by the packets of both.

use super::{
    ConntrackEntry, Env, Refused, affinity,
    choice::Choice,
    hash,
    parse::{FIN, Headers, RST, SYN},
};
use crate::{
    abi::{
        affinity::refresh_after,
        conntrack::{
            BACKEND_FIN, BOTH_ENDS, CLIENT_FIN, Conntrack, ConntrackKey, FORWARD, OPENED, OUTSIDE, REPLIED, RESET,
            STREAM,
        },
        frontends::{Frontend, FrontendKey},
        work::Work,
    },
    family::Family,
    reason::Reason,
    types::{Nanos, Port, Proto, Seconds, TICK_SHIFT, Ticks},
};

/// How a packet stands to its connection.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Role {
    /// It opens one, and nothing is known of any on the same ports.
    First,
    /// It opens one on ports that are known: it comes again, or the connection before it is over.
    Again,
    /// It belongs to one that is open.
    Later,
}

/// Which end a packet comes from.
#[derive(Clone, Copy)]
pub enum From {
    /// From the one that has opened the connection.
    Client,
    /// From the one that answers.
    Backend,
}

/// What a packet tells of its connection.
#[inline(always)]
pub(super) fn shown<F: Family>(headers: &Headers<F>, from: From) -> u8 {
    let (mut seen, fin) = match from {
        From::Client if headers.opens() => (OPENED, CLIENT_FIN),
        From::Client => (0, CLIENT_FIN),
        From::Backend => (REPLIED, BACKEND_FIN),
    };
    if headers.flags & FIN != 0 {
        seen |= fin;
    }
    if headers.flags & RST != 0 {
        seen |= RESET;
    }
    seen
}

/// Whether nothing was seen of a connection for as long as it may be silent.
#[inline(always)]
pub fn has_expired<F: Family, E: Env<F>>(env: &E, held: &Conntrack<F>, proto: Proto, now: Nanos) -> bool {
    held.has_expired(env.lifetime(proto, held.seen), now.ticks())
}

/// Turns the key of a packet and its entry into those of the other direction. `FULL`: the packet may be of a pod that is
/// its own backend, both of whose directions are [`FORWARD`]: each end sends to the service's address.
#[inline(always)]
fn turn_round<F: Family, const FULL: bool>(key: &mut ConntrackKey<F>, value: &mut Conntrack<F>, headers: &Headers<F>) {
    let (addr, port, client_port) = (value.addr, value.port, value.client_port);
    value.packets = 0;
    if FULL && value.is_hairpin(&headers.src) {
        key.turn_forward(port, headers.dst, client_port);
        (value.addr, value.port, value.client_port) = (headers.src, headers.src_port, headers.dst_port);
    } else {
        key.turn_reverse(client_port, addr, port);
        (value.addr, value.port, value.client_port) = (headers.dst, headers.dst_port, headers.src_port);
    }
}

/// Notes a packet that is sent to a service's address in its connection's entry, and now and then looks after what belongs
/// to it. The key and what was read of the entry are used up.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "what is known of a packet lies in registers and on a small stack")]
pub fn note_request<F: Family, E: Env<F>, const FULL: bool>(
    env: &E,
    key: &mut ConntrackKey<F>,
    entry: &E::Conntrack,
    held: &mut Conntrack<F>,
    frontend: &Frontend,
    headers: &Headers<F>,
    from: From,
    now: Nanos,
) -> Result<(), Reason> {
    if note(entry, held, shown(headers, from), now.ticks()) {
        turn_round::<F, FULL>(key, held, headers);
        claim::<F, E, FULL>(env, key, held, now, Role::Later)?;
        entry.set_due(look_after(env, frontend, &headers.src, held, now));
    }
    Ok(())
}

/// Notes a packet from the backend in its connection's entry, and now and then looks after what belongs to it. The key
/// and what was read of the entry are used up.
#[inline(always)]
pub fn note_reply<F: Family, E: Env<F>>(
    env: &E,
    key: &mut ConntrackKey<F>,
    entry: &E::Conntrack,
    held: &mut Conntrack<F>,
    headers: &Headers<F>,
    now: Nanos,
) {
    if note(entry, held, shown(headers, From::Backend), now.ticks()) {
        let due = match frontend_of(env, held, key.proto) {
            Some(frontend) => look_after(env, &frontend, &headers.dst, held, now),
            None => now.ticks().after(Seconds::new(1).ticks()),
        };
        entry.set_due(due);
        if held.leads_to(&headers.src, headers.src_port) && held.client_port == headers.dst_port {
            // Past services, from its own port: its requests need nothing.
            return;
        }
        held.due = due;
        key.turn_forward(held.client_port, held.addr, held.port);
        held.packets = 0;
        (held.addr, held.port, held.client_port) = (headers.src, headers.src_port, headers.dst_port);
        keep_forward(env, key, held, now);
    }
}

/// The frontend of a connection, by the entry of the packets to its client.
#[inline(always)]
fn frontend_of<F: Family, E: Env<F>>(env: &E, held: &Conntrack<F>, proto: Proto) -> Option<Frontend> {
    let key = FrontendKey::new(held.addr, held.port, proto);
    let frontend = env.frontend(&key)?;
    if frontend.parts_outsiders() && held.is_from_outside() {
        env.frontend(&key.for_outsiders())
    } else {
        Some(frontend)
    }
}

/// Returns whether what belongs to the connection is to be looked after: whether it is time, or the packet tells something
/// that was not known in this direction.
#[inline(always)]
fn note<F: Family, C: ConntrackEntry<F>>(entry: &C, held: &mut Conntrack<F>, shown: u8, now: Ticks) -> bool {
    entry.count_packet();
    let is_due = held.due.is_due(now);
    let shown = if is_due && held.seen & REPLIED != 0 { shown | STREAM } else { shown };
    if held.last_seen != now {
        held.last_seen = now;
        entry.set_last_seen(now);
    }
    let news = shown & !held.seen != 0;
    if news {
        held.seen |= shown;
        entry.set_seen(held.seen);
    }
    news || is_due
}

/// Whether a packet from a backend answers another connection than the one that has its ports here: one past services, of
/// which nothing is noted. The first answer to a SYN is a SYN, too, or a reset; on a connection that it has on the same
/// ports already, a backend acknowledges what that has got (RFC 5961, section 4).
#[inline(always)]
pub fn is_anothers<F: Family>(held: &Conntrack<F>, headers: &Headers<F>) -> bool {
    headers.is_tcp() && held.is_unanswered() && headers.flags & (SYN | RST) == 0
}

/// Leaves the place of a new connection to the one past services that has its ports, and forgets the new one: when its SYN
/// comes again, it is given another port. The key is the place's.
#[inline(always)]
pub fn leave_place<F: Family, E: Env<F>>(
    env: &E,
    key: &mut ConntrackKey<F>,
    held: &mut Conntrack<F>,
    headers: &Headers<F>,
    now: Nanos,
) {
    key.turn_forward(held.client_port, held.addr, held.port);
    env.conntrack_remove(key);
    key.turn_reverse(headers.dst_port, headers.src, headers.src_port);
    let (addr, port, client_port) = (headers.src, headers.src_port, headers.dst_port);
    let last_seen = now.ticks();
    *held = Conntrack { addr, port, client_port, last_seen, due: last_seen, ..Conntrack::default() };
    // Where the map refuses, the next answer tries again.
    let _ = env.conntrack_replace(key, held);
}

/// Refreshes the client's affinity; returns when the flow is to look again: as soon as the entry can be stale.
#[inline(always)]
fn look_after<F: Family, E: Env<F>>(
    env: &E,
    frontend: &Frontend,
    client: &F::Addr,
    held: &Conntrack<F>,
    now: Nanos,
) -> Ticks {
    if !frontend.has_affinity() || frontend.service != held.service {
        return Nanos(now.0 + Nanos::SECOND.0).ticks();
    }
    let used = affinity::touch(env, frontend, client, held.backend, now);
    Nanos(used.0 + refresh_after(frontend.timeout).0 + (1 << TICK_SHIFT)).ticks()
}

/// Makes a new connection's entries, the way back first: a reply is never faster than that. The key is used up.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "what is known of a packet lies in registers and on a small stack")]
pub fn open<F: Family, E: Env<F>>(
    env: &E,
    key: &mut ConntrackKey<F>,
    way: &mut Conntrack<F>,
    old: Option<E::Conntrack>,
    frontend: &Frontend,
    choice: &Choice<F>,
    headers: &Headers<F>,
    now: Nanos,
) -> Result<(), Reason> {
    *way = new_way(frontend, choice, headers, now);
    let role = if old.is_some() { Role::Again } else { Role::First };
    if let Some(entry) = &old {
        leave_another::<F, E, false>(env, key, &mut entry.load(), way, headers);
    }
    turn_round::<F, false>(key, way, headers);
    claim::<F, E, false>(env, key, way, now, role)?;
    key.turn_forward(headers.src_port, headers.dst, headers.dst_port);
    (way.addr, way.port, way.client_port) = (choice.backend.addr, choice.backend.port, headers.src_port);
    begin(env, key, old, way);
    Ok(())
}

/// How many ports are tried for a client, its own the first.
const PORTS: u32 = 12;

/// Makes a new connection's entries where both of its ends may have to be translated, as [`open`] does. The client's end has
/// its own port, or where another connection has that, one of those that no client is given by Linux
/// (`ip_local_port_range`); the same again for the same connection, as long as it is free.
#[inline(always)]
pub fn open_full<F: Family, E: Env<F>>(
    env: &E,
    work: &mut Work<F>,
    old: Option<E::Conntrack>,
    frontend: &Frontend,
    choice: &Choice<F>,
    headers: &Headers<F>,
    now: Nanos,
) -> Result<(), Reason> {
    let Work { key, held, way } = work;
    *way = new_way(frontend, choice, headers, now);
    let role = if old.is_some() { Role::Again } else { Role::First };
    // What it comes from is a pointer, which the compiler would mix with the addresses in one test: the verifier lets nobody.
    env.in_memory(way);
    let is_hairpin = way.is_hairpin(&headers.src);
    let mut port = headers.src_port;
    if let Some(entry) = &old {
        *held = entry.load();
        if held.leads_to(&way.addr, way.port) {
            port = held.client_port;
        }
        leave_another::<F, E, true>(env, key, held, way, headers);
    }
    let hash = hash::connection::<F>(
        &headers.src,
        headers.src_port,
        &headers.dst,
        headers.dst_port,
        headers.proto,
        frontend.seed,
    );
    for attempt in 0..PORTS {
        if attempt != 0 {
            port = spare_port(hash, attempt);
            key.turn_forward(headers.src_port, headers.dst, headers.dst_port);
            (way.addr, way.port) = (choice.backend.addr, choice.backend.port);
        }
        way.client_port = port;
        way.ends = way.ends & OUTSIDE | if is_hairpin || port != headers.src_port { BOTH_ENDS } else { 0 };
        turn_round::<F, true>(key, way, headers);
        if is_free(env, key, way, now, role) {
            break;
        }
    }
    claim::<F, E, true>(env, key, way, now, role)?;
    key.turn_forward(headers.src_port, headers.dst, headers.dst_port);
    (way.addr, way.port, way.client_port) = (choice.backend.addr, choice.backend.port, port);
    begin(env, key, old, way);
    Ok(())
}

/// Whether [`claim`] can have a place.
#[inline(always)]
fn is_free<F: Family, E: Env<F>>(
    env: &E,
    key: &ConntrackKey<F>,
    wanted: &Conntrack<F>,
    now: Nanos,
    role: Role,
) -> bool {
    let Some(entry) = env.conntrack(key) else { return true };
    let held = entry.load();
    held.leads_as(wanted) || gives_way(env, &held, key.proto, now, role)
}

/// Whether the connection that has a place leaves it to another one.
#[inline(always)]
pub(super) fn gives_way<F: Family, E: Env<F>>(
    env: &E,
    held: &Conntrack<F>,
    proto: Proto,
    now: Nanos,
    role: Role,
) -> bool {
    has_expired(env, held, proto, now) || role != Role::Later && held.is_over()
}

/// A port that a client's end may have instead of its own.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "both summands are under 2^16")]
fn spare_port(hash: u32, attempt: u32) -> Port {
    /// Above what Linux gives to clients unless told otherwise.
    const FIRST: u32 = 61_000;
    const COUNT: u32 = (u16::MAX as u32) + 1 - FIRST;
    // Each connection has its own distance from try to try, so that those whose first tries meet part again.
    let distance = hash.rotate_left(16) | 1;
    Port::new((FIRST + hash::place(hash.wrapping_add(attempt.wrapping_mul(distance)), COUNT)) as u16)
}

/// The entry of a new connection's packets from the client, whose end keeps its port.
#[inline(always)]
fn new_way<F: Family>(frontend: &Frontend, choice: &Choice<F>, headers: &Headers<F>, now: Nanos) -> Conntrack<F> {
    // The affinity entry was just looked at: the next look is due when it can be stale.
    let wait = if frontend.has_affinity() { refresh_after(frontend.timeout) } else { Nanos::SECOND };
    Conntrack {
        packets: 0,
        service: frontend.service,
        backend: choice.id,
        last_seen: now.ticks(),
        due: Nanos(now.0 + wait.0 + (1 << TICK_SHIFT)).ticks(),
        port: choice.backend.port,
        client_port: headers.src_port,
        seen: shown(headers, From::Client),
        ends: if headers.from_outside { OUTSIDE } else { 0 },
        snat_port: Port::default(),
        addr: choice.backend.addr,
    }
}

/// Writes the entry of a new connection's packets from the client.
#[inline(always)]
fn begin<F: Family, E: Env<F>>(env: &E, key: &ConntrackKey<F>, old: Option<E::Conntrack>, way: &mut Conntrack<F>) {
    way.packets = 1;
    match old {
        // A SYN that comes again, or a connection after another on the same ports: no map is written.
        Some(entry) if is_same_way(&entry.load(), way) => {
            entry.count_packet();
            entry.set_last_seen(way.last_seen);
            entry.set_due(way.due);
            entry.set_seen(seen_of_another(key.proto, &entry.load(), way));
        }
        _ => {
            // Where the map refuses, the next packet tries again: the way back is there, and the choice comes out the same.
            let _ = env.conntrack_replace(key, way);
        }
    }
}

/// What is known of a connection that begins in the place of one on the same ports. Of TCP that is not over the SYN may have
/// come again, late.
#[inline(always)]
fn seen_of_another<F: Family>(proto: Proto, held: &Conntrack<F>, new: &Conntrack<F>) -> u8 {
    if proto == Proto::TCP && !held.is_over() { held.seen | new.seen } else { new.seen }
}

/// Takes away the way back of a connection that moves to another backend: what the old one still sends is no reply any
/// more. What was read of the old entry is used up.
#[inline(always)]
fn leave_another<F: Family, E: Env<F>, const FULL: bool>(
    env: &E,
    key: &mut ConntrackKey<F>,
    old: &mut Conntrack<F>,
    new: &Conntrack<F>,
    headers: &Headers<F>,
) {
    if old.leads_to(&new.addr, new.port) {
        return;
    }
    turn_round::<F, FULL>(key, old, headers);
    if let Some(entry) = env.conntrack(key)
        && entry.load().leads_as(old)
    {
        env.conntrack_remove(key);
    }
}

#[inline(always)]
fn is_same_connection<F: Family>(a: &Conntrack<F>, b: &Conntrack<F>) -> bool {
    a.service == b.service && a.backend == b.backend && a.is_from_outside() == b.is_from_outside()
}

#[inline(always)]
fn is_same_way<F: Family>(a: &Conntrack<F>, b: &Conntrack<F>) -> bool {
    is_same_connection(a, b) && a.leads_as(b)
}

/// Sees to it that the replies of a connection find their way back: that there is such an entry as `wanted`, at `key`.
/// Where another live connection has the same ports and backend by another frontend, the two can't be told apart: that is
/// a [`Reason::Collision`] of the later one.
#[inline(always)]
fn claim<F: Family, E: Env<F>, const FULL: bool>(
    env: &E,
    key: &mut ConntrackKey<F>,
    wanted: &Conntrack<F>,
    now: Nanos,
    role: Role,
) -> Result<(), Reason> {
    // It is seldom there for a first packet, and nearly always for another: tried in the order that takes one call.
    if role == Role::First {
        match env.conntrack_insert(key, wanted) {
            Err(Refused::Exists) => {}
            done => return done.map_err(|_| Reason::ConntrackRefused),
        }
    }
    let Some(entry) = env.conntrack(key) else {
        return match env.conntrack_insert(key, wanted) {
            // Another packet was quicker: it made the same entry, or took the way for another frontend.
            Err(Refused::Exists) if env.conntrack(key).is_some_and(|entry| !entry.load().leads_as(wanted)) => {
                Err(Reason::Collision)
            }
            Ok(()) | Err(Refused::Exists) => Ok(()),
            Err(Refused::Full) => Err(Reason::ConntrackRefused),
        };
    };
    let held = entry.load();
    if !held.leads_as(wanted) {
        if !gives_way(env, &held, key.proto, now, role) {
            return Err(Reason::Collision);
        }
        // What may still come of the connection that had this place must not reach the backend as the new one's.
        let (client_port, peer, port) = (key.client_port, key.peer, key.peer_port);
        if FULL && key.direction == FORWARD {
            key.turn_forward(held.port, peer, held.client_port);
            env.conntrack_remove(key);
            key.turn_forward(client_port, peer, port);
        } else {
            key.turn_forward(held.client_port, held.addr, held.port);
            env.conntrack_remove(key);
            key.turn_reverse(client_port, peer, port);
        }
    } else if is_same_connection(&held, wanted) {
        let seen =
            if role == Role::Later { held.seen | wanted.seen } else { seen_of_another(key.proto, &held, wanted) };
        if held.seen != seen {
            entry.set_seen(seen);
        }
        entry.set_last_seen(now.ticks());
        return Ok(());
    }
    env.conntrack_replace(key, wanted).map_err(|_| Reason::ConntrackRefused)
}

/// Sees to it that the requests of a connection find the backend that answers them: that there is such an entry as
/// `wanted`, at `key`.
#[inline(always)]
fn keep_forward<F: Family, E: Env<F>>(env: &E, key: &ConntrackKey<F>, wanted: &Conntrack<F>, now: Nanos) {
    let Some(entry) = env.conntrack(key) else {
        // Exists: the client's own packet was quicker. Full: the client's next packet rebuilds it.
        let _ = env.conntrack_insert(key, wanted);
        return;
    };
    let held = entry.load();
    if held.leads_as(wanted) {
        let seen = held.seen | wanted.seen;
        if held.seen != seen {
            entry.set_seen(seen);
        }
        entry.set_last_seen(now.ticks());
    }
}
