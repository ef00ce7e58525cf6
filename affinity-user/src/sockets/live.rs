//! The sockets of the network namespace that the calling thread is in, by `sock_diag(7)`.

use std::io;
use std::net::{IpAddr, SocketAddr};

use affinity_common::abi::sockets::SocketCookie;
use affinity_common::types::Proto;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_packet_sock_diag::{SockDiagDestroy, SockDiagMessage};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};

/// A socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveSocket {
    /// Its cookie.
    pub cookie: SocketCookie,
    /// Whom it is connected to; `None` for a UDP socket that is not.
    pub peer: Option<SocketAddr>,
    /// TCP or UDP.
    pub proto: Proto,
    id: SocketId,
    family: u8,
}

/// Every TCP and UDP socket that talks to somebody, or can.
///
/// # Errors
/// Where the kernel has no `sock_diag`, or refuses.
pub fn list() -> io::Result<Vec<LiveSocket>> {
    // What a closed connection has left has no socket any more, and what listens talks to nobody.
    let talking = StateFlags::all() - StateFlags::LISTEN - StateFlags::TIME_WAIT;
    let mut sockets = Vec::new();
    for (protocol, proto) in [(IPPROTO_TCP, Proto::TCP), (IPPROTO_UDP, Proto::UDP)] {
        for (family, socket_id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
            let request = InetRequest {
                family,
                protocol,
                extensions: ExtensionFlags::empty(),
                states: talking.clone(),
                socket_id,
            };
            ask(NLM_F_DUMP, SockDiagMessage::InetRequest(request), |message| {
                if let SockDiagMessage::InetResponse(response) = message {
                    let id = response.header.socket_id;
                    let peer = SocketAddr::new(unmapped(id.destination_address), id.destination_port);
                    sockets.push(LiveSocket {
                        cookie: SocketCookie { halves: bytemuck::cast(id.cookie) },
                        peer: (id.destination_port != 0).then_some(peer),
                        proto,
                        id,
                        family,
                    });
                }
            })?;
        }
    }
    Ok(sockets)
}

/// Ends a socket as if its network had: whoever waits on it gets `ECONNABORTED` (kernel commit 5d77dca82839).
///
/// # Errors
/// Where it is no longer there, or the kernel can't (`CONFIG_INET_DIAG_DESTROY`).
pub fn destroy(socket: &LiveSocket) -> io::Result<()> {
    let protocol = if socket.proto == Proto::TCP { IPPROTO_TCP } else { IPPROTO_UDP };
    let request = InetRequest {
        family: socket.family,
        protocol,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id: socket.id.clone(),
    };
    ask(NLM_F_ACK, SockDiagDestroy::new(SockDiagMessage::InetRequest(request)), |_| {})
}

/// An IPv4 address as such, where an IPv6 socket has it.
fn unmapped(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// Sends a request, and hands on what is answered, to the end of it.
fn ask<T: NetlinkSerializable + Into<NetlinkPayload<T>>>(
    flags: u16,
    request: T,
    mut answered: impl FnMut(SockDiagMessage),
) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let mut message = NetlinkMessage::new(header, request.into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    loop {
        let (received, _) = socket.recv_from_full()?;
        let mut rest = &received[..];
        while !rest.is_empty() {
            let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest).map_err(io::Error::other)?;
            let length = usize::try_from(message.header.length).map_err(io::Error::other)?;
            match message.payload {
                NetlinkPayload::InnerMessage(message) => answered(message),
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) => return error.code.map_or(Ok(()), |_| Err(error.to_io())),
                _ => {}
            }
            // Each is aligned to four bytes.
            rest = rest.get(length.next_multiple_of(4).max(4)..).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;

    fn is_listed(local: SocketAddr, peer: Option<SocketAddr>, proto: Proto) -> bool {
        let sockets = list().expect("sock_diag");
        sockets.iter().any(|one| one.id.source_port == local.port() && one.peer == peer && one.proto == proto)
    }

    #[test]
    fn connected_and_unconnected_sockets_are_listed() {
        let server = TcpListener::bind("127.0.0.1:0").expect("a port");
        let there = server.local_addr().expect("an address");
        let stream = TcpStream::connect(there).expect("a connection");
        assert!(is_listed(stream.local_addr().expect("an address"), Some(there), Proto::TCP));
        let socket = UdpSocket::bind("[::1]:0").expect("a port");
        let own = socket.local_addr().expect("an address");
        assert!(is_listed(own, None, Proto::UDP));
        socket.connect(own).expect("a route");
        assert!(is_listed(own, Some(own), Proto::UDP));
    }
}
