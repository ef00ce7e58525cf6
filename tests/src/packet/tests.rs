//! Packets against etherparse's own, and against themselves.

use super::*;
use etherparse::PacketBuilder;

const V4: [&str; 2] = ["10.244.0.11:40000", "10.96.0.10:80"];
const V6: [&str; 2] = ["[fd00:10:244::b]:40000", "[fd00:10:96::a]:80"];

fn built_by_etherparse([source, destination]: [&str; 2], tcp: bool, payload: &[u8]) -> Vec<u8> {
    let (source, destination) = (source.endpoint(), destination.endpoint());
    let ethernet = PacketBuilder::ethernet2(SOURCE_MAC, DESTINATION_MAC);
    let ip = match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut header = Ipv4Header::new(0, 64, IpNumber(0), source.octets(), destination.octets()).expect("short");
            header.identification = 0x4242;
            header.dont_fragment = true;
            ethernet.ip(etherparse::IpHeaders::Ipv4(header, etherparse::Ipv4Extensions::default()))
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => ethernet.ipv6(source.octets(), destination.octets(), 64),
        _ => unreachable!("of one family"),
    };
    let mut frame = Vec::new();
    if tcp {
        ip.tcp(source.port(), destination.port(), 0x1000_0001, 64_240).ack(0x2000_0002).write(&mut frame, payload)
    } else {
        ip.udp(source.port(), destination.port()).write(&mut frame, payload)
    }
    .expect("a vector takes all");
    frame
}

#[test]
fn frames_are_those_of_etherparse() {
    for endpoints in [V4, V6] {
        let [source, destination] = endpoints;
        for payload in [&b""[..], b"odd", b"even"] {
            let tcp = Packet::tcp(source, destination).payload(payload).build();
            assert_same_packet(&built_by_etherparse(endpoints, true, payload), &tcp);
            let udp = Packet::udp(source, destination).payload(payload).build();
            assert_same_packet(&built_by_etherparse(endpoints, false, payload), &udp);
        }
    }
}

#[test]
fn what_is_built_verifies() {
    for [source, destination] in [V4, V6] {
        let udp = Packet::udp(source, destination).payload([9; 100]);
        let frames = [
            Packet::tcp(source, destination).flags(Tcp::SYN).tcp_options(&[2, 4, 5, 0xb4]),
            udp.clone(),
            udp.clone().padded(7),
            udp.clone().fragment(0, 64, true),
            udp.clone().fragment(64, 64, false),
            Packet::ping(source, destination),
            Packet::too_big(destination, &udp, 1400, 8),
            Packet::raw(source, destination, 132, b"something"),
        ];
        for frame in frames {
            let bytes = frame.build();
            verify_checksums(&bytes).unwrap_or_else(|error| panic!("{frame:?}: {error}"));
            assert!(!describe(&bytes).contains("malformed"), "{}", describe(&bytes));
        }
    }
    let [source, destination] = V4;
    let frame = Packet::udp(source, destination);
    verify_checksums(&frame.clone().without_udp_checksum().build()).expect("IPv4 may");
    verify_checksums(&frame.ip_options(&[1, 1, 1, 0]).build()).expect("options");
}

#[test]
fn what_is_spoilt_does_not_verify() {
    let [source, destination] = V4;
    let udp = Packet::udp(source, destination).payload(b"1234");
    let tcp = Packet::tcp(source, destination);
    for frame in [
        udp.clone().upper_checksum(1),
        udp.clone().ip_checksum(1),
        udp.clone().wrong_ip_length(30),
        udp.clone().wrong_ip_version(5),
        udp.clone().wrong_ihl(15),
        udp.clone().wrong_udp_length(3),
        udp.clone().truncated(40),
        tcp.clone().wrong_tcp_data_offset(2),
        tcp.clone().upper_checksum(0),
        Packet::udp(V6[0], V6[1]).without_udp_checksum(),
    ] {
        assert!(verify_checksums(&frame.build()).is_err(), "{frame:?}");
    }
    let mut bytes = tcp.payload(b"payload").build();
    *bytes.last_mut().expect("not empty") ^= 1;
    assert!(verify_checksums(&bytes).is_err());
}

#[test]
fn fragments_make_up_the_whole() {
    for [source, destination] in [V4, V6] {
        let udp = Packet::udp(source, destination).payload([9; 100]);
        let whole = &udp.build()[udp.upper_offset()..];
        let parts = [udp.clone().fragment(0, 64, true), udp.clone().fragment(64, 64, false)];
        let parts = parts.map(|part| part.build()[part.upper_offset()..].to_vec());
        assert_eq!(parts.concat(), whole);
    }
}

#[test]
fn a_difference_names_both_packets_and_the_bytes() {
    let [source, destination] = V4;
    let one = Packet::tcp(source, destination).flags(Tcp::SYN);
    let other = one.clone().to("10.244.0.101:8080");
    assert_eq!(difference(&one.build(), &one.build()), None);
    let text = difference(&one.build(), &other.build()).expect("they differ");
    for part in ["TCP SYN 10.244.0.11:40000 -> 10.96.0.10:80", "- 00*0a", "+ 00*65"] {
        assert!(text.contains(part), "{part:?} in:\n{text}");
    }
}
