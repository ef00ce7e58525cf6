//! The loaded programs, driven by whole packets through `BPF_PROG_TEST_RUN`; whole packets compared.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};

use affinity_common::abi::affinity::Affinity;
use affinity_common::abi::conntrack::{
    BACKEND_FIN, CLIENT_FIN, Conntrack, ConntrackKey, FORWARD, REPLIED, RESET, REVERSE,
};
use affinity_common::family::{Family, V4, V6};
use affinity_common::reason::{Program, Reason};
use affinity_common::types::{BackendId, Proto, Seconds, Ticks};
use affinity_tests::packet::{Packet, Tcp, assert_same_packet, verify_checksums};
use affinity_tests::privilege::require_root;
use affinity_tests::programs::{DROP, PASS, Programs, REDIRECT, Run, Service, now};
use anyhow::{Context as _, Result};

const CLIENT: &str = "10.244.0.11:40000";
const STICKY: &str = "10.96.0.10:80";
const SPREAD: &str = "10.96.0.20:80";
const TIMEOUT: u32 = 10;

/// A family that the tests' addresses, which are IPv4's, are taken over to.
trait Over: Family {
    fn over(addr: Ipv4Addr) -> IpAddr;
}

impl Over for V4 {
    fn over(addr: Ipv4Addr) -> IpAddr {
        addr.into()
    }
}

impl Over for V6 {
    fn over(addr: Ipv4Addr) -> IpAddr {
        let [a, b, c, d] = addr.octets().map(u16::from);
        Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, a << 8 | b, c << 8 | d).into()
    }
}

fn over<F: Over>(name: &str) -> SocketAddr {
    let name: SocketAddrV4 = name.parse().expect("an IPv4 address and a port");
    SocketAddr::new(F::over(*name.ip()), name.port())
}

/// What the tests call an address.
fn name(address: SocketAddr) -> String {
    match address.ip() {
        IpAddr::V4(ip) => SocketAddrV4::new(ip, address.port()).to_string(),
        IpAddr::V6(ip) => {
            let [.., a, b, c, d] = ip.octets();
            SocketAddrV4::new(Ipv4Addr::new(a, b, c, d), address.port()).to_string()
        }
    }
}

/// A packet taken over to a family.
fn in_family<F: Over>(packet: &Packet) -> Packet {
    let taken = |end: SocketAddr| over::<F>(&end.to_string());
    packet.clone().from(taken(packet.source())).to(taken(packet.destination()))
}

fn service<F: Over>(id: u32, frontend: &str, proto: Proto, timeout: u32) -> Service {
    let backends =
        [1, 2, 3].map(|backend| (id * 10 + backend, over::<F>(&format!("10.244.0.{}:8080", 100 + backend)), true));
    Service { id, frontend: over::<F>(frontend), proto, timeout, backends: backends.to_vec() }
}

/// A sticky and a spreading service, of TCP and of UDP each.
fn programs<F: Over>() -> Result<Programs> {
    require_root();
    let mut programs = Programs::load()?;
    programs.set_service(&service::<F>(1, STICKY, Proto::TCP, TIMEOUT))?;
    programs.set_service(&service::<F>(2, SPREAD, Proto::TCP, 0))?;
    programs.set_service(&service::<F>(3, STICKY, Proto::UDP, TIMEOUT))?;
    programs.set_service(&service::<F>(4, SPREAD, Proto::UDP, 0))?;
    Ok(programs)
}

fn ingress<F: Over>(programs: &Programs, packet: &Packet) -> Result<Run> {
    programs.run(Program::Ingress, &in_family::<F>(packet).build())
}

fn egress<F: Over>(programs: &Programs, packet: &Packet) -> Result<Run> {
    programs.run(Program::Egress, &in_family::<F>(packet).build())
}

/// Sends a packet of a client to a service; returns the backend that it was translated to.
fn send<F: Over>(programs: &Programs, packet: &Packet, reason: Reason) -> Result<String> {
    let run = ingress::<F>(programs, packet)?;
    assert_eq!((run.action, run.reason), (PASS, reason), "{packet:?}");
    // The last octet of the destination.
    let host = *run.packet.get(if F::VERSION == 4 { 33 } else { 53 }).context("an IP packet")?;
    let backend = format!("10.244.0.{host}:8080");
    assert!((101..=103).contains(&host), "{backend} is no backend");
    assert_same_packet(&in_family::<F>(&packet.clone().to(&*backend)).build(), &run.packet);
    Ok(backend)
}

/// Sends a backend's packet to a client; it must come from the frontend.
fn reply<F: Over>(programs: &Programs, packet: &Packet, frontend: &str) -> Result<()> {
    let run = egress::<F>(programs, packet)?;
    assert_eq!((run.action, run.reason), (PASS, Reason::Reply));
    assert_same_packet(&in_family::<F>(&packet.clone().from(frontend)).build(), &run.packet);
    Ok(())
}

