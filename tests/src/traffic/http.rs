//! HTTP/1.1, as little of it as the labs need: names, echoes, connections that are kept alive.
//!
//! | request | answer |
//! |---|---|
//! | `GET /` | the name of the backend |
//! | `POST /echo` | the body of the request |
//!
//! Every answer has the headers `X-Backend` (its name) and `X-Client` (who asked, as the backend saw it).

use std::collections::HashMap;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use socket2::{SockRef, Type};

use super::{Answer, ClientOptions, bind_any, client_socket, unmapped};
use crate::netns::Netns;
use crate::sys::no_address;

/// The largest body that either side accepts, in bytes.
const MAX_BODY: usize = 64 << 20;

/// Serves a name over HTTP until it is stopped or dropped.
#[derive(Debug)]
pub struct HttpServer {
    listener: TcpListener,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    name: String,
    stopped: AtomicBool,
    requests: AtomicUsize,
    /// The connections that are open, by a number of their own.
    open: Mutex<HashMap<usize, TcpStream>>,
}

impl HttpServer {
    /// Serves `name` on a port of every address in the namespace.
    ///
    /// # Errors
    /// Where the port is taken.
    pub fn start(netns: &Netns, port: u16, name: &str) -> Result<Self> {
        let listener: TcpListener = netns
            .enter(|| {
                let socket = bind_any(Type::STREAM, port)?;
                socket.listen(1024)?;
                Ok(socket.into())
            })
            .with_context(|| format!("HTTP server {name} on port {port}"))?;
        let shared = Arc::new(Shared { name: name.to_owned(), ..Shared::default() });
        let thread = thread::Builder::new().name(format!("http {name}")).spawn({
            let (listener, shared) = (listener.try_clone()?, Arc::clone(&shared));
            move || accept(&listener, &shared)
        })?;
        Ok(Self { listener, shared, thread: Some(thread) })
    }

    /// The name it serves.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// How many requests it has answered.
    pub fn requests(&self) -> usize {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// How many connections are open.
    pub fn connections(&self) -> usize {
        self.shared.connections().len()
    }

    /// Closes the port and every connection, as when the pod's process ends.
    pub fn stop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.shared.stopped.store(true, Ordering::SeqCst);
        // Wakes `accept`, which no closing of the descriptor would.
        let _ = SockRef::from(&self.listener).shutdown(Shutdown::Both);
        let _ = thread.join();
        for stream in self.shared.connections().values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn connections(&self) -> std::sync::MutexGuard<'_, HashMap<usize, TcpStream>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    for number in 0.. {
        let accepted = listener.accept();
        if shared.stopped.load(Ordering::SeqCst) {
            return;
        }
        let Ok((stream, client)) = accepted else {
            // Out of descriptors, or a connection that was reset before it was accepted.
            thread::sleep(Duration::from_millis(10));
            continue;
        };
        let Ok(kept) = stream.try_clone() else {
            continue;
        };
        shared.connections().insert(number, kept);
        let shared = Arc::clone(shared);
        let spawned = thread::Builder::new().name(format!("http {}", shared.name)).spawn({
            let shared = Arc::clone(&shared);
            move || {
                // A client that goes away in the middle is no news.
                let _ = serve(stream, client, &shared);
                shared.connections().remove(&number);
            }
        });
        if spawned.is_err() {
            shared.connections().remove(&number);
        }
    }
}

fn serve(mut stream: TcpStream, client: SocketAddr, shared: &Shared) -> Result<()> {
    stream.set_nodelay(true)?;
    let client = unmapped(client);
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(request) = Message::read(&mut reader)? {
        let (status, body) = match request.first_line.split(' ').collect::<Vec<_>>()[..] {
            ["GET", "/", _] => ("200 OK", shared.name.as_bytes()),
            ["POST", "/echo", _] => ("200 OK", &request.body[..]),
            _ => ("404 Not Found", &b"no such page\n"[..]),
        };
        let close = request.closes();
        shared.requests.fetch_add(1, Ordering::Relaxed);
        let head = format!(
            "HTTP/1.1 {status}\r\nX-Backend: {}\r\nX-Client: {client}\r\nContent-Length: {}\r\nConnection: {}\r\n\r\n",
            shared.name,
            body.len(),
            if close { "close" } else { "keep-alive" },
        );
        stream.write_all(&[head.as_bytes(), body].concat())?;
        if close {
            break;
        }
    }
    stream.shutdown(Shutdown::Both)?;
    Ok(())
}

/// A request or an answer.
struct Message {
    first_line: String,
    headers: HashMap<String, String>,
    body: Vec<u8>,
}

