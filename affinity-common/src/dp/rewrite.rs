//! Translation: one address and one port of a packet, with every checksum that covers them.

use core::mem::offset_of;

use bytemuck::{Pod, Zeroable};
use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use super::{Checksum, Packet, RewriteError, parse::Headers};
use crate::{
    family::{Family, V4, V6},
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
    /// Writes what a packet's ends are now that the address of one has changed: its address, with the IP header's own
    /// checksum where the family has one, and the ports. By one call where they lie side by side, also if what is in
    /// between is written as it was: a helper costs as much for two bytes as for fourteen.
    fn write_ends<P: Packet>(
        packet: &mut P,
        ends: &Headers<Self>,
        end: End,
        from: &Self::Addr,
        to: &Self::Addr,
    ) -> Result<(), RewriteError>;

    /// Writes one address of the IP header at `l3`, with the header's own checksum where the family has one, and nothing of
    /// what is behind it.
    fn write_address<P: Packet>(
        packet: &mut P,
        l3: usize,
        end: End,
        from: &Self::Addr,
        to: &Self::Addr,
    ) -> Result<(), RewriteError>;
}

impl Rewrite for V4 {
    #[inline(always)]
    fn write_ends<P: Packet>(
        packet: &mut P,
        ends: &Headers<Self>,
        _end: End,
        from: &[u8; 4],
        to: &[u8; 4],
    ) -> Result<(), RewriteError> {
        const { assert!(offset_of!(Ipv4Hdr, check) + 2 == offset_of!(Ipv4Hdr, src_addr)) };
        let at = ends.l3 + offset_of!(Ipv4Hdr, check);
        let check = header_checksum(packet.read(at).ok_or(RewriteError)?, *from, *to);
        let addrs = V4Addrs { check, src: ends.src, dst: ends.dst };
        if ends.l4 == ends.l3 + Ipv4Hdr::LEN {
            packet.write::<14>(at, &bytemuck::cast(V4Ends { addrs, ports: Ports::of(ends) }))
        } else {
            packet.write::<10>(at, &bytemuck::cast(addrs))?;
            packet.write::<4>(ends.l4 + offset_of!(UdpHdr, src), &bytemuck::cast(Ports::of(ends)))
        }
    }

    #[inline(always)]
    fn write_address<P: Packet>(
        packet: &mut P,
        l3: usize,
        end: End,
        from: &[u8; 4],
        to: &[u8; 4],
    ) -> Result<(), RewriteError> {
        let check_at = l3 + offset_of!(Ipv4Hdr, check);
        let check = header_checksum(packet.read(check_at).ok_or(RewriteError)?, *from, *to);
        packet.write(check_at, &check)?;
        let at = match end {
            End::Source => offset_of!(Ipv4Hdr, src_addr),
            End::Destination => offset_of!(Ipv4Hdr, dst_addr),
        };
        packet.write(l3 + at, to)
    }
}

impl Rewrite for V6 {
    #[inline(always)]
    fn write_ends<P: Packet>(
        packet: &mut P,
        ends: &Headers<Self>,
        end: End,
        _from: &[u8; 16],
        _to: &[u8; 16],
    ) -> Result<(), RewriteError> {
        let (src_at, dst_at) = (offset_of!(Ipv6Hdr, src_addr), offset_of!(Ipv6Hdr, dst_addr));
        let (is_next, ports) = (ends.l4 == ends.l3 + Ipv6Hdr::LEN, Ports::of(ends));
        let ports_at = ends.l4 + offset_of!(UdpHdr, src);
        match (end, is_next) {
            (End::Source, true) => {
                packet.write::<36>(ends.l3 + src_at, &bytemuck::cast(V6Ends { src: ends.src, dst: ends.dst, ports }))
            }
            (End::Destination, true) => {
                packet.write::<20>(ends.l3 + dst_at, &bytemuck::cast(V6Destination { dst: ends.dst, ports }))
            }
            (End::Source, false) => {
                packet.write::<16>(ends.l3 + src_at, &ends.src)?;
                packet.write::<4>(ports_at, &bytemuck::cast(ports))
            }
            (End::Destination, false) => {
                packet.write::<16>(ends.l3 + dst_at, &ends.dst)?;
                packet.write::<4>(ports_at, &bytemuck::cast(ports))
            }
        }
    }

    #[inline(always)]
    fn write_address<P: Packet>(
        packet: &mut P,
        l3: usize,
        end: End,
        _from: &[u8; 16],
        to: &[u8; 16],
    ) -> Result<(), RewriteError> {
        let at = match end {
            End::Source => offset_of!(Ipv6Hdr, src_addr),
            End::Destination => offset_of!(Ipv6Hdr, dst_addr),
        };
        packet.write(l3 + at, to)
    }
}

/// What is written of an IPv4 header, up to its options.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct V4Addrs {
    check: [u8; 2],
    src: [u8; 4],
    dst: [u8; 4],
}

/// The same, with the ports behind it.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct V4Ends {
    addrs: V4Addrs,
    ports: Ports,
}

/// Both addresses of an IPv6 header without extensions, and the ports behind it.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct V6Ends {
    src: [u8; 16],
    dst: [u8; 16],
    ports: Ports,
}

/// The destination of such a header, and the ports behind it.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct V6Destination {
    dst: [u8; 16],
    ports: Ports,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Ports {
    src: [u8; 2],
    dst: [u8; 2],
}

impl Ports {
    #[inline(always)]
    fn of<F: Family>(headers: &Headers<F>) -> Self {
        Self { src: headers.src_port.be, dst: headers.dst_port.be }
    }
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

/// Translates one end of a packet, of which the headers are then what it says. What does not change is not written.
#[inline(always)]
pub fn translate<F: Rewrite, P: Packet>(
    packet: &mut P,
    headers: &mut Headers<F>,
    end: End,
    addr: &F::Addr,
    port: Port,
) -> Result<(), RewriteError> {
    let sum = if headers.is_tcp() {
        Checksum { at: headers.l4 + offset_of!(TcpHdr, check), zero_is_none: false }
    } else {
        Checksum { at: headers.l4 + offset_of!(UdpHdr, check), zero_is_none: true }
    };
    let (its_addr, its_port) = match end {
        End::Source => (&mut headers.src, &mut headers.src_port),
        End::Destination => (&mut headers.dst, &mut headers.dst_port),
    };
    let (old_addr, old_port) = (*its_addr, *its_port);
    let (is_same_addr, is_same_port) = (old_addr == *addr, old_port == port);
    if is_same_addr && is_same_port {
        return Ok(());
    }
    if !is_same_addr {
        packet.update_checksum_by_address(sum, old_addr.as_ref(), addr.as_ref())?;
    }
    if !is_same_port {
        packet.update_checksum_by_port(sum, old_port.be, port.be)?;
    }
    (*its_addr, *its_port) = (*addr, port);
    F::write_ends(packet, headers, end, &old_addr, addr)
}