/// A packet that must go on as it came, and leave no trace but its count.
fn untouched(programs: &Programs, program: Program, bytes: &[u8], reason: Option<Reason>) -> Result<()> {
    let run = programs.run(program, bytes)?;
    assert_eq!(run.action, PASS, "{:?}: {bytes:02x?}", run.reason);
    if let Some(reason) = reason {
        assert_eq!(run.reason, reason, "{bytes:02x?}");
    }
    assert_same_packet(bytes, &run.packet);
    Ok(())
}

fn syn(from: &str, to: &str) -> Packet {
    Packet::tcp(from, to).flags(Tcp::SYN)
}

fn a_connection_is_translated_both_ways<F: Over>() -> Result<()> {
    let programs = programs::<F>()?;
    for (frontend, first) in [(STICKY, Reason::AffinityNew), (SPREAD, Reason::Hashed)] {
        let backend = send::<F>(&programs, &syn(CLIENT, frontend), first)?;
        reply::<F>(&programs, &Packet::tcp(&*backend, CLIENT).flags(Tcp::SYN_ACK), frontend)?;
        let data = Packet::tcp(CLIENT, frontend).payload(b"GET / HTTP/1.1\r\n\r\n");
        assert_eq!(send::<F>(&programs, &data, Reason::Established)?, backend);
        reply::<F>(&programs, &Packet::tcp(&*backend, CLIENT).payload([7; 1000]), frontend)?;
        let fin = Packet::tcp(CLIENT, frontend).flags(Tcp::FIN | Tcp::ACK);
        assert_eq!(send::<F>(&programs, &fin, Reason::Established)?, backend);
        reply::<F>(&programs, &Packet::tcp(&*backend, CLIENT).flags(Tcp::FIN | Tcp::ACK), frontend)?;
    }
    for (_, entry) in programs.conntrack::<F>()? {
        assert_eq!(entry.seen, REPLIED | CLIENT_FIN | BACKEND_FIN);
    }
    Ok(())
}

fn udp_is_translated_both_ways<F: Over>() -> Result<()> {
    let programs = programs::<F>()?;
    for (frontend, first) in [(STICKY, Reason::AffinityNew), (SPREAD, Reason::Hashed)] {
        let question = Packet::udp(CLIENT, frontend).payload(b"question");
        let backend = send::<F>(&programs, &question, first)?;
        reply::<F>(&programs, &Packet::udp(&*backend, CLIENT).payload(b"answer"), frontend)?;
        assert_eq!(send::<F>(&programs, &question, Reason::Established)?, backend);
    }
    Ok(())
}

#[test]
fn a_udp_checksum_of_zero_stays_zero_and_a_computed_zero_becomes_ones() -> Result<()> {
    let programs = programs::<V4>()?;
    let question = Packet::udp(CLIENT, SPREAD).payload(b"q").without_udp_checksum();
    let backend = send::<V4>(&programs, &question, Reason::Hashed)?;
    reply::<V4>(&programs, &Packet::udp(&*backend, CLIENT).payload(b"a").without_udp_checksum(), SPREAD)?;
    // Every 16-bit payload: one of them makes the translated checksum come out as 0, which means none.
    let mut ones = 0;
    for word in 0..=u16::MAX {
        let packet = Packet::udp(CLIENT, SPREAD).payload(word.to_be_bytes());
        let (action, bytes) = programs.run_uncounted(Program::Ingress, &packet.build())?;
        assert_eq!(action, PASS);
        assert_ne!(bytes[40..42], [0, 0], "payload {word:#06x}");
        ones += u32::from(bytes[40..42] == [0xff, 0xff]);
        if word % 4096 == 0 || bytes[40..42] == [0xff, 0xff] {
            verify_checksums(&bytes)?;
        }
    }
    assert!(ones >= 1);
    Ok(())
}

#[test]
fn ip_and_tcp_options_are_carried_along() -> Result<()> {
    let programs = programs::<V4>()?;
    for words in 1..=10u8 {
        let options = [&[0x94, 4, 0, 0][..], &vec![1; usize::from(words - 1) * 4]].concat();
        let from = format!("10.244.0.11:{}", 41_000 + u16::from(words));
        let packet =
            syn(&from, SPREAD).ip_options(&options).tcp_options(&[2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0]);
        send::<V4>(&programs, &packet, Reason::Hashed)?;
    }
    Ok(())
}

fn a_client_keeps_its_backend_over_many_connections<F: Over>() -> Result<()> {
    let programs = programs::<F>()?;
    let first = send::<F>(&programs, &syn(CLIENT, STICKY), Reason::AffinityNew)?;
    for port in 41_000..41_200 {
        let from = format!("10.244.0.11:{port}");
        assert_eq!(send::<F>(&programs, &syn(&from, STICKY), Reason::AffinityHit)?, first);
    }
    assert_eq!(programs.counters(Program::Ingress)?[Reason::AffinityNew as usize], 1);
    Ok(())
}

