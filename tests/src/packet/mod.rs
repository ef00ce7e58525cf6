//! Whole frames as data: built, compared and verified.
//!
//! ```
//! use affinity_tests::packet::{Packet, Tcp, assert_same_packet};
//! let syn = Packet::tcp("10.244.0.11:40000", "10.96.0.10:80").flags(Tcp::SYN);
//! let translated = syn.clone().to("10.244.0.101:8080");
//! assert_ne!(syn.build(), translated.build());
//! assert_same_packet(&translated.build(), &translated.build());
//! ```
//!
//! Lengths and checksums are right unless told otherwise. The headers are etherparse's; the checksums are computed here,
//! in the plainest way, and the tests hold them against etherparse's own.

mod checksum;
mod compare;

use std::net::{IpAddr, SocketAddr};
use std::ops::BitOr;

use etherparse::{EtherType, Ethernet2Header, IpFragOffset, IpNumber, Ipv4Header, Ipv4Options, Ipv6Header, TcpHeader};

pub use checksum::{checksum, upper_checksum, verify_checksums};
pub use compare::{assert_same_packet, describe, difference};

/// The Ethernet address that frames come from unless told otherwise.
pub const SOURCE_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];
/// The Ethernet address that frames go to unless told otherwise.
pub const DESTINATION_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x02];
/// Length of an Ethernet header in bytes: where the IP header begins.
pub const ETHERNET: usize = 14;

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMP6: u8 = 58;
const FRAGMENT_HEADER: u8 = 44;

/// TCP flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tcp(u8);

impl Tcp {
    /// No more data.
    pub const FIN: Self = Self(0x01);
    /// Opens a connection.
    pub const SYN: Self = Self(0x02);
    /// Ends a connection at once.
    pub const RST: Self = Self(0x04);
    /// Hand over at once.
    pub const PSH: Self = Self(0x08);
    /// Acknowledges.
    pub const ACK: Self = Self(0x10);
    /// Answers an opening.
    pub const SYN_ACK: Self = Self(0x12);

    fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Tcp {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Whatever can be written for an address and a port in a test: `"10.0.0.1:80"` or a [`SocketAddr`].
pub trait Endpoint {
    /// The endpoint.
    ///
    /// # Panics
    /// Where the text is no address and port.
    fn endpoint(self) -> SocketAddr;
}

impl Endpoint for SocketAddr {
    fn endpoint(self) -> SocketAddr {
        self
    }
}

impl Endpoint for &str {
    fn endpoint(self) -> SocketAddr {
        self.parse().unwrap_or_else(|error| panic!("endpoint {self:?}: {error}"))
    }
}

impl<A: Into<IpAddr>> Endpoint for (A, u16) {
    fn endpoint(self) -> SocketAddr {
        self.into()
    }
}

/// What is above IP.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Upper {
    Tcp {
        flags: Tcp,
        sequence: u32,
        acknowledgement: u32,
        window: u16,
        options: Vec<u8>,
        payload: Vec<u8>,
    },
    Udp {
        payload: Vec<u8>,
        checksum: bool,
    },
    /// Type, code, the four bytes after the checksum, and the rest.
    Icmp {
        kind: u8,
        code: u8,
        word: [u8; 4],
        payload: Vec<u8>,
    },
    /// Any other protocol.
    Raw {
        protocol: u8,
        payload: Vec<u8>,
    },
}

/// Which part of a fragmented packet a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fragment {
    offset: u16,
    length: usize,
    more: bool,
}

/// Fields that are written after all others, whatever they make of the packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Wrong {
    ip_length: Option<u16>,
    ip_version: Option<u8>,
    ihl: Option<u8>,
    udp_length: Option<u16>,
    tcp_data_offset: Option<u8>,
    upper_checksum: Option<u16>,
    ip_checksum: Option<u16>,
    truncated: Option<usize>,
}

/// A packet to build. Source and destination are of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    macs: [[u8; 6]; 2],
    ether_type: Option<u16>,
    source: SocketAddr,
    destination: SocketAddr,
    ttl: u8,
    identification: u16,
    dont_fragment: bool,
    ip_options: Vec<u8>,
    /// Number and bytes of each, the first two to be written.
    extensions: Vec<(u8, Vec<u8>)>,
    fragment: Option<Fragment>,
    upper: Upper,
    padding: usize,
    wrong: Wrong,
}

