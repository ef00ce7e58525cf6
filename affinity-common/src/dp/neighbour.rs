//! Who has a service's address is asked on a link, by ARP (RFC 826) or neighbour discovery (RFC 4861): answered by the node that
//! announces it, with the link-layer address of the interface that was asked on. The question becomes the answer, where it is.

use core::mem::offset_of;

use network_types::{eth::EthHdr, ip::Ipv6Hdr};

use super::{Env, Packet, RewriteError, parse::Headers};
use crate::{
    abi::announced::AnnouncedKey,
    family::{Family, V4},
    reason::Reason,
    types::Proto,
};

/// Ethertype of ARP, octets as on the wire.
pub const ARP: [u8; 2] = [0x08, 0x06];

/// Bytes of ARP for IPv4 on Ethernet.
const ARP_LEN: usize = 28;
/// Hardware of Ethernet, protocol of IPv4, addresses of 6 and 4 bytes; what comes next is the operation.
const ARP_OF_IPV4: [u8; 6] = [0, 1, 0x08, 0x00, 6, 4];
const REQUEST: [u8; 2] = [0, 1];
const REPLY: u8 = 2;

/// A frame of ARP.
#[inline(always)]
pub fn arp<E: Env<V4>, P: Packet>(env: &E, packet: &mut P) -> Reason {
    let Some(asked) = packet.read::<ARP_LEN>(EthHdr::LEN) else { return Reason::Malformed };
    let [h0, h1, p0, p1, hl, pl, o0, o1, rest @ ..] = asked;
    let (mac, rest) = split::<6, 20, 14>(rest);
    let (asker, rest) = split::<4, 14, 10>(rest);
    let (_, addr) = split::<6, 10, 4>(rest);
    // Who tells of its own address asks nothing (RFC 5227, section 2.3), and one that has none yet is told, too.
    if [h0, h1, p0, p1, hl, pl] != ARP_OF_IPV4 || [o0, o1] != REQUEST || asker == addr {
        return Reason::NotIp;
    }
    let Some(own) = announced(env, packet, &addr) else { return Reason::NotIp };
    let mut answer = [0; ARP_LEN];
    answer[..6].copy_from_slice(&ARP_OF_IPV4);
    answer[7] = REPLY;
    answer[8..14].copy_from_slice(&own);
    answer[14..18].copy_from_slice(&addr);
    answer[18..24].copy_from_slice(&mac);
    answer[24..].copy_from_slice(&asker);
    let done = packet.write(EthHdr::LEN, &answer).and_then(|()| address_to(packet, mac, own));
    if done.is_ok() { Reason::Announced } else { Reason::RewriteFailed }
}

/// Bytes, and those behind them.
#[inline(always)]
fn split<const A: usize, const N: usize, const B: usize>(bytes: [u8; N]) -> ([u8; A], [u8; B]) {
    const { assert!(A + B == N) };
    let (mut first, mut rest) = ([0; A], [0; B]);
    first.copy_from_slice(&bytes[..A]);
    rest.copy_from_slice(&bytes[A..]);
    (first, rest)
}

/// The link-layer address to answer with, where the node answers for an address on the interface that was asked on.
#[inline(always)]
fn announced<F: Family, E: Env<F>, P: Packet>(env: &E, packet: &P, addr: &F::Addr) -> Option<[u8; 6]> {
    let ifindex = packet.ifindex();
    if env.announced(&AnnouncedKey { addr: *addr, ifindex })?.until.is_due(env.now().ticks()) {
        return None;
    }
    Some(env.uplink(ifindex)?.mac)
}

/// Has the frame go to a link-layer address, from another.
#[inline(always)]
fn address_to<P: Packet>(packet: &mut P, to: [u8; 6], from: [u8; 6]) -> Result<(), RewriteError> {
    let mut macs = [0; 12];
    macs[..6].copy_from_slice(&to);
    macs[6..].copy_from_slice(&from);
    packet.write(0, &macs)
}

