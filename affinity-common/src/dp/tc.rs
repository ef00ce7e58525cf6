//! The two pipelines of a client's interface. Ingress changes destinations only, egress sources only: routing,
//! reverse-path filtering and netfilter in between see a consistent flow of true addresses.

use super::{
    ConntrackEntry, Env, Packet,
    address::{self, Looks},
    choice::Choice,
    conntrack, fragment, full,
    icmp::{self, Icmp},
    parse::{Headers, NoPorts, Parse},
    reject::{self, Answer, Reject},
    rewrite::{End, Rewrite, translate},
    select, snat,
    step::{self, Step},
};
use crate::{
    abi::{
        backends::BackendKey,
        conntrack::{Conntrack, ConntrackKey},
        events::Event,
        filter::Place,
        frontends::{Frontend, FrontendKey},
        tail_calls::Stage,
    },
    family::Family,
    reason::Reason,
    types::{Nanos, Port},
};

/// A packet from a client: DNAT to a backend of the service that it is for.
#[inline(always)]
pub fn ingress<F: Parse + Rewrite, E: Env<F>, P: Packet>(env: &E, packet: &mut P) -> Step {
    let mut headers = Headers::default();
    match F::parse(packet, &mut headers) {
        Ok(()) => {}
        Err(NoPorts::Ends(reason)) => return Step::Ends(reason),
        Err(NoPorts::Fragment) => return step::hand_over(packet, Stage::FragmentIn),
        Err(NoPorts::Icmp) => return step::hand_over(packet, Stage::IcmpIn),
    }
    let looks = address::looks(env, &headers.dst);
    if looks.like_service {
        let key = FrontendKey::new(headers.dst, headers.dst_port, headers.proto);
        if let Some(frontend) = env.frontend(&key) {
            let frontend = for_origin(env, packet, &key, frontend);
            return request(env, packet, &mut headers, &frontend).map_or_else(|step| step, Step::Ends);
        }
    }
    if snat::is_like_reply(env, &headers)
        && let Some(step) = snat::come_back(env, packet, &mut headers)
    {
        return step;
    }
    without_frontend(env, packet, &headers, looks)
}

/// A packet from a client that no frontend and no address of the node's own is for.
#[inline(always)]
pub fn without_frontend<F: Family, E: Env<F>, P: Packet>(
    env: &E,
    packet: &mut P,
    headers: &Headers<F>,
    looks: Looks,
) -> Step {
    if looks.like_service && address::is_service(env, &headers.dst)
        || looks.like_direct
        || meets_translated(env, headers)
    {
        return step::hand_over(packet, Stage::Request);
    }
    Step::Ends(Reason::NotService)
}

/// Whether a packet has come in by one of the node's uplinks or, at egress, leaves by one.
#[inline(always)]
pub fn is_on_uplink<F: Family, E: Env<F>, P: Packet>(env: &E, packet: &P) -> bool {
    env.uplink(packet.ifindex()).is_some()
}

/// The frontend of a packet: that of those who come from outside, where they have one of their own and it is one of theirs.
#[inline(always)]
pub fn for_origin<F: Family, E: Env<F>, P: Packet>(
    env: &E,
    packet: &P,
    key: &FrontendKey<F>,
    frontend: Frontend,
) -> Frontend {
    if !frontend.parts_outsiders() || !is_on_uplink(env, packet) {
        return frontend;
    }
    // Both are written one after the other: where one is missing, it will be there in a moment.
    env.frontend(&key.for_outsiders()).unwrap_or(frontend)
}

/// A packet that another program has handed over.
#[inline(always)]
pub fn go_on<F: Icmp, E: Env<F>, P: Packet>(env: &E, packet: &mut P, stage: Stage) -> Step {
    match stage {
        Stage::Refuse => refuse::<F, P>(packet),
        Stage::Request => full::request(env, packet),
        Stage::Reply => full::reply(env, packet),
        Stage::FragmentIn => fragment::ingress(env, packet),
        Stage::FragmentOut => fragment::egress(env, packet),
        Stage::IcmpIn => icmp::ingress(env, packet),
        Stage::IcmpOut => icmp::egress(env, packet),
        Stage::Snat => snat::egress(env, packet),
        Stage::SnatReply => snat::ingress(env, packet),
        Stage::SnatRefuse => snat::refuse(env, packet),
        // Which is no frame of a family: see [`super::neighbour::arp`].
        Stage::Arp => Step::Ends(Reason::NotIp),
    }
}

