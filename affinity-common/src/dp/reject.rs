//! A packet that is refused is turned, where it is, into the answer that says so, from the address that the client has
//! asked: a reset for TCP (RFC 9293, section 3.10.7.1), an ICMP port unreachable for UDP (RFC 792; RFC 4443, section 3.1).
#![expect(clippy::cast_possible_truncation, reason = "lengths of headers")]

use core::mem::offset_of;

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use super::{
    Packet, RewriteError,
    parse::{ACK, FIN, Headers, RST, SYN},
};
use crate::{
    family::{Family, V4, V6},
    types::Proto,
};

/// The hop limit of an answer: what Linux gives its own packets.
const HOPS: u8 = 64;

/// A family that packets are refused in.
pub trait Reject: Family {
    /// The length of its header without options or extensions, in bytes.
    const HEADER_LEN: usize;

    /// How many bytes a packet with such a header says are behind it.
    fn upper_len<P: Packet>(packet: &P, l3: usize) -> Option<u16>;

    /// Writes the header of an answer with `len` bytes behind it.
    fn write_header<P: Packet>(packet: &mut P, asked: &Headers<Self>, proto: u8, len: u16) -> Result<(), RewriteError>;

    /// Turns a datagram into the ICMP error about it.
    fn write_unreachable<P: Packet>(packet: &mut P, asked: &Headers<Self>) -> Result<(), RewriteError>;
}

/// What came of turning a packet into its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The packet is the answer now, and is to go back.
    Made,
    /// There is none: the packet is to be dropped.
    None,
}

/// Whether a packet that is refused gets an answer: nobody answers a reset, and behind options or extensions the hardware may
/// be asked to compute a checksum that is none of the answer's.
#[inline(always)]
pub fn is_answered<F: Reject>(headers: &Headers<F>) -> bool {
    headers.flags & RST == 0 && headers.l4 == headers.l3 + F::HEADER_LEN
}

/// Turns a packet that is refused into its answer.
#[inline(always)]
pub fn answer<F: Reject, P: Packet>(packet: &mut P, headers: &Headers<F>) -> Answer {
    if !is_answered(headers) {
        return Answer::None;
    }
    let answered = if headers.is_tcp() { reset(packet, headers) } else { F::write_unreachable(packet, headers) };
    match answered.and_then(|()| turn_back(packet)) {
        Ok(()) => Answer::Made,
        Err(_) => Answer::None,
    }
}

/// Has the frame go to where it came from.
#[inline(always)]
pub fn turn_back<P: Packet>(packet: &mut P) -> Result<(), RewriteError> {
    let mut macs: [u8; 12] = packet.read(0).ok_or(RewriteError)?;
    macs.rotate_left(6);
    packet.write(0, &macs)
}

#[inline(always)]
fn reset<F: Reject, P: Packet>(packet: &mut P, asked: &Headers<F>) -> Result<(), RewriteError> {
    const LEN: u16 = TcpHdr::LEN as u16;
    let tcp: [u8; TcpHdr::LEN] = packet.read(asked.l4).ok_or(RewriteError)?;
    let upper_len = F::upper_len(packet, asked.l3).ok_or(RewriteError)?;
    let [_, _, _, _, a, b, c, d, ack @ ..] = tcp;
    let header_len = u32::from(tcp[12] >> 4) << 2;
    // What the segment takes of the sequence: its payload, and its SYN and FIN as a byte each.
    let took = u32::from(upper_len).wrapping_sub(header_len)
        + u32::from(asked.flags & SYN != 0)
        + u32::from(asked.flags & FIN != 0);
    let (seq, ack, flags) = if asked.flags & ACK == 0 {
        ([0; 4], u32::from_be_bytes([a, b, c, d]).wrapping_add(took).to_be_bytes(), RST | ACK)
    } else {
        ([ack[0], ack[1], ack[2], ack[3]], [0; 4], RST)
    };
    let pseudo = pseudo_sum(packet, asked, Proto::TCP.number, LEN);
    let (from, to) = (asked.dst_port.be, asked.src_port.be);
    let start = fold(pseudo).to_be_bytes();
    let mut answer: [u8; TcpHdr::LEN] = [0; TcpHdr::LEN];
    answer[..2].copy_from_slice(&from);
    answer[2..4].copy_from_slice(&to);
    answer[4..8].copy_from_slice(&seq);
    answer[8..12].copy_from_slice(&ack);
    answer[12] = (TcpHdr::LEN as u8 / 4) << 4;
    answer[13] = flags;
    let whole = fold(pseudo + u32::from(packet.sum(&answer)));
    answer[16..18].copy_from_slice(&start);
    packet.resize(asked.l4 + TcpHdr::LEN)?;
    F::write_header(packet, asked, Proto::TCP.number, LEN)?;
    packet.write(asked.l4, &answer)?;
    packet.finish_checksum(asked.l4 + offset_of!(TcpHdr, check), fold(pseudo), whole)
}

