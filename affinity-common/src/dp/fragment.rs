//! Fragments: the first one of a packet has its ports, and they are noted; the others follow it, in whatever order they
//! come behind it. One that comes before it can't be told where to go.

use super::{
    ConntrackEntry, Env, Packet, address, conntrack,
    parse::{self, Headers, NoPorts, Parse, Part, Payload},
    reject::turn_back,
    rewrite::{End, Rewrite},
    snat,
    step::{self, Step},
};
use crate::{
    abi::{
        conntrack::ConntrackKey,
        fragments::{Fragments, FragmentsKey, LIFETIME},
        tail_calls::Stage,
    },
    family::Family,
    reason::Reason,
    types::Proto,
};

/// A fragment from a client.
#[inline(always)]
pub fn ingress<F: Parse + Rewrite, E: Env<F>, P: Packet>(env: &E, packet: &mut P) -> Step {
    let mut headers = Headers::default();
    let payload = match read::<F, P>(packet, &mut headers) {
        Ok(payload) => payload,
        Err(reason) => return Step::Ends(reason),
    };
    env.in_memory(&headers);
    let looks = address::looks(env, &headers.dst);
    let is_like_reply = address::is_like_snat(env, &headers.src);
    if !looks.like_service && !looks.like_direct && !is_like_reply {
        return Step::Ends(Reason::Fragment);
    }
    if payload.part.offset == 0 {
        return match ports_of_first(env, packet, &mut headers, payload) {
            Ok(ports) => {
                note(env, &headers, payload.part, &ports);
                let stage = if snat::is_like_reply(env, &headers) { Stage::SnatReply } else { Stage::Request };
                step::hand_over(packet, stage)
            }
            Err(reason) => Step::Ends(reason),
        };
    }
    let Headers { src, dst, proto, .. } = headers;
    let held = noted(env, &headers, payload.part).and_then(|noted| {
        let entry = if is_like_reply && snat::is_of_range(noted.dst_port) {
            env.conntrack(&ConntrackKey::snat_reply(dst, noted.dst_port, src, noted.src_port, proto))?
        } else {
            env.conntrack(&ConntrackKey::forward(src, noted.src_port, dst, noted.dst_port, proto))?
        };
        entry.count_packet();
        entry.set_last_seen(env.now().ticks());
        Some(entry.load())
    });
    let Some(held) = held else {
        let is_lost = address::is_service(env, &dst);
        return Step::Ends(if is_lost { Reason::FragmentAlone } else { Reason::Fragment });
    };
    let mut done = F::write_address(packet, headers.l3, End::Destination, &dst, &held.addr);
    let is_hairpin = held.is_hairpin(&src);
    if is_hairpin {
        done = done
            .and_then(|()| F::write_address(packet, headers.l3, End::Source, &src, &dst))
            .and_then(|()| turn_back(packet));
    }
    Step::Ends(match done {
        Ok(()) if is_hairpin => Reason::Hairpin,
        Ok(()) => Reason::Established,
        Err(_) => Reason::RewriteFailed,
    })
}

/// A fragment to a client.
#[inline(always)]
pub fn egress<F: Parse + Rewrite, E: Env<F>, P: Packet>(env: &E, packet: &mut P) -> Step {
    let mut headers = Headers::default();
    let payload = match read::<F, P>(packet, &mut headers) {
        Ok(payload) => payload,
        Err(reason) => return Step::Ends(reason),
    };
    env.in_memory(&headers);
    let Headers { src, dst, proto, .. } = headers;
    let ports = if payload.part.offset == 0 {
        ports_of_first(env, packet, &mut headers, payload).ok()
    } else {
        noted(env, &headers, payload.part)
    };
    let of_reply = ports.as_ref().and_then(|ports| {
        let held = env.conntrack(&ConntrackKey::reverse(dst, ports.dst_port, src, ports.src_port, proto))?.load();
        let is_over = proto != Proto::TCP && conntrack::has_expired(env, &held, proto, env.now());
        (!is_over).then_some((held.addr, *ports))
    });
    let Some((from, ports)) = of_reply else { return leaves(env, packet, &headers, payload.part, ports) };
    if payload.part.offset == 0 {
        // Of replies alone: what others send must not push those out.
        note(env, &headers, payload.part, &ports);
        return step::hand_over(packet, Stage::Reply);
    }
    Step::Ends(match F::write_address(packet, headers.l3, End::Source, &src, &from) {
        Ok(()) => Reason::Reply,
        Err(_) => Reason::RewriteFailed,
    })
}

/// A fragment that is of no reply: perhaps from outside, to a backend elsewhere.
#[inline(always)]
fn leaves<F: Parse + Rewrite, E: Env<F>, P: Packet>(
    env: &E,
    packet: &mut P,
    headers: &Headers<F>,
    part: Part,
    ports: Option<Fragments>,
) -> Step {
    let Headers { src, dst, proto, .. } = *headers;
    let Some(ports) = ports.filter(|_| address::is_like_snat(env, &dst)) else { return Step::Ends(Reason::Fragment) };
    if part.offset == 0 {
        note(env, headers, part, &ports);
        return step::hand_over(packet, Stage::Snat);
    }
    let key = ConntrackKey::reverse(src, ports.src_port, dst, ports.dst_port, proto);
    let has_left = snat::port_of_connection(env, &key).is_some();
    let uplink = snat::way_out(env, packet, headers).filter(|_| has_left);
    let Some(uplink) = uplink else { return Step::Ends(Reason::Fragment) };
    Step::Ends(match F::write_address(packet, headers.l3, End::Source, &src, &uplink.addr) {
        Ok(()) => Reason::Snat,
        Err(_) => Reason::RewriteFailed,
    })
}

/// What a fragment says of itself.
#[inline(always)]
fn read<F: Parse, P: Packet>(packet: &P, headers: &mut Headers<F>) -> Result<Payload, Reason> {
    match F::network(packet, headers, true) {
        Ok(payload) if headers.proto == Proto::TCP || headers.proto == Proto::UDP => Ok(payload),
        Err(NoPorts::Ends(reason)) => Err(reason),
        _ => Err(Reason::Fragment),
    }
}

#[inline(always)]
fn key<F: Family>(headers: &Headers<F>, part: Part) -> FragmentsKey<F> {
    FragmentsKey { src: headers.src, dst: headers.dst, id: part.id, proto: headers.proto, zero: [0; 3] }
}

/// The ports of a packet by its first fragment, as they are noted.
#[inline(always)]
fn ports_of_first<F: Family, E: Env<F>, P: Packet>(
    env: &E,
    packet: &P,
    headers: &mut Headers<F>,
    payload: Payload,
) -> Result<Fragments, Reason> {
    parse::first_part(packet, headers, payload.len)?;
    Ok(Fragments { src_port: headers.src_port, dst_port: headers.dst_port, at: env.now().ticks() })
}

/// Notes the ports of a packet for its later fragments.
#[inline(always)]
fn note<F: Family, E: Env<F>>(env: &E, headers: &Headers<F>, part: Part, ports: &Fragments) {
    if part.more {
        // Where the map refuses, the others are lost, as on any way.
        let _ = env.note_fragments(&key(headers, part), ports);
    }
}

/// What was noted of a packet, if that was not long ago: its identification may be another one's by now.
#[inline(always)]
fn noted<F: Family, E: Env<F>>(env: &E, headers: &Headers<F>, part: Part) -> Option<Fragments> {
    let noted = env.fragments(&key(headers, part))?;
    (noted.at.until(env.now().ticks()) < LIFETIME.ticks()).then_some(noted)
}
