//! ICMP: the errors about translated packets, which show their receiver what it has sent itself, so that it finds the
//! connection they are about (RFC 5508, section 4.2; path MTU discovery rests on it); and who asks a service's address for
//! an echo is told that nobody is there. All other ICMP, neighbour discovery too, passes as it came.
//!
//! Nothing is noted: no error makes an entry, or keeps one.

use core::mem::offset_of;

use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use super::{
    Checksum, ConntrackEntry, Env, Packet, RewriteError, address, neighbour,
    parse::{FRAGMENT_HEADER, FRAGMENT_HEADER_LEN, Headers, NoPorts, Parse, field},
    reject::{self, Answer, ICMP_LEN, Reject, turn_back},
    rewrite::{End, Rewrite},
    snat,
    step::Step,
};
use crate::{
    abi::conntrack::ConntrackKey,
    family::{Family, V4, V6},
    reason::Reason,
    types::{Port, Proto},
};

/// What an ICMP packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// An error about the packet that it quotes.
    Error,
    /// The question whether anybody is there.
    Echo,
    /// The question of neighbour discovery who has an address.
    Solicitation,
    /// Anything else.
    Other,
}

/// A family whose ICMP the datapath reads and rewrites.
pub trait Icmp: Parse + Rewrite + Reject {
    /// What a packet of this type is.
    fn message(kind: u8) -> Message;

    /// The headers of the packet that an error quotes at `l3`, as far as its ports.
    fn quoted<P: Packet>(packet: &P, l3: usize, headers: &mut Headers<Self>) -> Option<()>;

    /// Whether the checksum covers the addresses of the packet that it is in.
    const HAS_PSEUDO_HEADER: bool;
}

/// The ports of a quoted packet, of which the rest of the headers is known.
#[inline(always)]
fn ports<F: Family, P: Packet>(packet: &P, headers: &mut Headers<F>) -> Option<()> {
    if headers.proto != Proto::TCP && headers.proto != Proto::UDP {
        return None;
    }
    let [a, b, c, d]: [u8; 4] = packet.read(headers.l4)?;
    (headers.src_port, headers.dst_port) = (Port { be: [a, b] }, Port { be: [c, d] });
    Some(())
}

impl Icmp for V4 {
    const HAS_PSEUDO_HEADER: bool = false;

    #[inline(always)]
    fn message(kind: u8) -> Message {
        match kind {
            // Destination unreachable, time exceeded, parameter problem (RFC 792).
            3 | 11 | 12 => Message::Error,
            8 => Message::Echo,
            _ => Message::Other,
        }
    }

    #[inline(always)]
    fn quoted<P: Packet>(packet: &P, l3: usize, headers: &mut Headers<V4>) -> Option<()> {
        /// The fragment's offset, of `Ipv4Hdr::frags`: only the first one has ports.
        const OFFSET: u16 = 0x1fff;
        let header: [u8; Ipv4Hdr::LEN] = packet.read(l3)?;
        let header_len = usize::from(header[0] & 0x0f) << 2;
        if header[0] >> 4 != 4
            || header_len < Ipv4Hdr::LEN
            || u16::from_be_bytes(field(&header, offset_of!(Ipv4Hdr, frags))) & OFFSET != 0
        {
            return None;
        }
        let header_len = packet.unknown(header_len) & 0x3f;
        (headers.l3, headers.l4) = (l3, l3 + header_len);
        headers.src = field(&header, offset_of!(Ipv4Hdr, src_addr));
        headers.dst = field(&header, offset_of!(Ipv4Hdr, dst_addr));
        headers.proto = Proto { number: header[offset_of!(Ipv4Hdr, proto)] };
        ports(packet, headers)
    }
}

impl Icmp for V6 {
    const HAS_PSEUDO_HEADER: bool = true;

    #[inline(always)]
    fn message(kind: u8) -> Message {
        match kind {
            // Destination unreachable, packet too big, time exceeded, parameter problem (RFC 4443).
            1..=4 => Message::Error,
            128 => Message::Echo,
            neighbour::SOLICITATION => Message::Solicitation,
            _ => Message::Other,
        }
    }