fn clients_and_connections_spread<F: Over>() -> Result<()> {
    let programs = programs::<F>()?;
    let mut sticky = std::collections::BTreeMap::<String, u32>::new();
    let mut spread = std::collections::BTreeMap::<String, u32>::new();
    for host in 1..=240 {
        let from = format!("10.244.1.{host}:40000");
        *sticky.entry(send::<F>(&programs, &syn(&from, STICKY), Reason::AffinityNew)?).or_default() += 1;
        let from = format!("10.244.0.11:{}", 40_000 + host);
        *spread.entry(send::<F>(&programs, &syn(&from, SPREAD), Reason::Hashed)?).or_default() += 1;
    }
    for counts in [sticky, spread] {
        assert_eq!(counts.len(), 3, "{counts:?}");
        assert!(counts.values().all(|&count| (50..=110).contains(&count)), "{counts:?}");
    }
    Ok(())
}

/// Sets how long ago a client's entry was last used.
fn age_affinity<F: Over>(programs: &mut Programs, client: &str, service: u32, age: f64) -> Result<Affinity> {
    let client = over::<F>(client);
    let entry = programs.affinity::<F>(client, service)?.context("no entry")?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some seconds")]
    let age = (age * 1e9) as u64;
    let used = affinity_common::types::Nanos(now()?.0 - age).ticks();
    let aged = Affinity { last_used: used, ..entry };
    programs.set_affinity::<F>(client, service, aged)?;
    Ok(aged)
}

fn affinity_lasts_for_its_timeout_and_a_packet_refreshes_it<F: Over>() -> Result<()> {
    let mut programs = programs::<F>()?;
    let client = over::<F>(CLIENT);
    let first = send::<F>(&programs, &syn(CLIENT, STICKY), Reason::AffinityNew)?;
    // Well before the bound: a hit, which writes the use anew.
    let aged = age_affinity::<F>(&mut programs, CLIENT, 1, f64::from(TIMEOUT) - 1.0)?;
    assert_eq!(send::<F>(&programs, &syn("10.244.0.11:40001", STICKY), Reason::AffinityHit)?, first);
    let refreshed = programs.affinity::<F>(client, 1)?.context("no entry")?;
    assert_eq!(refreshed.backend, aged.backend);
    assert!(refreshed.last_used.age(now()?).0 < 500_000_000);
    // A fresh record is not written.
    send::<F>(&programs, &syn("10.244.0.11:40002", STICKY), Reason::AffinityHit)?;
    assert_eq!(programs.affinity::<F>(client, 1)?, Some(refreshed));
    // After it: a fresh choice, of any backend.
    let mut found = std::collections::BTreeSet::new();
    for _ in 0..40 {
        age_affinity::<F>(&mut programs, CLIENT, 1, f64::from(TIMEOUT) + 0.1)?;
        found.insert(send::<F>(&programs, &syn(CLIENT, STICKY), Reason::AffinityExpired)?);
    }
    assert_eq!(found.len(), 3, "a random choice meets every backend");
    Ok(())
}

fn an_established_flow_refreshes_its_clients_entry_and_only_its_own<F: Over>() -> Result<()> {
    let mut programs = programs::<F>()?;
    let client = over::<F>(CLIENT);
    let backend = send::<F>(&programs, &syn(CLIENT, STICKY), Reason::AffinityNew)?;
    let make_due = |programs: &mut Programs| -> Result<()> {
        for (key, entry) in programs.conntrack::<F>()? {
            programs.set_conntrack(key, Conntrack { due: Ticks { at: now()?.ticks().at.wrapping_sub(1) }, ..entry })?;
        }
        Ok(())
    };
    // By a request and by a reply.
    for program in Program::ALL {
        age_affinity::<F>(&mut programs, CLIENT, 1, 5.0)?;
        make_due(&mut programs)?;
        match program {
            Program::Ingress => drop(send::<F>(&programs, &Packet::tcp(CLIENT, STICKY), Reason::Established)?),
            Program::Egress => reply::<F>(&programs, &Packet::tcp(&*backend, CLIENT), STICKY)?,
        }
        let entry = programs.affinity::<F>(client, 1)?.context("no entry")?;
        assert!(entry.last_used.age(now()?).0 < 500_000_000, "{program:?}");
    }
    // An entry that names another backend is not this flow's.
    let aged = age_affinity::<F>(&mut programs, CLIENT, 1, 5.0)?;
    let other = Affinity { backend: BackendId { id: 11 + aged.backend.id % 3 }, ..aged };
    programs.set_affinity::<F>(client, 1, other)?;
    make_due(&mut programs)?;
    assert_eq!(send::<F>(&programs, &Packet::tcp(CLIENT, STICKY), Reason::Established)?, backend);
    assert_eq!(programs.affinity::<F>(client, 1)?, Some(other));
    // A backend that takes no new sessions keeps its flow, and its entry grows old.
    programs.set_affinity::<F>(client, 1, aged)?;
    programs.set_backend(1, aged.backend.id, over::<F>(&backend), false)?;
    make_due(&mut programs)?;
    assert_eq!(send::<F>(&programs, &Packet::tcp(CLIENT, STICKY), Reason::Established)?, backend);
    assert_eq!(programs.affinity::<F>(client, 1)?, Some(aged));
    Ok(())
}

