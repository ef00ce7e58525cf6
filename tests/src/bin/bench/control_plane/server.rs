//! As much of an API server as a watch needs: lists as a stream, then what it is told to send. It costs next to nothing
//! itself, so that what is measured is whoever watches.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use affinity_tests::netns::Netns;
use affinity_tests::wait;
use anyhow::{Context as _, Result};

use super::cluster::Cluster;

/// How many bytes of a list are written at a time.
const CHUNK: usize = 1 << 16;
/// How often a watch that has nothing to say gets a bookmark.
const BOOKMARK: Duration = Duration::from_secs(30);
/// How long lists may take.
const PATIENCE: Duration = Duration::from_mins(5);

/// The server. Its threads end with the process.
#[derive(Clone)]
pub struct Server {
    cluster: Cluster,
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    slices: Vec<Sender<String>>,
    /// When the last byte of each list was taken.
    listed: Vec<Instant>,
}

/// What is asked for, by its path.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Services,
    Slices,
    /// Of which there are none.
    Other(&'static str, &'static str),
}

impl Kind {
    fn of(path: &str) -> Self {
        match path.rsplit('/').next() {
            Some("services") => Self::Services,
            Some("endpointslices") => Self::Slices,
            Some("nodes") => Self::Other("v1", "Node"),
            Some("pods") => Self::Other("v1", "Pod"),
            _ => Self::Other("v1", "Namespace"),
        }
    }

    fn bookmark(self, end_of_list: bool) -> String {
        let (version, kind) = match self {
            Self::Services => ("v1", "Service"),
            Self::Slices => ("discovery.k8s.io/v1", "EndpointSlice"),
            Self::Other(version, kind) => (version, kind),
        };
        let end = if end_of_list { r#","annotations":{"k8s.io/initial-events-end":"true"}"# } else { "" };
        let object = format!(
            r#"{{"kind":"{kind}","apiVersion":"{version}","metadata":{{"resourceVersion":"1"{end}}},"addressType":"","endpoints":[]}}"#
        );
        event("BOOKMARK", &object)
    }
}

fn event(what: &str, object: &str) -> String {
    format!(r#"{{"type":"{what}","object":{object}}}"#) + "\n"
}

impl Server {
    /// Listens on loopback in a namespace.
    pub fn start(netns: &Netns, cluster: Cluster) -> Result<Self> {
        let listener = netns.enter(|| Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?))?;
        let server = Self { cluster, address: listener.local_addr()?, shared: Arc::default() };
        let accepting = server.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = accepting.clone();
                // A daemon that goes away in the middle is no news.
                thread::spawn(move || drop(server.serve(stream)));
            }
        });
        Ok(server)
    }

    /// A kubeconfig that leads to it.
    pub fn kubeconfig(&self) -> String {
        format!(
            "apiVersion: v1\nkind: Config\nclusters: [{{name: bench, cluster: {{server: \"http://{}\"}}}}]\n\
             users: [{{name: bench, user: {{}}}}]\ncontexts: [{{name: bench, context: {{cluster: bench, user: bench}}}}]\n\
             current-context: bench\n",
            self.address
        )
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until both lists have been taken; returns when that was.
    pub fn wait_listed(&self) -> Result<Instant> {
        wait::until("lists that are taken", PATIENCE, || {
            let shared = self.shared();
            Ok(shared.listed.iter().max().copied().filter(|_| shared.listed.len() >= 2))
        })
    }

    /// Sends another version of a service's slice to whoever watches.
    pub fn change(&self, service: u32, version: u32) {
        let event = event("MODIFIED", &self.cluster.slice(service, version));
        self.shared().slices.retain(|watch| watch.send(event.clone()).is_ok());
    }

    fn serve(&self, mut stream: TcpStream) -> Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        loop {
            let mut first = String::new();
            if reader.read_line(&mut first)? == 0 {
                return Ok(());
            }
            let mut line = String::new();
            while reader.read_line(&mut line)? > 2 {
                line.clear();
            }
            let target = first.split(' ').nth(1).context("no request")?;
            let (path, query) = target.split_once('?').unwrap_or((target, ""));
            let kind = Kind::of(path);
            if query.contains("watch=") {
                return self.watch(&mut stream, kind, query.contains("sendInitialEvents=true"));
            }
            let body = r#"{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}"#;
            let head = "HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\n";
            write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len())?;
        }
    }

    fn watch(&self, stream: &mut TcpStream, kind: Kind, lists: bool) -> Result<()> {
        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes())?;
        let (sender, events) = mpsc::channel();
        if kind == Kind::Slices {
            self.shared().slices.push(sender.clone());
        }
        if lists {
            self.list(stream, kind)?;
        }
        loop {
            match events.recv_timeout(BOOKMARK) {
                Ok(mut text) => {
                    text.extend(events.try_iter());
                    chunk(stream, &text)?;
                }
                Err(RecvTimeoutError::Timeout) => chunk(stream, &kind.bookmark(false))?,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    }

    fn list(&self, stream: &mut TcpStream, kind: Kind) -> Result<()> {
        let mut text = String::with_capacity(CHUNK * 2);
        for service in 0..self.cluster.services {
            match kind {
                Kind::Services => text.push_str(&event("ADDED", &self.cluster.service(service))),
                Kind::Slices => text.push_str(&event("ADDED", &self.cluster.slice(service, 0))),
                Kind::Other(..) => break,
            }
            if text.len() >= CHUNK {
                chunk(stream, &text)?;
                text.clear();
            }
        }
        text.push_str(&kind.bookmark(true));
        chunk(stream, &text)?;
        if !matches!(kind, Kind::Other(..)) {
            self.shared().listed.push(Instant::now());
        }
        Ok(())
    }
}

fn chunk(stream: &mut TcpStream, text: &str) -> Result<()> {
    stream.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes())?;
    Ok(())
}
