//! Every checksum of a packet, by etherparse: an implementation that shares nothing with the datapath's or the fake's.

use etherparse::{LaxPacketHeaders, LaxPayloadSlice, NetHeaders, PacketHeaders, TransportHeader};

/// Holds every checksum of a frame against etherparse's. Those of a fragment are its IP header's alone.
///
/// # Panics
/// Where one is wrong, or the frame is none that etherparse reads.
#[track_caller]
pub fn verify(frame: &[u8]) {
    let headers = PacketHeaders::from_ethernet_slice(frame).unwrap_or_else(|error| panic!("{error}: {frame:02x?}"));
    verify_net(headers.net.as_ref().expect("IP"));
    if let Some(transport) = &headers.transport {
        verify_transport(headers.net.as_ref().expect("IP"), transport, headers.payload.slice());
    }
}

/// The same of an ICMP error, and of what it quotes, as far as that is quoted.
///
/// # Panics
/// As [`verify`].
#[track_caller]
pub fn verify_error(frame: &[u8], quote_len: usize) {
    verify(frame);
    let quote = &frame[frame.len() - quote_len..];
    let headers = LaxPacketHeaders::from_ip(quote).unwrap_or_else(|error| panic!("{error}: {quote:02x?}"));
    verify_net(headers.net.as_ref().expect("IP"));
    let (LaxPayloadSlice::Udp { payload, incomplete } | LaxPayloadSlice::Tcp { payload, incomplete }) = headers.payload
    else {
        return;
    };
    if let Some(transport) = headers.transport.filter(|_| !incomplete) {
        verify_transport(headers.net.as_ref().expect("IP"), &transport, payload);
    }
}

#[track_caller]
fn verify_net(net: &NetHeaders) {
    if let NetHeaders::Ipv4(ip, _) = net {
        assert_eq!(ip.header_checksum, ip.calc_header_checksum(), "the IPv4 header's checksum");
    }
}

#[track_caller]
fn verify_transport(net: &NetHeaders, held: &TransportHeader, payload: &[u8]) {
    if matches!(held, TransportHeader::Udp(udp) if udp.checksum == 0) {
        return;
    }
    let mut right = held.clone();
    match net {
        NetHeaders::Ipv4(ip, _) => right.update_checksum_ipv4(ip, payload).expect("a transport of IPv4"),
        NetHeaders::Ipv6(ip, _) => right.update_checksum_ipv6(ip, payload).expect("a short payload"),
        NetHeaders::Arp(_) => panic!("ARP"),
    }
    assert_eq!(*held, right, "the transport's checksum");
}
