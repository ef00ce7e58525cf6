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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
    /// Whether it has come in by one of the node's uplinks; known of what opens a connection to a service, and of nothing else.
    pub from_outside: bool,
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

/// What a frame is that has no ports of its own to go by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPorts {
    /// Nothing that is for a service, for this reason.
    Ends(Reason),
    /// A fragment.
    Fragment,
    /// ICMP of this family.
    Icmp,
}

impl NoPorts {
    /// Why such a frame ends where only those with ports have come for.
    #[inline(always)]
    pub const fn reason(self) -> Reason {
        match self {
            Self::Ends(reason) => reason,
            Self::Fragment => Reason::Fragment,
            Self::Icmp => Reason::OtherProtocol,
        }
    }
}

impl From<Reason> for NoPorts {
    #[inline(always)]
    fn from(reason: Reason) -> Self {
        Self::Ends(reason)
    }
}

/// What comes behind the network header of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    /// How many bytes.
    pub len: usize,
    /// How the packet is a part of a larger one.
    pub part: Part,
}

/// How a packet is a part of a larger one (RFC 791, section 2.3; RFC 8200, section 4.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// The identification; of IPv4, two octets and then zeroes.
    pub id: [u8; 4],
    /// Where its bytes lie in the larger one, in units of eight bytes.
    pub offset: u16,
    /// Whether more come behind it.
    pub more: bool,
}

impl Part {
    /// Whether it is a part, and no whole packet.
    #[inline(always)]
    pub const fn is_part(self) -> bool {
        self.offset != 0 || self.more
    }

    /// Of the 16 bits that both families have alike but for where the flag is.
    #[inline(always)]
    const fn new(id: [u8; 4], offset: u16, more: bool) -> Self {
        Self { id, offset, more }
    }
}

/// A family whose headers the datapath reads.
pub trait Parse: Family {
    /// Its ICMP.
    const ICMP: Proto;

    /// What a frame of this family says before its ports, written to `headers`, whose ports and flags are left as they are.
    /// Of a protocol that services have, or ICMP; `part_too`: also of a fragment.
    ///
    /// Here and below the headers are filled in their place, as a program's stack has no room for two of them.
    fn network<P: Packet>(packet: &P, headers: &mut Headers<Self>, part_too: bool) -> Result<Payload, NoPorts>;

    /// The headers of a frame of this family, or why it can't be for a service.
    #[inline(always)]
    fn parse<P: Packet>(packet: &P, headers: &mut Headers<Self>) -> Result<(), NoPorts> {
        let payload = Self::network(packet, headers, false)?;
        if headers.proto == Self::ICMP {
            return Err(NoPorts::Icmp);
        }
        Ok(transport(packet, headers, payload.len)?)
    }

    /// The same, also of the first fragment of a packet.
    #[inline(always)]
    fn parse_first<P: Packet>(packet: &P, headers: &mut Headers<Self>) -> Result<(), NoPorts> {
        let payload = Self::network(packet, headers, true)?;
        if headers.proto == Self::ICMP {
            return Err(NoPorts::Icmp);
        }
        if payload.part.offset != 0 {
            return Err(NoPorts::Fragment);
        }
        if payload.part.more {
            first_part(packet, headers, payload.len)?;
        } else {
            transport(packet, headers, payload.len)?;
        }
        Ok(())
    }
}

impl Parse for V4 {
    const ICMP: Proto = Proto::ICMP;

    #[inline(always)]
    fn network<P: Packet>(packet: &P, headers: &mut Headers<Self>, part_too: bool) -> Result<Payload, NoPorts> {
        const L3: usize = EthHdr::LEN;
        /// The flag `MF`, and the offset, of `Ipv4Hdr::frags`.
        const MORE: u16 = 0x2000;
        const OFFSET: u16 = 0x1fff;
        let header: [u8; Ipv4Hdr::LEN] = packet.read(L3).ok_or(Reason::Malformed)?;
        let header_len = usize::from(header[0] & 0x0f) << 2;
        if header[0] >> 4 != 4 || header_len < Ipv4Hdr::LEN {
            return Err(Reason::Malformed.into());
        }
        let said = usize::from(u16::from_be_bytes(field(&header, offset_of!(Ipv4Hdr, tot_len))));
        let total_len = total_len(packet, L3, said).ok_or(Reason::Malformed)?;
        let proto = Proto { number: header[offset_of!(Ipv4Hdr, proto)] };
        if proto != Proto::TCP && proto != Proto::UDP && proto != Self::ICMP {
            return Err(Reason::OtherProtocol.into());
        }
        let frags = u16::from_be_bytes(field(&header, offset_of!(Ipv4Hdr, frags)));
        if frags & (MORE | OFFSET) != 0 && !part_too {
            return Err(NoPorts::Fragment);
        }
        let [high, low] = field(&header, offset_of!(Ipv4Hdr, id));
        (headers.l3, headers.l4, headers.proto) = (L3, L3 + header_len, proto);
        headers.src = field(&header, offset_of!(Ipv4Hdr, src_addr));
        headers.dst = field(&header, offset_of!(Ipv4Hdr, dst_addr));
        Ok(Payload {
            len: total_len.checked_sub(header_len).ok_or(Reason::Malformed)?,
            part: Part::new([high, low, 0, 0], frags & OFFSET, frags & MORE != 0),
        })
    }
}

