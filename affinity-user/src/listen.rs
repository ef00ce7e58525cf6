//! Listeners of TCP.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use socket2::{Domain, Protocol, Socket, Type};

/// How many connections wait to be accepted, at most.
const BACKLOG: i32 = 128;

/// Listens at an address, without waiting for whoever comes. `[::]` is every address of the node, of both families where it has
/// both.
///
/// # Errors
/// Where it is taken, or none of this node's.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let is_every = address.is_ipv6() && address.ip().is_unspecified();
    match listen(address, is_every) {
        // A node without IPv6.
        Err(error) if is_every && matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {
            listen((Ipv4Addr::UNSPECIFIED, address.port()).into(), false)
        }
        done => done,
    }
}

fn listen(address: SocketAddr, of_both: bool) -> io::Result<TcpListener> {
    let kind = Type::STREAM.cloexec().nonblocking();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
    if of_both {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(TcpListener::from(socket))
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv6Addr, TcpStream};

    use super::*;

    #[test]
    fn every_address_is_of_both_families() {
        let listener = bind((Ipv6Addr::UNSPECIFIED, 0).into()).expect("a port");
        let port = listener.local_addr().expect("an address").port();
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("by IPv4");
        if listener.local_addr().expect("an address").is_ipv6() {
            TcpStream::connect((Ipv6Addr::LOCALHOST, port)).expect("by IPv6");
        }
        let taken = bind((Ipv6Addr::UNSPECIFIED, port).into()).expect_err("it is taken");
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
        let taken = bind((Ipv4Addr::UNSPECIFIED, port).into()).expect_err("it is taken");
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
    }
}
