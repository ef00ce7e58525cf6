//! Packets of which more than one end may have to be translated, in programs of their own, for it is seldom:
//!
//! - The client's port is taken: another connection of the client's, by another frontend or past services, has the same
//!   ports with the same backend. The later one gets another port, and its answers the client's own again.
//! - A pod is its own backend (hairpin). Its packet goes back to it with the service's address for its source, and its
//!   answer, which is sent there, too: neither meets the node's routing, which would find it strange.
//! - What is sent to a service's address and is for none of its ports is refused.
//! - The first fragment of a packet, which is the one that has ports.

use super::{
    ConntrackEntry, Env, Packet, address,
    choice::Choice,
    conntrack::{self, From},
    parse::{Headers, Parse},
    reject::turn_back,
    rewrite::{End, Rewrite, translate},
    select,
    step::{self, Step},
    tc,
};
use crate::{
    abi::{
        backends::Backend,
        conntrack::{Conntrack, ConntrackKey},
        filter::Place,
        frontends::{Frontend, FrontendKey},
        tail_calls::Stage,
        work::Work,
    },
    family::Family,
    reason::Reason,
    types::{BackendId, Nanos},
};

/// A packet from a client.
#[inline(always)]
pub fn request<F: Parse + Rewrite, E: Env<F>, P: Packet>(env: &E, packet: &mut P) -> Step {
    let mut headers = Headers::default();
    if let Err(no_ports) = F::parse_first(packet, &mut headers) {
        return Step::Ends(no_ports.reason());
    }
    env.in_memory(&headers);
    let Some(mut work) = env.work() else { return Step::Ends(Reason::ConntrackRefused) };
    match find::<F, E, P>(env, packet, &mut work, &mut headers) {
        Ok(reason) => rewrite(packet, &mut headers, &work.way, reason),
        Err(step) => step,
    }
}

/// A packet to a client.
#[inline(always)]
pub fn reply<F: Parse + Rewrite, E: Env<F>, P: Packet>(env: &E, packet: &mut P) -> Step {
    let mut headers = Headers::default();
    match F::parse_first(packet, &mut headers) {
        Ok(()) => tc::reply::<F, E, P, true>(env, packet, &mut headers),
        Err(no_ports) => Step::Ends(no_ports.reason()),
    }
}

/// Sees where a packet goes and as whose: leaves that as [`Work::way`], and says why.
#[inline(always)]
fn find<F: Family, E: Env<F>, P: Packet>(
    env: &E,
    packet: &mut P,
    work: &mut Work<F>,
    headers: &mut Headers<F>,
) -> Result<Reason, Step> {
    let now = env.now();
    let Headers { src, src_port, dst, dst_port, proto, .. } = *headers;
    let asked = FrontendKey::new(dst, dst_port, proto);
    let frontend = env.frontend(&asked).map(|frontend| tc::for_origin(env, packet, &asked, frontend));
    work.key = ConntrackKey::forward(src, src_port, dst, dst_port, proto);
    if let Some(frontend) = frontend {
        return to_service(env, packet, work, headers, &frontend, now);
    }
    if let Some(reason) = without_service(env, work, headers, now) {
        return Ok(reason);
    }
    if address::is_service(env, &dst) {
        return Err(step::hand_over_for(packet, Stage::Refuse, Reason::NoSuchPort));
    }
    past_services(env, work, headers, now)
}

/// A packet for a service.
#[inline(always)]
fn to_service<F: Family, E: Env<F>, P: Packet>(
    env: &E,
    packet: &mut P,
    work: &mut Work<F>,
    headers: &mut Headers<F>,
    frontend: &Frontend,
    now: Nanos,
) -> Result<Reason, Step> {
    env.in_memory(frontend);
    let known = env.conntrack(&work.key);
    if let Some(entry) = &known {
        work.held = entry.load();
        if tc::still_stands(env, frontend, headers, &work.held, now) {
            return Ok(goes_on(env, work, entry, frontend, headers, From::Client, now)?);
        }
    }
    let mut choice = match select::choose(env, frontend, headers, now) {
        Ok(choice) => choice,
        Err(Reason::NoBackend) => return Err(step::hand_over_for(packet, Stage::Refuse, Reason::NoBackend)),
        Err(reason) => return Err(reason.into()),
    };
    // The program before has made the client's entry, and this one has found it.
    for first in [Reason::AffinityNew, Reason::AffinityExpired, Reason::AffinityFailover] {
        if step::is_for(packet, first) {
            choice.reason = first;
        }
    }
    choice.reason = step::any_reason(packet, choice.reason);
    headers.from_outside = tc::is_on_uplink(env, packet);
    conntrack::open_full(env, work, known, frontend, &choice, headers, now)?;
    tc::chosen(env, frontend, headers, &choice, now);
    Ok(choice.reason)
}

