//! ICMP errors, both directions: byte for byte what an error about the packet that its receiver has sent would be.

use super::*;

const OTHER: &str = "10.96.0.32:80";
const ROUTER: &str = "10.9.9.9:0";

/// Every error: type, code, and the word behind the checksum.
fn errors<F: Family>() -> Vec<(u8, u8, [u8; 4])> {
    if F::VERSION == 4 {
        // Net, host, port unreachable, fragmentation needed, prohibited, time exceeded, parameter problem.
        vec![
            (3, 0, [0; 4]),
            (3, 1, [0; 4]),
            (3, 3, [0; 4]),
            (3, 4, [0, 0, 5, 0]),
            (3, 13, [0; 4]),
            (11, 0, [0; 4]),
            (12, 0, [9, 0, 0, 0]),
        ]
    } else {
        // No route, prohibited, port unreachable, packet too big, time exceeded, parameter problem.
        vec![
            (1, 0, [0; 4]),
            (1, 1, [0; 4]),
            (1, 4, [0; 4]),
            (2, 0, [0, 0, 5, 0]),
            (3, 0, [0; 4]),
            (4, 1, [0, 0, 0, 40]),
        ]
    }
}

/// The error that `from` sends about a packet, of which it quotes the IP header and so many bytes.
fn about(from: SocketAddr, packet: &Packet, (kind, code, word): (u8, u8, [u8; 4]), quoted: usize) -> Packet {
    let frame = packet.build();
    let end = frame.len().min(packet.upper_offset() + quoted);
    Packet::icmp(from, packet.source(), kind, code, word, &frame[14..end])
}

/// A client's connection: what it sends and gets, and what the backend gets and sends.
struct Flow {
    sent: Packet,
    delivered: Packet,
    answered: Packet,
    got: Packet,
}

/// Two connections on one client port with one backend: one keeps its port, the other gets another one.
fn flows<F: Over>(programs: &mut Programs, proto: Proto) -> Result<Vec<Flow>> {
    let frontends = two_of_one::<F>(programs, proto)?;
    let client = over::<F>(CLIENT);
    let mut flows = Vec::new();
    for frontend in frontends.map(over::<F>) {
        let packet = |from: SocketAddr, to: SocketAddr, flags: Tcp| match proto {
            Proto::TCP => {
                Packet::tcp(from, to).flags(flags).numbers(7, 9).tcp_options(&[2, 4, 5, 0xb4]).payload([3; 99])
            }
            _ => Packet::udp(from, to).payload([3; 99]),
        };
        let sent = packet(client, frontend, Tcp::SYN);
        let run = programs.run(Program::Ingress, &sent.build())?;
        assert_eq!((run.action, run.reason), (PASS, Reason::AffinityNew));
        let seen = SocketAddr::new(client.ip(), source_port::<F>(&run));
        let backend = over::<F>("10.244.0.101:8080");
        let delivered = sent.clone().from(seen).to(backend);
        assert_same_packet(&delivered.build(), &run.packet);
        let answered = packet(backend, seen, Tcp::SYN_ACK);
        let run = programs.run(Program::Egress, &answered.build())?;
        assert_eq!((run.action, run.reason), (PASS, Reason::Reply));
        let got = answered.clone().from(frontend).to(client);
        assert_same_packet(&got.build(), &run.packet);
        flows.push(Flow { sent, delivered, answered, got });
    }
    assert_ne!(flows[0].delivered.source(), flows[1].delivered.source());
    Ok(flows)
}

pub fn an_error_shows_its_receiver_what_that_has_sent<F: Over>() -> Result<()> {
    for proto in [Proto::TCP, Proto::UDP] {
        let mut programs = programs::<F>()?;
        let flows = flows::<F>(&mut programs, proto)?;
        let entries = programs.conntrack::<F>()?.len();
        let router = over::<F>(ROUTER);
        for flow in &flows {
            // The ports alone; all of TCP's header but its options; everything.
            for quoted in [8, 20, 1000] {
                for error in errors::<F>() {
                    // To the client: of the backend, as if of the service; of who is on the way, as it came.
                    for (from, shown) in [(flow.delivered.destination(), flow.sent.destination()), (router, router)] {
                        let run =
                            programs.run(Program::Egress, &about(from, &flow.delivered, error, quoted).build())?;
                        assert_eq!((run.action, run.reason), (PASS, Reason::IcmpError), "{error:?} {quoted}");
                        assert_same_packet(&about(shown, &flow.sent, error, quoted).build(), &run.packet);
                        verify_checksums(&run.packet)?;
                    }
                    // From the client.
                    let client = flow.got.destination();
                    let run = programs.run(Program::Ingress, &about(client, &flow.got, error, quoted).build())?;
                    assert_eq!((run.action, run.reason), (PASS, Reason::IcmpError), "{error:?} {quoted}");
                    assert_same_packet(&about(client, &flow.answered, error, quoted).build(), &run.packet);
                    verify_checksums(&run.packet)?;
                }
            }
        }
        assert_eq!(programs.conntrack::<F>()?.len(), entries);
    }
    Ok(())
}