fn clients_of_a_lost_backend_move_and_only_they<F: Over>() -> Result<()> {
    let mut programs = programs::<F>()?;
    let clients: Vec<String> = (1..=60).map(|host| format!("10.244.1.{host}:40000")).collect();
    let before: Vec<String> = clients
        .iter()
        .map(|client| send::<F>(&programs, &syn(client, STICKY), Reason::AffinityNew))
        .collect::<Result<_>>()?;
    let mut changed = service::<F>(1, STICKY, Proto::TCP, TIMEOUT);
    changed.backends[0].2 = false;
    let lost = name(changed.backends[0].1);
    programs.set_service(&changed)?;
    for (client, before) in clients.iter().zip(&before) {
        // The established connection stays; the next one moves, and stays where it moved.
        assert_eq!(send::<F>(&programs, &Packet::tcp(&**client, STICKY), Reason::Established)?, *before);
        let reason = if *before == lost { Reason::AffinityFailover } else { Reason::AffinityHit };
        let after = send::<F>(&programs, &syn(client, STICKY), reason)?;
        assert_eq!(after == *before, *before != lost);
        assert_eq!(send::<F>(&programs, &syn(client, STICKY), Reason::AffinityHit)?, after);
    }
    assert!(before.contains(&lost));
    Ok(())
}

fn an_evicted_entry_is_rebuilt_on_the_same_backend<F: Over>() -> Result<()> {
    let mut programs = programs::<F>()?;
    for (frontend, id) in [(STICKY, 1), (SPREAD, 2)] {
        let backend =
            send::<F>(&programs, &syn(CLIENT, frontend), if id == 1 { Reason::AffinityNew } else { Reason::Hashed })?;
        let data = Packet::tcp(CLIENT, frontend).payload(b"data");
        let entries: Vec<(ConntrackKey<F>, Conntrack<F>)> =
            programs.conntrack::<F>()?.into_iter().filter(|(_, entry)| entry.service.id == id).collect();
        assert_eq!(entries.len(), 2);
        // Both directions gone: the middle of the connection finds its way.
        for (key, _) in &entries {
            programs.remove_conntrack(*key)?;
        }
        assert_eq!(send::<F>(&programs, &data, Reason::Rebuilt)?, backend);
        reply::<F>(&programs, &Packet::tcp(&*backend, CLIENT), frontend)?;
        // One direction gone: the other rebuilds it when it looks after its flow.
        for gone in [FORWARD, REVERSE] {
            for (key, entry) in &entries {
                programs.set_conntrack(*key, Conntrack { due: now()?.ticks(), ..*entry })?;
            }
            let (key, _) = entries.iter().find(|(key, _)| key.direction == gone).context("a direction")?;
            programs.remove_conntrack(*key)?;
            match gone {
                FORWARD => reply::<F>(&programs, &Packet::tcp(&*backend, CLIENT), frontend)?,
                _ => drop(send::<F>(&programs, &data, Reason::Established)?),
            }
            assert_eq!(programs.conntrack::<F>()?.iter().filter(|(_, entry)| entry.service.id == id).count(), 2);
            assert_eq!(send::<F>(&programs, &data, Reason::Established)?, backend);
            reply::<F>(&programs, &Packet::tcp(&*backend, CLIENT), frontend)?;
        }
    }
    Ok(())
}

