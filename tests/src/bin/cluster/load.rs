//! A load: one client that asks one address again and again, in the namespace and the cgroup of a process in the cluster, and
//! counts every answer. It is a process of its own, since a process as a whole is in a cgroup.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use affinity_user::loader::cgroup;
use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// How long an answer may take before it counts as failed. What is lost never comes; a machine with much else to do can be
/// seconds late.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// A pod's name, by HTTP on a connection of its own each time.
    Http,
    /// The same on one connection, for as long as that lasts.
    KeptHttp,
    /// The same by a datagram, from a socket of its own each time.
    Udp,
    /// The address of a service, by DNS in a datagram.
    DnsUdp,
    /// The same by DNS over TCP.
    DnsTcp,
    /// Any answer of the API server's.
    Api,
}

/// What a load does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// The process whose network namespace and cgroup it runs in.
    pub like: u32,
    /// What it asks.
    pub question: Question,
    /// Whom it asks.
    pub server: SocketAddr,
    /// How often; without end where there is none, until its standard input is closed.
    pub count: Option<u64>,
    /// How long it rests after each answer.
    pub pause: Duration,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// How many requests were made, those that failed among them.
    pub requests: u64,
    /// How many had no right answer.
    pub failed: u64,
    /// How often an answer came from another pod than the one before it.
    pub moved: u64,
    /// Who answered how often.
    pub pods: BTreeMap<String, u64>,
    /// Why requests failed, and how often.
    pub errors: BTreeMap<String, u64>,
    /// The slowest answer that was right.
    pub slowest: Duration,
    /// The slowest refusal or failure.
    pub slowest_failure: Duration,
    last: Option<String>,
}

impl Seen {
    fn answer(&mut self, pod: String, took: Duration) {
        self.requests += 1;
        self.slowest = self.slowest.max(took);
        *self.pods.entry(pod.clone()).or_default() += 1;
        self.moved += u64::from(self.last.as_ref().is_some_and(|last| *last != pod));
        self.last = Some(pod);
    }

    fn failure(&mut self, error: &anyhow::Error, took: Duration) {
        self.requests += 1;
        self.failed += 1;
        self.slowest_failure = self.slowest_failure.max(took);
        *self.errors.entry(format!("{error:#}")).or_default() += 1;
    }

    /// The pod that answered last.
    pub fn pod(&self) -> Option<&str> {
        self.last.as_deref()
    }

    /// Adds what another load saw; pods are those of either.
    pub fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.failed += other.failed;
        self.moved += other.moved;
        self.slowest = self.slowest.max(other.slowest);
        self.slowest_failure = self.slowest_failure.max(other.slowest_failure);
        for (pod, count) in &other.pods {
            *self.pods.entry(pod.clone()).or_default() += count;
        }
        for (error, count) in &other.errors {
            *self.errors.entry(error.clone()).or_default() += count;
        }
    }
}

/// Does what the order says, and returns what came of it.
///
/// # Errors
/// Where the namespace or the cgroup can't be entered. What happens to requests is no error.
pub fn run(order: &Order) -> Result<Seen> {
    enter(order.like).with_context(|| format!("entering the namespaces of process {}", order.like))?;
    let over = Arc::new(AtomicBool::new(false));
    thread::spawn({
        let over = Arc::clone(&over);
        move || {
            let _ = io::copy(&mut io::stdin(), &mut io::sink());
            over.store(true, Ordering::Relaxed);
        }
    });
    let mut seen = Seen::default();
    let mut socket = Socket::default();
    while !over.load(Ordering::Relaxed) && order.count.is_none_or(|count| seen.requests < count) {
        let started = Instant::now();
        match ask(order, &mut socket) {
            Ok(pod) => seen.answer(pod, started.elapsed()),
            Err(error) => seen.failure(&error, started.elapsed()),
        }
        thread::sleep(order.pause);
    }
    Ok(seen)
}

/// Before there is a second thread, which would be left behind.
fn enter(like: u32) -> Result<()> {
    let cgroups = fs::read_to_string(format!("/proc/{like}/cgroup"))?;
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::/")).context("no cgroup of version 2")?;
    let procs = cgroup::find(None)?.join(path).join("cgroup.procs");
    fs::write(&procs, "0").with_context(|| procs.display().to_string())?;
    let namespace = fs::File::open(format!("/proc/{like}/ns/net"))?;
    Ok(setns(namespace, CloneFlags::CLONE_NEWNET)?)
}

/// Source ports of datagrams. The kernel's own choice is random, and soon one that was used a moment ago, by this load or by an
/// earlier one: the same flow then, which stays where it was when its client moved. By those below 30000 a node sends what
/// comes from outside on to other nodes' pods, and nodes are among the clients.
const PORTS: RangeInclusive<u16> = 40_000..=60_000;
/// How long each of them is the next one of every load: all are used up after two minutes, which is longer than a flow lives
/// that was asked and answered once.
const TURN: Duration = Duration::from_millis(6);

/// What requests share.
#[derive(Default)]
struct Socket {
    /// The connection of [`Question::KeptHttp`].
    kept: Option<BufReader<TcpStream>>,
    /// How many turns of ports were used up.
    turns: u128,
}

impl Socket {
    /// A socket on the next port that nobody has, by the clock that all loads share.
    fn bind(&mut self, any: IpAddr) -> Result<UdpSocket> {
        let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
        self.turns = (self.turns + 1).max(now.as_nanos() / TURN.as_nanos());
        loop {
            let place = u16::try_from(self.turns % PORTS.len() as u128)?;
            match UdpSocket::bind(SocketAddr::new(any, PORTS.start() + place)) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => self.turns += 1,
                bound => return Ok(bound?),
            }
        }
    }
}

