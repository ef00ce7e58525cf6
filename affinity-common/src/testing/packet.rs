//! Packets in plain memory, with their checksum left to hardware or not.

use crate::{
    dp::{Checksum, Packet, RewriteError, icmp::Icmp},
    family::{V4, V6},
    types::Proto,
};

/// Who is to compute the transport checksum, or has: `skb->ip_summed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// Nobody: it is in the packet (`CHECKSUM_NONE`, `CHECKSUM_UNNECESSARY`).
    None,
    /// The hardware will: the field holds the sum of the pseudo-header alone (`CHECKSUM_PARTIAL`).
    Partial,
    /// The hardware has: beside the packet is the sum of it from its IP header on (`CHECKSUM_COMPLETE`).
    Complete,
}

/// A family whose packets the tests build.
pub trait Wire: Icmp {
    /// The address that tests call by an IPv4 one: itself, or that of IPv6 which ends in it.
    fn addr(name: [u8; 4]) -> Self::Addr;
    /// What tests call an address.
    fn name(addr: &Self::Addr) -> [u8; 4];
    /// The IP header of a segment with `upper_len` bytes behind it.
    fn header(segment: &Segment, upper_len: u16) -> Vec<u8>;
}

impl Wire for V4 {
    fn addr(name: [u8; 4]) -> [u8; 4] {
        name
    }

    fn name(addr: &[u8; 4]) -> [u8; 4] {
        *addr
    }

    fn header(segment: &Segment, upper_len: u16) -> Vec<u8> {
        let words = u8::try_from(5 + segment.options.len() / 4).expect("few options");
        let total = u16::from(words) * 4 + upper_len;
        let mut ip = vec![0x40 | words, 0];
        ip.extend(total.to_be_bytes());
        ip.extend([0x42, 0x42, 0x40, 0, 64, segment.proto.number, 0, 0]);
        ip.extend(segment.src.0);
        ip.extend(segment.dst.0);
        ip.extend(&segment.options);
        let sum = checksum(&ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        ip
    }
}

impl Wire for V6 {
    fn addr(name: [u8; 4]) -> [u8; 16] {
        let mut addr = [0xfd, 0, 0, 0x42, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        addr[12..].copy_from_slice(&name);
        addr
    }

    fn name(addr: &[u8; 16]) -> [u8; 4] {
        [addr[12], addr[13], addr[14], addr[15]]
    }

    /// The options are a header of destination options, filled up to eight bytes and their multiples.
    fn header(segment: &Segment, upper_len: u16) -> Vec<u8> {
        let mut options = Vec::new();
        if !segment.options.is_empty() {
            let eights = (segment.options.len() + 2).div_ceil(8);
            options = vec![segment.proto.number, u8::try_from(eights - 1).expect("few options")];
            // Pad1 (RFC 8200, section 4.2).
            options.resize(eights * 8, 0);
        }
        let len = upper_len + u16::try_from(options.len()).expect("few options");
        let next = if options.is_empty() { segment.proto.number } else { 60 };
        let mut ip = vec![0x60, 0x42, 0x42, 0x42];
        ip.extend(len.to_be_bytes());
        ip.extend([next, 64]);
        ip.extend(Self::addr(segment.src.0));
        ip.extend(Self::addr(segment.dst.0));
        ip.extend(options);
        ip
    }
}

/// A TCP or UDP segment to build, in either family.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Source address and port.
    pub src: ([u8; 4], u16),
    /// Destination address and port.
    pub dst: ([u8; 4], u16),
    /// TCP or UDP.
    pub proto: Proto,
    /// TCP's flags.
    pub flags: u8,
    /// IP options; a multiple of four bytes.
    pub options: Vec<u8>,
    /// What it carries.
    pub payload: Vec<u8>,
}

impl Segment {
    /// A TCP segment with nothing in it.
    pub fn tcp(src: ([u8; 4], u16), dst: ([u8; 4], u16), flags: u8) -> Self {
        Self { src, dst, proto: Proto::TCP, flags, options: Vec::new(), payload: Vec::new() }
    }

    /// A UDP datagram with a byte in it.
    pub fn udp(src: ([u8; 4], u16), dst: ([u8; 4], u16)) -> Self {
        Self { src, dst, proto: Proto::UDP, flags: 0, options: Vec::new(), payload: vec![7] }
    }