fn a_udp_flow_ends_with_its_backend_or_its_time<F: Over>() -> Result<()> {
    let mut programs = programs::<F>()?;
    let question = Packet::udp(CLIENT, STICKY).payload(b"q");
    let backend = send::<F>(&programs, &question, Reason::AffinityNew)?;
    let id = programs.affinity::<F>(over::<F>(CLIENT), 3)?.context("no entry")?.backend.id;
    // Terminating: the flow stays.
    programs.set_backend(3, id, over::<F>(&backend), false)?;
    assert_eq!(send::<F>(&programs, &question, Reason::Established)?, backend);
    // Removed: it is a new flow.
    let mut changed = service::<F>(3, STICKY, Proto::UDP, TIMEOUT);
    changed.backends.retain(|(backend, _, _)| *backend != id);
    programs.remove_backend::<F>(3, id)?;
    programs.set_service(&changed)?;
    let next = send::<F>(&programs, &question, Reason::AffinityFailover)?;
    assert_ne!(next, backend);
    // What the removed one still sends is no reply any more.
    let late = in_family::<F>(&Packet::udp(&*backend, CLIENT).payload(b"late")).build();
    untouched(&programs, Program::Egress, &late, Some(Reason::NotReply))?;
    // Silent for 30 s without an answer, 120 s with one: the next packet opens a flow.
    for (answered, silent, reason) in [
        (false, 29, Reason::Established),
        (false, 31, Reason::AffinityHit),
        (true, 119, Reason::Established),
        (true, 121, Reason::AffinityHit),
    ] {
        if answered {
            reply::<F>(&programs, &Packet::udp(&*next, CLIENT).payload(b"a"), STICKY)?;
        }
        for (key, entry) in programs.conntrack::<F>()? {
            let last_seen = Ticks { at: now()?.ticks().at.wrapping_sub(Seconds::new(silent).ticks()) };
            programs.set_conntrack(key, Conntrack { last_seen, ..entry })?;
        }
        if reason == Reason::AffinityHit {
            let late = in_family::<F>(&Packet::udp(&*next, CLIENT).payload(b"late")).build();
            untouched(&programs, Program::Egress, &late, Some(Reason::NotReply))?;
        }
        assert_eq!(send::<F>(&programs, &question, reason)?, next, "{answered} {silent}");
    }
    Ok(())
}

fn resets_and_fins_are_seen_in_both_directions<F: Over>() -> Result<()> {
    let programs = programs::<F>()?;
    let backend = send::<F>(&programs, &syn(CLIENT, SPREAD), Reason::Hashed)?;
    reply::<F>(&programs, &Packet::tcp(&*backend, CLIENT).flags(Tcp::RST | Tcp::ACK), SPREAD)?;
    let entries = programs.conntrack::<F>()?;
    assert_eq!(entries.len(), 2);
    assert!(entries.iter().all(|(_, entry)| entry.seen == REPLIED | RESET), "{entries:?}");
    // The ports are used again: a new connection, from the start.
    assert_eq!(send::<F>(&programs, &syn(CLIENT, SPREAD), Reason::Hashed)?, backend);
    assert!(programs.conntrack::<F>()?.iter().all(|(_, entry)| entry.seen == 0));
    Ok(())
}

fn without_a_backend_tcp_is_reset_and_udp_unreachable<F: Over>() -> Result<()> {
    const EMPTY: &str = "10.96.0.30:80";
    let mut programs = programs::<F>()?;
    for (id, proto) in [(5, Proto::TCP), (6, Proto::UDP)] {
        let mut empty = service::<F>(id, EMPTY, proto, TIMEOUT);
        empty.backends.clear();
        programs.set_service(&empty)?;
    }
    let back = |packet: Packet| {
        let macs = packet.build()[..12].to_vec();
        let half = |at: usize| <[u8; 6]>::try_from(&macs[at..at + 6]).expect("six bytes");
        packet.macs(half(0), half(6)).identification(0)
    };
    // SYN and FIN count a byte each; what has an ACK is reset by its number.
    let reset = Packet::tcp(EMPTY, CLIENT).window(0);
    for (asked, answer) in [
        (syn(CLIENT, EMPTY).numbers(7, 0), reset.clone().flags(Tcp::RST | Tcp::ACK).numbers(0, 8)),
        (
            syn(CLIENT, EMPTY).numbers(u32::MAX, 0).tcp_options(&[2, 4, 5, 0xb4]).payload(b"early"),
            reset.clone().flags(Tcp::RST | Tcp::ACK).numbers(0, 5),
        ),
        (
            Packet::tcp(CLIENT, EMPTY).flags(Tcp::FIN).numbers(7, 0),
            reset.clone().flags(Tcp::RST | Tcp::ACK).numbers(0, 8),
        ),
        (Packet::tcp(CLIENT, EMPTY).numbers(7, 9).payload([1; 900]), reset.flags(Tcp::RST).numbers(9, 0)),
    ] {
        let run = ingress::<F>(&programs, &asked)?;
        assert_eq!((run.action, run.reason), (REDIRECT, Reason::NoBackend));
        assert_same_packet(&back(in_family::<F>(&answer)).build(), &run.packet);
    }
    for payload in [&[][..], &[7; 3], &[7; 1200]] {
        let asked = in_family::<F>(&Packet::udp(CLIENT, EMPTY).payload(payload));
        let run = programs.run(Program::Ingress, &asked.build())?;
        assert_eq!((run.action, run.reason), (REDIRECT, Reason::NoBackend));
        let quote = &asked.build()[14..asked.upper_offset() + 8];
        let (kind, code) = if F::VERSION == 4 { (3, 3) } else { (1, 4) };
        let answer = Packet::icmp(asked.destination(), asked.source(), kind, code, [0; 4], quote);
        assert_same_packet(&back(answer).build(), &run.packet);
    }
    // Nobody answers a reset.
    let run = ingress::<F>(&programs, &Packet::tcp(CLIENT, EMPTY).flags(Tcp::RST))?;
    assert_eq!((run.action, run.reason), (DROP, Reason::NoBackendDropped));
    assert_eq!(programs.affinity::<F>(over::<F>(CLIENT), 5)?, None);
    assert_eq!(programs.conntrack::<F>()?.len(), 0);
    Ok(())
}