impl Message {
    /// Reads one; none at the end of the connection.
    fn read(reader: &mut BufReader<TcpStream>) -> Result<Option<Self>> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                if lines.is_empty() {
                    return Ok(None);
                }
                bail!("the connection ended within the headers");
            }
            let line = line.trim_end();
            if line.is_empty() {
                break;
            }
            lines.push(line.to_owned());
        }
        let headers: HashMap<String, String> = lines
            .iter()
            .skip(1)
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        let length = headers.get("content-length").map_or(Ok(0), |v| v.parse())?;
        if length > MAX_BODY {
            bail!("a body of {length} bytes");
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        Ok(Some(Self { first_line: lines.into_iter().next().unwrap_or_default(), headers, body }))
    }

    fn header(&self, name: &str) -> Result<&str> {
        self.headers.get(name).map(String::as_str).with_context(|| format!("an answer without {name}"))
    }

    fn closes(&self) -> bool {
        self.headers.get("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }
}

/// Posts JSON to any HTTP server that this process reaches, and returns the body of its answer.
pub(crate) fn post_json(server: SocketAddr, path: &str, json: &str) -> Result<Vec<u8>> {
    let mut connection = HttpConnection::open_here(server, &ClientOptions::default())?;
    connection.send("POST", path, "close", json.as_bytes())?;
    Ok(connection.receive()?.body)
}

/// Asks for a name once, on a connection of its own.
///
/// # Errors
/// Where there is no connection or no answer within the timeout.
pub fn http_get(netns: &Netns, server: SocketAddr, options: &ClientOptions) -> Result<Answer> {
    let mut connection = HttpConnection::open(netns, server, options)?;
    connection.exchange("GET", "/", "close", &[])
}

/// A client's connection, kept alive from request to request.
#[derive(Debug)]
pub struct HttpConnection {
    reader: BufReader<TcpStream>,
    server: SocketAddr,
}

impl HttpConnection {
    /// Connects from a namespace.
    ///
    /// # Errors
    /// Where there is no connection within the timeout.
    pub fn open(netns: &Netns, server: SocketAddr, options: &ClientOptions) -> Result<Self> {
        netns.enter(|| Self::open_here(server, options))
    }

    /// Connects from the calling thread's namespace: for many connections within one [`Netns::enter`].
    ///
    /// # Errors
    /// Where there is no connection within the timeout.
    pub fn open_here(server: SocketAddr, options: &ClientOptions) -> Result<Self> {
        let connect = || -> io::Result<TcpStream> {
            let socket = client_socket(Type::STREAM, server, options)?;
            socket.connect_timeout(&server.into(), options.timeout)?;
            socket.set_read_timeout(Some(options.timeout))?;
            socket.set_write_timeout(Some(options.timeout))?;
            socket.set_tcp_nodelay(true)?;
            Ok(socket.into())
        };
        let stream = connect().with_context(|| format!("connecting to {server}"))?;
        Ok(Self { reader: BufReader::new(stream), server })
    }

    /// Whom the client is connected to, as the client sees it.
    ///
    /// # Errors
    /// Where the socket cannot be asked.
    pub fn peer_addr(&self) -> Result<SocketAddr> {
        Ok(self.reader.get_ref().peer_addr()?)
    }

    /// Asks for the name of the backend.
    ///
    /// # Errors
    /// Where there is no answer within the timeout.
    pub fn get(&mut self) -> Result<Answer> {
        self.exchange("GET", "/", "keep-alive", &[])
    }

    /// Sends `length` bytes that depend on `seed`, has them sent back, and compares.
    ///
    /// # Errors
    /// Where there is no answer within the timeout, or one with other bytes.
    pub fn echo(&mut self, length: usize, seed: u64) -> Result<Answer> {
        let mut sent = vec![0; length];
        fastrand::Rng::with_seed(seed).fill(&mut sent);
        let answer = self.exchange("POST", "/echo", "keep-alive", &sent)?;
        if answer.body == sent {
            return Ok(answer);
        }
        let at = sent.iter().zip(&answer.body).position(|(a, b)| a != b);
        bail!("{} sent back {} bytes of {length}, the first wrong one at {at:?}", answer.backend, answer.body.len());
    }

    /// The client's side of the connection, as the client sees it.
    ///
    /// # Errors
    /// Where the socket cannot be asked.
    pub fn local_addr(&self) -> Result<SocketAddr> {
        Ok(self.reader.get_ref().local_addr()?)
    }

    /// Closes it with a reset instead of a FIN, at once: also where a child process that is about to be another program has the
    /// socket, too.
    ///
    /// # Errors
    /// Where the socket can't be disconnected.
    pub fn reset(self) -> Result<()> {
        let stream = self.reader.into_inner();
        Ok(SockRef::from(&stream).connect(&no_address())?)
    }

    /// Waits until the backend closes or resets it. True where it was reset.
    ///
    /// # Errors
    /// Where neither comes within the timeout, or something else is received.
    pub fn wait_closed(&mut self) -> Result<bool> {
        match self.reader.read(&mut [0]) {
            Ok(0) => Ok(false),
            Ok(_) => bail!("{} sent something unasked", self.server),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(true),
            Err(error) => Err(error).with_context(|| format!("waiting for {}", self.server)),
        }
    }

    fn exchange(&mut self, method: &str, path: &str, then: &str, body: &[u8]) -> Result<Answer> {
        self.send(method, path, then, body)?;
        let answer = self.receive()?;
        Ok(Answer {
            backend: answer.header("x-backend")?.to_owned(),
            client: answer.header("x-client")?.parse()?,
            body: answer.body,
        })
    }

    fn send(&mut self, method: &str, path: &str, then: &str, body: &[u8]) -> Result<()> {
        let server = self.server;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {server}\r\nContent-Length: {}\r\nConnection: {then}\r\n\r\n",
            body.len()
        );
        let request = [head.as_bytes(), body].concat();
        self.reader.get_mut().write_all(&request).with_context(|| format!("asking {server}"))
    }

    fn receive(&mut self) -> Result<Message> {
        let server = self.server;
        let answer = Message::read(&mut self.reader)
            .with_context(|| format!("the answer of {server}"))?
            .with_context(|| format!("{server} closed the connection without an answer"))?;
        if !answer.first_line.starts_with("HTTP/1.1 200 ") {
            bail!("{server} answered {}: {}", answer.first_line, String::from_utf8_lossy(&answer.body));
        }
        Ok(answer)
    }
}