/// ICMP type of a neighbour solicitation (RFC 4861, section 4.3).
pub const SOLICITATION: u8 = 135;
/// ICMP type of a neighbour advertisement (RFC 4861, section 4.4).
const ADVERTISEMENT: u8 = 136;
/// It was asked for, and is to replace what was known.
const SOLICITED_OVERRIDE: u8 = 0x60;
/// What is needed of a solicitation: type, code, checksum, four bytes of nothing, the address that is asked for.
const SOLICITATION_LEN: usize = 24;
/// The same of the answer, and its link-layer address, in an option of eight bytes.
const ADVERTISEMENT_LEN: usize = 32;

/// A neighbour solicitation, whose headers are `outer`. Only what comes from the link has all its hops yet (RFC 4861, 7.1.1).
#[inline(always)]
pub fn solicited<F: Family, E: Env<F>, P: Packet>(env: &E, packet: &mut P, outer: &Headers<F>) -> Reason {
    const ALL_HOPS: u8 = 255;
    // Behind extension headers it is none of the kernel's either.
    if outer.l4 != outer.l3 + Ipv6Hdr::LEN || outer.src == F::Addr::default() {
        return Reason::OtherProtocol;
    }
    if packet.read(outer.l3 + offset_of!(Ipv6Hdr, hop_limit)) != Some([ALL_HOPS]) {
        return Reason::OtherProtocol;
    }
    let Some(question) = packet.read::<SOLICITATION_LEN>(outer.l4) else { return Reason::OtherProtocol };
    let (head, target) = split::<8, SOLICITATION_LEN, 16>(question);
    if head[1] != 0 {
        return Reason::OtherProtocol;
    }
    let Some(from) = packet.read::<6>(6) else { return Reason::OtherProtocol };
    let addr = F::from_octets16(&target);
    let Some(own) = announced(env, packet, &addr) else { return Reason::OtherProtocol };
    let done = advertise(packet, outer, &addr, &target, own).and_then(|()| address_to(packet, from, own));
    if done.is_ok() { Reason::Announced } else { Reason::RewriteFailed }
}

/// Turns a solicitation into its answer.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the length of a header")]
fn advertise<F: Family, P: Packet>(
    packet: &mut P,
    outer: &Headers<F>,
    addr: &F::Addr,
    target: &[u8; 16],
    own: [u8; 6],
) -> Result<(), RewriteError> {
    /// The option of the target's link-layer address, of eight bytes.
    const TARGET_LINK_LAYER: [u8; 2] = [2, 1];
    let mut answer = [0; ADVERTISEMENT_LEN];
    (answer[0], answer[4]) = (ADVERTISEMENT, SOLICITED_OVERRIDE);
    answer[8..24].copy_from_slice(target);
    answer[24..26].copy_from_slice(&TARGET_LINK_LAYER);
    answer[26..].copy_from_slice(&own);
    let addrs = u32::from(packet.sum(addr.as_ref())) + u32::from(packet.sum(outer.src.as_ref()));
    let pseudo = addrs + u32::from(Proto::ICMP6.number) + ADVERTISEMENT_LEN as u32;
    let mut sum = pseudo + u32::from(packet.sum(&answer));
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    answer[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());

    packet.resize(outer.l4 + ADVERTISEMENT_LEN)?;
    // The length, the next header and the hops: the latter two are what they were.
    packet.write(outer.l3 + offset_of!(Ipv6Hdr, payload_len), &(ADVERTISEMENT_LEN as u16).to_be_bytes())?;
    let (mut source, mut destination) = ([0; 16], [0; 16]);
    source.copy_from_slice(target);
    destination.copy_from_slice(&F::octets16(&outer.src));
    packet.write(outer.l3 + offset_of!(Ipv6Hdr, src_addr), &source)?;
    packet.write(outer.l3 + offset_of!(Ipv6Hdr, dst_addr), &destination)?;
    packet.write(outer.l4, &answer)
}
