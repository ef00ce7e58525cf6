//! What load balancers ask of services with `externalTrafficPolicy: Local`: an HTTP server at each `healthCheckNodePort`, which
//! answers as kube-proxy's does. They send a service's clients to the nodes that have endpoints of it.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::Display;
use std::io;
use std::net::Ipv6Addr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use affinity_common::types::Port;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use hyper::{Request, Response, StatusCode};
use tokio::sync::watch;
use tokio::task::JoinHandle as Task;
use tokio::time::timeout;

use crate::health::Pulse;
use crate::listen;
use crate::model::{Kind, ServiceName, Subject};
use crate::plan::HealthCheck;
use crate::server::{self, Answers};
use crate::status::ProblemStatus;

/// The number of endpoints that a load balancer may weigh the node by.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");
/// How often a port that can't be listened on is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// What is to be answered, by service.
type Wanted = BTreeMap<ServiceName, HealthCheck>;
/// Why nothing is, by service.
type Failures = BTreeMap<ServiceName, String>;

/// The servers, on a thread of their own, which ends when this is dropped.
#[derive(Debug)]
pub struct HealthChecks {
    wanted: Option<watch::Sender<Wanted>>,
    failures: Arc<Mutex<Failures>>,
    thread: Option<JoinHandle<()>>,
}

