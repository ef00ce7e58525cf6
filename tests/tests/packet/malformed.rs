//! What is not for a service, and what is no packet at all.

use super::*;

#[test]
fn what_is_not_for_a_service_passes_untouched() -> Result<()> {
    let programs = programs::<V4>()?;
    let cases = [
        (Packet::udp(CLIENT, "10.96.0.99:53"), Reason::NotService),
        (Packet::tcp(CLIENT, ELSEWHERE), Reason::NotService),
        (Packet::ping(CLIENT, ELSEWHERE), Reason::OtherProtocol),
        (Packet::raw(CLIENT, STICKY, 132, &[0, 80, 0, 80, 1, 2, 3, 4, 5, 6, 7, 8]), Reason::OtherProtocol),
        (Packet::tcp("[fd00::1]:40000", "[fd00::2]:80"), Reason::NotService),
        (Packet::tcp(CLIENT, STICKY).ether_type(0x0806), Reason::NotIp),
        (Packet::tcp(CLIENT, STICKY).ether_type(0x8100), Reason::NotIp),
        (Packet::udp(CLIENT, ELSEWHERE).payload([1; 64]).fragment(0, 24, true), Reason::Fragment),
        (Packet::udp(CLIENT, ELSEWHERE).payload([1; 64]).fragment(24, 48, false), Reason::Fragment),
        (Packet::tcp(CLIENT, ELSEWHERE).payload([1; 64]).fragment(0, 40, true), Reason::Fragment),
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
            for program in Program::TC {
                untouched(&programs, program, &cut, Some(Reason::Malformed))?;
            }
        }
    }
    assert_eq!(programs.conntrack::<V4>()?.len(), 0);
    assert_eq!(programs.affinity::<V4>(CLIENT.parse()?, 1)?, None);
    Ok(())
}

/// Still to a service's address, but for none of its ports, or a fragment.
fn is_refused(reason: Reason) -> bool {
    matches!(reason, Reason::NoSuchPort | Reason::NoSuchPortDropped | Reason::FragmentAlone)
}

/// A deterministic sweep of spoilt headers: whatever a byte says, the packet passes as it came, is translated whole, or is
/// refused.
#[test]
fn no_single_byte_makes_a_packet_go_wrong() -> Result<()> {
    let programs = programs::<V4>()?;
    let packet = syn(CLIENT, SPREAD).build();
    for at in 12..packet.len() {
        for value in [0, 1, 0x0f, 0x40, 0x7f, 0x80, 0xf0, 0xff] {
            let mut spoilt = packet.clone();
            spoilt[at] ^= value;
            let (action, out) = programs.run_uncounted(Program::Ingress, &spoilt)?;
            if action != PASS {
                let Run { reason, .. } = programs.run(Program::Ingress, &spoilt)?;
                assert!(is_refused(reason), "byte {at} ^ {value:#04x}: {reason:?}");
                continue;
            }
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
        (syn6(1).to(over::<V6>(ELSEWHERE)).extension(HOP_BY_HOP, 0).fragment(0, 16, true), Reason::Fragment),
        (syn6(1).to(over::<V6>(ELSEWHERE)).fragment(8, 12, false), Reason::Fragment),
        (Packet::ping(over::<V6>(CLIENT), over::<V6>(ELSEWHERE)), Reason::OtherProtocol),
        (syn6(1).wrong_ip_version(4), Reason::Malformed),
        (syn6(1).wrong_ip_length(19), Reason::Malformed),
        (syn6(1).wrong_ip_length(21), Reason::Malformed),
        (syn6(1).wrong_ip_length(0), Reason::Malformed),
        (syn6(1).wrong_tcp_data_offset(15), Reason::Malformed),
        (in_family::<V6>(&Packet::udp(CLIENT, STICKY)).wrong_udp_length(9), Reason::Malformed),
    ] {
        for program in Program::TC {
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
            for program in Program::TC {
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
            if action != PASS {
                let Run { reason, .. } = programs.run(Program::Ingress, &spoilt)?;
                assert!(is_refused(reason), "byte {at} ^ {value:#04x}: {reason:?}");
                continue;
            }
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
