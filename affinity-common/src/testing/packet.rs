//! Packets in plain memory, with their checksum left to hardware or not.

use crate::{
    dp::{Checksum, Packet, RewriteError},
    types::Proto,
};

/// Who is to compute the transport checksum, or has: `skb->ip_summed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// Nobody: it is in the packet (`CHECKSUM_NONE`, `CHECKSUM_UNNECESSARY`).
    None,
    /// The hardware will: the field holds the sum of the pseudo-header alone (`CHECKSUM_PARTIAL`).
    Partial,
    /// The hardware has: beside the packet is the sum of what is behind its IP header (`CHECKSUM_COMPLETE`).
    Complete,
}

/// A TCP or UDP segment over IPv4 to build.
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
    /// IPv4 options; a multiple of four bytes.
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
    pub fn build(&self) -> Vec<u8> {
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
        let header_len = 20 + self.options.len();
        let total = u16::try_from(header_len + upper.len()).expect("a short packet");
        let mut ip = vec![0x40 | u8::try_from(header_len / 4).expect("few options"), 0];
        ip.extend(total.to_be_bytes());
        ip.extend([0x42, 0x42, 0x40, 0, 64, self.proto.number, 0, 0]);
        ip.extend(self.src.0);
        ip.extend(self.dst.0);
        ip.extend(&self.options);
        let sum = checksum(&ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        let sum = checksum(&[pseudo_header(&ip, upper.len()), upper.clone()].concat());
        let sum = if sum == 0 && self.proto == Proto::UDP { 0xffff } else { sum };
        upper[sum_at..sum_at + 2].copy_from_slice(&sum.to_be_bytes());
        [vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0], ip, upper].concat()
    }
}

fn pseudo_header(ip: &[u8], upper_len: usize) -> Vec<u8> {
    let len = u16::try_from(upper_len).unwrap_or_default().to_be_bytes();
    [&ip[12..20], &[0, ip[9]], &len].concat()
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
    /// After so many writes, one fails.
    pub fail_after: Option<usize>,
    /// A length that differs from that of the bytes, of a packet whose payload is not modelled.
    pub said_len: Option<usize>,
}

impl FakePacket {
    /// Any bytes.
    pub fn raw(bytes: Vec<u8>) -> Self {
        Self { bytes, offload: Offload::None, complete: 0, fail_after: None, said_len: None }
    }

    /// A segment whose checksum is as `offload` says.
    pub fn new(segment: &Segment, offload: Offload) -> Self {
        let mut packet = Self { offload, ..Self::raw(segment.build()) };
        let (l4, at) = packet.upper();
        match offload {
            Offload::None => {}
            Offload::Partial => {
                let pseudo = sum(&pseudo_header(&packet.bytes[14..], packet.bytes.len() - l4));
                packet.bytes[at..at + 2].copy_from_slice(&pseudo.to_be_bytes());
            }
            Offload::Complete => packet.complete = sum(&packet.bytes[l4..]),
        }
        packet
    }

    /// Where the transport header and its checksum are.
    fn upper(&self) -> (usize, usize) {
        let l4 = 14 + usize::from(self.bytes[14] & 15) * 4;
        (l4, l4 + if self.bytes[23] == Proto::TCP.number { 16 } else { 6 })
    }

    /// The frame as the hardware sends it.
    ///
    /// # Panics
    /// Where what the hardware had computed does not agree with the packet any more.
    pub fn sent(&self) -> Vec<u8> {
        let (l4, at) = self.upper();
        let mut bytes = self.bytes.clone();
        match self.offload {
            Offload::None => {}
            Offload::Partial => {
                // It sums up what it finds, pseudo-header included, and complements.
                let sum = checksum(&bytes[l4..]);
                let sum = if sum == 0 && bytes[23] == Proto::UDP.number { 0xffff } else { sum };
                bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
            }
            Offload::Complete => {
                let right = sum(&bytes[l4..]);
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
        if offload == Offload::Complete && pseudo {
            // The field has changed, and nothing else behind the IP header.
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
}