fn a_collision_is_dropped_and_counted<F: Over>() -> Result<()> {
    let mut programs = programs::<F>()?;
    // Two services with one backend, and one client port.
    for (id, frontend) in [(6, "10.96.0.31:80"), (7, "10.96.0.32:80")] {
        let mut one = service::<F>(id, frontend, Proto::TCP, TIMEOUT);
        one.backends.truncate(1);
        programs.set_service(&one)?;
    }
    let backend = send::<F>(&programs, &syn(CLIENT, "10.96.0.31:80"), Reason::AffinityNew)?;
    let run = ingress::<F>(&programs, &syn(CLIENT, "10.96.0.32:80"))?;
    assert_eq!((run.action, run.reason), (DROP, Reason::Collision));
    reply::<F>(&programs, &Packet::tcp(&*backend, CLIENT).flags(Tcp::SYN_ACK), "10.96.0.31:80")?;
    // Once it is over, its place is free: by a half-closed connection it is not.
    let fin = Tcp::FIN | Tcp::ACK;
    send::<F>(&programs, &Packet::tcp(CLIENT, "10.96.0.31:80").flags(fin), Reason::Established)?;
    assert_eq!(ingress::<F>(&programs, &syn(CLIENT, "10.96.0.32:80"))?.reason, Reason::Collision);
    reply::<F>(&programs, &Packet::tcp(&*backend, CLIENT).flags(fin), "10.96.0.31:80")?;
    assert_eq!(send::<F>(&programs, &syn(CLIENT, "10.96.0.32:80"), Reason::AffinityHit)?, backend);
    reply::<F>(&programs, &Packet::tcp(&*backend, CLIENT).flags(Tcp::SYN_ACK), "10.96.0.32:80")?;
    Ok(())
}

fn a_slot_without_its_backend_is_dropped_and_counted<F: Over>() -> Result<()> {
    let mut programs = programs::<F>()?;
    for (id, _, _) in service::<F>(2, SPREAD, Proto::TCP, 0).backends {
        programs.remove_backend::<F>(2, id)?;
    }
    let run = ingress::<F>(&programs, &syn(CLIENT, SPREAD))?;
    assert_eq!((run.action, run.reason), (DROP, Reason::BackendGone));
    Ok(())
}

fn a_backends_connections_are_counted<F: Over>() -> Result<()> {
    let programs = programs::<F>()?;
    for port in 0..30 {
        let from = format!("10.244.0.11:{}", 42_000 + port);
        send::<F>(&programs, &syn(&from, SPREAD), Reason::Hashed)?;
    }
    let sum: u64 = (21..=23).map(|id| programs.connections(2, id)).sum::<Result<u64>>()?;
    assert_eq!(sum, 30);
    Ok(())
}

#[test]
fn what_is_not_for_a_service_passes_untouched() -> Result<()> {
    let programs = programs::<V4>()?;
    let cases = [
        (Packet::tcp(CLIENT, "10.96.0.10:81"), Reason::NotService),
        (Packet::udp(CLIENT, "10.96.0.99:53"), Reason::NotService),
        (Packet::tcp(CLIENT, "192.0.2.1:443"), Reason::NotService),
        (Packet::ping(CLIENT, STICKY), Reason::OtherProtocol),
        (Packet::raw(CLIENT, STICKY, 132, &[0, 80, 0, 80, 1, 2, 3, 4, 5, 6, 7, 8]), Reason::OtherProtocol),
        (Packet::tcp("[fd00::1]:40000", "[fd00::2]:80"), Reason::NotService),
        (Packet::tcp(CLIENT, STICKY).ether_type(0x0806), Reason::NotIp),
        (Packet::tcp(CLIENT, STICKY).ether_type(0x8100), Reason::NotIp),
        (Packet::udp(CLIENT, STICKY).payload([1; 64]).fragment(0, 24, true), Reason::Fragment),
        (Packet::udp(CLIENT, STICKY).payload([1; 64]).fragment(24, 48, false), Reason::Fragment),
        (Packet::tcp(CLIENT, STICKY).payload([1; 64]).fragment(0, 40, true), Reason::Fragment),
        (Packet::tcp(CLIENT, STICKY).wrong_ip_version(5), Reason::Malformed),
        (Packet::tcp(CLIENT, STICKY).wrong_ihl(4), Reason::Malformed),
        (Packet::tcp(CLIENT, STICKY).wrong_ihl(15), Reason::Malformed),
        (Packet::tcp(CLIENT, STICKY).wrong_ip_length(19), Reason::Malformed),
        (Packet::tcp(CLIENT, STICKY).wrong_ip_length(0), Reason::Malformed),
        (Packet::tcp(CLIENT, STICKY).wrong_ip_length(39).padded(20), Reason::Malformed),
        (Packet::tcp(CLIENT, STICKY).wrong_ip_length(2000), Reason::Malformed),
        (Packet::tcp(CLIENT, STICKY).wrong_tcp_data_offset(4), Reason::Malformed),
        (Packet::tcp(CLIENT, STICKY).wrong_tcp_data_offset(15), Reason::Malformed),
        (Packet::udp(CLIENT, STICKY).wrong_udp_length(7), Reason::Malformed),
        (Packet::udp(CLIENT, STICKY).wrong_udp_length(9), Reason::Malformed),
        (Packet::udp(CLIENT, STICKY).wrong_ip_length(27).padded(20), Reason::Malformed),
    ];
    for (packet, reason) in cases {
        untouched(&programs, Program::Ingress, &packet.build(), Some(reason))?;
        let reason = if reason == Reason::NotService { Reason::NotReply } else { reason };
        untouched(&programs, Program::Egress, &packet.build(), Some(reason))?;
    }
    assert_eq!(programs.conntrack::<V4>()?.len(), 0);
    Ok(())
}

