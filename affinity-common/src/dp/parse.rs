//! From a frame to the headers that a service is recognised by.

use core::mem::offset_of;

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use super::Packet;
use crate::{
    family::{Family, V4, V6},
    reason::Reason,
    types::{Port, Proto},
};

/// Where the headers are and what they say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers<F: Family> {
    /// Offset of the IP header in bytes.
    pub l3: usize,
    /// Offset of the transport header in bytes.
    pub l4: usize,
    /// The source address.
    pub src: F::Addr,
    /// The destination address.
    pub dst: F::Addr,
    /// The source port.
    pub src_port: Port,
    /// The destination port.
    pub dst_port: Port,
    /// TCP or UDP.
    pub proto: Proto,
    /// TCP's flags; 0 for UDP.
    pub flags: u8,
}

/// TCP's FIN.
pub const FIN: u8 = 0x01;
/// TCP's SYN.
pub const SYN: u8 = 0x02;
/// TCP's RST.
pub const RST: u8 = 0x04;
/// TCP's ACK.
pub const ACK: u8 = 0x10;

impl<F: Family> Headers<F> {
    /// Whether this packet opens a connection: a SYN without ACK.
    #[inline(always)]
    pub const fn opens(&self) -> bool {
        self.flags & (SYN | ACK) == SYN
    }

    /// Whether the packet is TCP's.
    #[inline(always)]
    pub fn is_tcp(&self) -> bool {
        self.proto == Proto::TCP
    }
}

/// The ethertype of a frame; `None` for a frame without one.
#[inline(always)]
pub fn ethertype<P: Packet>(packet: &P) -> Option<[u8; 2]> {
    packet.read(offset_of!(EthHdr, ether_type))
}

/// A family whose headers the datapath reads.
pub trait Parse: Family {
    /// The headers of a frame of this family, or why it can't be for a service.
    fn parse<P: Packet>(packet: &P) -> Result<Headers<Self>, Reason>;
}

/// The flags `MF` and the fragment's offset, of `Ipv4Hdr::frags`: non-zero in every fragment (RFC 791).
const FRAGMENT: u16 = 0x3fff;

impl Parse for V4 {
    #[inline(always)]
    fn parse<P: Packet>(packet: &P) -> Result<Headers<Self>, Reason> {
        const L3: usize = EthHdr::LEN;
        let header: [u8; Ipv4Hdr::LEN] = packet.read(L3).ok_or(Reason::Malformed)?;
        let header_len = usize::from(header[0] & 0x0f) << 2;
        if header[0] >> 4 != 4 || header_len < Ipv4Hdr::LEN {
            return Err(Reason::Malformed);
        }
        let said = usize::from(u16::from_be_bytes(field(&header, offset_of!(Ipv4Hdr, tot_len))));
        let total_len = total_len(packet, L3, said).ok_or(Reason::Malformed)?;
        let proto = Proto { number: header[offset_of!(Ipv4Hdr, proto)] };
        if proto != Proto::TCP && proto != Proto::UDP {
            return Err(Reason::OtherProtocol);
        }
        if u16::from_be_bytes(field(&header, offset_of!(Ipv4Hdr, frags))) & FRAGMENT != 0 {
            return Err(Reason::Fragment);
        }
        let (src, dst) = (field(&header, offset_of!(Ipv4Hdr, src_addr)), field(&header, offset_of!(Ipv4Hdr, dst_addr)));
        transport(packet, L3, header_len, total_len, src, dst, proto)
    }
}

/// How many extension headers of an IPv6 packet are passed over: hop-by-hop options and twice destination options, as many
/// as RFC 8200 (section 4.1) has of those. A packet with more of them passes untouched, as does one with a routing header,
/// whose destination is not its last, and one with an authentication header, which forbids translation.
pub const EXTENSION_HEADERS: usize = 3;

