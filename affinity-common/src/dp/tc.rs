//! The two pipelines of a client's interface. Ingress changes destinations only, egress sources only: routing,
//! reverse-path filtering and netfilter in between see a consistent flow of true addresses.

use super::{
    ConntrackEntry, Env, Packet,
    choice::Choice,
    conntrack,
    parse::{Headers, Parse},
    reject::{self, Reject},
    rewrite::{End, Rewrite, translate},
    select,
};
use crate::{
    abi::{
        backends::BackendKey,
        conntrack::{Conntrack, ConntrackKey},
        events::Event,
        frontends::{Frontend, FrontendKey},
    },
    family::Family,
    reason::Reason,
    types::{Nanos, Port},
};

/// A packet from a client: DNAT to a backend of the service that it is for.
#[inline(always)]
pub fn ingress<F: Parse + Rewrite, E: Env<F>, P: Packet>(env: &E, packet: &mut P) -> Reason {
    let headers = match F::parse(packet) {
        Ok(headers) => headers,
        Err(reason) => return reason,
    };
    let Some(frontend) = env.frontend(&FrontendKey::new(headers.dst, headers.dst_port, headers.proto)) else {
        return Reason::NotService;
    };
    request(env, packet, &headers, &frontend).unwrap_or_else(|reason| reason)
}

/// A packet that [`ingress`] has left as it came, as [`Reason::NoBackend`]: turned into its answer.
#[inline(always)]
pub fn refuse<F: Parse + Reject, P: Packet>(packet: &mut P) -> Reason {
    match F::parse(packet) {
        Ok(headers) => reject::no_backend(packet, &headers),
        Err(reason) => reason,
    }
}

/// A packet to a client: if it is a backend's reply, its source becomes the frontend again.
#[inline(always)]
pub fn egress<F: Parse + Rewrite, E: Env<F>, P: Packet>(env: &E, packet: &mut P) -> Reason {
    let headers = match F::parse(packet) {
        Ok(headers) => headers,
        Err(reason) => return reason,
    };
    let mut key = ConntrackKey::reverse(headers.dst, headers.dst_port, headers.src, headers.src_port, headers.proto);
    let Some(entry) = env.conntrack(&key) else { return Reason::NotReply };
    env.in_memory(&headers);
    let mut held = entry.load();
    let now = env.now();
    if !headers.is_tcp() && held.has_expired(headers.proto, now.ticks()) {
        return Reason::NotReply;
    }
    let (addr, port) = (held.addr, held.port);
    conntrack::note_reply(env, &mut key, &entry, &mut held, &headers, now);
    match translate(packet, &headers, End::Source, &addr, port) {
        Ok(()) => Reason::Reply,
        Err(_) => Reason::RewriteFailed,
    }
}

#[inline(always)]
fn request<F: Parse + Rewrite, E: Env<F>, P: Packet>(
    env: &E,
    packet: &mut P,
    headers: &Headers<F>,
    frontend: &Frontend,
) -> Result<Reason, Reason> {
    env.in_memory(headers);
    env.in_memory(frontend);
    let (reason, addr, port) = backend(env, headers, frontend)?;
    match translate(packet, headers, End::Destination, &addr, port) {
        Ok(()) => Ok(reason),
        Err(_) => Err(Reason::RewriteFailed),
    }
}

/// Where a client's packet goes: where its connection is or, for the first of one, to the backend chosen now.
#[inline(always)]
fn backend<F: Family, E: Env<F>>(
    env: &E,
    headers: &Headers<F>,
    frontend: &Frontend,
) -> Result<(Reason, F::Addr, Port), Reason> {
    let now = env.now();
    let mut key = ConntrackKey::forward(headers.src, headers.src_port, headers.dst, headers.dst_port, headers.proto);
    let known = env.conntrack(&key);
    if let Some(entry) = &known {
        let mut held = entry.load();
        if still_stands(env, frontend, headers, &held, now) {
            let (addr, port) = (held.addr, held.port);
            conntrack::note_request(env, &mut key, entry, &mut held, frontend, headers, now)?;
            return Ok((Reason::Established, addr, port));
        }
    }
    let choice = select::choose(env, frontend, headers, now)?;
    conntrack::open(env, &mut key, known, frontend, &choice, headers, now)?;
    env.count_connection(&BackendKey { service: frontend.service, backend: choice.id });
    if env.wants_events(now) {
        env.emit(event(frontend, headers, &choice, now));
    }
    Ok((choice.reason, choice.backend.addr, choice.backend.port))
}

/// Whether a packet belongs to the connection of its conntrack entry. A TCP connection stays where it is until a SYN
/// opens another one; a UDP flow ends with its time, with its backend's removal, or with its service.
#[inline(always)]
fn still_stands<F: Family, E: Env<F>>(
    env: &E,
    frontend: &Frontend,
    headers: &Headers<F>,
    held: &Conntrack<F>,
    now: Nanos,
) -> bool {
    if headers.is_tcp() {
        return !headers.opens();
    }
    held.service == frontend.service
        && !held.has_expired(headers.proto, now.ticks())
        && env.backend(&BackendKey { service: held.service, backend: held.backend }).is_some()
}

#[inline(always)]
fn event<F: Family>(frontend: &Frontend, headers: &Headers<F>, choice: &Choice<F>, now: Nanos) -> Event {
    Event {
        at: now.0,
        service: frontend.service,
        backend: choice.id,
        previous: choice.previous,
        client_port: headers.src_port,
        frontend_port: headers.dst_port,
        proto: headers.proto,
        version: F::VERSION,
        reason: choice.reason as u8,
        zero: [0; 5],
        client: F::octets16(&headers.src),
    }
}
