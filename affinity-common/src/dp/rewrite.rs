//! Translation: one address and one port of a packet, with every checksum that covers them.

use core::mem::offset_of;

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
    /// Writes an address into the IP header, with the header's own checksum where the family has one.
    fn write_addr<P: Packet>(
        packet: &mut P,
        l3: usize,
        end: End,
        from: &Self::Addr,
        to: &Self::Addr,
    ) -> Result<(), RewriteError>;
}

impl Rewrite for V4 {
    #[inline(always)]
    fn write_addr<P: Packet>(
        packet: &mut P,
        l3: usize,
        end: End,
        from: &[u8; 4],
        to: &[u8; 4],
    ) -> Result<(), RewriteError> {
        let at = match end {
            End::Source => offset_of!(Ipv4Hdr, src_addr),
            End::Destination => offset_of!(Ipv4Hdr, dst_addr),
        };
        packet.update_header_checksum(l3 + offset_of!(Ipv4Hdr, check), *from, *to)?;
        packet.write(l3 + at, to)
    }
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
    let (old_addr, old_port, port_at) = match end {
        End::Source => (&headers.src, headers.src_port, offset_of!(UdpHdr, src)),
        End::Destination => (&headers.dst, headers.dst_port, offset_of!(UdpHdr, dst)),
    };
    let sum = if headers.is_tcp() {
        Checksum { at: headers.l4 + offset_of!(TcpHdr, check), zero_is_none: false }
    } else {
        Checksum { at: headers.l4 + offset_of!(UdpHdr, check), zero_is_none: true }
    };
    if old_addr != addr {
        packet.update_checksum_by_address(sum, old_addr.as_ref(), addr.as_ref())?;
        F::write_addr(packet, headers.l3, end, old_addr, addr)?;
    }
    if old_port != port {
        packet.update_checksum_by_port(sum, old_port.be, port.be)?;
        packet.write(headers.l4 + port_at, &port.be)?;
    }
    Ok(())
}