    /// Without extension headers but that of a fragment.
    #[inline(always)]
    fn quoted<P: Packet>(packet: &P, l3: usize, headers: &mut Headers<V6>) -> Option<()> {
        let header: [u8; Ipv6Hdr::LEN] = packet.read(l3)?;
        if header[0] >> 4 != 6 {
            return None;
        }
        let (mut next, mut header_len) = (header[offset_of!(Ipv6Hdr, next_hdr)], Ipv6Hdr::LEN);
        if next == FRAGMENT_HEADER {
            let [then, _, high, low]: [u8; 4] = packet.read(l3 + Ipv6Hdr::LEN)?;
            // Only the first one has ports.
            if u16::from_be_bytes([high, low]) >> 3 != 0 {
                return None;
            }
            (next, header_len) = (then, Ipv6Hdr::LEN + FRAGMENT_HEADER_LEN);
        }
        let header_len = packet.unknown(header_len) & 0x3f;
        (headers.l3, headers.l4) = (l3, l3 + header_len);
        headers.src = field(&header, offset_of!(Ipv6Hdr, src_addr));
        headers.dst = field(&header, offset_of!(Ipv6Hdr, dst_addr));
        headers.proto = Proto { number: next };
        ports(packet, headers)
    }
}

/// ICMP from a client: its errors are about what was sent to it, which is the replies of services.
#[inline(always)]
pub fn ingress<F: Icmp, E: Env<F>, P: Packet>(env: &E, packet: &mut P) -> Step {
    let mut outer = Headers::default();
    let (len, message) = match read::<F, P>(packet, &mut outer) {
        Ok(read) => read,
        Err(reason) => return Step::Ends(reason),
    };
    if message == Message::Solicitation {
        return Step::Ends(neighbour::solicited(env, packet, &outer));
    }
    env.in_memory(&outer);
    if message == Message::Error
        && let Some(reason) = error_about_snat(env, packet, &outer, len)
    {
        return Step::Ends(reason);
    }
    let looks = address::looks(env, &outer.dst);
    if !looks.like_service && !looks.like_direct {
        return Step::Ends(Reason::OtherProtocol);
    }
    match message {
        Message::Echo => Step::Ends(echo(env, packet, &outer)),
        Message::Error => Step::Ends(error_from_client(env, packet, &outer, len)),
        Message::Solicitation | Message::Other => Step::Ends(Reason::OtherProtocol),
    }
}

/// ICMP to a client: the errors are about what it has sent, to services.
#[inline(always)]
pub fn egress<F: Icmp, E: Env<F>, P: Packet>(env: &E, packet: &mut P) -> Step {
    let mut outer = Headers::default();
    let len = match read::<F, P>(packet, &mut outer) {
        Ok((len, Message::Error)) => len,
        Ok(_) => return Step::Ends(Reason::OtherProtocol),
        Err(reason) => return Step::Ends(reason),
    };
    env.in_memory(&outer);
    Step::Ends(error_to_client(env, packet, &outer, len))
}

/// The headers of an ICMP packet, of which the ports are none, how many bytes it has behind those of IP, and what it is.
#[inline(always)]
fn read<F: Icmp, P: Packet>(packet: &P, outer: &mut Headers<F>) -> Result<(usize, Message), Reason> {
    let payload = match F::network(packet, outer, false) {
        Ok(payload) => payload,
        Err(NoPorts::Ends(reason)) => return Err(reason),
        Err(_) => return Err(Reason::Fragment),
    };
    let [kind] = packet.read(outer.l4).ok_or(Reason::Malformed)?;
    Ok((payload.len, if outer.proto == F::ICMP { F::message(kind) } else { Message::Other }))
}

/// A service's address has no ports of this protocol, and no host behind it.
#[inline(always)]
fn echo<F: Icmp, E: Env<F>, P: Packet>(env: &E, packet: &mut P, outer: &Headers<F>) -> Reason {
    if !address::is_service(env, &outer.dst) {
        return Reason::OtherProtocol;
    }
    match reject::answer(packet, outer) {
        Answer::Made => Reason::NoSuchPort,
        Answer::None => Reason::NoSuchPortDropped,
    }
}