impl Packet {
    /// A TCP segment, with ACK set and nothing in it.
    pub fn tcp(source: impl Endpoint, destination: impl Endpoint) -> Self {
        Self::new(
            source,
            destination,
            Upper::Tcp {
                flags: Tcp::ACK,
                sequence: 0x1000_0001,
                acknowledgement: 0x2000_0002,
                window: 64_240,
                options: Vec::new(),
                payload: Vec::new(),
            },
        )
    }

    /// A UDP datagram with nothing in it.
    pub fn udp(source: impl Endpoint, destination: impl Endpoint) -> Self {
        Self::new(source, destination, Upper::Udp { payload: Vec::new(), checksum: true })
    }

    /// An echo request; the ports are its identifier (of the source) and sequence number (of the destination).
    pub fn ping(source: impl Endpoint, destination: impl Endpoint) -> Self {
        let (source, destination) = (source.endpoint(), destination.endpoint());
        let kind = if source.is_ipv4() { 8 } else { 128 };
        let [a, b] = source.port().to_be_bytes();
        let [c, d] = destination.port().to_be_bytes();
        Self::icmp(source, destination, kind, 0, [a, b, c, d], b"ping")
    }

    /// Any ICMP (or, between IPv6 addresses, `ICMPv6`) message; ports do not matter. `word` is what follows the checksum.
    pub fn icmp(
        source: impl Endpoint,
        destination: impl Endpoint,
        kind: u8,
        code: u8,
        word: [u8; 4],
        payload: &[u8],
    ) -> Self {
        let payload = payload.to_vec();
        Self::new(source, destination, Upper::Icmp { kind, code, word, payload })
    }

    /// The error "packet too big" (fragmentation needed) about a frame, quoting its IP header and `quoted` bytes after.
    pub fn too_big(source: impl Endpoint, about: &Self, mtu: u16, quoted: usize) -> Self {
        let frame = about.build();
        let header = about.ip_header_length();
        let end = frame.len().min(ETHERNET + header + quoted);
        let [a, b] = mtu.to_be_bytes();
        let (kind, code) = if about.source.is_ipv4() { (3, 4) } else { (2, 0) };
        let quote = &frame[ETHERNET..end];
        Self::icmp(source, about.source, kind, code, [0, 0, a, b], quote)
    }

    /// Any other protocol above IP.
    pub fn raw(source: impl Endpoint, destination: impl Endpoint, protocol: u8, payload: &[u8]) -> Self {
        let payload = payload.to_vec();
        Self::new(source, destination, Upper::Raw { protocol, payload })
    }

    fn new(source: impl Endpoint, destination: impl Endpoint, upper: Upper) -> Self {
        let (source, destination) = (source.endpoint(), destination.endpoint());
        assert_eq!(source.is_ipv4(), destination.is_ipv4(), "{source} and {destination} are of two families");
        Self {
            macs: [SOURCE_MAC, DESTINATION_MAC],
            ether_type: None,
            source,
            destination,
            ttl: 64,
            identification: 0x4242,
            dont_fragment: true,
            ip_options: Vec::new(),
            extensions: Vec::new(),
            fragment: None,
            upper,
            padding: 0,
            wrong: Wrong::default(),
        }
    }

    /// Comes from elsewhere.
    #[must_use]
    pub fn from(mut self, source: impl Endpoint) -> Self {
        self.source = source.endpoint();
        self
    }

    /// Goes elsewhere.
    #[must_use]
    pub fn to(mut self, destination: impl Endpoint) -> Self {
        self.destination = destination.endpoint();
        self
    }

    /// Goes back: source and destination, of Ethernet too, change places. TCP's numbers stay.
    #[must_use]
    pub fn reversed(mut self) -> Self {
        std::mem::swap(&mut self.source, &mut self.destination);
        self.macs.swap(0, 1);
        self
    }

    /// Ethernet source and destination.
    #[must_use]
    pub fn macs(mut self, source: [u8; 6], destination: [u8; 6]) -> Self {
        self.macs = [source, destination];
        self
    }

    /// Says another `EtherType` than the IP version's.
    #[must_use]
    pub fn ether_type(mut self, ether_type: u16) -> Self {
        self.ether_type = Some(ether_type);
        self
    }

    /// TTL or hop limit.
    #[must_use]
    pub fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    /// IPv4 identification, or that of an IPv6 fragment.
    #[must_use]
    pub fn identification(mut self, identification: u16) -> Self {
        self.identification = identification;
        self
    }