/// Whether the answers to a packet past services would be taken for replies of one: whether the client has a translated
/// connection on the same ports. Of TCP, only a packet that opens a connection asks.
#[inline(always)]
fn meets_translated<F: Family, E: Env<F>>(env: &E, headers: &Headers<F>) -> bool {
    if headers.is_tcp() && !headers.opens() {
        return false;
    }
    let Headers { src, src_port, dst, dst_port, proto, .. } = *headers;
    env.conntrack(&ConntrackKey::reverse(src, src_port, dst, dst_port, proto)).is_some()
}

/// A packet that was handed over as [`Stage::Refuse`] with its reason: turned into its answer.
#[inline(always)]
fn refuse<F: Parse + Reject, P: Packet>(packet: &mut P) -> Step {
    let is_no_port = step::is_for(packet, Reason::NoSuchPort);
    let mut headers = Headers::default();
    match F::parse(packet, &mut headers) {
        Ok(()) => {}
        Err(NoPorts::Ends(reason)) => return Step::Ends(reason),
        // It is not in one piece.
        Err(_) if is_no_port => return Step::Ends(Reason::NoSuchPortDropped),
        Err(_) => return Step::Ends(Reason::NoBackendDropped),
    }
    Step::Ends(match (reject::answer(packet, &headers), is_no_port) {
        (Answer::Made, false) => Reason::NoBackend,
        (Answer::None, false) => Reason::NoBackendDropped,
        (Answer::Made, true) => Reason::NoSuchPort,
        (Answer::None, true) => Reason::NoSuchPortDropped,
    })
}

/// A packet to a client: if it is a backend's reply, its source becomes the frontend again.
#[inline(always)]
pub fn egress<F: Parse + Rewrite, E: Env<F>, P: Packet>(env: &E, packet: &mut P) -> Step {
    let mut headers = Headers::default();
    match F::parse(packet, &mut headers) {
        Ok(()) => {}
        Err(NoPorts::Ends(reason)) => return Step::Ends(reason),
        Err(NoPorts::Fragment) => return step::hand_over(packet, Stage::FragmentOut),
        Err(NoPorts::Icmp) => return step::hand_over(packet, Stage::IcmpOut),
    }
    reply::<F, E, P, false>(env, packet, &mut headers)
}

/// A packet to a client of which the headers are known. `FULL`: both its ends may have to be translated.
#[inline(always)]
pub fn reply<F: Rewrite, E: Env<F>, P: Packet, const FULL: bool>(
    env: &E,
    packet: &mut P,
    headers: &mut Headers<F>,
) -> Step {
    // Perhaps from outside, to a backend elsewhere.
    let is_like_snat = !FULL && address::is_like_snat(env, &headers.dst);
    if is_like_snat && let Some(step) = snat::leave(env, packet, headers) {
        return step;
    }
    let mut key = ConntrackKey::reverse(headers.dst, headers.dst_port, headers.src, headers.src_port, headers.proto);
    let Some(entry) = env.conntrack(&key) else {
        let leaves = is_like_snat && is_on_uplink(env, packet);
        return if leaves { snat::hand_over(packet) } else { Step::Ends(Reason::NotReply) };
    };
    env.in_memory(headers);
    let mut held = entry.load();
    let now = env.now();
    if !headers.is_tcp() && conntrack::has_expired(env, &held, headers.proto, now) {
        return Step::Ends(Reason::NotReply);
    }
    let is_anothers = conntrack::is_anothers(&held, headers);
    if !FULL && (held.has_both_ends() || is_anothers) {
        return step::hand_over(packet, Stage::Reply);
    }
    if FULL && is_anothers {
        conntrack::leave_place(env, &mut key, &mut held, headers, now);
        return Step::Ends(Reason::NotReply);
    }
    let (addr, port, client_port) = (held.addr, held.port, held.client_port);
    conntrack::note_reply(env, &mut key, &entry, &mut held, headers, now);
    let mut done = translate(packet, headers, End::Source, &addr, port);
    if FULL && done.is_ok() {
        let client = headers.dst;
        done = translate(packet, headers, End::Destination, &client, client_port);
    }
    match done {
        Ok(()) => Step::Ends(Reason::Reply),
        Err(_) => Step::Ends(Reason::RewriteFailed),
    }
}

