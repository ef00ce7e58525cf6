//! Packets from outside to backends elsewhere leave the node as its own, so that the answers come back by it: at egress their
//! source becomes the node's address on the interface that they leave by, as masquerading picks it, and a port of a range of its
//! own; at ingress the answers' destination becomes the client again. Affinity, which was asked before, is by the client's own
//! address.
//!
//! A port belongs to a client for a backend's address and port: whoever inserts the entry of its answers has it, and that entry
//! says for how long. The connection's way back only remembers which one it is: each packet asks whether it is so still. Whoever
//! wants one tries ports in an order of the connection's own, so that what was evicted is found, or made, again.

use super::{
    ConntrackEntry, Env, Packet, address, conntrack,
    conntrack::{From, Role},
    hash,
    parse::{Headers, NoPorts, Parse},
    reject::{self, Answer, Reject},
    rewrite::{End, Rewrite, translate},
    step::{self, Step},
    tc,
};
use crate::{
    abi::{
        conntrack::{Conntrack, ConntrackKey, OPENED},
        frontends::FrontendKey,
        tail_calls::Stage,
        uplinks::Uplink,
        work::Work,
    },
    family::Family,
    reason::Reason,
    types::{Nanos, Port, Ticks},
};

/// The first port of the range: below it are those that only privileged processes listen on.
pub const FIRST_PORT: u16 = 1024;

/// How many ports there are: up to those that node ports are given out of (30000-32767), and then those that Linux gives to
/// the node's own clients (32768-60999).
pub const PORTS: u16 = 30_000 - FIRST_PORT;

/// How many ports are tried by one run of the program.
const TRIES: u32 = 12;

/// How many times the program hands a packet on to itself: 192 ports are tried, so that of the whole range 97 of 100 can be in
/// use before it is likely that one finds none.
const ROUNDS: u32 = 16;

/// The round in which ports are tried first. Before it, it is not known yet that the connection has none.
const FIRST_ROUND: u32 = 1;

/// Whether a packet looks like the answer to one that has left as the node's own. Nobody answers by a SYN alone.
#[inline(always)]
pub fn is_like_reply<F: Family, E: Env<F>>(env: &E, headers: &Headers<F>) -> bool {
    is_of_range(headers.dst_port) && !(headers.is_tcp() && headers.opens()) && address::is_like_snat(env, &headers.src)
}

/// Whether a port is of the range.
#[inline(always)]
pub const fn is_of_range(port: Port) -> bool {
    port.get().wrapping_sub(FIRST_PORT) < PORTS
}

/// A packet that leaves by an interface, and looks as if it were from outside: where its connection has a port, it leaves as the
/// node's own.
#[inline(always)]
pub fn leave<F: Rewrite, E: Env<F>, P: Packet>(env: &E, packet: &mut P, headers: &mut Headers<F>) -> Option<Step> {
    let uplink = way_out(env, packet, headers)?;
    env.in_memory(headers);
    env.in_memory(&uplink);
    let port = known(env, headers, &uplink, env.now())?;
    Some(write_source(packet, headers, &uplink, port))
}

/// Hands a packet that [`leave`] has no port for, and that is no reply, over to where its connection may be given one.
#[inline(always)]
pub fn hand_over<P: Packet>(packet: &mut P) -> Step {
    step::hand_over_again(packet, Stage::Snat, FIRST_ROUND)
}

/// A packet that leaves by an interface, and may be the first one of its connection, or the first fragment of one.
#[inline(always)]
pub fn egress<F: Parse + Rewrite, E: Env<F>, P: Packet>(env: &E, packet: &mut P) -> Step {
    let mut headers = Headers::default();
    if let Err(no_ports) = F::parse_first(packet, &mut headers) {
        return Step::Ends(no_ports.reason());
    }
    let Some(uplink) = way_out(env, packet, &headers) else { return Step::Ends(Reason::NotReply) };
    env.in_memory(&headers);
    env.in_memory(&uplink);
    let Some(mut work) = env.work() else { return Step::Ends(Reason::ConntrackRefused) };
    match source::<F, E, P>(env, packet, &mut work, &headers, &uplink) {
        Ok(port) => write_source(packet, &mut headers, &uplink, port),
        Err(step) => step,
    }
}

/// The uplink that a packet leaves by. To a pod's interface it goes as it is; what is the node's own already, or was made so by
/// others, too.
#[inline(always)]
pub fn way_out<F: Family, E: Env<F>, P: Packet>(env: &E, packet: &P, headers: &Headers<F>) -> Option<Uplink<F>> {
    let uplink = env.uplink(packet.ifindex())?;
    if uplink.addr == F::Addr::default() || uplink.addr == headers.src {
        return None;
    }
    Some(uplink)
}