    /// The frame, all checksums computed.
    ///
    /// # Panics
    /// Where it is longer than IP allows.
    pub fn build<F: Wire>(&self) -> Vec<u8> {
        let mut upper = [self.src.1.to_be_bytes(), self.dst.1.to_be_bytes()].concat();
        let sum_at = if self.proto == Proto::TCP {
            upper.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
            16
        } else {
            let len = u16::try_from(8 + self.payload.len()).expect("a short payload");
            upper.extend(len.to_be_bytes());
            upper.extend([0, 0]);
            6
        };
        upper.extend(&self.payload);
        let upper_len = u16::try_from(upper.len()).expect("a short packet");
        let ethernet = [vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1], F::ETHERTYPE.to_vec()].concat();
        let mut frame = [ethernet, F::header(self, upper_len), upper.clone()].concat();
        let place = Upper::of(&frame);
        let sum = checksum(&[place.pseudo_header(&frame), upper].concat());
        let sum = if sum == 0 && self.proto == Proto::UDP { 0xffff } else { sum };
        let at = frame.len() - usize::from(upper_len) + sum_at;
        frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        frame
    }
}

/// Where a frame's transport header is, found without the datapath's parser.
struct Upper {
    at: usize,
    proto: u8,
}

impl Upper {
    fn of(frame: &[u8]) -> Self {
        if frame[14] >> 4 == 4 {
            return Self { at: 14 + usize::from(frame[14] & 15) * 4, proto: frame[23] };
        }
        let (mut at, mut proto) = (54, frame[20]);
        while [0, 60].contains(&proto) && at + 1 < frame.len() {
            (at, proto) = (at + 8 + usize::from(frame[at + 1]) * 8, frame[at]);
        }
        Self { at, proto }
    }

    fn checksum_at(&self) -> usize {
        self.at + if self.proto == Proto::TCP.number { 16 } else { 6 }
    }

    /// RFC 9293, section 3.1, and RFC 8200, section 8.1, of which zeroes count nothing.
    fn pseudo_header(&self, frame: &[u8]) -> Vec<u8> {
        let addrs = if frame[14] >> 4 == 4 { &frame[26..34] } else { &frame[22..54] };
        let len = u16::try_from(frame.len() - self.at).unwrap_or_default().to_be_bytes();
        [addrs, &[0, self.proto], &len].concat()
    }
}

/// The source of a frame as tests call it, and its port; `None` where it has none.
pub fn source<F: Wire>(frame: &[u8]) -> Option<([u8; 4], u16)> {
    end::<F>(frame, if F::VERSION == 4 { 26 } else { 22 }, 0)
}

/// The destination of a frame as tests call it, and its port; `None` where it has none.
pub fn destination<F: Wire>(frame: &[u8]) -> Option<([u8; 4], u16)> {
    end::<F>(frame, if F::VERSION == 4 { 30 } else { 38 }, 2)
}

fn end<F: Wire>(frame: &[u8], at: usize, port_at: usize) -> Option<([u8; 4], u16)> {
    let addr = bytemuck::pod_read_unaligned(frame.get(at..at + size_of::<F::Addr>())?);
    let l4 = Upper::of(frame).at + port_at;
    let port: [u8; 2] = frame.get(l4..l4 + 2)?.try_into().ok()?;
    (F::addr(F::name(&addr)) == addr).then(|| (F::name(&addr), u16::from_be_bytes(port)))
}

/// The Internet checksum (RFC 1071), in the plainest way.
pub fn checksum(bytes: &[u8]) -> u16 {
    !sum(bytes)
}

fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|word| u64::from(word[0]) << 8 | u64::from(word.get(1).copied().unwrap_or(0)));
    fold(words.sum())
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or_default()
}

/// `sum - from + to` in one's complement.
fn replaced(sum_of: u16, from: &[u8], to: &[u8]) -> u16 {
    fold(u64::from(sum_of) + u64::from(!sum(from)) + u64::from(sum(to)))
}

/// A packet in memory.
#[derive(Clone, Debug)]
pub struct FakePacket {
    /// The frame.
    pub bytes: Vec<u8>,
    offload: Offload,
    complete: u16,
    note: u32,
    /// After so many writes, one fails.
    pub fail_after: Option<usize>,
    /// A length that differs from that of the bytes, of a packet whose payload is not modelled.
    pub said_len: Option<usize>,
}

impl FakePacket {
    /// Any bytes.
    pub fn raw(bytes: Vec<u8>) -> Self {
        Self { bytes, offload: Offload::None, complete: 0, note: 0, fail_after: None, said_len: None }
    }