    /// IPv4 options, a multiple of four bytes up to 40.
    ///
    /// # Panics
    /// On IPv6 and on another length.
    #[must_use]
    pub fn ip_options(mut self, options: &[u8]) -> Self {
        assert!(self.source.is_ipv4(), "IPv6 has no options of this kind");
        assert!(options.len().is_multiple_of(4) && options.len() <= 40, "{} bytes of options", options.len());
        self.ip_options = options.to_vec();
        self
    }

    /// TCP flags.
    ///
    /// # Panics
    /// Where it is not TCP.
    #[must_use]
    pub fn flags(mut self, set: Tcp) -> Self {
        match &mut self.upper {
            Upper::Tcp { flags, .. } => *flags = set,
            other => panic!("flags of {other:?}"),
        }
        self
    }

    /// TCP sequence and acknowledgement number.
    ///
    /// # Panics
    /// Where it is not TCP.
    #[must_use]
    pub fn numbers(mut self, seq: u32, ack: u32) -> Self {
        match &mut self.upper {
            Upper::Tcp { sequence, acknowledgement, .. } => (*sequence, *acknowledgement) = (seq, ack),
            other => panic!("numbers of {other:?}"),
        }
        self
    }

    /// TCP's window.
    ///
    /// # Panics
    /// Where it is not TCP.
    #[must_use]
    pub fn window(mut self, bytes: u16) -> Self {
        match &mut self.upper {
            Upper::Tcp { window, .. } => *window = bytes,
            other => panic!("the window of {other:?}"),
        }
        self
    }

    /// TCP options, a multiple of four bytes up to 40.
    ///
    /// # Panics
    /// Where it is not TCP.
    #[must_use]
    pub fn tcp_options(mut self, raw: &[u8]) -> Self {
        match &mut self.upper {
            Upper::Tcp { options, .. } if raw.len().is_multiple_of(4) && raw.len() <= 40 => {
                *options = raw.to_vec();
            }
            other => panic!("{} bytes of options of {other:?}", raw.len()),
        }
        self
    }

    /// What it carries.
    #[must_use]
    pub fn payload(mut self, bytes: impl AsRef<[u8]>) -> Self {
        match &mut self.upper {
            Upper::Tcp { payload, .. }
            | Upper::Udp { payload, .. }
            | Upper::Icmp { payload, .. }
            | Upper::Raw { payload, .. } => *payload = bytes.as_ref().to_vec(),
        }
        self
    }

    /// UDP without a checksum: the field is 0.
    ///
    /// # Panics
    /// Where it is not UDP.
    #[must_use]
    pub fn without_udp_checksum(mut self) -> Self {
        match &mut self.upper {
            Upper::Udp { checksum, .. } => *checksum = false,
            other => panic!("UDP checksum of {other:?}"),
        }
        self
    }

    /// One more IPv6 extension header: its number, and how many times eight bytes it is longer than eight. Behind its length
    /// it holds zeroes: padding, for a header of options.
    ///
    /// # Panics
    /// On IPv4.
    #[must_use]
    pub fn extension(mut self, number: u8, eights: u8) -> Self {
        assert!(self.source.is_ipv6(), "IPv4 has no extension headers");
        let mut bytes = vec![0; 8 * (usize::from(eights) + 1)];
        bytes[1] = eights;
        self.extensions.push((number, bytes));
        self
    }

    /// Only `length` bytes of what is above IP, from `offset` on (a multiple of 8); `more` where others follow.
    ///
    /// The checksum above IP is that of the whole.
    ///
    /// # Panics
    /// At another offset.
    #[must_use]
    pub fn fragment(mut self, offset: u16, length: usize, more: bool) -> Self {
        assert!(offset.is_multiple_of(8), "a fragment at {offset}");
        self.fragment = Some(Fragment { offset, length, more });
        self.dont_fragment = false;
        self
    }

    /// Zeroes after the end of the packet, as Ethernet pads short frames.
    #[must_use]
    pub fn padded(mut self, bytes: usize) -> Self {
        self.padding = bytes;
        self
    }

    /// A wrong IPv4 total length, or IPv6 payload length.
    #[must_use]
    pub fn wrong_ip_length(mut self, length: u16) -> Self {
        self.wrong.ip_length = Some(length);
        self
    }

    /// A wrong IP version.
    #[must_use]
    pub fn wrong_ip_version(mut self, version: u8) -> Self {
        self.wrong.ip_version = Some(version);
        self
    }

    /// A wrong IPv4 header length, in words of four bytes.
    #[must_use]
    pub fn wrong_ihl(mut self, words: u8) -> Self {
        self.wrong.ihl = Some(words);
        self
    }

