//! The HTTP server: `/metrics`, `/healthz`, `/livez` and `/readyz`, on a thread of its own, so that it answers whatever
//! the daemon's task does.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv6Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use thiserror::Error;
use tokio::sync::{Semaphore, oneshot};

use crate::health::{GOING, Pulse, is_going, readiness};
use crate::listen;
use crate::metrics::{Metrics, exposition::Format};

/// How many connections are served at a time.
const CONNECTIONS: usize = 64;
/// How long a client may take for its request's header.
const HEADER: Duration = Duration::from_secs(5);

/// An address can't be listened on.
#[derive(Debug, Error)]
#[error("{option} {address}: {source}{}", hint(source))]
pub struct ListenError {
    /// The command line's option.
    pub option: &'static str,
    /// The address.
    pub address: SocketAddr,
    /// Why not.
    pub source: io::Error,
}

fn hint(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::AddrInUse {
        ": another affinity, or kube-proxy, whose ports are the same, has it: end that, or give another address or `off`"
    } else {
        ""
    }
}

/// Where to listen; `None` is nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// For everything, metrics included.
    pub metrics: Option<SocketAddr>,
    /// For health alone.
    pub health: Option<SocketAddr>,
}

impl Default for Addresses {
    fn default() -> Self {
        Self { metrics: Some(([127, 0, 0, 1], 10249).into()), health: Some((Ipv6Addr::UNSPECIFIED, 10256).into()) }
    }
}

/// A listener, and what may be asked there.
#[derive(Debug)]
struct Door {
    listener: TcpListener,
    with_metrics: bool,
}

/// Listeners that nobody serves yet: connections wait.
#[derive(Debug)]
pub struct Listeners {
    doors: Vec<Door>,
}

impl Listeners {
    /// Listens.
    ///
    /// # Errors
    /// Where an address is taken, or none of this node's.
    pub fn bind(addresses: &Addresses) -> Result<Self, ListenError> {
        let same = addresses.metrics.is_some() && addresses.metrics == addresses.health;
        let health = addresses.health.filter(|_| !same);
        let wanted = [("--metrics-address", addresses.metrics, true), ("--health-address", health, false)].into_iter();
        let doors = wanted.filter_map(|(option, address, with_metrics)| {
            let address = address?;
            let door = listen::bind(address).map(|listener| Door { listener, with_metrics });
            Some(door.map_err(|source| ListenError { option, address, source }))
        });
        Ok(Self { doors: doors.collect::<Result<_, _>>()? })
    }

    /// Where they listen.
    pub fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.doors.iter().filter_map(|door| door.listener.local_addr().ok())
    }

    /// Serves what comes, on a thread.
    ///
    /// # Errors
    /// Where there is no further thread.
    pub fn serve(self, metrics: Arc<Metrics>, pulse: Arc<Pulse>) -> io::Result<Server> {
        let (stop, stopped) = oneshot::channel::<()>();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = thread::Builder::new().name("http".to_owned()).spawn(move || {
            runtime.block_on(async {
                for door in self.doors {
                    let app = App { metrics: metrics.clone(), pulse: pulse.clone(), with_metrics: door.with_metrics };
                    match tokio::net::TcpListener::from_std(door.listener) {
                        Ok(listener) => drop(tokio::spawn(serve(listener, app))),
                        Err(error) => tracing::error!(%error, "a listener can't be served"),
                    }
                }
                // It is dropped when the server is.
                let _ = stopped.await;
            });
            // A scrape that is under way is not waited for.
            runtime.shutdown_background();
        })?;
        Ok(Server { stop: Some(stop), thread: Some(thread) })
    }
}

/// A handle of the thread, which ends when this is dropped.
#[derive(Debug)]
pub struct Server {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Clone, Debug)]
struct App {
    metrics: Arc<Metrics>,
    pulse: Arc<Pulse>,
    with_metrics: bool,
}

/// Something that answers requests.
pub(crate) trait Answers: Clone + Send + Sync + 'static {
    /// The answer to a request.
    fn answer(
        &self,
        request: Request<Incoming>,
    ) -> impl Future<Output = Result<Response<Full<Bytes>>, Infallible>> + Send;
}

