//! UDP: a backend that answers with its name, and clients that check whose answer it is.
//!
//! A question is eight bytes that identify it and any payload; the answer is those eight bytes, a line with the backend's
//! name, a line with the client as the backend saw it, and the payload.

use std::io;
use std::net::{Shutdown, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use socket2::{SockRef, Type};

use super::{Answer, ClientOptions, bind_any, client_socket, unmapped};
use crate::netns::Netns;

/// The largest datagram, in bytes.
const MAX_DATAGRAM: usize = 65_535;
/// How many bytes of a question identify it.
const TAG: usize = 8;
/// How often a server looks whether it should end.
const INTERVAL: Duration = Duration::from_millis(100);

/// Serves a name over UDP until it is stopped or dropped.
#[derive(Debug)]
pub struct UdpServer {
    socket: UdpSocket,
    stopped: Arc<AtomicBool>,
    requests: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl UdpServer {
    /// Serves `name` on a port of every address in the namespace.
    ///
    /// # Errors
    /// Where the port is taken.
    pub fn start(netns: &Netns, port: u16, name: &str) -> Result<Self> {
        let socket: UdpSocket = netns
            .enter(|| Ok(bind_any(Type::DGRAM, port)?.into()))
            .with_context(|| format!("UDP server {name} on port {port}"))?;
        socket.set_read_timeout(Some(INTERVAL))?;
        let stopped = Arc::new(AtomicBool::new(false));
        let requests = Arc::new(AtomicUsize::new(0));
        let thread = thread::Builder::new().name(format!("udp {name}")).spawn({
            let (socket, name) = (socket.try_clone()?, name.to_owned());
            let (stopped, requests) = (Arc::clone(&stopped), Arc::clone(&requests));
            move || {
                let mut buffer = vec![0; MAX_DATAGRAM];
                while !stopped.load(Ordering::SeqCst) {
                    if answer_one(&socket, &name, &mut buffer).is_ok() {
                        requests.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        })?;
        Ok(Self { socket, stopped, requests, thread: Some(thread) })
    }

    /// How many questions it has answered.
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }

    /// Closes the port, as when the pod's process ends.
    pub fn stop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        // Wakes the receiver on Linux, though it says that the socket is not connected.
        let _ = SockRef::from(&self.socket).shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for UdpServer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn answer_one(socket: &UdpSocket, name: &str, buffer: &mut [u8]) -> io::Result<()> {
    let (length, client) = socket.recv_from(buffer)?;
    let Some((tag, payload)) = buffer[..length].split_at_checked(TAG) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let lines = format!("{name}\n{}\n", unmapped(client));
    socket.send_to(&[tag, lines.as_bytes(), payload].concat(), client)?;
    Ok(())
}

/// A client's socket; one source port for all that it asks.
#[derive(Debug)]
pub struct UdpClient {
    socket: UdpSocket,
    timeout: Duration,
}

impl UdpClient {
    /// Opens a socket in a namespace, to ask servers of the family of `server`. It is not connected: it can ask several.
    ///
    /// # Errors
    /// Where the source cannot be bound.
    pub fn open(netns: &Netns, server: SocketAddr, options: &ClientOptions) -> Result<Self> {
        netns.enter(|| Self::open_here(server, options))
    }

    /// Opens a socket in the calling thread's namespace.
    ///
    /// # Errors
    /// Where the source cannot be bound.
    pub fn open_here(server: SocketAddr, options: &ClientOptions) -> Result<Self> {
        Ok(Self { socket: client_socket(Type::DGRAM, server, options)?.into(), timeout: options.timeout })
    }

    /// Connects the socket: from now on an ICMP error makes [`UdpClient::ask`] fail at once.
    ///
    /// # Errors
    /// Where there is no route.
    pub fn connect(&self, server: SocketAddr) -> Result<()> {
        Ok(self.socket.connect(server)?)
    }

    /// Sends one datagram and waits for its answer; late answers to earlier questions are passed over.
    ///
    /// # Errors
    /// Where there is no answer within the timeout; where it comes from another address than the one that was asked; and
    /// where the payload comes back changed.
    pub fn ask(&self, server: SocketAddr, payload: &[u8]) -> Result<Answer> {
        let tag: [u8; TAG] = fastrand::u64(..).to_be_bytes();
        let question = [&tag[..], payload].concat();
        self.send(server, &question).with_context(|| format!("asking {server}"))?;
        let deadline = Instant::now() + self.timeout;
        let mut buffer = vec![0; MAX_DATAGRAM];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("{server}: no answer within {:?}", self.timeout);
            }
            self.socket.set_read_timeout(Some(left))?;
            let (length, from) = match self.socket.recv_from(&mut buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error).with_context(|| format!("the answer of {server}")),
            };
            let Some(answer) = buffer[..length].strip_prefix(&tag) else {
                continue;
            };
            if from != server {
                bail!("asked {server}, and {from} answered");
            }
            return parse(answer, payload).with_context(|| format!("the answer of {server}"));
        }
    }

    /// Whom the client is connected to, as the client sees it.
    ///
    /// # Errors
    /// Where it is not connected.
    pub fn peer_addr(&self) -> Result<SocketAddr> {
        Ok(self.socket.peer_addr()?)
    }

    /// The client's address and port, as the client sees them.
    ///
    /// # Errors
    /// Where the socket cannot be asked.
    pub fn local_addr(&self) -> Result<SocketAddr> {
        Ok(self.socket.local_addr()?)
    }

    fn send(&self, server: SocketAddr, question: &[u8]) -> io::Result<usize> {
        // A connected socket takes no address.
        if self.socket.peer_addr().is_ok() { self.socket.send(question) } else { self.socket.send_to(question, server) }
    }
}

fn parse(answer: &[u8], payload: &[u8]) -> Result<Answer> {
    let mut parts = answer.splitn(3, |byte| *byte == b'\n');
    let mut line = || parts.next().context("too short");
    let (backend, client, body) = (line()?, line()?, line()?);
    if body != payload {
        bail!("{} bytes of payload came back as others", payload.len());
    }
    Ok(Answer {
        backend: str::from_utf8(backend)?.to_owned(),
        client: str::from_utf8(client)?.parse()?,
        body: body.to_vec(),
    })
}