#[test]
fn a_packet_cut_off_anywhere_passes_untouched() -> Result<()> {
    let programs = programs::<V4>()?;
    let options = [0x94, 4, 0, 0, 1, 1, 1, 1];
    for packet in [
        syn(CLIENT, STICKY),
        syn(CLIENT, STICKY).ip_options(&options).tcp_options(&[2, 4, 5, 0xb4]),
        Packet::udp(CLIENT, STICKY),
        Packet::udp(CLIENT, STICKY).ip_options(&options),
    ] {
        let whole = packet.build().len();
        // Newer kernels refuse a test run on less than an IPv4 header; the logic's own tests cut that too.
        for length in 14 + 20..whole {
            let cut = packet.clone().truncated(length).build();
            for program in Program::ALL {
                untouched(&programs, program, &cut, Some(Reason::Malformed))?;
            }
        }
    }
    assert_eq!(programs.conntrack::<V4>()?.len(), 0);
    assert_eq!(programs.affinity::<V4>(CLIENT.parse()?, 1)?, None);
    Ok(())
}

/// A deterministic sweep of spoilt headers: whatever a byte says, the packet passes as it came or is translated whole.
#[test]
fn no_single_byte_makes_a_packet_go_wrong() -> Result<()> {
    let programs = programs::<V4>()?;
    let packet = syn(CLIENT, SPREAD).build();
    for at in 12..packet.len() {
        for value in [0, 1, 0x0f, 0x40, 0x7f, 0x80, 0xf0, 0xff] {
            let mut spoilt = packet.clone();
            spoilt[at] ^= value;
            let (action, out) = programs.run_uncounted(Program::Ingress, &spoilt)?;
            assert_eq!(action, PASS, "byte {at} ^ {value:#04x}");
            let changed: Vec<usize> = (0..out.len()).filter(|&i| out[i] != spoilt[i]).collect();
            // Destination address and port, and the two checksums.
            let may = |i: &usize| [24, 25, 30, 31, 32, 33, 36, 37, 50, 51].contains(i);
            assert!(changed.iter().all(may), "byte {at} ^ {value:#04x} changed {changed:?}");
            assert!(changed.is_empty() || out[30..33] == [10, 244, 0], "byte {at} ^ {value:#04x} went elsewhere");
        }
    }
    Ok(())
}

/// Numbers of IPv6 extension headers.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

fn syn6(port: u16) -> Packet {
    in_family::<V6>(&syn(&format!("10.244.0.11:{port}"), SPREAD))
}