    /// A wrong UDP length.
    #[must_use]
    pub fn wrong_udp_length(mut self, length: u16) -> Self {
        self.wrong.udp_length = Some(length);
        self
    }

    /// A wrong TCP data offset, in words of four bytes.
    #[must_use]
    pub fn wrong_tcp_data_offset(mut self, words: u8) -> Self {
        self.wrong.tcp_data_offset = Some(words);
        self
    }

    /// Another checksum above IP.
    #[must_use]
    pub fn upper_checksum(mut self, checksum: u16) -> Self {
        self.wrong.upper_checksum = Some(checksum);
        self
    }

    /// Another IPv4 header checksum.
    #[must_use]
    pub fn ip_checksum(mut self, checksum: u16) -> Self {
        self.wrong.ip_checksum = Some(checksum);
        self
    }

    /// Only the first bytes of the frame.
    #[must_use]
    pub fn truncated(mut self, length: usize) -> Self {
        self.wrong.truncated = Some(length);
        self
    }

    /// Where it comes from.
    pub fn source(&self) -> SocketAddr {
        self.source
    }

    /// Where it goes.
    pub fn destination(&self) -> SocketAddr {
        self.destination
    }

    /// Where the header above IP begins in the frame, in bytes.
    pub fn upper_offset(&self) -> usize {
        ETHERNET + self.ip_header_length()
    }

    /// The bytes of the frame, from the Ethernet header on.
    ///
    /// # Panics
    /// Where it is longer than IP allows.
    pub fn build(&self) -> Vec<u8> {
        let whole = self.build_upper();
        let part = match self.fragment {
            None => &whole[..],
            Some(part) => {
                let start = whole.len().min(part.offset.into());
                &whole[start..whole.len().min(start + part.length)]
            }
        };
        let ether_type = if self.source.is_ipv4() { 0x0800 } else { 0x86dd };
        let ethernet = Ethernet2Header {
            source: self.macs[0],
            destination: self.macs[1],
            ether_type: EtherType(self.ether_type.unwrap_or(ether_type)),
        };
        let mut frame = ethernet.to_bytes().to_vec();
        frame.extend(self.build_ip(part.len()));
        frame.extend(part);
        self.spoil(&mut frame);
        frame.resize(frame.len() + self.padding, 0);
        frame.truncate(self.wrong.truncated.unwrap_or(usize::MAX));
        frame
    }

    /// The length of all that is between Ethernet and the upper header.
    fn ip_header_length(&self) -> usize {
        match (self.source, self.fragment) {
            (SocketAddr::V4(_), _) => Ipv4Header::MIN_LEN + self.ip_options.len(),
            (SocketAddr::V6(_), fragment) => {
                let extensions: usize = self.extensions.iter().map(|(_, bytes)| bytes.len()).sum();
                Ipv6Header::LEN + extensions + if fragment.is_some() { 8 } else { 0 }
            }
        }
    }

    fn protocol(&self) -> u8 {
        match self.upper {
            Upper::Tcp { .. } => TCP,
            Upper::Udp { .. } => UDP,
            Upper::Icmp { .. } if self.source.is_ipv4() => ICMP,
            Upper::Icmp { .. } => ICMP6,
            Upper::Raw { protocol, .. } => protocol,
        }
    }