impl HealthChecks {
    /// None at first. `pulse` says whether the proxy is healthy; `changed` is called when [`Self::problems`] are others.
    ///
    /// # Errors
    /// Where there is no further thread.
    pub fn start(pulse: Arc<Pulse>, changed: impl Fn() + Send + 'static) -> io::Result<Self> {
        let (wanted, asked) = watch::channel(Wanted::new());
        let failures = Arc::new(Mutex::new(Failures::new()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let servers = Servers { pulse, open: BTreeMap::new() };
        let told = failures.clone();
        let thread = thread::Builder::new().name("health-checks".to_owned()).spawn(move || {
            runtime.block_on(servers.follow(asked, &told, changed));
            // An answer that is under way is not waited for.
            runtime.shutdown_background();
        })?;
        Ok(Self { wanted: Some(wanted), failures, thread: Some(thread) })
    }

    /// These are to be there, and no others.
    pub fn set(&self, wanted: &Wanted) {
        if let Some(sender) = &self.wanted {
            sender.send_if_modified(|is| {
                let differs = is != wanted;
                is.clone_from(wanted);
                differs
            });
        }
    }

    /// The services whose port can't be listened on, and why.
    pub fn problems(&self) -> Vec<ProblemStatus> {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let problem = |(name, message): (&ServiceName, &String)| ProblemStatus {
            object: Subject::Object(Kind::Service, name.clone()).to_string(),
            message: message.clone(),
        };
        failures.iter().map(problem).collect()
    }
}

impl Drop for HealthChecks {
    fn drop(&mut self) {
        self.wanted = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A server that listens.
struct Open {
    port: Port,
    local_endpoints: Arc<AtomicU32>,
    task: Task<()>,
}

struct Servers {
    pulse: Arc<Pulse>,
    open: BTreeMap<ServiceName, Open>,
}

impl Servers {
    /// Brings them to what is wanted, until nobody says that any more.
    async fn follow(mut self, mut asked: watch::Receiver<Wanted>, told: &Mutex<Failures>, changed: impl Fn()) {
        loop {
            let wanted = asked.borrow_and_update().clone();
            let failures = self.bring_to(&wanted).await;
            let fails = !failures.is_empty();
            if note(told, failures) {
                changed();
            }
            let ended = if fails {
                timeout(RETRY, asked.changed()).await.is_ok_and(|changed| changed.is_err())
            } else {
                asked.changed().await.is_err()
            };
            if ended {
                return;
            }
        }
    }

    /// Returns why some can't be there. Those that go are closed first: another may want the port.
    async fn bring_to(&mut self, wanted: &Wanted) -> Failures {
        let is_over = |name: &ServiceName, open: &Open| wanted.get(name).is_none_or(|check| check.port != open.port);
        for (_, open) in self.open.extract_if(.., |name, open| is_over(name, open)) {
            open.task.abort();
            // It has let go of its port when it has ended.
            let _ = open.task.await;
        }
        let mut failures = Failures::new();
        for (name, check) in wanted {
            if let Some(open) = self.open.get(name) {
                open.local_endpoints.store(check.local_endpoints, Ordering::Relaxed);
                continue;
            }
            match self.listen(name, *check) {
                Ok(open) => drop(self.open.insert(name.clone(), open)),
                Err(error) => drop(failures.insert(name.clone(), describe(check.port, &error))),
            }
        }
        failures
    }

    fn listen(&self, name: &ServiceName, check: HealthCheck) -> io::Result<Open> {
        let listener =
            tokio::net::TcpListener::from_std(listen::bind((Ipv6Addr::UNSPECIFIED, check.port.get()).into())?)?;
        let local_endpoints = Arc::new(AtomicU32::new(check.local_endpoints));
        let answer =
            Answer { service: name.clone(), local_endpoints: local_endpoints.clone(), pulse: self.pulse.clone() };
        let task = tokio::spawn(server::serve(listener, answer));
        Ok(Open { port: check.port, local_endpoints, task })
    }
}

/// Takes note of what fails; returns whether that is something else than was known.
fn note(told: &Mutex<Failures>, failures: Failures) -> bool {
    let mut known = told.lock().unwrap_or_else(PoisonError::into_inner);
    let differs = *known != failures;
    *known = failures;
    differs
}

fn describe(port: Port, error: &impl Display) -> String {
    format!(
        "spec.healthCheckNodePort: {port} can't be listened on, so load balancers take the node for one without endpoints: {error}"
    )
}

/// What is answered, whatever is asked, as by kube-proxy.
#[derive(Clone)]
struct Answer {
    service: ServiceName,
    local_endpoints: Arc<AtomicU32>,
    pulse: Arc<Pulse>,
}

impl Answers for Answer {
    async fn answer(&self, _: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
        let healthy = self.pulse.check().await.is_ok();
        let count = self.local_endpoints.load(Ordering::Relaxed);
        let mut response = Response::new(Full::from(body(&self.service, count, healthy)));
        let is_served = count > 0 && healthy;
        *response.status_mut() = if is_served { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(WEIGHT, HeaderValue::from(count));
        Ok(response)
    }
}

/// Kube-proxy's text (`pkg/proxy/healthcheck/service_health.go`), to the byte. Names need no escapes.
fn body(ServiceName { namespace, name }: &ServiceName, count: u32, healthy: bool) -> String {
    format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{namespace}\",\n\t\t\"name\": \"{name}\"\n\t}},\n\t\
         \"localEndpoints\": {count},\n\t\"serviceProxyHealthy\": {healthy}\n}}"
    )
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::sync::mpsc;
    use std::time::Instant;

    use tokio::sync::mpsc::Receiver;

    use super::*;
    use crate::health::Ping;

    /// Answers for the daemon's task, until the sender is dropped.
    fn alive(mut pings: Receiver<Ping>) -> tokio::sync::oneshot::Sender<()> {
        let (stop, mut stopped) = tokio::sync::oneshot::channel();
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
            runtime.block_on(async move {
                loop {
                    tokio::select! {
                        Some(ping) = pings.recv() => drop(ping.send(())),
                        _ = &mut stopped => return,
                    }
                }
            });
        });
        stop
    }

    fn free_port() -> u16 {
        TcpListener::bind("127.0.0.1:0").and_then(|it| it.local_addr()).expect("a port").port()
    }

    /// Status line, headers and body; asks again until somebody answers.
    fn get(address: &str, port: u16) -> String {
        let address: SocketAddr = format!("{address}:{port}").parse().expect("an address");
        let ask = || -> io::Result<String> {
            let mut stream = TcpStream::connect(address)?;
            stream.write_all(b"GET /anything HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        };
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            match ask() {
                Ok(text) => return text,
                // Nobody listens yet, or who did has just ended.
                Err(error) => assert!(Instant::now() < until, "{error}"),
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn wanted(service: &str, port: u16, local_endpoints: u32) -> Wanted {
        let check = HealthCheck { port: Port::new(port), local_endpoints };
        [(ServiceName::new("shop", service), check)].into()
    }

    #[test]
    fn load_balancers_are_told_what_kube_proxy_tells() {
        let (pulse, pings) = Pulse::new();
        let living = alive(pings);
        let checks = HealthChecks::start(Arc::new(pulse), || {}).expect("a thread");
        let port = free_port();
        checks.set(&wanted("web", port, 2));
        for address in ["127.0.0.1", "[::1]"] {
            let answer = get(address, port);
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
            for header in [
                "content-type: application/json",
                "x-content-type-options: nosniff",
                "x-load-balancing-endpoint-weight: 2",
            ] {
                assert!(answer.contains(&format!("\r\n{header}\r\n")), "{answer}");
            }
            let body = "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"web\"\n\t},\n\
                        \t\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}";
            assert!(answer.ends_with(&format!("\r\n\r\n{body}")), "{answer}");
        }
        let settles = |expected: &[&str]| {
            let until = Instant::now() + Duration::from_secs(20);
            loop {
                let answer = get("127.0.0.1", port);
                if expected.iter().all(|part| answer.contains(part)) {
                    return;
                }
                assert!(Instant::now() < until, "{answer}");
                thread::sleep(Duration::from_millis(10));
            }
        };
        checks.set(&wanted("web", port, 0));
        settles(&["503 Service Unavailable", "weight: 0", "\"localEndpoints\": 0", "\"serviceProxyHealthy\": true"]);
        checks.set(&wanted("web", port, 1));
        settles(&["200 OK", "weight: 1"]);
        drop(living);
        settles(&["503 Service Unavailable", "weight: 1", "\"serviceProxyHealthy\": false"]);
        drop(checks);
        assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "nobody listens any more");
    }

    #[test]
    fn a_port_that_is_taken_is_a_problem_until_it_is_free() {
        let (pulse, pings) = Pulse::new();
        let _living = alive(pings);
        let (changed, changes) = mpsc::channel();
        let told = move || {
            let _ = changed.send(());
        };
        let checks = HealthChecks::start(Arc::new(pulse), told).expect("a thread");
        let taken = TcpListener::bind("0.0.0.0:0").expect("a port");
        let port = taken.local_addr().expect("an address").port();
        let soon = Duration::from_secs(20);

        checks.set(&wanted("web", port, 1));
        changes.recv_timeout(soon).expect("a change");
        let problems = checks.problems();
        assert_eq!((problems.len(), problems[0].object.as_str()), (1, "Service shop/web"));
        let message = &problems[0].message;
        assert!(message.starts_with(&format!("spec.healthCheckNodePort: {port} can't be")), "{message}");
        assert!(message.contains("in use"), "{message}");

        drop(taken);
        changes.recv_timeout(soon).expect("a change");
        assert_eq!(checks.problems(), []);
        assert!(get("127.0.0.1", port).contains("\"name\": \"web\""));
        // Another service has it next, and the first one another.
        let mut both = wanted("app", port, 1);
        both.extend(wanted("web", free_port(), 1));
        checks.set(&both);
        let until = Instant::now() + soon;
        while !get("127.0.0.1", port).contains("\"name\": \"app\"") {
            assert!(Instant::now() < until, "{:?}", checks.problems());
        }
        assert_eq!(checks.problems(), []);
    }
}
