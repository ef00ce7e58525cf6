//! Frames to build, in either family, and what to read out of one, without any of the datapath's own code.

use super::checksum::checksum;
use crate::{
    dp::icmp::Icmp,
    family::{V4, V6},
    types::Proto,
};

/// A family whose packets the tests build.
pub trait Wire: Icmp {
    /// The address that tests call by an IPv4 one: itself, or that of IPv6 which ends in it.
    fn addr(name: [u8; 4]) -> Self::Addr;
    /// What tests call an address.
    fn name(addr: &Self::Addr) -> [u8; 4];
    /// The IP header of a segment, or of a part of it, with `upper_len` bytes behind it.
    fn header(segment: &Segment, part: Option<Part>, upper_len: u16) -> Vec<u8>;
    /// The first eight bytes of an error, whose checksum is zero yet.
    fn error(trouble: Trouble) -> [u8; 8];
}

/// How a frame is a part of a larger packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The identification; IPv4 has its lower half.
    pub id: u32,
    /// Where its bytes lie in the larger one, in units of eight.
    pub eights: u16,
    /// Whether more come behind it.
    pub more: bool,
}

/// What an ICMP error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Nobody has the port.
    PortUnreachable,
    /// A link of this MTU is on the way (RFC 1191; RFC 4443, section 3.2).
    TooBig(u16),
    /// Too many hops.
    TimeExceeded,
}

impl Wire for V4 {
    fn addr(name: [u8; 4]) -> [u8; 4] {
        name
    }

    fn name(addr: &[u8; 4]) -> [u8; 4] {
        *addr
    }

