//! The entries of a connection: one for each direction, made together, looked after by the packets of both.

use super::{
    ConntrackEntry, Env, Refused, affinity,
    choice::Choice,
    parse::{FIN, Headers, RST},
};
use crate::{
    abi::{
        affinity::refresh_after,
        conntrack::{BACKEND_FIN, CLIENT_FIN, Conntrack, ConntrackKey, REPLIED, RESET},
        frontends::{Frontend, FrontendKey},
    },
    family::Family,
    reason::Reason,
    types::{Nanos, Seconds, TICK_SHIFT, Ticks},
};

/// How a packet stands to its connection.
#[derive(Clone, Copy, PartialEq)]
enum Role {
    /// It opens one, and nothing is known of any on the same ports.
    First,
    /// It opens one on ports that are known: it comes again, or the connection before it is over.
    Again,
    /// It belongs to one that is open.
    Later,
}

/// Which end a packet comes from.
#[derive(Clone, Copy)]
enum From {
    Client,
    Backend,
}

#[inline(always)]
fn shown<F: Family>(headers: &Headers<F>, from: From) -> u8 {
    let (mut seen, fin) = match from {
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

/// Notes a packet from the client in its connection's entry, and now and then looks after what belongs to it. The key and
/// what was read of the entry are used up.
#[inline(always)]
pub fn note_request<F: Family, E: Env<F>>(
    env: &E,
    key: &mut ConntrackKey<F>,
    entry: &E::Conntrack,
    held: &mut Conntrack<F>,
    frontend: &Frontend,
    headers: &Headers<F>,
    now: Nanos,
) -> Result<(), Reason> {
    let news = note(entry, held, shown(headers, From::Client), now.ticks());
    if news || held.due.is_due(now.ticks()) {
        let (backend, port) = (held.addr, held.port);
        key.turn_reverse(backend, port);
        (held.packets, held.addr, held.port) = (0, headers.dst, headers.dst_port);
        claim_reverse(env, key, held, now, Role::Later)?;
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
    let news = note(entry, held, shown(headers, From::Backend), now.ticks());
    if news || held.due.is_due(now.ticks()) {
        let due = match env.frontend(&FrontendKey::new(held.addr, held.port, key.proto)) {
            Some(frontend) => look_after(env, &frontend, &headers.dst, held, now),
            None => now.ticks().after(Seconds::new(1).ticks()),
        };
        entry.set_due(due);
        held.due = due;
        key.turn_forward(held.addr, held.port);
        (held.packets, held.addr, held.port) = (0, headers.src, headers.src_port);
        keep_forward(env, key, held, now);
    }
}

/// Returns whether the packet tells something of the connection that was not known in this direction.
#[inline(always)]
fn note<F: Family, C: ConntrackEntry<F>>(entry: &C, held: &mut Conntrack<F>, shown: u8, now: Ticks) -> bool {
    entry.count_packet();
    if held.last_seen != now {
        held.last_seen = now;
        entry.set_last_seen(now);
    }
    let news = shown & !held.seen != 0;
    if news {
        held.seen |= shown;
        entry.set_seen(held.seen);
    }
    news
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

/// Makes a new connection's entries, reverse first: a reply is never faster than its way back. The key is used up.
#[inline(always)]
pub fn open<F: Family, E: Env<F>>(
    env: &E,
    key: &mut ConntrackKey<F>,
    old: Option<E::Conntrack>,
    frontend: &Frontend,
    choice: &Choice<F>,
    headers: &Headers<F>,
    now: Nanos,
) -> Result<(), Reason> {
    let at = now.ticks();
    let (addr, port) = (choice.backend.addr, choice.backend.port);
    // The affinity entry was just looked at: the next look is due when it can be stale.
    let wait = if frontend.has_affinity() { refresh_after(frontend.timeout) } else { Nanos::SECOND };
    let due = Nanos(now.0 + wait.0 + (1 << TICK_SHIFT)).ticks();
    if let Some(entry) = &old {
        let held = entry.load();
        if !held.leads_to(&addr, port) {
            leave(env, key, &held, headers);
        }
    }
    let mut new = Conntrack {
        packets: 0,
        service: frontend.service,
        backend: choice.id,
        last_seen: at,
        due,
        port: headers.dst_port,
        seen: shown(headers, From::Client),
        zero: 0,
        addr: headers.dst,
    };
    let role = if old.is_some() { Role::Again } else { Role::First };
    key.turn_reverse(addr, port);
    claim_reverse(env, key, &new, now, role)?;
    key.turn_forward(headers.dst, headers.dst_port);
    (new.packets, new.addr, new.port) = (1, addr, port);
    match old {
        // A SYN that comes again, or a connection after another on the same ports: no map is written.
        Some(entry) if is_same_way(&entry.load(), &new) => {
            entry.count_packet();
            entry.set_last_seen(at);
            entry.set_due(due);
            entry.set_seen(new.seen);
        }
        _ => {
            // Where the map refuses, the next packet tries again: the way back is there, and the choice comes out the same.
            let _ = env.conntrack_replace(key, &new);
        }
    }
    Ok(())
}

/// Takes away the way back of a connection that moves to another backend: what the old one still sends is no reply any
/// more. The key is used up.
#[inline(always)]
fn leave<F: Family, E: Env<F>>(env: &E, key: &mut ConntrackKey<F>, old: &Conntrack<F>, headers: &Headers<F>) {
    key.turn_reverse(old.addr, old.port);
    if let Some(entry) = env.conntrack(key)
        && entry.load().leads_to(&headers.dst, headers.dst_port)
    {
        env.conntrack_remove(key);
    }
}

#[inline(always)]
fn is_same_way<F: Family>(a: &Conntrack<F>, b: &Conntrack<F>) -> bool {
    a.service == b.service && a.backend == b.backend && a.leads_to(&b.addr, b.port)
}

/// Sees to it that the replies of a connection find their way back: that there is such an entry as `wanted`, at `key`.
/// Where another live connection has the same client port and backend by another frontend, the two can't be told apart:
/// the later one is not let through.
#[inline(always)]
fn claim_reverse<F: Family, E: Env<F>>(
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
            Err(Refused::Exists)
                if env.conntrack(key).is_some_and(|entry| !entry.load().leads_to(&wanted.addr, wanted.port)) =>
            {
                Err(Reason::Collision)
            }
            Ok(()) | Err(Refused::Exists) => Ok(()),
            Err(Refused::Full) => Err(Reason::ConntrackRefused),
        };
    };
    let held = entry.load();
    if !held.leads_to(&wanted.addr, wanted.port) {
        let is_free = held.has_expired(key.proto, now.ticks()) || role != Role::Later && held.is_over();
        if !is_free {
            return Err(Reason::Collision);
        }
        // What may still come of the connection that had this place must not reach the backend as the new one's.
        let (backend, port) = (key.peer, key.peer_port);
        key.turn_forward(held.addr, held.port);
        env.conntrack_remove(key);
        key.turn_reverse(backend, port);
    } else if held.service == wanted.service && held.backend == wanted.backend {
        let seen = if role == Role::Later { held.seen | wanted.seen } else { wanted.seen };
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
    if held.leads_to(&wanted.addr, wanted.port) {
        let seen = held.seen | wanted.seen;
        if held.seen != seen {
            entry.set_seen(seen);
        }
        entry.set_last_seen(now.ticks());
    }
}