#[inline(always)]
fn error_from_client<F: Icmp, E: Env<F>, P: Packet>(env: &E, packet: &mut P, outer: &Headers<F>, len: usize) -> Reason {
    let mut quoted = Headers::default();
    if F::quoted(packet, outer.l4 + ICMP_LEN, &mut quoted).is_none() {
        return Reason::OtherProtocol;
    }
    env.in_memory(&quoted);
    let Headers { src, src_port, dst, dst_port, proto, .. } = quoted;
    let Some(entry) = env.conntrack(&ConntrackKey::forward(dst, dst_port, src, src_port, proto)) else {
        return Reason::OtherProtocol;
    };
    let held = entry.load();
    // Who sent what is quoted: the backend, or the client itself to the service's address.
    let is_hairpin = held.is_hairpin(&dst);
    let (from, from_port) = (&held.addr, held.port);
    let to = if is_hairpin { &quoted.src } else { &quoted.dst };
    let mut done = rewrite_quote(packet, outer, len, &quoted, (from, from_port), (to, held.client_port));
    if outer.dst == src {
        done = done.and_then(|()| rewrite_outer(packet, outer, End::Destination, &outer.dst, &held.addr));
    }
    if !is_hairpin {
        return outcome(done, Reason::IcmpError);
    }
    done = done
        .and_then(|()| rewrite_outer(packet, outer, End::Source, &outer.src, &src))
        .and_then(|()| turn_back(packet));
    outcome(done, Reason::Hairpin)
}

/// An error about a packet that has left as the node's own: to the client whose packet it was.
#[inline(always)]
fn error_about_snat<F: Icmp, E: Env<F>, P: Packet>(
    env: &E,
    packet: &mut P,
    outer: &Headers<F>,
    len: usize,
) -> Option<Reason> {
    let mut quoted = Headers::default();
    F::quoted(packet, outer.l4 + ICMP_LEN, &mut quoted)?;
    if quoted.src != outer.dst || !snat::is_of_range(quoted.src_port) || !address::is_like_snat(env, &quoted.dst) {
        return None;
    }
    env.in_memory(&quoted);
    let Headers { src, src_port, dst, dst_port, proto, .. } = quoted;
    let held = env.conntrack(&ConntrackKey::snat_reply(src, src_port, dst, dst_port, proto))?.load();
    let done = rewrite_quote(packet, outer, len, &quoted, (&held.addr, held.client_port), (&dst, dst_port))
        .and_then(|()| rewrite_outer(packet, outer, End::Destination, &outer.dst, &held.addr));
    Some(outcome(done, Reason::IcmpError))
}

/// An error about an answer to a packet that has left as the node's own, on its way to the backend: it shows what that has sent,
/// and leaves as the node's own, too.
#[inline(always)]
fn error_to_backend_elsewhere<F: Icmp, E: Env<F>, P: Packet>(
    env: &E,
    packet: &mut P,
    outer: &Headers<F>,
    len: usize,
    quoted: &Headers<F>,
) -> Reason {
    let Headers { src, src_port, dst, dst_port, proto, .. } = *quoted;
    if !address::is_like_snat(env, &src) {
        return Reason::OtherProtocol;
    }
    let Some(uplink) = env.uplink(packet.ifindex()) else { return Reason::OtherProtocol };
    let Some(port) = snat::port_of_connection(env, &ConntrackKey::reverse(dst, dst_port, src, src_port, proto)) else {
        return Reason::OtherProtocol;
    };
    let done = rewrite_quote(packet, outer, len, quoted, (&src, src_port), (&uplink.addr, port))
        .and_then(|()| rewrite_outer(packet, outer, End::Source, &outer.src, &uplink.addr));
    outcome(done, Reason::IcmpError)
}

#[inline(always)]
fn error_to_client<F: Icmp, E: Env<F>, P: Packet>(env: &E, packet: &mut P, outer: &Headers<F>, len: usize) -> Reason {
    let mut quoted = Headers::default();
    if F::quoted(packet, outer.l4 + ICMP_LEN, &mut quoted).is_none() {
        return Reason::OtherProtocol;
    }
    env.in_memory(&quoted);
    let Headers { src, src_port, dst, dst_port, proto, .. } = quoted;
    let Some(entry) = env.conntrack(&ConntrackKey::reverse(src, src_port, dst, dst_port, proto)) else {
        return error_to_backend_elsewhere(env, packet, outer, len, &quoted);
    };
    let held = entry.load();
    let mut done = rewrite_quote(packet, outer, len, &quoted, (&quoted.src, held.client_port), (&held.addr, held.port));
    // The backend's own errors are the service's; those of who is on the way are their own. But to who is outside all are the
    // service's, as with netfilter: the router that tells of a way behind the node may be the one before it, and drops what comes
    // to it with its own address.
    if outer.src == dst || held.is_from_outside() {
        done = done.and_then(|()| rewrite_outer(packet, outer, End::Source, &outer.src, &held.addr));
    }
    outcome(done, Reason::IcmpError)
}