#[inline(always)]
fn write_source<F: Rewrite, P: Packet>(
    packet: &mut P,
    headers: &mut Headers<F>,
    uplink: &Uplink<F>,
    port: Port,
) -> Step {
    match translate(packet, headers, End::Source, &uplink.addr, port) {
        Ok(()) => Step::Ends(Reason::Snat),
        Err(_) => Step::Ends(Reason::RewriteFailed),
    }
}

/// The port that the packets of a connection leave by, where it has one.
#[inline(always)]
fn known<F: Family, E: Env<F>>(env: &E, headers: &Headers<F>, uplink: &Uplink<F>, now: Nanos) -> Option<Port> {
    let Headers { src, src_port, dst, dst_port, proto, .. } = *headers;
    let mut key = ConntrackKey::reverse(src, src_port, dst, dst_port, proto);
    let port = port_of_connection(env, &key)?;
    key.turn_snat_reply(uplink.addr, port);
    let reply = env.conntrack(&key)?;
    let owner = reply.load();
    if !owner.leads_to(&src, src_port) {
        return None;
    }
    note(&reply, &owner, conntrack::shown(headers, From::Client), now);
    Some(port)
}

/// The port that a connection from outside has, by the key of its way back, or had.
#[inline(always)]
pub fn port_of_connection<F: Family, E: Env<F>>(env: &E, key: &ConntrackKey<F>) -> Option<Port> {
    let port = env.conntrack(key)?.load().snat_port;
    (port != Port::default()).then_some(port)
}

/// The port that a packet leaves by.
#[inline(always)]
fn source<F: Family, E: Env<F>, P: Packet>(
    env: &E,
    packet: &mut P,
    work: &mut Work<F>,
    headers: &Headers<F>,
    uplink: &Uplink<F>,
) -> Result<Port, Step> {
    let Headers { src, src_port, dst, dst_port, proto, .. } = *headers;
    let now = env.now();
    if step::round(packet) < FIRST_ROUND
        && let Some(port) = known(env, headers, uplink, now)
    {
        return Ok(port);
    }
    let Work { key, way, .. } = work;
    *key = ConntrackKey::reverse(src, src_port, dst, dst_port, proto);
    // Of no connection that this node has made, or of one of its own pods': nothing to do with it.
    let Some((entry, of)) = outsiders(env, key) else { return Err(Step::Ends(Reason::NotReply)) };
    *way = of;
    (way.packets, way.last_seen, way.due) = (1, now.ticks(), now.ticks());
    let port = take(env, packet, key, way, headers, uplink, now)?;
    // Where it is another connection's by now, that finds its own port again.
    entry.set_snat_port(port);
    Ok(port)
}

/// The way back of a connection from outside, and what it holds.
#[inline(always)]
fn outsiders<F: Family, E: Env<F>>(env: &E, key: &ConntrackKey<F>) -> Option<(E::Conntrack, Conntrack<F>)> {
    let entry = env.conntrack(key)?;
    let held = entry.load();
    held.is_from_outside().then_some((entry, held))
}

/// Takes a port for a connection: its first one that is free, or its own already.
#[inline(always)]
fn take<F: Family, E: Env<F>, P: Packet>(
    env: &E,
    packet: &mut P,
    key: &mut ConntrackKey<F>,
    way: &mut Conntrack<F>,
    headers: &Headers<F>,
    uplink: &Uplink<F>,
    now: Nanos,
) -> Result<Port, Step> {
    let Headers { src, src_port, dst, dst_port, proto, .. } = *headers;
    let round = step::round(packet).max(FIRST_ROUND);
    let hash = hash::connection::<F>(&src, src_port, &dst, dst_port, proto, 0);
    (way.addr, way.port, way.client_port) = (src, src_port, src_port);
    for attempt in 0..TRIES {
        let port = port_of(hash, (round - FIRST_ROUND) * TRIES + attempt);
        *key = ConntrackKey::snat_reply(uplink.addr, port, dst, dst_port, proto);
        if has_port(env, key, way, now) {
            return Ok(port);
        }
    }
    if round < ROUNDS {
        return Err(step::hand_over_again(packet, Stage::Snat, round + 1));
    }
    Err(step::hand_over(packet, Stage::SnatRefuse))
}

/// A packet that there is no port for: who has sent it is told so, by the address that was asked.
#[inline(always)]
pub fn refuse<F: Parse + Reject + Rewrite, E: Env<F>, P: Packet>(env: &E, packet: &mut P) -> Step {
    let mut headers = Headers::default();
    match F::parse(packet, &mut headers) {
        Ok(()) if reject::is_answered(&headers) => {}
        Err(NoPorts::Ends(reason)) => return Step::Ends(reason),
        Ok(()) | Err(NoPorts::Fragment | NoPorts::Icmp) => return Step::Ends(Reason::SnatExhaustedDropped),
    }
    let Headers { src, src_port, dst, dst_port, proto, .. } = headers;
    let Some((_, of)) = outsiders(env, &ConntrackKey::reverse(src, src_port, dst, dst_port, proto)) else {
        return Step::Ends(Reason::SnatExhaustedDropped);
    };
    // An error quotes what its receiver has sent.
    let shown = translate(packet, &mut headers, End::Destination, &of.addr, of.port)
        .and_then(|()| translate(packet, &mut headers, End::Source, &src, of.client_port));
    Step::Ends(match shown.map(|()| reject::answer(packet, &headers)) {
        Ok(Answer::Made) => Reason::SnatExhausted,
        Ok(Answer::None) | Err(_) => Reason::SnatExhaustedDropped,
    })
}