#[inline(always)]
fn request<F: Parse + Rewrite, E: Env<F>, P: Packet>(
    env: &E,
    packet: &mut P,
    headers: &mut Headers<F>,
    frontend: &Frontend,
) -> Result<Reason, Step> {
    env.in_memory(headers);
    env.in_memory(frontend);
    let (reason, addr, port) = backend(env, packet, headers, frontend)?;
    match translate(packet, headers, End::Destination, &addr, port) {
        Ok(()) => Ok(reason),
        Err(_) => Err(Step::Ends(Reason::RewriteFailed)),
    }
}

/// Where a client's packet goes: where its connection is or, for the first of one, to the backend chosen now.
#[inline(always)]
fn backend<F: Family, E: Env<F>, P: Packet>(
    env: &E,
    packet: &mut P,
    headers: &mut Headers<F>,
    frontend: &Frontend,
) -> Result<(Reason, F::Addr, Port), Step> {
    let now = env.now();
    let mut key = ConntrackKey::forward(headers.src, headers.src_port, headers.dst, headers.dst_port, headers.proto);
    let known = env.conntrack(&key);
    if let Some(entry) = &known {
        let mut held = entry.load();
        if held.has_both_ends() {
            return Err(step::hand_over(packet, Stage::Request));
        }
        if still_stands(env, frontend, headers, &held, now) {
            let (addr, port) = (held.addr, held.port);
            let from = conntrack::From::Client;
            conntrack::note_request::<F, E, false>(env, &mut key, entry, &mut held, frontend, headers, from, now)?;
            return Ok((Reason::Established, addr, port));
        }
    }
    let mut choice = match select::choose(env, frontend, headers, now) {
        Ok(choice) => choice,
        Err(Reason::NoBackend) => return Err(step::hand_over_for(packet, Stage::Refuse, Reason::NoBackend)),
        Err(reason) => return Err(reason.into()),
    };
    choice.reason = step::any_reason(packet, choice.reason);
    headers.from_outside = is_on_uplink(env, packet);
    // The client itself, or ports that are taken: its own end is to be translated too.
    let opened = if choice.backend.addr == headers.src && !headers.from_outside {
        Err(Reason::Collision)
    } else if let Some(mut work) = env.work() {
        conntrack::open(env, &mut key, &mut work.way, known, frontend, &choice, headers, now)
    } else {
        Err(Reason::ConntrackRefused)
    };
    match opened {
        Ok(()) => {}
        Err(Reason::Collision) => {
            return Err(step::hand_over_for(packet, Stage::Request, choice.reason));
        }
        Err(reason) => return Err(reason.into()),
    }
    chosen(env, frontend, headers, &choice, now);
    Ok((choice.reason, choice.backend.addr, choice.backend.port))
}

/// Tells of a choice.
#[inline(always)]
pub fn chosen<F: Family, E: Env<F>>(
    env: &E,
    frontend: &Frontend,
    headers: &Headers<F>,
    choice: &Choice<F>,
    now: Nanos,
) {
    if headers.from_outside {
        env.mark_snat(Place::of::<F>(&choice.backend.addr));
    }
    env.count_connection(&BackendKey { service: frontend.service, backend: choice.id });
    if env.wants_events(now) {
        env.emit(event(frontend, headers, choice, now));
    }
}

/// Whether a packet belongs to the connection of its conntrack entry. A TCP connection stays where it is until a SYN
/// opens another one; a UDP flow ends with its time, with its backend's removal, or with its service.
#[inline(always)]
pub fn still_stands<F: Family, E: Env<F>>(
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
        && !conntrack::has_expired(env, held, headers.proto, now)
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
        outside: headers.from_outside.into(),
        frontend_flags: frontend.flags,
        zero: [0; 2],
        client: F::octets16(&headers.src),
    }
}
