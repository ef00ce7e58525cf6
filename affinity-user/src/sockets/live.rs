//! The sockets of the network namespace that the calling thread is in, by `sock_diag(7)`.

use std::io;
use std::net::{IpAddr, SocketAddr};

use affinity_common::abi::sockets::SocketCookie;
use affinity_common::types::Proto;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags};
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
    for proto in [Proto::TCP, Proto::UDP] {
        dump(proto, &talking, |family, response| {
            let id = response.header.socket_id;
            let peer = SocketAddr::new(unmapped(id.destination_address), id.destination_port);
            sockets.push(LiveSocket {
                cookie: SocketCookie { halves: bytemuck::cast(id.cookie) },
                peer: (id.destination_port != 0).then_some(peer),
                proto,
                id,
                family,
            });
        })?;
    }
    Ok(sockets)
}

/// A socket that takes what anybody sends to a port: one that listens, or a UDP one that is not connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BoundSocket {
    /// What it is bound to.
    pub at: SocketAddr,
    /// TCP or UDP.
    pub proto: Proto,
    /// Whether IPv4 comes to it too, where it is bound to every IPv6 address.
    pub takes_ipv4: bool,
}

/// Every one of them.
///
/// # Errors
/// Where the kernel has no `sock_diag`, or refuses.
pub fn bound() -> io::Result<Vec<BoundSocket>> {
    let mut sockets = Vec::new();
    for (proto, state) in [(Proto::TCP, StateFlags::LISTEN), (Proto::UDP, StateFlags::CLOSE)] {
        dump(proto, &state, |_, response| {
            let id = response.header.socket_id;
            sockets.push(BoundSocket {
                at: SocketAddr::new(unmapped(id.source_address), id.source_port),
                proto,
                takes_ipv4: !response.nlas.contains(&Nla::SkV6Only(true)),
            });
        })?;
    }
    Ok(sockets)
}

/// The sockets of a protocol that are in some states, of both families.
fn dump(proto: Proto, states: &StateFlags, mut found: impl FnMut(u8, Box<InetResponse>)) -> io::Result<()> {
    for (family, socket_id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        let request = InetRequest {
            family,
            protocol: protocol(proto),
            extensions: ExtensionFlags::empty(),
            states: states.clone(),
            socket_id,
        };
        ask(NLM_F_DUMP, SockDiagMessage::InetRequest(request), |message| {
            if let SockDiagMessage::InetResponse(response) = message {
                found(family, response);
            }
        })?;
    }
    Ok(())
}

fn protocol(proto: Proto) -> u8 {
    if proto == Proto::TCP { IPPROTO_TCP } else { IPPROTO_UDP }
}

/// Ends a socket as if its network had: whoever waits on it gets `ECONNABORTED` (kernel commit 5d77dca82839).
///
/// # Errors
/// Where it is no longer there, or the kernel can't (`CONFIG_INET_DIAG_DESTROY`).
pub fn destroy(socket: &LiveSocket) -> io::Result<()> {
    let request = InetRequest {
        family: socket.family,
        protocol: protocol(socket.proto),
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

    #[test]
    fn sockets_that_take_what_anybody_sends_are_listed() {
        let listed = |at: SocketAddr, proto| {
            let sockets = bound().expect("sock_diag");
            sockets.into_iter().find(|one| one.at == at && one.proto == proto).map(|one| one.takes_ipv4)
        };
        let server = TcpListener::bind("127.0.0.1:0").expect("a port");
        assert_eq!(listed(server.local_addr().expect("an address"), Proto::TCP), Some(true));
        for (only_v6, takes_ipv4) in [(false, true), (true, false)] {
            let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None).expect("a socket");
            socket.set_only_v6(only_v6).expect("an option");
            socket.bind(&SocketAddr::from(([0_u16; 8], 0)).into()).expect("a port");
            let at = socket.local_addr().ok().and_then(|at| at.as_socket()).expect("an address");
            assert_eq!(listed(at, Proto::TCP), None, "it does not listen yet");
            socket.listen(1).expect("a listener");
            assert_eq!(listed(at, Proto::TCP), Some(takes_ipv4));
        }
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
        let own = socket.local_addr().expect("an address");
        assert_eq!(listed(own, Proto::UDP), Some(true));
        socket.connect(own).expect("a route");
        assert_eq!(listed(own, Proto::UDP), None, "it hears one peer alone");
    }
}