    fn header(segment: &Segment, part: Option<Part>, upper_len: u16) -> Vec<u8> {
        /// The flag `DF`, and `MF`.
        const WHOLE: u16 = 0x4000;
        const MORE: u16 = 0x2000;
        let words = u8::try_from(5 + segment.options.len() / 4).expect("few options");
        let total = u16::from(words) * 4 + upper_len;
        let (id, frags) = part.map_or((0x4242, WHOLE), |part| {
            let [_, _, high, low] = part.id.to_be_bytes();
            (u16::from_be_bytes([high, low]), part.eights | if part.more { MORE } else { 0 })
        });
        let mut ip = vec![0x40 | words, 0];
        ip.extend(total.to_be_bytes());
        ip.extend(id.to_be_bytes());
        ip.extend(frags.to_be_bytes());
        ip.extend([64, segment.proto.number, 0, 0]);
        ip.extend(segment.src.0);
        ip.extend(segment.dst.0);
        ip.extend(&segment.options);
        let sum = checksum(&ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        ip
    }

    /// RFC 792.
    fn error(trouble: Trouble) -> [u8; 8] {
        match trouble {
            Trouble::PortUnreachable => [3, 3, 0, 0, 0, 0, 0, 0],
            Trouble::TooBig(mtu) => {
                let [high, low] = mtu.to_be_bytes();
                [3, 4, 0, 0, 0, 0, high, low]
            }
            Trouble::TimeExceeded => [11, 0, 0, 0, 0, 0, 0, 0],
        }
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
    fn header(segment: &Segment, part: Option<Part>, upper_len: u16) -> Vec<u8> {
        const FRAGMENT: u8 = 44;
        const OPTIONS: u8 = 60;
        let mut next = segment.proto.number;
        let mut extensions = Vec::new();
        if let Some(part) = part {
            extensions = vec![next, 0];
            extensions.extend((part.eights << 3 | u16::from(part.more)).to_be_bytes());
            extensions.extend(part.id.to_be_bytes());
            next = FRAGMENT;
        }
        if !segment.options.is_empty() {
            let eights = (segment.options.len() + 2).div_ceil(8);
            let mut options = vec![next, u8::try_from(eights - 1).expect("few options")];
            // Pad1 (RFC 8200, section 4.2).
            options.resize(eights * 8, 0);
            extensions = [options, extensions].concat();
            next = OPTIONS;
        }
        let len = upper_len + u16::try_from(extensions.len()).expect("few options");
        let mut ip = vec![0x60, 0x42, 0x42, 0x42];
        ip.extend(len.to_be_bytes());
        ip.extend([next, 64]);
        ip.extend(Self::addr(segment.src.0));
        ip.extend(Self::addr(segment.dst.0));
        ip.extend(extensions);
        ip
    }

    /// RFC 4443.
    fn error(trouble: Trouble) -> [u8; 8] {
        match trouble {
            Trouble::PortUnreachable => [1, 4, 0, 0, 0, 0, 0, 0],
            Trouble::TooBig(mtu) => {
                let [high, low] = mtu.to_be_bytes();
                [2, 0, 0, 0, 0, 0, high, low]
            }
            Trouble::TimeExceeded => [3, 0, 0, 0, 0, 0, 0, 0],
        }
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
        self.carry::<F>(None, &self.upper::<F>())
    }

    /// What the frame has behind its IP header: the transport header and the payload.
    ///
    /// # Panics
    /// Where it is longer than IP allows.
    pub fn upper<F: Wire>(&self) -> Vec<u8> {
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
        let sum = self.checksum::<F>(&upper);
        let sum = if sum == 0 && self.proto == Proto::UDP { 0xffff } else { sum };
        upper[sum_at..sum_at + 2].copy_from_slice(&sum.to_be_bytes());
        upper
    }

    /// A frame with the segment's IP header, and what is given behind it: the whole, or a part of it.
    ///
    /// # Panics
    /// Where it is longer than IP allows.
    pub fn carry<F: Wire>(&self, part: Option<Part>, upper: &[u8]) -> Vec<u8> {
        let ethernet = [vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1], F::ETHERTYPE.to_vec()].concat();
        let len = u16::try_from(upper.len()).expect("a short packet");
        [ethernet, F::header(self, part, len), upper.to_vec()].concat()
    }

    /// The checksum of what is behind the IP header, pseudo-header included (RFC 9293, section 3.1, and RFC 8200, section
    /// 8.1, of which zeroes count nothing).
    fn checksum<F: Wire>(&self, upper: &[u8]) -> u16 {
        let (src, dst) = (F::addr(self.src.0), F::addr(self.dst.0));
        let len = u16::try_from(upper.len()).expect("a short packet").to_be_bytes();
        checksum(&[src.as_ref(), dst.as_ref(), &[0, self.proto.number], &len, upper].concat())
    }
}

/// An ICMP error to build, in either family.
#[derive(Clone, Debug)]
pub struct IcmpError {
    /// Who has found the trouble.
    pub src: [u8; 4],
    /// Who is told.
    pub dst: [u8; 4],
    /// What it is.
    pub trouble: Trouble,
    /// The packet that it is about, from its IP header on, as far as it is quoted.
    pub quote: Vec<u8>,
}

impl IcmpError {
    /// The frame, its own checksums computed.
    ///
    /// # Panics
    /// Where it is longer than IP allows.
    pub fn build<F: Wire>(&self) -> Vec<u8> {
        let (src, dst) = ((self.src, 0), (self.dst, 0));
        let carrier = Segment { src, dst, proto: F::ICMP, flags: 0, options: Vec::new(), payload: Vec::new() };
        let mut upper = [&F::error(self.trouble)[..], &self.quote].concat();
        let sum = if F::VERSION == 4 { checksum(&upper) } else { carrier.checksum::<F>(&upper) };
        upper[2..4].copy_from_slice(&sum.to_be_bytes());
        carrier.carry::<F>(None, &upper)
    }
}

/// Where a frame's transport header is, found without the datapath's parser.
pub(super) struct Upper {
    pub at: usize,
    pub proto: u8,
}

impl Upper {
    pub fn of(frame: &[u8]) -> Self {
        if frame[14] >> 4 == 4 {
            return Self { at: 14 + usize::from(frame[14] & 15) * 4, proto: frame[23] };
        }
        let (mut at, mut proto) = (54, frame[20]);
        while [0, 44, 60].contains(&proto) && at + 1 < frame.len() {
            // The second byte of a fragment header is reserved, and zero.
            (at, proto) = (at + 8 + usize::from(frame[at + 1]) * 8, frame[at]);
        }
        Self { at, proto }
    }

    pub fn checksum_at(&self) -> usize {
        self.at + if self.proto == Proto::TCP.number { 16 } else { 6 }
    }

    /// RFC 9293, section 3.1, and RFC 8200, section 8.1, of which zeroes count nothing.
    pub fn pseudo_header(&self, frame: &[u8]) -> Vec<u8> {
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
