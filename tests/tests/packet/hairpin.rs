//! A pod that is its own backend.

use super::*;

pub fn a_pods_packets_to_itself_come_back_from_the_service<F: Over>() -> Result<()> {
    const POD: &str = "10.244.0.101:8080";
    for proto in [Proto::TCP, Proto::UDP] {
        let mut programs = programs::<F>()?;
        let [frontend, other] = two_of_one::<F>(&mut programs, proto)?;
        let packet = |from: &str, to: &str, flags: Tcp| match proto {
            Proto::TCP => Packet::tcp(from, to).flags(flags).payload([1; 33]),
            _ => Packet::udp(from, to).payload([1; 33]),
        };
        // Two connections of its own, by two frontends, on one port.
        for service in [frontend, other] {
            let host = service.trim_end_matches(":80");
            for (flags, answer) in [(Tcp::SYN, Tcp::SYN_ACK), (Tcp::ACK, Tcp::ACK), (Tcp::FIN, Tcp::FIN)] {
                let run = ingress::<F>(&programs, &packet("10.244.0.101:40000", service, flags))?;
                assert_eq!((run.action, run.reason), (REDIRECT, Reason::Hairpin));
                let as_seen = format!("{host}:40000");
                assert_same_packet(&turned::<F>(&packet(&as_seen, POD, flags)).build(), &run.packet);
                let run = ingress::<F>(&programs, &packet(POD, &as_seen, answer))?;
                assert_eq!((run.action, run.reason), (REDIRECT, Reason::Hairpin));
                assert_same_packet(&turned::<F>(&packet(service, "10.244.0.101:40000", answer)).build(), &run.packet);
            }
        }
        // An error about what it has sent to itself.
        let there = in_family::<F>(&packet("10.96.0.31:40000", POD, Tcp::ACK));
        let (kind, code) = if F::VERSION == 4 { (3, 3) } else { (1, 4) };
        let quote = |packet: &Packet| packet.build()[14..packet.upper_offset() + 8].to_vec();
        let pod = over::<F>("10.244.0.101:0");
        let error = Packet::icmp(pod, there.source(), kind, code, [0; 4], &quote(&there));
        let run = programs.run(Program::Ingress, &error.build())?;
        assert_eq!((run.action, run.reason), (REDIRECT, Reason::Hairpin));
        let sent = in_family::<F>(&packet("10.244.0.101:40000", "10.96.0.31:80", Tcp::ACK));
        let seen = Packet::icmp(there.source(), pod, kind, code, [0; 4], &quote(&sent));
        assert_same_packet(&turned_as_is(seen).build(), &run.packet);
        // Others are as they were.
        let backend = send::<F>(&programs, &packet(CLIENT, frontend, Tcp::SYN), Reason::AffinityNew)?;
        reply::<F>(&programs, &packet(&backend, CLIENT, Tcp::SYN_ACK), frontend)?;
    }
    Ok(())
}

/// A packet as it goes back by the interface that it has come by.
fn turned<F: Over>(packet: &Packet) -> Packet {
    turned_as_is(in_family::<F>(packet))
}

fn turned_as_is(packet: Packet) -> Packet {
    packet.macs(affinity_tests::packet::DESTINATION_MAC, affinity_tests::packet::SOURCE_MAC)
}