    /// A segment whose checksum is as `offload` says.
    pub fn new<F: Wire>(segment: &Segment, offload: Offload) -> Self {
        let mut packet = Self { offload, ..Self::raw(segment.build::<F>()) };
        let upper = Upper::of(&packet.bytes);
        match offload {
            Offload::None => {}
            Offload::Partial => {
                let pseudo = sum(&upper.pseudo_header(&packet.bytes));
                let at = upper.checksum_at();
                packet.bytes[at..at + 2].copy_from_slice(&pseudo.to_be_bytes());
            }
            Offload::Complete => packet.complete = sum(&packet.bytes[14..]),
        }
        packet
    }

    /// The frame as the hardware sends it.
    ///
    /// # Panics
    /// Where what the hardware had computed does not agree with the packet any more.
    pub fn sent(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        match self.offload {
            Offload::None => {}
            Offload::Partial => {
                let upper = Upper::of(&bytes);
                // It sums up what it finds, pseudo-header included, and complements.
                let sum = checksum(&bytes[upper.at..]);
                let sum = if sum == 0 && upper.proto == Proto::UDP.number { 0xffff } else { sum };
                let at = upper.checksum_at();
                bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
            }
            Offload::Complete => {
                let right = sum(&bytes[14..]);
                assert!(self.complete == right || self.complete == !right && right == 0xffff, "CHECKSUM_COMPLETE");
            }
        }
        bytes
    }

    fn allow_write(&mut self) -> Result<(), RewriteError> {
        match &mut self.fail_after {
            Some(0) => Err(RewriteError),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn field(&mut self, at: usize) -> Result<&mut [u8; 2], RewriteError> {
        self.bytes.get_mut(at..at + 2).and_then(|field| field.try_into().ok()).ok_or(RewriteError)
    }

    /// As `bpf_l4_csum_replace` and `inet_proto_csum_replace4` have it.
    fn replace(&mut self, sum: Checksum, from: &[u8], to: &[u8], pseudo: bool) -> Result<(), RewriteError> {
        self.allow_write()?;
        let offload = self.offload;
        let field = self.field(sum.at)?;
        let held = u16::from_be_bytes(*field);
        if sum.zero_is_none && held == 0 {
            return Ok(());
        }
        let new = match offload {
            Offload::Partial if pseudo => replaced(held, from, to),
            Offload::Partial => held,
            Offload::None | Offload::Complete => !replaced(!held, from, to),
        };
        *field = if new == 0 && sum.zero_is_none { [0xff; 2] } else { new.to_be_bytes() };
        if offload == Offload::Complete && pseudo && from.len() == 4 {
            // The address is made up for twice: by the header's checksum and by this one. Of IPv6, which has only this one,
            // the sum stays as it is (`BPF_F_IPV6`).
            self.complete = replaced(self.complete, to, from);
        }
        Ok(())
    }
}

impl Packet for FakePacket {
    fn frame_len(&self) -> usize {
        self.said_len.unwrap_or(self.bytes.len())
    }

    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
    }

    fn any_length(&self, length: usize) -> usize {
        length
    }

    fn write<const N: usize>(&mut self, offset: usize, bytes: &[u8; N]) -> Result<(), RewriteError> {
        self.allow_write()?;
        self.bytes.get_mut(offset..offset + N).ok_or(RewriteError)?.copy_from_slice(bytes);
        Ok(())
    }

    fn update_checksum_by_address(&mut self, sum: Checksum, from: &[u8], to: &[u8]) -> Result<(), RewriteError> {
        self.replace(sum, from, to, true)
    }

    fn update_checksum_by_port(&mut self, sum: Checksum, from: [u8; 2], to: [u8; 2]) -> Result<(), RewriteError> {
        self.replace(sum, &from, &to, false)
    }

    fn leave_note(&mut self, note: u32) {
        self.note = note;
    }

    fn note(&self) -> u32 {
        self.note
    }

    fn resize(&mut self, len: usize) -> Result<(), RewriteError> {
        self.allow_write()?;
        self.bytes.resize(len, 0);
        Ok(())
    }

    fn sum(&self, bytes: &[u8]) -> u16 {
        sum(bytes)
    }

    fn finish_checksum(&mut self, at: usize, pseudo: u16, whole: u16) -> Result<(), RewriteError> {
        self.allow_write()?;
        let offload = self.offload;
        let field = self.field(at)?;
        assert_eq!(u16::from_be_bytes(*field), pseudo);
        if offload != Offload::Partial {
            *field = (!whole).to_be_bytes();
        }
        Ok(())
    }
}