/// Serves what comes, so many at a time, for ever.
pub(crate) async fn serve(listener: tokio::net::TcpListener, app: impl Answers) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = room.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: others may close some.
                tracing::debug!(%error, "a connection can't be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let app = app.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| app.answer(request));
            let mut http = http1::Builder::new();
            let connection = http
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended early");
            }
            drop(place);
        });
    }
}

impl Answers for App {
    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return Ok(text(StatusCode::METHOD_NOT_ALLOWED, "GET and HEAD are answered\n".to_owned()));
        }
        Ok(match request.uri().path() {
            // Load balancers ask the one, by which they leave a node that is about to go, and kubelets the other.
            path @ ("/healthz" | "/livez") => match self.pulse.check().await {
                Ok(()) if path == "/healthz" && is_going(self.metrics.published().as_deref()) => {
                    text(StatusCode::SERVICE_UNAVAILABLE, GOING.to_owned())
                }
                Ok(()) => text(StatusCode::OK, "ok\n".to_owned()),
                Err(stuck) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{stuck}\n")),
            },
            "/readyz" => {
                let (ready, body) = readiness(self.metrics.published().as_deref());
                text(if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, body)
            }
            "/metrics" if self.with_metrics => {
                let accept = request.headers().get(ACCEPT).and_then(|value| value.to_str().ok());
                self.exposition(Format::accepted(accept.unwrap_or_default())).await
            }
            _ => {
                let metrics = if self.with_metrics { ", /metrics" } else { "" };
                text(StatusCode::NOT_FOUND, format!("there are /healthz, /livez, /readyz{metrics}\n"))
            }
        })
    }
}

impl App {
    async fn exposition(&self, format: Format) -> Response<Full<Bytes>> {
        let metrics = self.metrics.clone();
        // Maps of a million entries take their time: others are answered meanwhile.
        match tokio::task::spawn_blocking(move || metrics.text()).await {
            Ok(Ok(open_metrics)) => {
                let mut response = Response::new(Full::from(format.of(&open_metrics)));
                response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(format.content_type()));
                response
            }
            Ok(Err(error)) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::{Read as _, Write as _};
    use std::net::TcpStream;

    use super::*;
    use crate::metrics::{IgnoredTriggers, Published};
    use crate::reconcile::Counts;
    use crate::status::{NodeStatus, SourceStatus, StatusFile};
    use crate::tables::memory::MemoryTables;

    /// The status code of an answer.
    fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).expect("a server");
        write!(stream, "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").expect("a server");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("an answer");
        text.split(' ').nth(1).expect("a status line").to_owned()
    }

    #[test]
    fn load_balancers_leave_a_node_that_goes_and_kubelets_do_not_restart_the_daemon() {
        let metrics = Arc::new(Metrics::new(MemoryTables::default().tables()));
        let publish = |going| {
            let mut status = StatusFile::new(SourceStatus::new("directory", "/somewhere")).expect("proc");
            status.node = Some(NodeStatus { name: "here".to_owned(), known: true, zone: None, going });
            metrics.publish(Published {
                status,
                seen_interfaces: true,
                counts: Counts::default(),
                sources: BTreeMap::new(),
                ignored: IgnoredTriggers::default(),
            });
        };
        let addresses = Addresses { metrics: None, health: Some(([127, 0, 0, 1], 0).into()) };
        let listeners = Listeners::bind(&addresses).expect("a port");
        let address = listeners.addresses().next().expect("an address");
        // A task that is busy is alive for a while.
        let (pulse, pings) = Pulse::new();
        let server = listeners.serve(metrics.clone(), Arc::new(pulse)).expect("a thread");
        assert_eq!((get(address, "/healthz"), get(address, "/livez")), ("200".to_owned(), "200".to_owned()));
        publish(true);
        assert_eq!((get(address, "/healthz"), get(address, "/livez")), ("503".to_owned(), "200".to_owned()));
        publish(false);
        assert_eq!((get(address, "/healthz"), get(address, "/livez")), ("200".to_owned(), "200".to_owned()));
        drop(server);
        drop(pings);
    }
}