#[inline(always)]
fn outcome(done: Result<(), RewriteError>, reason: Reason) -> Reason {
    if done.is_ok() { reason } else { Reason::RewriteFailed }
}

/// Writes an address of the packet that the error is.
#[inline(always)]
fn rewrite_outer<F: Icmp, P: Packet>(
    packet: &mut P,
    outer: &Headers<F>,
    end: End,
    from: &F::Addr,
    to: &F::Addr,
) -> Result<(), RewriteError> {
    if F::HAS_PSEUDO_HEADER {
        packet.update_checksum_by_address(checksum(outer), from.as_ref(), to.as_ref())?;
    }
    F::write_address(packet, outer.l3, end, from, to)
}

/// Where the error's own checksum is: behind its type and code.
#[inline(always)]
const fn checksum<F: Family>(outer: &Headers<F>) -> Checksum {
    Checksum { at: outer.l4 + 2, zero_is_none: false }
}

/// What a one's complement sum of words changes by.
#[derive(Clone, Copy, Default)]
struct Change(u32);

impl Change {
    #[inline(always)]
    fn word(self, from: [u8; 2], to: [u8; 2]) -> Self {
        Self(self.0 + u32::from(!u16::from_be_bytes(from)) + u32::from(u16::from_be_bytes(to)))
    }

    #[inline(always)]
    fn addr<F: Family, P: Packet>(self, packet: &P, from: &F::Addr, to: &F::Addr) -> Self {
        if from == to {
            return self;
        }
        let (from, to) = (packet.sum(from.as_ref()), packet.sum(to.as_ref()));
        Self(self.0 + u32::from(!from) + u32::from(to))
    }

    /// As one word.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "what is over 16 bits was added to them")]
    fn folded(self) -> u16 {
        let sum = (self.0 & 0xffff) + (self.0 >> 16);
        ((sum & 0xffff) + (sum >> 16)) as u16
    }

    /// What a checksum becomes by the change of what it covers.
    #[inline(always)]
    fn of_checksum(self, check: [u8; 2]) -> [u8; 2] {
        let sum = Self(u32::from(!u16::from_be_bytes(check)) + u32::from(self.folded()));
        (!sum.folded()).to_be_bytes()
    }
}

/// Writes both ends of the packet that an error quotes, with every checksum that is quoted, and makes up for it in the
/// error's own.
#[inline(always)]
fn rewrite_quote<F: Icmp, P: Packet>(
    packet: &mut P,
    outer: &Headers<F>,
    len: usize,
    quoted: &Headers<F>,
    (src, src_port): (&F::Addr, Port),
    (dst, dst_port): (&F::Addr, Port),
) -> Result<(), RewriteError> {
    let addrs = Change::default().addr::<F, P>(packet, &quoted.src, src).addr::<F, P>(packet, &quoted.dst, dst);
    let ports = Change::default().word(quoted.src_port.be, src_port.be).word(quoted.dst_port.be, dst_port.be);
    // IPv4's header has a checksum of its own, which makes up for its addresses.
    let mut change = if F::HAS_PSEUDO_HEADER { Change(addrs.0 + ports.0) } else { ports };
    let check_at = quoted.l4 + if quoted.is_tcp() { offset_of!(TcpHdr, check) } else { offset_of!(UdpHdr, check) };
    // Of TCP, an error need not quote so much.
    let is_quoted = check_at + 2 <= outer.l4 + len;
    if is_quoted
        && let Some(check) = packet.read::<2>(check_at)
        && (quoted.is_tcp() || check != [0; 2])
    {
        let new = Change(addrs.0 + ports.0).of_checksum(check);
        packet.write(check_at, &new)?;
        change = change.word(check, new);
    }
    if quoted.src != *src {
        F::write_address(packet, quoted.l3, End::Source, &quoted.src, src)?;
    }
    if quoted.dst != *dst {
        F::write_address(packet, quoted.l3, End::Destination, &quoted.dst, dst)?;
    }
    let ([a, b], [c, d]) = (src_port.be, dst_port.be);
    packet.write(quoted.l4, &[a, b, c, d])?;
    // As of a word that was none.
    packet.update_checksum_by_port(checksum(outer), [0; 2], change.folded().to_be_bytes())
}