pub fn an_error_about_a_datagram_without_a_checksum_keeps_it_so<F: Over>() -> Result<()> {
    // IPv6 needs one (RFC 8200, section 8.1).
    if F::VERSION == 6 {
        return Ok(());
    }
    let programs = programs::<F>()?;
    let sent = in_family::<F>(&Packet::udp(CLIENT, STICKY).payload([1; 64]).without_udp_checksum());
    let backend = send::<F>(&programs, &sent, Reason::AffinityNew)?;
    let delivered = sent.clone().to(over::<F>(&backend));
    let run = programs.run(Program::Egress, &about(over::<F>(&backend), &delivered, (3, 3, [0; 4]), 64).build())?;
    assert_same_packet(&about(sent.destination(), &sent, (3, 3, [0; 4]), 64).build(), &run.packet);
    verify_checksums(&run.packet)
}

pub fn errors_about_other_flows_pass_untouched<F: Over>() -> Result<()> {
    let mut programs = programs::<F>()?;
    let flows = flows::<F>(&mut programs, Proto::TCP)?;
    let entries = programs.conntrack::<F>()?.len();
    let (client, elsewhere) = (over::<F>(CLIENT), over::<F>(ELSEWHERE));
    let flow = &flows[0];
    for error in errors::<F>() {
        for forged in [
            flow.delivered.clone().from(SocketAddr::new(client.ip(), 1)),
            flow.delivered.clone().to(elsewhere),
            in_family::<F>(&Packet::udp(CLIENT, STICKY)).to(flow.delivered.destination()),
            Packet::raw(client, flow.delivered.destination(), 132, &[0; 20]),
            Packet::ping(client, flow.delivered.destination()),
        ] {
            let frame = about(flow.delivered.destination(), &forged, error, 64).build();
            untouched(&programs, Program::Egress, &frame, Some(Reason::OtherProtocol))?;
            let frame = about(client, &forged.reversed(), error, 64).build();
            untouched(&programs, Program::Ingress, &frame, Some(Reason::OtherProtocol))?;
        }
        // Cut off within what it quotes.
        for quoted in 0..4 {
            let frame = about(flow.delivered.destination(), &flow.delivered, error, quoted).build();
            untouched(&programs, Program::Egress, &frame, Some(Reason::OtherProtocol))?;
        }
    }
    // Echoes and answers of others; in IPv6, neighbour discovery (router solicitation to redirect).
    for kind in if F::VERSION == 4 { vec![0, 5, 8, 13] } else { vec![128, 129, 133, 134, 135, 136, 137] } {
        let frame = Packet::icmp(client, elsewhere, kind, 0, [0; 4], &[7; 64]).build();
        for program in Program::TC {
            untouched(&programs, program, &frame, Some(Reason::OtherProtocol))?;
        }
    }
    assert_eq!(programs.conntrack::<F>()?.len(), entries);
    Ok(())
}

pub fn an_error_about_the_other_frontends_flow_is_not_taken_for_ours<F: Over>() -> Result<()> {
    let mut programs = programs::<F>()?;
    let flows = flows::<F>(&mut programs, Proto::UDP)?;
    let [one, other] = &flows[..] else { panic!("two flows") };
    assert_eq!(name(other.sent.destination()), OTHER);
    let error = errors::<F>()[2];
    for flow in [one, other] {
        let from = flow.delivered.destination();
        let run = programs.run(Program::Egress, &about(from, &flow.delivered, error, 8).build())?;
        assert_same_packet(&about(flow.sent.destination(), &flow.sent, error, 8).build(), &run.packet);
    }
    Ok(())
}
