//! Translation: one address and one port of a packet, with every checksum that covers them.

use core::mem::offset_of;

use bytemuck::{Pod, Zeroable};
use network_types::{ip::Ipv4Hdr, tcp::TcpHdr, udp::UdpHdr};

use super::{Checksum, Packet, RewriteError, parse::Headers};
use crate::{
    family::{Family, V4},
    types::Port,
};

/// Which end of the packet is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The source: at egress.
    Source,
    /// The destination: at ingress.
    Destination,
}

/// A family whose headers the datapath rewrites.
pub trait Rewrite: Family {
    /// Writes what a packet's ends are now that an address has changed: the addresses, with the IP header's own checksum
    /// where the family has one, and the ports. By one call where they lie side by side: a helper costs as much for two
    /// bytes as for fourteen.
    fn write_ends<P: Packet>(
        packet: &mut P,
        ends: &Headers<Self>,
        from: &Self::Addr,
        to: &Self::Addr,
    ) -> Result<(), RewriteError>;
}

impl Rewrite for V4 {
    #[inline(always)]
    fn write_ends<P: Packet>(
        packet: &mut P,
        ends: &Headers<Self>,
        from: &[u8; 4],
        to: &[u8; 4],
    ) -> Result<(), RewriteError> {
        const { assert!(offset_of!(Ipv4Hdr, check) + 2 == offset_of!(Ipv4Hdr, src_addr)) };
        let at = ends.l3 + offset_of!(Ipv4Hdr, check);
        let check = header_checksum(packet.read(at).ok_or(RewriteError)?, *from, *to);
        let addrs = Addrs { check, src: ends.src, dst: ends.dst };
        let ports = Ports { src: ends.src_port.be, dst: ends.dst_port.be };
        if ends.l4 == ends.l3 + Ipv4Hdr::LEN {
            packet.write::<14>(at, &bytemuck::cast(Ends { addrs, ports }))
        } else {
            packet.write::<10>(at, &bytemuck::cast(addrs))?;
            packet.write::<4>(ends.l4 + offset_of!(UdpHdr, src), &bytemuck::cast(ports))
        }
    }
}

/// The end of an IPv4 header without options, and the ports behind it.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Ends {
    addrs: Addrs,
    ports: Ports,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Addrs {
    check: [u8; 2],
    src: [u8; 4],
    dst: [u8; 4],
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Ports {
    src: [u8; 2],
    dst: [u8; 2],
}

/// The IPv4 header's checksum after four bytes of the header have changed (RFC 1624, equation 3). No offload has a part
/// in it, unlike in the transport's: nothing here that only the kernel knows.
#[inline(always)]
fn header_checksum(old: [u8; 2], from: [u8; 4], to: [u8; 4]) -> [u8; 2] {
    let words = |bytes: [u8; 4]| u64::from(u32::from_ne_bytes(bytes));
    let mut sum = u64::from(!u16::from_ne_bytes(old)) + words(from.map(|byte| !byte)) + words(to);
    // Each time what is over 16 bits is added to them: 34 bits become 19, 17 and 16.
    for _ in 0..3 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let [low, high, ..] = (!sum).to_le_bytes();
    u16::from_le_bytes([low, high]).to_ne_bytes()
}

/// Translates one end of a packet. What does not change is not written.
#[inline(always)]
pub fn translate<F: Rewrite, P: Packet>(
    packet: &mut P,
    headers: &Headers<F>,
    end: End,
    addr: &F::Addr,
    port: Port,
) -> Result<(), RewriteError> {
    let mut translated = *headers;
    let (old_addr, old_port) = match end {
        End::Source => {
            (translated.src, translated.src_port) = (*addr, port);
            (&headers.src, headers.src_port)
        }
        End::Destination => {
            (translated.dst, translated.dst_port) = (*addr, port);
            (&headers.dst, headers.dst_port)
        }
    };
    let sum = if headers.is_tcp() {
        Checksum { at: headers.l4 + offset_of!(TcpHdr, check), zero_is_none: false }
    } else {
        Checksum { at: headers.l4 + offset_of!(UdpHdr, check), zero_is_none: true }
    };
    if old_addr != addr {
        packet.update_checksum_by_address(sum, old_addr.as_ref(), addr.as_ref())?;
    }
    if old_port != port {
        packet.update_checksum_by_port(sum, old_port.be, port.be)?;
    }
    if old_addr == addr && old_port == port { Ok(()) } else { F::write_ends(packet, &translated, old_addr, addr) }
}