/// Whether a connection has the port of an entry now, which is made for it where the port is free.
#[inline(always)]
fn has_port<F: Family, E: Env<F>>(env: &E, key: &mut ConntrackKey<F>, way: &Conntrack<F>, now: Nanos) -> bool {
    if let Some(entry) = env.conntrack(key) {
        let owner = entry.load();
        if owner.leads_to(&way.addr, way.port) {
            entry.set_last_seen(now.ticks());
            if owner.is_over() {
                entry.set_seen(way.seen);
            }
            return true;
        }
        if !conntrack::gives_way(env, &owner, key.proto, now, Role::First) {
            return false;
        }
        // Of two that want it one inserts.
        env.conntrack_remove(key);
    }
    // A service may be reached by the node's address and that port.
    env.frontend(&FrontendKey::new(key.client, key.client_port, key.proto)).is_none()
        && env.conntrack_insert(key, way).is_ok()
}

/// The port of an attempt, each another one.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "below 2^16")]
fn port_of(hash: u32, attempt: u32) -> Port {
    /// Odd, and less than 1811: no divisor in common with [`PORTS`], which is 2^4 by 1811, so that no port comes twice. Each
    /// connection has its own, so that those whose first tries meet part again.
    const DISTANCES: u32 = 905;
    const { assert!(PORTS == 16 * 1811) };
    let first = hash::place(hash, u32::from(PORTS));
    let distance = 2 * hash::place(hash.rotate_left(16), DISTANCES) + 1;
    let at = (first + attempt.wrapping_mul(distance)) % u32::from(PORTS);
    Port::new(FIRST_PORT + at as u16)
}

/// Notes a packet in the entry of the answers. A connection that is opened on the ports of one that is over starts anew: else its
/// port would be given on while it lasts.
#[inline(always)]
fn note<F: Family, C: ConntrackEntry<F>>(entry: &C, held: &Conntrack<F>, shown: u8, now: Nanos) {
    let now: Ticks = now.ticks();
    entry.count_packet();
    if held.last_seen != now {
        entry.set_last_seen(now);
    }
    let before = if shown & OPENED != 0 && held.is_over() { 0 } else { held.seen };
    let seen = before | shown;
    if held.seen != seen {
        entry.set_seen(seen);
    }
}

/// A packet that has come in, and looks like an answer to one that has left as the node's own: where it is one, it is the
/// client's again.
#[inline(always)]
pub fn come_back<F: Rewrite, E: Env<F>, P: Packet>(env: &E, packet: &mut P, headers: &mut Headers<F>) -> Option<Step> {
    env.in_memory(headers);
    let Headers { src, src_port, dst, dst_port, proto, .. } = *headers;
    let entry = env.conntrack(&ConntrackKey::snat_reply(dst, dst_port, src, src_port, proto))?;
    let (held, now) = (entry.load(), env.now());
    if !headers.is_tcp() && conntrack::has_expired(env, &held, proto, now) {
        return None;
    }
    note(&entry, &held, conntrack::shown(headers, From::Backend), now);
    Some(match translate(packet, headers, End::Destination, &held.addr, held.client_port) {
        Ok(()) => Step::Ends(Reason::SnatReply),
        Err(_) => Step::Ends(Reason::RewriteFailed),
    })
}

/// The first fragment of such a packet, or one that was taken for it.
#[inline(always)]
pub fn ingress<F: Parse + Rewrite, E: Env<F>, P: Packet>(env: &E, packet: &mut P) -> Step {
    let mut headers = Headers::default();
    if let Err(no_ports) = F::parse_first(packet, &mut headers) {
        return Step::Ends(no_ports.reason());
    }
    if let Some(step) = come_back(env, packet, &mut headers) {
        return step;
    }
    let looks = address::looks(env, &headers.dst);
    tc::without_frontend(env, packet, &headers, looks)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_connection_tries_each_port_once() {
        for hash in [0, 1, 2, 3, u32::MAX] {
            let ports: BTreeSet<_> = (0..u32::from(PORTS)).map(|attempt| port_of(hash, attempt)).collect();
            assert_eq!(ports.len(), usize::from(PORTS));
            assert!(ports.iter().all(|port| is_of_range(*port)));
        }
        assert!(!is_of_range(Port::new(FIRST_PORT - 1)) && !is_of_range(Port::new(30_000)));
    }
}
