//! Comparing whole packets so that the difference can be read.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use etherparse::{NetHeaders, PacketHeaders, TransportHeader};

use super::verify_checksums;

/// Compares two whole frames.
///
/// # Panics
/// Where they differ, with what they say and their differing bytes.
#[track_caller]
pub fn assert_same_packet(expected: &[u8], got: &[u8]) {
    if let Some(difference) = difference(expected, got) {
        panic!("{difference}");
    }
}

/// What two frames differ in, for reading; none where they are the same.
pub fn difference(expected: &[u8], got: &[u8]) -> Option<String> {
    if expected == got {
        return None;
    }
    let mut text = String::from("the packet is not the expected one\n");
    let mut line = |name: &str, frame: &[u8]| {
        let _ = writeln!(text, "  {name:<9} {}", describe(frame));
    };
    line("expected:", expected);
    line("got:", got);
    for start in (0..expected.len().max(got.len())).step_by(16) {
        let row =
            |frame: &[u8]| -> Vec<u8> { frame.get(start..).unwrap_or_default().iter().copied().take(16).collect() };
        let (left, right) = (row(expected), row(got));
        if left == right {
            continue;
        }
        let hex = |mine: &[u8], other: &[u8]| -> String {
            let bytes = mine.iter().enumerate().map(|(at, byte)| {
                let differs = other.get(at) != Some(byte);
                format!("{}{byte:02x}", if differs { '*' } else { ' ' })
            });
            bytes.collect()
        };
        let _ = writeln!(text, "  {start:>5}  -{}", hex(&left, &right));
        let _ = writeln!(text, "         +{}", hex(&right, &left));
    }
    Some(text)
}

/// One line on what a frame is.
pub fn describe(frame: &[u8]) -> String {
    let length = frame.len();
    let checksums = match verify_checksums(frame) {
        Ok(()) => String::new(),
        Err(error) => format!(", {error}"),
    };
    let headers = match PacketHeaders::from_ethernet_slice(frame) {
        Ok(headers) => headers,
        Err(error) => return format!("malformed, {length} bytes: {error}"),
    };
    let mut text = String::new();
    let (source, destination): (IpAddr, IpAddr) = match &headers.net {
        Some(NetHeaders::Ipv4(ip, _)) => {
            if ip.is_fragmenting_payload() {
                let _ = write!(text, "fragment at {}, ", ip.fragment_offset.value() * 8);
            }
            (ip.source.into(), ip.destination.into())
        }
        Some(NetHeaders::Ipv6(ip, _)) => (ip.source.into(), ip.destination.into()),
        _ => return format!("not IP, {length} bytes"),
    };
    let _ = match &headers.transport {
        Some(TransportHeader::Tcp(tcp)) => {
            let flags = [(tcp.syn, "SYN "), (tcp.fin, "FIN "), (tcp.rst, "RST "), (tcp.psh, "PSH "), (tcp.ack, "ACK ")];
            let flags: String = flags.iter().filter(|f| f.0).map(|f| f.1).collect();
            let from = SocketAddr::new(source, tcp.source_port);
            let to = SocketAddr::new(destination, tcp.destination_port);
            write!(text, "TCP {flags}{from} -> {to}, checksum {:04x}", tcp.checksum)
        }
        Some(TransportHeader::Udp(udp)) => {
            let from = SocketAddr::new(source, udp.source_port);
            let to = SocketAddr::new(destination, udp.destination_port);
            write!(text, "UDP {from} -> {to}, checksum {:04x}", udp.checksum)
        }
        Some(TransportHeader::Icmpv4(icmp)) => {
            write!(text, "ICMP {source} -> {destination}, {:?}", icmp.icmp_type)
        }
        Some(TransportHeader::Icmpv6(icmp)) => {
            write!(text, "ICMPv6 {source} -> {destination}, {:?}", icmp.icmp_type)
        }
        _ => write!(text, "IP {source} -> {destination}"),
    };
    format!("{text}, {length} bytes{checksums}")
}