/// How many extension headers of an IPv6 packet are passed over: hop-by-hop options and twice destination options, as many
/// as RFC 8200 (section 4.1) has of those. A packet with more of them passes untouched, as does one with a routing header,
/// whose destination is not its last, and one with an authentication header, which forbids translation.
pub const EXTENSION_HEADERS: usize = 3;

impl Parse for V6 {
    const ICMP: Proto = Proto::ICMP6;

    #[inline(always)]
    fn network<P: Packet>(packet: &P, headers: &mut Headers<Self>, part_too: bool) -> Result<Payload, NoPorts> {
        const L3: usize = EthHdr::LEN;
        let header: [u8; Ipv6Hdr::LEN] = packet.read(L3).ok_or(Reason::Malformed)?;
        if header[0] >> 4 != 6 {
            return Err(Reason::Malformed.into());
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
                        return Err(Reason::Malformed.into());
                    }
                }
                _ => break,
            }
        }
        let mut part = Part::default();
        if next == FRAGMENT_HEADER {
            if !part_too {
                return Err(NoPorts::Fragment);
            }
            let [after, _, high, low, id @ ..]: [u8; 8] = packet.read(L3 + header_len).ok_or(Reason::Malformed)?;
            let offset = u16::from_be_bytes([high, low]);
            part = Part::new(id, offset >> 3, offset & 1 != 0);
            (next, header_len) = (after, header_len + FRAGMENT_HEADER_LEN);
        }
        let proto = Proto { number: next };
        if proto != Proto::TCP && proto != Proto::UDP && proto != Self::ICMP {
            return Err(Reason::OtherProtocol.into());
        }
        // At most 40 + 3 * 2048 + 8.
        let header_len = packet.unknown(header_len) & 0x1fff;
        (headers.l3, headers.l4, headers.proto) = (L3, L3 + header_len, proto);
        headers.src = field(&header, offset_of!(Ipv6Hdr, src_addr));
        headers.dst = field(&header, offset_of!(Ipv6Hdr, dst_addr));
        Ok(Payload { len: total_len.checked_sub(header_len).ok_or(Reason::Malformed)?, part })
    }
}

// IPv6 extension headers by their number (IANA, "IPv6 Extension Header Types").
const HOP_BY_HOP: u8 = 0;
/// That of a fragment.
pub(super) const FRAGMENT_HEADER: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

/// Bytes of the header of a fragment (RFC 8200, section 4.5).
pub(super) const FRAGMENT_HEADER_LEN: usize = 8;

/// The length of an IP packet that says it is of `said` bytes, or `None` if the frame is shorter. A GSO packet over 64 kB
/// says 0 (BIG TCP: kernel commits b1a78b9b9886 for IPv4, 7c96d8ec96bb for IPv6).
#[inline(always)]
fn total_len<P: Packet>(packet: &P, l3: usize, said: usize) -> Option<usize> {
    let there = packet.frame_len().checked_sub(l3)?;
    if said == 0 && there > usize::from(u16::MAX) { Some(there) } else { (0 < said && said <= there).then_some(said) }
}

/// As far as TCP's flags.
const TCP_FLAGS: usize = 13;

/// The ports of a packet with a whole transport header and payload.
#[inline(always)]
fn transport<F: Family, P: Packet>(packet: &P, headers: &mut Headers<F>, len: usize) -> Result<(), Reason> {
    if headers.is_tcp() {
        // The whole fixed header has to be there, though only its first part is read.
        let header: [u8; TcpHdr::LEN] = packet.read(headers.l4).ok_or(Reason::Malformed)?;
        let header_len = usize::from(header[TCP_FLAGS - 1] >> 4) << 2;
        if header_len < TcpHdr::LEN || header_len > len {
            return Err(Reason::Malformed);
        }
        fill(headers, &header, header[TCP_FLAGS]);
    } else {
        let header: [u8; UdpHdr::LEN] = packet.read(headers.l4).ok_or(Reason::Malformed)?;
        let udp_len = usize::from(u16::from_be_bytes(field(&header, offset_of!(UdpHdr, len))));
        if len < UdpHdr::LEN || udp_len < UdpHdr::LEN || udp_len > len {
            return Err(Reason::Malformed);
        }
        fill(headers, &header, 0);
    }
    Ok(())
}

/// The ports of a packet's first fragment, which has at least all of the transport header that is translated.
#[inline(always)]
pub fn first_part<F: Family, P: Packet>(packet: &P, headers: &mut Headers<F>, len: usize) -> Result<(), Reason> {
    if headers.is_tcp() {
        let header: [u8; TcpHdr::LEN] = packet.read(headers.l4).ok_or(Reason::Malformed)?;
        if len < TcpHdr::LEN {
            return Err(Reason::Malformed);
        }
        fill(headers, &header, header[TCP_FLAGS]);
    } else {
        let header: [u8; UdpHdr::LEN] = packet.read(headers.l4).ok_or(Reason::Malformed)?;
        if len < UdpHdr::LEN {
            return Err(Reason::Malformed);
        }
        fill(headers, &header, 0);
    }
    Ok(())
}

/// The ports that both protocols begin with.
#[inline(always)]
fn fill<F: Family>(headers: &mut Headers<F>, ports: &[u8], flags: u8) {
    headers.src_port = Port { be: [ports[0], ports[1]] };
    headers.dst_port = Port { be: [ports[2], ports[3]] };
    headers.flags = flags;
}

/// Bytes of a header.
#[inline(always)]
pub(super) fn field<const N: usize>(header: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&header[at..at + N]);
    out
}