impl Parse for V6 {
    #[inline(always)]
    fn parse<P: Packet>(packet: &P) -> Result<Headers<Self>, Reason> {
        const L3: usize = EthHdr::LEN;
        let header: [u8; Ipv6Hdr::LEN] = packet.read(L3).ok_or(Reason::Malformed)?;
        if header[0] >> 4 != 6 {
            return Err(Reason::Malformed);
        }
        let said = match field(&header, offset_of!(Ipv6Hdr, payload_len)) {
            [0, 0] => 0,
            payload => Ipv6Hdr::LEN + usize::from(u16::from_be_bytes(payload)),
        };
        let total_len = total_len(packet, L3, said).ok_or(Reason::Malformed)?;
        let (mut next, mut header_len) = (header[offset_of!(Ipv6Hdr, next_hdr)], Ipv6Hdr::LEN);
        for _ in 0..EXTENSION_HEADERS {
            match next {
                HOP_BY_HOP | DESTINATION_OPTIONS => {
                    let [after, eights] = packet.read(L3 + header_len).ok_or(Reason::Malformed)?;
                    (next, header_len) = (after, header_len + 8 + (usize::from(eights) << 3));
                    if header_len > total_len {
                        return Err(Reason::Malformed);
                    }
                }
                _ => break,
            }
        }
        if next == FRAGMENT_HEADER {
            return Err(Reason::Fragment);
        }
        let proto = Proto { number: next };
        if proto != Proto::TCP && proto != Proto::UDP {
            return Err(Reason::OtherProtocol);
        }
        let (src, dst) = (field(&header, offset_of!(Ipv6Hdr, src_addr)), field(&header, offset_of!(Ipv6Hdr, dst_addr)));
        // At most 40 + 3 * 2048.
        let header_len = packet.any_length(header_len) & 0x1fff;
        transport(packet, L3, header_len, total_len, src, dst, proto)
    }
}

// IPv6 extension headers by their number (IANA, "IPv6 Extension Header Types").
const HOP_BY_HOP: u8 = 0;
const FRAGMENT_HEADER: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

/// The length of an IP packet that says it is of `said` bytes, or `None` if the frame is shorter. A GSO packet over 64 kB
/// says 0 (BIG TCP: kernel commits b1a78b9b9886 for IPv4, 7c96d8ec96bb for IPv6).
#[inline(always)]
fn total_len<P: Packet>(packet: &P, l3: usize, said: usize) -> Option<usize> {
    let there = packet.frame_len().checked_sub(l3)?;
    if said == 0 && there > usize::from(u16::MAX) { Some(there) } else { (0 < said && said <= there).then_some(said) }
}

/// The transport header of a packet of `total_len` bytes of which the network header takes `header_len`.
#[inline(always)]
fn transport<F: Family, P: Packet>(
    packet: &P,
    l3: usize,
    header_len: usize,
    total_len: usize,
    src: F::Addr,
    dst: F::Addr,
    proto: Proto,
) -> Result<Headers<F>, Reason> {
    /// As far as TCP's flags.
    const TCP_FLAGS: usize = 13;
    let l4 = l3 + header_len;
    let headers = |ports: &[u8], flags| Headers {
        l3,
        l4,
        src,
        dst,
        src_port: Port { be: [ports[0], ports[1]] },
        dst_port: Port { be: [ports[2], ports[3]] },
        proto,
        flags,
    };
    let len = total_len.checked_sub(header_len).ok_or(Reason::Malformed)?;
    if proto == Proto::TCP {
        // The whole fixed header has to be there, though only its first part is read.
        let header: [u8; TcpHdr::LEN] = packet.read(l4).ok_or(Reason::Malformed)?;
        let header_len = usize::from(header[TCP_FLAGS - 1] >> 4) << 2;
        if header_len < TcpHdr::LEN || header_len > len {
            return Err(Reason::Malformed);
        }
        Ok(headers(&header, header[TCP_FLAGS]))
    } else {
        let header: [u8; UdpHdr::LEN] = packet.read(l4).ok_or(Reason::Malformed)?;
        let udp_len = usize::from(u16::from_be_bytes(field(&header, offset_of!(UdpHdr, len))));
        if len < UdpHdr::LEN || udp_len < UdpHdr::LEN || udp_len > len {
            return Err(Reason::Malformed);
        }
        Ok(headers(&header, 0))
    }
}

#[inline(always)]
fn field<const N: usize>(header: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&header[at..at + N]);
    out
}
