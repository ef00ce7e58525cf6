//! Connections and datagrams of services.

use super::*;

pub fn a_connection_is_translated_both_ways<F: Over>() -> Result<()> {
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
        assert_eq!(entry.seen, OPENED | REPLIED | CLIENT_FIN | BACKEND_FIN);
    }
    Ok(())
}

pub fn udp_is_translated_both_ways<F: Over>() -> Result<()> {
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

pub fn a_client_keeps_its_backend_over_many_connections<F: Over>() -> Result<()> {
    let programs = programs::<F>()?;
    let first = send::<F>(&programs, &syn(CLIENT, STICKY), Reason::AffinityNew)?;
    for port in 41_000..41_200 {
        let from = format!("10.244.0.11:{port}");
        assert_eq!(send::<F>(&programs, &syn(&from, STICKY), Reason::AffinityHit)?, first);
    }
    assert_eq!(programs.counters(Program::Ingress)?[Reason::AffinityNew as usize], 1);
    Ok(())
}

pub fn clients_and_connections_spread<F: Over>() -> Result<()> {
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

pub fn affinity_lasts_for_its_timeout_and_a_packet_refreshes_it<F: Over>() -> Result<()> {
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

pub fn an_established_flow_refreshes_its_clients_entry_and_only_its_own<F: Over>() -> Result<()> {
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
    for program in Program::TC {
        age_affinity::<F>(&mut programs, CLIENT, 1, 5.0)?;
        make_due(&mut programs)?;
        match program {
            Program::Ingress => drop(send::<F>(&programs, &Packet::tcp(CLIENT, STICKY), Reason::Established)?),
            _ => reply::<F>(&programs, &Packet::tcp(&*backend, CLIENT).flags(Tcp::SYN_ACK), STICKY)?,
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

pub fn clients_of_a_lost_backend_move_and_only_they<F: Over>() -> Result<()> {
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

pub fn an_evicted_entry_is_rebuilt_on_the_same_backend<F: Over>() -> Result<()> {
    let mut programs = programs::<F>()?;
    for (frontend, id) in [(STICKY, 1), (SPREAD, 2)] {
        let backend =
            send::<F>(&programs, &syn(CLIENT, frontend), if id == 1 { Reason::AffinityNew } else { Reason::Hashed })?;
        reply::<F>(&programs, &Packet::tcp(&*backend, CLIENT).flags(Tcp::SYN_ACK), frontend)?;
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

pub fn a_udp_flow_ends_with_its_backend_or_its_time<F: Over>() -> Result<()> {
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
    // Silent for 30 s, or 120 s where it was answered and has gone on since: the next packet opens a flow.
    let due_now = |programs: &mut Programs| -> Result<()> {
        for (key, entry) in programs.conntrack::<F>()? {
            programs.set_conntrack(key, Conntrack { due: now()?.ticks(), ..entry })?;
        }
        Ok(())
    };
    for (answered, goes_on, silent, reason) in [
        (false, false, 29, Reason::Established),
        (false, false, 31, Reason::AffinityHit),
        (true, false, 29, Reason::Established),
        (true, false, 31, Reason::AffinityHit),
        (true, true, 119, Reason::Established),
        (true, true, 121, Reason::AffinityHit),
    ] {
        if answered {
            reply::<F>(&programs, &Packet::udp(&*next, CLIENT).payload(b"a"), STICKY)?;
        }
        if goes_on {
            due_now(&mut programs)?;
            reply::<F>(&programs, &Packet::udp(&*next, CLIENT).payload(b"b"), STICKY)?;
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

pub fn resets_and_fins_are_seen_in_both_directions<F: Over>() -> Result<()> {
    let programs = programs::<F>()?;
    let backend = send::<F>(&programs, &syn(CLIENT, SPREAD), Reason::Hashed)?;
    reply::<F>(&programs, &Packet::tcp(&*backend, CLIENT).flags(Tcp::RST | Tcp::ACK), SPREAD)?;
    let entries = programs.conntrack::<F>()?;
    assert_eq!(entries.len(), 2);
    assert!(entries.iter().all(|(_, entry)| entry.seen == OPENED | REPLIED | RESET), "{entries:?}");
    // The ports are used again: a new connection, from the start.
    assert_eq!(send::<F>(&programs, &syn(CLIENT, SPREAD), Reason::Hashed)?, backend);
    assert!(programs.conntrack::<F>()?.iter().all(|(_, entry)| entry.seen == OPENED));
    Ok(())
}

pub fn without_a_backend_tcp_is_reset_and_udp_unreachable<F: Over>() -> Result<()> {
    const EMPTY: &str = "10.96.0.30:80";
    let mut programs = programs::<F>()?;
    for (id, proto) in [(5, Proto::TCP), (6, Proto::UDP)] {
        let mut empty = service::<F>(id, EMPTY, proto, TIMEOUT);
        empty.backends.clear();
        programs.set_service(&empty)?;
    }
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

pub fn two_frontends_with_one_backend_and_one_client_port_both_work<F: Over>() -> Result<()> {
    for (proto, first, answer) in [(Proto::TCP, Tcp::SYN, Tcp::SYN_ACK), (Proto::UDP, Tcp::ACK, Tcp::ACK)] {
        let mut programs = programs::<F>()?;
        let [one, other] = two_of_one::<F>(&mut programs, proto)?;
        let packet = |from: &str, to: &str, flags: Tcp| match proto {
            Proto::TCP => Packet::tcp(from, to).flags(flags),
            _ => Packet::udp(from, to).payload([7; 5]),
        };
        let backend = send::<F>(&programs, &packet(CLIENT, one, first), Reason::AffinityNew)?;
        let run = ingress::<F>(&programs, &packet(CLIENT, other, first))?;
        assert_eq!((run.action, run.reason), (PASS, Reason::AffinityNew));
        let port = source_port::<F>(&run);
        assert!(port >= 61_000, "{port}");
        let client = format!("10.244.0.11:{port}");
        assert_same_packet(&in_family::<F>(&packet(&client, &backend, first)).build(), &run.packet);
        // The answers to each find their way, and so do later packets.
        reply::<F>(&programs, &packet(&backend, CLIENT, answer), one)?;
        let run = egress::<F>(&programs, &packet(&backend, &client, answer))?;
        assert_eq!((run.action, run.reason), (PASS, Reason::Reply));
        assert_same_packet(&in_family::<F>(&packet(other, CLIENT, answer)).build(), &run.packet);
        let run = ingress::<F>(&programs, &packet(CLIENT, other, Tcp::ACK))?;
        assert_eq!((run.action, run.reason), (PASS, Reason::Established));
        assert_same_packet(&in_family::<F>(&packet(&client, &backend, Tcp::ACK)).build(), &run.packet);
        send::<F>(&programs, &packet(CLIENT, one, Tcp::ACK), Reason::Established)?;
    }
    Ok(())
}

pub fn what_no_port_is_for_is_refused<F: Over>() -> Result<()> {
    let programs = programs::<F>()?;
    for (asked, answered) in [
        (
            syn(CLIENT, "10.96.0.10:81").numbers(0xffff_ff00, 0).payload([9; 5]),
            Some(Packet::tcp("10.96.0.10:81", CLIENT).window(0).flags(Tcp::RST | Tcp::ACK).numbers(0, 0xffff_ff06)),
        ),
        (Packet::tcp(CLIENT, "10.96.0.10:81").flags(Tcp::RST), None),
    ] {
        let run = ingress::<F>(&programs, &asked)?;
        match answered {
            Some(answer) => {
                assert_eq!((run.action, run.reason), (REDIRECT, Reason::NoSuchPort));
                assert_same_packet(&back(in_family::<F>(&answer)).build(), &run.packet);
            }
            None => assert_eq!((run.action, run.reason), (DROP, Reason::NoSuchPortDropped)),
        }
    }
    let (kind, code) = if F::VERSION == 4 { (3, 3) } else { (1, 4) };
    let ping = Packet::ping(over::<F>(CLIENT), over::<F>(STICKY));
    for asked in [in_family::<F>(&Packet::udp(CLIENT, "10.96.0.10:81").payload([7; 900])), ping] {
        let run = programs.run(Program::Ingress, &asked.build())?;
        assert_eq!((run.action, run.reason), (REDIRECT, Reason::NoSuchPort));
        let quote = &asked.build()[14..asked.upper_offset() + 8];
        let answer = Packet::icmp(asked.destination(), asked.source(), kind, code, [0; 4], quote);
        assert_same_packet(&back(answer).build(), &run.packet);
    }
    assert_eq!(programs.conntrack::<F>()?.len(), 0);
    Ok(())
}

pub fn a_slot_without_its_backend_is_dropped_and_counted<F: Over>() -> Result<()> {
    let mut programs = programs::<F>()?;
    for (id, _, _) in service::<F>(2, SPREAD, Proto::TCP, 0).backends {
        programs.remove_backend::<F>(2, id)?;
    }
    let run = ingress::<F>(&programs, &syn(CLIENT, SPREAD))?;
    assert_eq!((run.action, run.reason), (DROP, Reason::BackendGone));
    Ok(())
}

pub fn a_backends_connections_are_counted<F: Over>() -> Result<()> {
    let programs = programs::<F>()?;
    for port in 0..30 {
        let from = format!("10.244.0.11:{}", 42_000 + port);
        send::<F>(&programs, &syn(&from, SPREAD), Reason::Hashed)?;
    }
    let sum: u64 = (21..=23).map(|id| programs.connections(2, id)).sum::<Result<u64>>()?;
    assert_eq!(sum, 30);
    Ok(())
}