    fn build_ip(&self, payload: usize) -> Vec<u8> {
        let length = |bytes: usize| u16::try_from(bytes).expect("longer than IP allows");
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut options = Ipv4Options::new();
                if !self.ip_options.is_empty() {
                    options = self.ip_options[..].try_into().expect("checked when set");
                }
                let offset = self.fragment.map_or(0, |part| part.offset / 8);
                let header = Ipv4Header {
                    total_len: length(Ipv4Header::MIN_LEN + self.ip_options.len() + payload),
                    identification: self.identification,
                    dont_fragment: self.dont_fragment,
                    more_fragments: self.fragment.is_some_and(|part| part.more),
                    fragment_offset: IpFragOffset::try_new(offset).expect("13 bits of 16"),
                    time_to_live: self.ttl,
                    protocol: IpNumber(self.protocol()),
                    source: source.octets(),
                    destination: destination.octets(),
                    options,
                    ..Ipv4Header::default()
                };
                let mut bytes = header.to_bytes().to_vec();
                bytes[10..12].fill(0);
                let sum = checksum(&bytes);
                bytes[10..12].copy_from_slice(&sum.to_be_bytes());
                bytes
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let mut extensions = self.extensions.clone();
                if let Some(part) = self.fragment {
                    let [a, b] = (part.offset | u16::from(part.more)).to_be_bytes();
                    let [c, d] = self.identification.to_be_bytes();
                    extensions.push((FRAGMENT_HEADER, vec![0, 0, a, b, 0, 0, c, d]));
                }
                let mut next = self.protocol();
                for (number, bytes) in extensions.iter_mut().rev() {
                    bytes[0] = std::mem::replace(&mut next, *number);
                }
                let extensions: Vec<u8> = extensions.into_iter().flat_map(|(_, bytes)| bytes).collect();
                let header = Ipv6Header {
                    payload_length: length(extensions.len() + payload),
                    next_header: IpNumber(next),
                    hop_limit: self.ttl,
                    source: source.octets(),
                    destination: destination.octets(),
                    ..Ipv6Header::default()
                };
                [&header.to_bytes()[..], &extensions].concat()
            }
            (source, destination) => panic!("{source} and {destination} are of two families"),
        }
    }

    /// The header above IP with its checksum, and what it carries.
    fn build_upper(&self) -> Vec<u8> {
        let (mut bytes, at) = match &self.upper {
            Upper::Tcp { flags, sequence, acknowledgement, window, options, payload } => {
                let mut header = TcpHeader {
                    source_port: self.source.port(),
                    destination_port: self.destination.port(),
                    sequence_number: *sequence,
                    acknowledgment_number: *acknowledgement,
                    fin: flags.has(Tcp::FIN),
                    syn: flags.has(Tcp::SYN),
                    rst: flags.has(Tcp::RST),
                    psh: flags.has(Tcp::PSH),
                    ack: flags.has(Tcp::ACK),
                    window_size: *window,
                    ..TcpHeader::default()
                };
                header.set_options_raw(options).expect("checked when set");
                ([&header.to_bytes()[..], payload].concat(), Some(16))
            }
            Upper::Udp { payload, checksum } => {
                let length = u16::try_from(8 + payload.len()).expect("longer than UDP allows");
                let fields = [self.source.port(), self.destination.port(), length, 0];
                let header = fields.map(u16::to_be_bytes).concat();
                ([&header[..], payload].concat(), checksum.then_some(6))
            }
            Upper::Icmp { kind, code, word, payload } => {
                let header = [&[*kind, *code, 0, 0], &word[..]].concat();
                ([&header[..], payload].concat(), Some(2))
            }
            Upper::Raw { payload, .. } => (payload.clone(), None),
        };
        if let Some(at) = at {
            let (source, destination) = (self.source.ip(), self.destination.ip());
            let mut sum = upper_checksum(source, destination, self.protocol(), &bytes);
            if sum == 0 && self.protocol() == UDP {
                // On the wire 0 says that there is none.
                sum = 0xffff;
            }
            bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        bytes
    }

    fn spoil(&self, frame: &mut [u8]) {
        let v4 = self.source.is_ipv4();
        let mut set = |at: usize, bytes: &[u8]| {
            if let Some(to) = frame.get_mut(at..at + bytes.len()) {
                to.copy_from_slice(bytes);
            }
        };
        let wrong = &self.wrong;
        let upper = self.upper_offset();
        if let Some(length) = wrong.ip_length {
            set(ETHERNET + if v4 { 2 } else { 4 }, &length.to_be_bytes());
        }
        if let Some(checksum) = wrong.ip_checksum.filter(|_| v4) {
            set(ETHERNET + 10, &checksum.to_be_bytes());
        }
        if let Some(length) = wrong.udp_length {
            set(upper + 4, &length.to_be_bytes());
        }
        if let Some(checksum) = wrong.upper_checksum {
            let at = match self.upper {
                Upper::Tcp { .. } => 16,
                Upper::Udp { .. } => 6,
                Upper::Icmp { .. } | Upper::Raw { .. } => 2,
            };
            set(upper + at, &checksum.to_be_bytes());
        }
        if let Some(first) = frame.get_mut(ETHERNET) {
            let version = wrong.ip_version.unwrap_or(*first >> 4);
            let low = wrong.ihl.filter(|_| v4).unwrap_or(*first & 0xf);
            *first = version << 4 | low & 0xf;
        }
        if let (Some(words), Some(byte)) = (wrong.tcp_data_offset, frame.get_mut(upper + 12)) {
            *byte = words << 4 | *byte & 0xf;
        }
    }
}

#[cfg(test)]
mod tests;
