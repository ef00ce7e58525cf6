//! Datagrams in parts.

use super::*;

/// What fits a link of 1,500 bytes, a multiple of eight.
const PART: usize = 1_440;

/// The parts of a packet, the first one first.
fn parts(packet: &Packet, whole: usize) -> Vec<Packet> {
    (0..whole)
        .step_by(PART)
        .map(|at| packet.clone().fragment(u16::try_from(at).expect("under 64 kB"), PART, at + PART < whole))
        .collect()
}

fn datagram<F: Over>(from: &str, to: &str, id: u16, len: usize) -> Packet {
    let payload: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).expect("a byte") ^ id.to_be_bytes()[1]).collect();
    in_family::<F>(&Packet::udp(from, to).payload(payload).identification(id))
}

pub fn all_parts_of_a_datagram_follow_its_first<F: Over>() -> Result<()> {
    const LEN: usize = 8_000;
    let programs = programs::<F>()?;
    // Many at a time, of several clients, a part of each by turns.
    let clients: Vec<String> = (0..20).map(|host| format!("10.244.1.{host}:5000")).collect();
    let asked: Vec<Packet> =
        (0..).zip(&clients).map(|(id, client)| datagram::<F>(client, STICKY, 100 + id % 7, LEN)).collect();
    let mut backends = vec![String::new(); clients.len()];
    let count = parts(&asked[0], LEN + 8).len();
    assert_eq!(count, 6);
    for n in 0..count {
        for (asked, backend) in asked.iter().zip(&mut backends) {
            let part = &parts(asked, LEN + 8)[n];
            let run = programs.run(Program::Ingress, &part.build())?;
            let reason = if n == 0 { Reason::AffinityNew } else { Reason::Established };
            assert_eq!((run.action, run.reason), (PASS, reason), "part {n}");
            if n == 0 {
                let host = run.packet[if F::VERSION == 4 { 33 } else { 53 }];
                *backend = format!("10.244.0.{host}:8080");
            }
            assert_same_packet(&part.clone().to(over::<F>(backend)).build(), &run.packet);
        }
    }
    for n in 0..count {
        for (client, backend) in clients.iter().zip(&backends) {
            let part = &parts(&datagram::<F>(backend, client, 9, LEN), LEN + 8)[n];
            let run = programs.run(Program::Egress, &part.build())?;
            assert_eq!((run.action, run.reason), (PASS, Reason::Reply), "part {n}");
            assert_same_packet(&part.clone().from(over::<F>(STICKY)).build(), &run.packet);
        }
    }
    Ok(())
}

pub fn all_parts_of_a_segment_follow_its_first<F: Over>() -> Result<()> {
    const LEN: usize = 4_000;
    let programs = programs::<F>()?;
    let segment = |from: &str, to: &str, flags: Tcp| {
        in_family::<F>(&Packet::tcp(from, to).flags(flags).payload(vec![7; LEN]).identification(3))
    };
    let backend = send::<F>(&programs, &syn(CLIENT, STICKY), Reason::AffinityNew)?;
    for part in parts(&segment(CLIENT, STICKY, Tcp::ACK), LEN + 20) {
        let run = programs.run(Program::Ingress, &part.build())?;
        assert_eq!((run.action, run.reason), (PASS, Reason::Established));
        assert_same_packet(&part.clone().to(over::<F>(&backend)).build(), &run.packet);
    }
    for part in parts(&segment(&backend, CLIENT, Tcp::SYN_ACK), LEN + 20) {
        let run = programs.run(Program::Egress, &part.build())?;
        assert_eq!((run.action, run.reason), (PASS, Reason::Reply));
        assert_same_packet(&part.clone().from(over::<F>(STICKY)).build(), &run.packet);
    }
    Ok(())
}

pub fn a_part_before_its_first_is_dropped_and_counted<F: Over>() -> Result<()> {
    let programs = programs::<F>()?;
    let all = parts(&datagram::<F>(CLIENT, STICKY, 5, 4_000), 4_008);
    let run = programs.run(Program::Ingress, &all[1].build())?;
    assert_eq!((run.action, run.reason), (DROP, Reason::FragmentAlone));
    assert_eq!(programs.run(Program::Ingress, &all[0].build())?.reason, Reason::AffinityNew);
    assert_eq!(programs.run(Program::Ingress, &all[1].build())?.reason, Reason::Established);
    // Overlapping, again, and never the last one: each is as good as the others, and makes nothing.
    let entries = programs.conntrack::<F>()?.len();
    for part in [&all[1], &all[1], &all[0], &datagram::<F>(CLIENT, STICKY, 5, 4_000).fragment(16, 64, true)] {
        let run = programs.run(Program::Ingress, &part.build())?;
        assert_eq!((run.action, run.reason), (PASS, Reason::Established));
    }
    assert_eq!(programs.conntrack::<F>()?.len(), entries);
    // Of another datagram.
    let other = parts(&datagram::<F>(CLIENT, STICKY, 6, 4_000), 4_008);
    assert_eq!(programs.run(Program::Ingress, &other[2].build())?.reason, Reason::FragmentAlone);
    // To no service, and to clients, nothing is known of it and it passes.
    let elsewhere = parts(&datagram::<F>(CLIENT, ELSEWHERE, 5, 4_000), 4_008);
    for part in [&elsewhere[2], &elsewhere[0], &elsewhere[1]] {
        for program in Program::TC {
            untouched(&programs, program, &part.build(), Some(Reason::Fragment))?;
        }
    }
    Ok(())
}

pub fn parts_keep_the_port_that_their_connection_was_given<F: Over>() -> Result<()> {
    let mut programs = programs::<F>()?;
    let [one, other] = two_of_one::<F>(&mut programs, Proto::UDP)?;
    let backend = send::<F>(&programs, &Packet::udp(CLIENT, one), Reason::AffinityNew)?;
    let all = parts(&datagram::<F>(CLIENT, other, 5, 4_000), 4_008);
    let run = programs.run(Program::Ingress, &all[0].build())?;
    assert_eq!((run.action, run.reason), (PASS, Reason::AffinityNew));
    let at = all[0].upper_offset();
    let port = u16::from_be_bytes([run.packet[at], run.packet[at + 1]]);
    let seen = SocketAddr::new(over::<F>(CLIENT).ip(), port);
    assert!(seen.port() >= 61_000, "{seen}");
    assert_same_packet(&all[0].clone().from(seen).to(over::<F>(&backend)).build(), &run.packet);
    for part in &all[1..] {
        let run = programs.run(Program::Ingress, &part.build())?;
        assert_eq!((run.action, run.reason), (PASS, Reason::Established));
        assert_same_packet(&part.clone().from(seen).to(over::<F>(&backend)).build(), &run.packet);
    }
    for (n, part) in parts(&datagram::<F>(&backend, &name(seen), 5, 4_000), 4_008).iter().enumerate() {
        let run = programs.run(Program::Egress, &part.build())?;
        assert_eq!((run.action, run.reason), (PASS, Reason::Reply), "part {n}");
        assert_same_packet(&part.clone().from(over::<F>(other)).to(over::<F>(CLIENT)).build(), &run.packet);
    }
    Ok(())
}