/// The sum of the pseudo-header of an answer.
#[inline(always)]
fn pseudo_sum<F: Family, P: Packet>(packet: &P, asked: &Headers<F>, proto: u8, len: u16) -> u32 {
    let addrs = u32::from(packet.sum(asked.src.as_ref())) + u32::from(packet.sum(asked.dst.as_ref()));
    addrs + u32::from(proto) + u32::from(len)
}

/// What is over 16 bits is added to them.
#[inline(always)]
fn fold(mut sum: u32) -> u16 {
    sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// Length of an ICMP header, of either version.
pub const ICMP_LEN: usize = 8;

impl Reject for V4 {
    const HEADER_LEN: usize = Ipv4Hdr::LEN;

    #[inline(always)]
    fn upper_len<P: Packet>(packet: &P, l3: usize) -> Option<u16> {
        let total = u16::from_be_bytes(packet.read(l3 + offset_of!(Ipv4Hdr, tot_len))?);
        total.checked_sub(Ipv4Hdr::LEN as u16)
    }

    #[inline(always)]
    fn write_header<P: Packet>(packet: &mut P, asked: &Headers<V4>, proto: u8, len: u16) -> Result<(), RewriteError> {
        /// Don't fragment.
        const DF: u8 = 0x40;
        let [len_high, len_low] = (Ipv4Hdr::LEN as u16 + len).to_be_bytes();
        let mut header = [0; Ipv4Hdr::LEN];
        header[..12].copy_from_slice(&[0x45, 0, len_high, len_low, 0, 0, DF, 0, HOPS, proto, 0, 0]);
        header[12..16].copy_from_slice(&asked.dst);
        header[16..20].copy_from_slice(&asked.src);
        let check = !packet.sum(&header);
        header[10..12].copy_from_slice(&check.to_be_bytes());
        packet.write(asked.l3, &header)
    }

    #[inline(always)]
    fn write_unreachable<P: Packet>(packet: &mut P, asked: &Headers<V4>) -> Result<(), RewriteError> {
        /// What is quoted: the headers, of which the second names the ports.
        const QUOTE: usize = Ipv4Hdr::LEN + UdpHdr::LEN;
        const LEN: usize = ICMP_LEN + QUOTE;
        let quote: [u8; QUOTE] = packet.read(asked.l3).ok_or(RewriteError)?;
        let [high, low] = (!fold(0x0303 + u32::from(packet.sum(&quote)))).to_be_bytes();
        packet.resize(EthHdr::LEN + Ipv4Hdr::LEN + LEN)?;
        packet.write(asked.l4 + ICMP_LEN, &quote)?;
        // Destination unreachable, port unreachable.
        packet.write(asked.l4, &[3, 3, high, low, 0, 0, 0, 0])?;
        Self::write_header(packet, asked, Proto::ICMP.number, LEN as u16)
    }
}

impl Reject for V6 {
    const HEADER_LEN: usize = Ipv6Hdr::LEN;

    #[inline(always)]
    fn upper_len<P: Packet>(packet: &P, l3: usize) -> Option<u16> {
        Some(u16::from_be_bytes(packet.read(l3 + offset_of!(Ipv6Hdr, payload_len))?))
    }

    #[inline(always)]
    fn write_header<P: Packet>(packet: &mut P, asked: &Headers<V6>, proto: u8, len: u16) -> Result<(), RewriteError> {
        let [len_high, len_low] = len.to_be_bytes();
        packet.write(asked.l3, &[0x60, 0, 0, 0, len_high, len_low, proto, HOPS])?;
        packet.write(asked.l3 + offset_of!(Ipv6Hdr, src_addr), &asked.dst)?;
        packet.write(asked.l3 + offset_of!(Ipv6Hdr, dst_addr), &asked.src)
    }

    #[inline(always)]
    fn write_unreachable<P: Packet>(packet: &mut P, asked: &Headers<V6>) -> Result<(), RewriteError> {
        const QUOTE: usize = Ipv6Hdr::LEN + UdpHdr::LEN;
        const LEN: usize = ICMP_LEN + QUOTE;
        let quote: [u8; QUOTE] = packet.read(asked.l3).ok_or(RewriteError)?;
        let pseudo = pseudo_sum(packet, asked, Proto::ICMP6.number, LEN as u16);
        let [high, low] = (!fold(pseudo + 0x0104 + u32::from(packet.sum(&quote)))).to_be_bytes();
        packet.resize(EthHdr::LEN + Ipv6Hdr::LEN + LEN)?;
        packet.write(asked.l4 + ICMP_LEN, &quote)?;
        // Destination unreachable, port unreachable.
        packet.write(asked.l4, &[1, 4, high, low, 0, 0, 0, 0])?;
        Self::write_header(packet, asked, Proto::ICMP6.number, LEN as u16)
    }
}