/// A packet of a known connection that has no frontend: what a pod answers to itself, or what it sends past services.
#[inline(always)]
fn without_service<F: Family, E: Env<F>>(
    env: &E,
    work: &mut Work<F>,
    headers: &Headers<F>,
    now: Nanos,
) -> Option<Reason> {
    let entry = env.conntrack(&work.key)?;
    work.held = entry.load();
    let held = &work.held;
    let is_over =
        if headers.is_tcp() { headers.opens() } else { conntrack::has_expired(env, held, headers.proto, now) };
    let is_answer = held.addr == headers.src;
    // Of a connection that had a frontend until a moment ago it can be neither.
    if is_over || !(is_answer || held.addr == headers.dst) {
        return None;
    }
    let none = Frontend { service: held.service, ..Frontend::default() };
    let from = if is_answer { From::Backend } else { From::Client };
    goes_on(env, work, &entry, &none, headers, from, now).ok()
}

/// A packet of a known connection.
#[inline(always)]
fn goes_on<F: Family, E: Env<F>>(
    env: &E,
    work: &mut Work<F>,
    entry: &E::Conntrack,
    frontend: &Frontend,
    headers: &Headers<F>,
    from: From,
    now: Nanos,
) -> Result<Reason, Reason> {
    let Work { key, held, way } = work;
    *way = *held;
    conntrack::note_request::<F, E, true>(env, key, entry, held, frontend, headers, from, now)?;
    Ok(if way.addr == headers.dst { Reason::Direct } else { Reason::Established })
}

/// A packet past services, at whose ports (by the key of its answers) the client may have a translated connection.
#[inline(always)]
fn past_services<F: Family, E: Env<F>>(
    env: &E,
    work: &mut Work<F>,
    headers: &Headers<F>,
    now: Nanos,
) -> Result<Reason, Step> {
    if headers.is_tcp() && !headers.opens() {
        return Err(Step::Ends(Reason::NotService));
    }
    let Work { key, held, .. } = work;
    key.turn_reverse(headers.src_port, headers.dst, headers.dst_port);
    let entry = env.conntrack(key);
    if let Some(entry) = &entry {
        *held = entry.load();
    }
    if entry.is_none() || held.is_over() || conntrack::has_expired(env, held, headers.proto, now) {
        // Its answers are its own again, and so are its ports, whatever an earlier one on them had.
        env.conntrack_remove(key);
        key.turn_forward(headers.src_port, headers.dst, headers.dst_port);
        env.conntrack_remove(key);
        return Err(Step::Ends(Reason::NotService));
    }
    let backend = Backend { addr: headers.dst, port: headers.dst_port, flags: 0, zero: 0 };
    let (id, previous) = (BackendId::default(), BackendId::default());
    let choice = Choice { id, backend, previous, used: now.ticks(), reason: Reason::Direct };
    key.turn_forward(headers.src_port, headers.dst, headers.dst_port);
    // Its later packets are to come here.
    env.mark_direct(Place::of::<F>(&headers.dst));
    conntrack::open_full(env, work, None, &Frontend::default(), &choice, headers, now)?;
    Ok(Reason::Direct)
}

/// Translates both ends of a packet.
#[inline(always)]
fn rewrite<F: Rewrite, P: Packet>(
    packet: &mut P,
    headers: &mut Headers<F>,
    way: &Conntrack<F>,
    reason: Reason,
) -> Step {
    let is_hairpin = way.is_hairpin(&headers.src);
    let source = if is_hairpin { headers.dst } else { headers.src };
    if translate(packet, headers, End::Destination, &way.addr, way.port).is_err() {
        return Step::Ends(Reason::RewriteFailed);
    }
    if translate(packet, headers, End::Source, &source, way.client_port).is_err() {
        return Step::Ends(Reason::RewriteFailed);
    }
    if !is_hairpin {
        return Step::Ends(reason);
    }
    Step::Ends(if turn_back(packet).is_ok() { Reason::Hairpin } else { Reason::RewriteFailed })
}
