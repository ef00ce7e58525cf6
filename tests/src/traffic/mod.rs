//! Backends that serve their own name, and clients that ask for it.
//!
//! A socket belongs to the namespace it was made in, wherever its file descriptor is used: servers and clients here make
//! theirs in the namespace they are given, and then run on ordinary threads.

pub mod http;
pub mod udp;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use socket2::{Domain, Protocol, Socket, Type};

pub use http::{HttpConnection, HttpServer, http_get};
pub use udp::{UdpClient, UdpServer};

use crate::topology::Host;

/// How a client reaches out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientOptions {
    /// The source address and port to bind; port 0 or the unspecified address leave that part to the kernel.
    pub source: Option<SocketAddr>,
    /// How long each of connecting, sending and receiving may take.
    pub timeout: Duration,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self { source: None, timeout: Duration::from_secs(3) }
    }
}

impl ClientOptions {
    /// Binds this source port, on any address of the family of `like`.
    #[must_use]
    pub fn from_port(mut self, like: IpAddr, port: u16) -> Self {
        let any = match like {
            IpAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
            IpAddr::V6(_) => IpAddr::from(Ipv6Addr::UNSPECIFIED),
        };
        self.source = Some(SocketAddr::new(any, port));
        self
    }

    /// Allows this long for each step.
    #[must_use]
    pub fn within(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }
}

/// What a backend answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The name of the backend.
    pub backend: String,
    /// The client as the backend saw it.
    pub client: SocketAddr,
    /// What else the backend sent.
    pub body: Vec<u8>,
}

/// A backend as the labs have them: HTTP and UDP on one port of a host's every address, serving the host's name.
#[derive(Debug)]
pub struct Backend {
    /// The HTTP half.
    pub http: HttpServer,
    /// The UDP half.
    pub udp: UdpServer,
}

impl Backend {
    /// Starts both halves.
    ///
    /// # Errors
    /// Where the port is taken.
    pub fn start(host: &Host, port: u16) -> Result<Self> {
        Ok(Self {
            http: HttpServer::start(&host.netns, port, &host.name)?,
            udp: UdpServer::start(&host.netns, port, &host.name)?,
        })
    }
}

/// A socket bound to a port on every address of both families, in the calling thread's namespace; of IPv4 alone where
/// IPv6 is switched off.
fn bind_any(kind: Type, port: u16) -> io::Result<Socket> {
    let protocol = if kind == Type::STREAM { Protocol::TCP } else { Protocol::UDP };
    let dual = Socket::new(Domain::IPV6, kind, Some(protocol)).and_then(|socket| {
        socket.set_only_v6(false)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
        Ok(socket)
    });
    match dual {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(error),
        Ok(socket) => Ok(socket),
        Err(_) => {
            let socket = Socket::new(Domain::IPV4, kind, Some(protocol))?;
            socket.set_reuse_address(true)?;
            socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())?;
            Ok(socket)
        }
    }
}

/// A client's socket, bound as asked, in the calling thread's namespace.
fn client_socket(kind: Type, server: SocketAddr, options: &ClientOptions) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(server), kind, None)?;
    if let Some(source) = options.source {
        // So that a port can be used again while an earlier connection from it is in TIME_WAIT.
        socket.set_reuse_address(true)?;
        socket.bind(&source.into())?;
    }
    Ok(socket)
}

/// A dual-stack socket sees IPv4 clients as `::ffff:a.b.c.d`.
fn unmapped(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