#[test]
fn extension_headers_are_carried_along_up_to_a_limit() -> Result<()> {
    let programs = programs::<V6>()?;
    let mut packet = syn6(41_000);
    for (number, eights) in [(HOP_BY_HOP, 0), (DESTINATION_OPTIONS, 255), (DESTINATION_OPTIONS, 3)] {
        packet = packet.extension(number, eights);
        let run = programs.run(Program::Ingress, &packet.build())?;
        assert_eq!((run.action, run.reason), (PASS, Reason::Hashed), "{number}");
        let end = SocketAddr::new(Ipv6Addr::from(<[u8; 16]>::try_from(&run.packet[38..54])?).into(), 8080);
        assert!(name(end).starts_with("10.244.0.10"), "{end}");
        assert_same_packet(&packet.clone().to(end).build(), &run.packet);
        let answer = Packet::tcp(end, packet.source()).flags(Tcp::SYN_ACK).extension(DESTINATION_OPTIONS, 1);
        let run = programs.run(Program::Egress, &answer.build())?;
        assert_eq!((run.action, run.reason), (PASS, Reason::Reply));
        assert_same_packet(&answer.from(packet.destination()).build(), &run.packet);
    }
    let flows = programs.conntrack::<V6>()?.len();
    for (packet, reason) in [
        (packet.clone().extension(DESTINATION_OPTIONS, 0), Reason::OtherProtocol),
        (syn6(1).extension(ROUTING, 2), Reason::OtherProtocol),
        (syn6(1).extension(AUTHENTICATION, 2), Reason::OtherProtocol),
        (syn6(1).extension(HOP_BY_HOP, 0).fragment(0, 16, true), Reason::Fragment),
        (syn6(1).fragment(8, 12, false), Reason::Fragment),
        (Packet::ping(over::<V6>(CLIENT), over::<V6>(STICKY)), Reason::OtherProtocol),
        (syn6(1).wrong_ip_version(4), Reason::Malformed),
        (syn6(1).wrong_ip_length(19), Reason::Malformed),
        (syn6(1).wrong_ip_length(21), Reason::Malformed),
        (syn6(1).wrong_ip_length(0), Reason::Malformed),
        (syn6(1).wrong_tcp_data_offset(15), Reason::Malformed),
        (in_family::<V6>(&Packet::udp(CLIENT, STICKY)).wrong_udp_length(9), Reason::Malformed),
    ] {
        for program in Program::ALL {
            untouched(&programs, program, &packet.build(), Some(reason))?;
        }
    }
    // A header that says it is longer than the packet.
    let mut lying = syn6(1).extension(HOP_BY_HOP, 0).build();
    lying[55] = 200;
    untouched(&programs, Program::Ingress, &lying, Some(Reason::Malformed))?;
    assert_eq!(programs.conntrack::<V6>()?.len(), flows);
    Ok(())
}

#[test]
fn an_ipv6_packet_cut_off_anywhere_passes_untouched() -> Result<()> {
    let programs = programs::<V6>()?;
    for packet in [syn6(1), syn6(1).extension(HOP_BY_HOP, 0).extension(DESTINATION_OPTIONS, 1)] {
        let whole = packet.build().len();
        for length in 14 + 40..whole {
            for program in Program::ALL {
                untouched(&programs, program, &packet.clone().truncated(length).build(), Some(Reason::Malformed))?;
            }
        }
    }
    assert_eq!(programs.conntrack::<V6>()?.len(), 0);
    Ok(())
}

#[test]
fn no_single_byte_makes_an_ipv6_packet_go_wrong() -> Result<()> {
    let programs = programs::<V6>()?;
    let packet = syn6(41_000).extension(DESTINATION_OPTIONS, 0).build();
    for at in 12..packet.len() {
        for value in [0, 1, 0x0f, 0x3c, 0x40, 0x7f, 0x80, 0xf0, 0xff] {
            let mut spoilt = packet.clone();
            spoilt[at] ^= value;
            let (action, out) = programs.run_uncounted(Program::Ingress, &spoilt)?;
            assert_eq!(action, PASS, "byte {at} ^ {value:#04x}");
            let changed: Vec<usize> = (0..out.len()).filter(|&i| out[i] != spoilt[i]).collect();
            if changed.is_empty() {
                continue;
            }
            // The destination, its port and the checksum: behind the extension header, or where that was taken for TCP.
            let may = |i: &usize| (38..54).contains(i) || [64, 65, 78, 79].contains(i);
            assert!(changed.iter().all(may), "byte {at} ^ {value:#04x} changed {changed:?}");
            assert_eq!(out[38..53], packet[22..37], "byte {at} ^ {value:#04x} went elsewhere");
        }
    }
    Ok(())
}

/// Makes a test of each function for each family.
macro_rules! in_both_families {
    ($($name:ident),+ $(,)?) => {
        mod v4 { $(#[test] fn $name() -> anyhow::Result<()> { super::$name::<super::V4>() })+ }
        mod v6 { $(#[test] fn $name() -> anyhow::Result<()> { super::$name::<super::V6>() })+ }
    };
}

in_both_families! {
    a_connection_is_translated_both_ways,
    udp_is_translated_both_ways,
    a_client_keeps_its_backend_over_many_connections,
    clients_and_connections_spread,
    affinity_lasts_for_its_timeout_and_a_packet_refreshes_it,
    an_established_flow_refreshes_its_clients_entry_and_only_its_own,
    clients_of_a_lost_backend_move_and_only_they,
    an_evicted_entry_is_rebuilt_on_the_same_backend,
    a_udp_flow_ends_with_its_backend_or_its_time,
    resets_and_fins_are_seen_in_both_directions,
    without_a_backend_tcp_is_reset_and_udp_unreachable,
    a_collision_is_dropped_and_counted,
    a_slot_without_its_backend_is_dropped_and_counted,
    a_backends_connections_are_counted,
}