fn ask(order: &Order, socket: &mut Socket) -> Result<String> {
    match order.question {
        Question::Http => http(&mut BufReader::new(connect(order.server)?), "close"),
        Question::KeptHttp => {
            let mut connection = match socket.kept.take() {
                Some(connection) => connection,
                None => BufReader::new(connect(order.server)?),
            };
            let pod = http(&mut connection, "keep-alive")?;
            socket.kept = Some(connection);
            Ok(pod)
        }
        Question::Udp => datagram(order.server, socket, b"hostname").and_then(text),
        Question::DnsUdp => {
            let answer = datagram(order.server, socket, &dns_query())?;
            dns_answer(&answer)
        }
        Question::DnsTcp => {
            let mut connection = connect(order.server)?;
            let query = dns_query();
            connection.write_all(&[&u16::try_from(query.len())?.to_be_bytes(), query.as_slice()].concat())?;
            let mut length = [0; 2];
            connection.read_exact(&mut length)?;
            let mut answer = vec![0; u16::from_be_bytes(length).into()];
            connection.read_exact(&mut answer)?;
            dns_answer(&answer)
        }
        Question::Api => {
            // Not worth a TLS library: the server says in plain words that it wants TLS.
            let mut connection = connect(order.server)?;
            connection.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            connection.read_to_string(&mut answer)?;
            if !answer.contains("HTTPS server") {
                bail!("the API server said {answer:?}");
            }
            Ok("the API server".to_owned())
        }
    }
}

fn connect(server: SocketAddr) -> Result<TcpStream> {
    let connection = TcpStream::connect_timeout(&server, PATIENCE).context("connecting")?;
    connection.set_read_timeout(Some(PATIENCE))?;
    connection.set_write_timeout(Some(PATIENCE))?;
    connection.set_nodelay(true)?;
    Ok(connection)
}

/// `GET /hostname` of agnhost's netexec.
fn http(connection: &mut BufReader<TcpStream>, then: &str) -> Result<String> {
    let request = format!("GET /hostname HTTP/1.1\r\nHost: web\r\nConnection: {then}\r\n\r\n");
    connection.get_mut().write_all(request.as_bytes()).context("asking")?;
    let mut line = String::new();
    connection.read_line(&mut line).context("the answer")?;
    if !line.starts_with("HTTP/1.1 200 ") {
        bail!("the answer is {:?}", line.trim_end());
    }
    let mut length = None;
    loop {
        line.clear();
        connection.read_line(&mut line).context("the answer")?;
        let header = line.trim_end();
        if header.is_empty() {
            break;
        }
        if let Some((name, value)) = header.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = Some(value.trim().parse()?);
        }
    }
    let mut body = vec![0; length.context("an answer without a length")?];
    connection.read_exact(&mut body).context("the answer")?;
    text(body)
}

fn datagram(server: SocketAddr, socket: &mut Socket, content: &[u8]) -> Result<Vec<u8>> {
    let any = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = socket.bind(any)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(server).context("connecting")?;
    socket.send(content).context("sending")?;
    let mut buffer = [0; 1500];
    let length = socket.recv(&mut buffer).context("the answer")?;
    Ok(buffer[..length].to_vec())
}

fn text(content: Vec<u8>) -> Result<String> {
    let name = String::from_utf8(content).context("the answer")?.trim().to_owned();
    if name.is_empty() || name.contains(char::is_whitespace) {
        bail!("the answer is no name: {name:?}");
    }
    Ok(name)
}

/// For the IPv4 address of the API server's service.
fn dns_query() -> Vec<u8> {
    let mut query = vec![0xaf, 0x1f, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in ["kubernetes", "default", "svc", "cluster", "local"] {
        query.push(u8::try_from(label.len()).unwrap_or_default());
        query.extend_from_slice(label.as_bytes());
    }
    query.extend_from_slice(&[0, 0, 1, 0, 1]);
    query
}

/// Which address it is, by the only answer.
fn dns_answer(answer: &[u8]) -> Result<String> {
    let [_, _, flags, code, _, _, _, 1, .., a, b, c, d] = answer else {
        bail!("the answer has {} bytes and not one address", answer.len());
    };
    let (flags, code) = (*flags, *code & 0xf);
    if flags & 0x80 == 0 || code != 0 {
        bail!("the answer has the code {code}");
    }
    Ok(Ipv4Addr::new(*a, *b, *c, *d).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_are_counted_between_answers() {
        let mut seen = Seen::default();
        for pod in ["a", "a", "b", "a"] {
            seen.answer(pod.to_owned(), Duration::ZERO);
        }
        seen.failure(&anyhow::anyhow!("no"), Duration::ZERO);
        seen.answer("a".to_owned(), Duration::ZERO);
        assert_eq!((seen.requests, seen.failed, seen.moved, seen.pod()), (6, 1, 2, Some("a")));
        let mut sum = seen.clone();
        sum.add(&seen);
        assert_eq!((sum.requests, sum.failed, sum.moved, sum.pods["a"]), (12, 2, 4, 8));
    }

    #[test]
    fn dns_answers_are_told_from_refusals() {
        let mut answer = dns_query();
        answer[2] = 0x81;
        answer[7] = 1;
        answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 10, 96, 0, 1]);
        assert_eq!(dns_answer(&answer).expect("an address"), "10.96.0.1");
        answer[3] = 3;
        assert!(dns_answer(&answer).is_err());
        assert!(dns_answer(&[0; 4]).is_err());
    }
}
