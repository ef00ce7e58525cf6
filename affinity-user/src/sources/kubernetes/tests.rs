//! The watch against an API server that is made of a script: what each request for one kind gets, in order.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

use jiff::SignedDuration;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use Reply::{Page, Status, Watch};
use Then::{Break, End, Hold};

use super::*;
use crate::model::Model;

/// The answer to a request for the kind that the script is about.
enum Reply {
    /// An error of the API server's.
    Status(u16),
    /// A page of a list.
    Page(Value),
    /// A watch: its events, and how it goes on.
    Watch(Vec<Value>, Then),
}

/// How a watch goes on after its events.
#[derive(Clone, Copy)]
enum Then {
    /// Nothing more comes.
    Hold,
    /// It is ended properly.
    End,
    /// The connection breaks.
    Break,
}

struct Server {
    /// The queries of the requests that were answered by the script so far.
    queries: Arc<Mutex<Vec<String>>>,
    task: tokio::task::JoinHandle<()>,
    /// A kubeconfig file that leads to it.
    kubeconfig: tempfile::NamedTempFile,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    /// The script is for Services. When it is at its end the server stops listening.
    async fn start(script: Vec<Reply>) -> Self {
        Self::start_for("/api/v1/services?", script).await
    }

    /// Of other paths all lists are empty.
    async fn start_for(path: &'static str, script: Vec<Reply>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port of loopback");
        let address = listener.local_addr().expect("its address");
        let queries = Arc::new(Mutex::new(Vec::new()));
        let task = tokio::spawn(serve(listener, path, script.into(), queries.clone()));
        let kubeconfig = file(&format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: a\n\
             contexts: [{{name: a, context: {{cluster: a, user: a}}}}]\n\
             clusters: [{{name: a, cluster: {{server: 'http://{address}'}}}}]\nusers: [{{name: a, user: {{}}}}]\n",
        ));
        Self { queries, task, kubeconfig }
    }

    fn queries(&self) -> Vec<String> {
        self.queries.lock().expect("not poisoned").clone()
    }
}

async fn serve(
    listener: TcpListener,
    path: &'static str,
    mut script: VecDeque<Reply>,
    queries: Arc<Mutex<Vec<String>>>,
) {
    let mut held = Vec::new();
    while !script.is_empty() {
        let Ok((mut stream, _)) = listener.accept().await else { return };
        let target = request(&mut stream).await;
        let reply = if target.starts_with(path) {
            queries.lock().expect("not poisoned").push(target);
            script.pop_front().expect("not empty")
        } else {
            Watch(vec![bookmark()], Hold)
        };
        held.extend(answer(stream, reply).await);
    }
    drop(listener);
    std::future::pending::<()>().await;
}

/// The target of a request, whose head is read to its end.
async fn request(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return String::new(),
        }
    }
    String::from_utf8_lossy(&head).split(' ').nth(1).unwrap_or_default().to_owned()
}

/// Answers, and hands the connection back if it is to be held.
async fn answer(mut stream: TcpStream, reply: Reply) -> Option<TcpStream> {
    let (code, body, then) = match reply {
        Status(code) => {
            let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "scripted",
                                "reason": "Scripted", "code": code});
            (code, vec![status], End)
        }
        Page(page) => (200, vec![page], End),
        Watch(events, then) => (200, events, then),
    };
    let mut out = format!(
        "HTTP/1.1 {code} X\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    );
    for line in body {
        let line = format!("{line}\n");
        out.extend([&format!("{:x}\r\n", line.len()), line.as_str(), "\r\n"]);
    }
    if matches!(then, End) {
        out += "0\r\n\r\n";
    }
    // A client that has gone away is no failure of the server.
    let _ = stream.write_all(out.as_bytes()).await;
    matches!(then, Hold).then_some(stream)
}

fn service(name: &str, version: u32) -> Value {
    json!({"apiVersion": "v1", "kind": "Service",
           "metadata": {"name": name, "namespace": "shop", "resourceVersion": version.to_string()},
           "spec": {"clusterIP": format!("10.0.0.{version}"), "ports": [{"port": 80}]}})
}

fn added(name: &str, version: u32) -> Value {
    json!({"type": "ADDED", "object": service(name, version)})
}

fn modified(name: &str, version: u32) -> Value {
    json!({"type": "MODIFIED", "object": service(name, version)})
}

fn deleted(name: &str, version: u32) -> Value {
    json!({"type": "DELETED", "object": service(name, version)})
}

/// The end of a list that comes as a stream.
fn bookmark() -> Value {
    json!({"type": "BOOKMARK", "object": {"apiVersion": "v1", "kind": "Service", "metadata": {
        "resourceVersion": "100", "annotations": {"k8s.io/initial-events-end": "true"}}, "spec": {}}})
}

fn gone() -> Value {
    json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "status": "Failure",
           "message": "too old", "reason": "Expired", "code": 410}})
}

fn page(items: &[Value], more: &str) -> Reply {
    let metadata = json!({"resourceVersion": "100", "continue": more});
    Page(json!({"apiVersion": "v1", "kind": "ServiceList", "metadata": metadata, "items": items}))
}

/// What the source tells of a kind, line by line, until the last of the expected lines.
struct Told {
    kind: Kind,
    events: mpsc::Receiver<Received>,
    model: Model,
    /// Since when it was stale, when that was told last.
    since: Option<Timestamp>,
}

impl Told {
    fn by(options: &Options) -> Self {
        Self::of(Kind::Service, options)
    }

    fn of(kind: Kind, options: &Options) -> Self {
        Self { kind, events: watch(options, "node-1"), model: Model::new("node-1"), since: None }
    }

    async fn next(&mut self) -> String {
        loop {
            let event = tokio::time::timeout(Duration::from_secs(20), self.events.recv());
            let Received { event, .. } = event.await.expect("an event in time").expect("no end");
            let (kind, line) = match &event {
                SourceEvent::Init(kind) => (*kind, "init".into()),
                SourceEvent::Service(version) => (Kind::Service, format!("apply {}", version.name)),
                SourceEvent::Pod(version) => (Kind::Pod, format!("apply {}", version.name)),
                SourceEvent::Delete(kind, name) => (*kind, format!("delete {name}")),
                SourceEvent::InitDone(kind) => (*kind, "done".into()),
                SourceEvent::Health(kind, Health::Fresh) => (*kind, "fresh".into()),
                SourceEvent::Health(kind, Health::Stale { error, since }) => {
                    self.since = Some(*since);
                    (*kind, format!("stale: {error}"))
                }
                _ => continue,
            };
            event.enter(&mut self.model);
            if kind == self.kind {
                return line;
            }
        }
    }

    #[track_caller]
    fn expect(&mut self, lines: &[&str]) -> impl Future<Output = ()> {
        let caller = std::panic::Location::caller();
        async move {
            for expected in lines {
                let line = self.next().await;
                let fits = expected.strip_suffix('…').map_or(line == *expected, |start| line.starts_with(start));
                assert!(fits, "{line:?} instead of {expected:?} at {caller}");
            }
        }
    }

    fn services(&self) -> Vec<String> {
        self.model.services().map(|view| view.service.name.name.to_string()).collect()
    }
}

/// Options for a server, whose kubeconfig is in the file.
fn options(kubeconfig: &tempfile::NamedTempFile) -> Options {
    Options {
        access: Access::Kubeconfig(kubeconfig.path().to_owned()),
        retry_min: Duration::from_millis(20),
        retry_max: Duration::from_millis(100),
        ..Options::default()
    }
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), text).expect("written");
    file
}

/// A script and what is told.
async fn check(script: Vec<Reply>, expected: &[&str]) -> (Server, Told) {
    let server = Server::start(script).await;
    let mut told = Told::by(&options(&server.kubeconfig));
    told.expect(expected).await;
    (server, told)
}

#[tokio::test]
async fn a_list_comes_as_a_stream_and_then_changes() {
    let events = vec![added("a", 1), added("b", 2), bookmark(), modified("a", 3), deleted("b", 4)];
    let (server, told) = check(
        vec![Watch(events, Hold), Status(500)],
        &["init", "apply shop/a", "apply shop/b", "done", "fresh", "apply shop/a", "delete shop/b"],
    )
    .await;
    assert_eq!(told.services(), ["a"]);
    let query = &server.queries()[0];
    assert!(query.contains("sendInitialEvents=true"), "{query}");
    assert!(query.contains("labelSelector=%21service.kubernetes.io%2Fheadless"), "{query}");
}

#[tokio::test]
async fn a_server_that_does_not_stream_is_listed_in_pages() {
    let script = vec![
        Status(422),
        page(&[service("a", 1)], "more"),
        page(&[service("b", 2)], ""),
        Watch(vec![], Hold),
        Status(500),
    ];
    let (server, _told) = check(script, &["init", "apply shop/a", "apply shop/b", "done", "fresh"]).await;
    assert!(server.queries()[2].contains("continue=more"));
}

#[tokio::test]
async fn a_watch_that_ends_or_breaks_is_taken_up_where_it_was() {
    for then in [End, Break] {
        let script =
            vec![Watch(vec![added("a", 1), bookmark()], then), Watch(vec![modified("a", 102)], Hold), Status(500)];
        let (server, _told) = check(script, &["init", "apply shop/a", "done", "fresh", "apply shop/a"]).await;
        assert!(server.queries()[1].contains("resourceVersion=100"), "{:?}", server.queries());
    }
}

#[tokio::test]
async fn a_watch_that_can_not_be_taken_up_is_stale_and_lists_anew() {
    let first = vec![added("a", 1), added("b", 2), bookmark()];
    let script = vec![
        Watch(first, Break),
        Status(503),
        Status(503),
        Watch(vec![added("b", 2), added("c", 3), bookmark()], Hold),
        Status(500),
    ];
    let (_server, told) = check(
        script,
        &[
            "init",
            "apply shop/a",
            "apply shop/b",
            "done",
            "fresh",
            "stale: http://127.0.0.1:…",
            "stale: http://127.0.0.1:…",
            "init",
            "apply shop/b",
            "apply shop/c",
            "done",
            "fresh",
        ],
    )
    .await;
    assert_eq!(told.services(), ["b", "c"]);
}

#[tokio::test]
async fn gone_is_no_trouble_but_a_relist() {
    let script = vec![
        Watch(vec![added("a", 1), bookmark(), gone()], End),
        Watch(vec![added("b", 2), bookmark()], Hold),
        Status(500),
    ];
    let (_server, told) =
        check(script, &["init", "apply shop/a", "done", "fresh", "init", "apply shop/b", "done"]).await;
    assert_eq!(told.services(), ["b"]);
}

#[tokio::test]
async fn a_relist_that_breaks_off_deletes_nothing() {
    let script = vec![
        Watch(vec![added("a", 1), added("b", 2), bookmark(), gone()], End),
        Watch(vec![added("b", 2)], Break),
        Status(403),
        Watch(vec![added("a", 1), bookmark()], Hold),
        Status(500),
    ];
    let (_server, mut told) =
        check(script, &["init", "apply shop/a", "apply shop/b", "done", "fresh", "init", "apply shop/b", "stale: …"])
            .await;
    assert_eq!(told.services(), ["a", "b"]);
    told.expect(&["init", "apply shop/a", "done", "fresh"]).await;
    assert_eq!(told.services(), ["a"]);
}

#[tokio::test]
async fn a_list_that_is_broken_off_again_and_again_is_stale() {
    let script = vec![
        Watch(vec![added("a", 1), added("b", 2), bookmark(), gone()], End),
        // The watcher says nothing of either.
        Watch(vec![added("b", 2)], Break),
        Watch(vec![added("b", 2)], Break),
        Watch(vec![added("b", 2), bookmark()], Hold),
        Status(500),
    ];
    let lines =
        ["init", "apply shop/a", "apply shop/b", "done", "fresh", "init", "apply shop/b", "stale: http://127.0.0.1:…"];
    let (_server, mut told) = check(script, &lines).await;
    assert_eq!(told.services(), ["a", "b"]);
    told.expect(&["init", "apply shop/b", "done", "fresh"]).await;
    assert_eq!(told.services(), ["b"]);
}

#[tokio::test]
async fn a_watch_that_says_nothing_is_taken_up_anew_and_then_stale() {
    let script = vec![
        Watch(vec![added("a", 1), bookmark()], Hold),
        Watch(vec![modified("a", 102)], Hold),
        Watch(vec![], Hold),
        Watch(vec![added("a", 103), bookmark()], Hold),
        Status(500),
    ];
    let server = Server::start(script).await;
    let silence_max = Duration::from_millis(200);
    let mut told = Told::by(&Options { silence_max, ..options(&server.kubeconfig) });
    told.expect(&["init", "apply shop/a", "done", "fresh", "apply shop/a"]).await;
    let last_word = Timestamp::now();
    told.expect(&["stale: http://127.0.0.1:…"]).await;
    let since = told.since.expect("a time");
    assert!(
        since.duration_since(last_word) < SignedDuration::from_millis(150),
        "{since}, the last word at {last_word}"
    );
    assert!(Timestamp::now().duration_since(last_word) >= SignedDuration::from_millis(400));
    told.expect(&["init", "apply shop/a", "done", "fresh"]).await;
}

/// One that no API server would store, as a broken mirror of it may send.
fn broken(kind: &str, name: &str) -> Value {
    let mut event = added(name, 7);
    event["type"] = kind.into();
    event["object"]["spec"]["ports"][0]["port"] = json!(70_000_000_000_u64);
    event
}

#[tokio::test]
async fn what_is_no_service_is_named_and_keeps_no_other_from_being_served() {
    let list = || vec![added("a", 1), broken("ADDED", "b"), added("c", 3), bookmark()];
    let script = vec![Watch(list(), Hold), Watch(list(), Hold), Status(500)];
    let lines = ["init", "apply shop/a", "init", "apply shop/a", "apply shop/b", "apply shop/c", "done", "fresh"];
    let (_server, told) = check(script, &lines).await;
    assert_eq!(told.services(), ["a", "c"]);
    let rejected: Vec<String> = told.model.rejections().map(|rejection| rejection.to_string()).collect();
    assert_eq!(rejected.len(), 1);
    let says = "Service shop/b: spec.ports[0].port: ";
    assert!(rejected[0].starts_with(says) && rejected[0].contains("70000000000"), "{rejected:?}");
}

#[tokio::test]
async fn what_is_no_service_any_more_keeps_its_last_good_version() {
    let script = vec![
        Watch(vec![added("a", 1), added("b", 2), bookmark(), broken("MODIFIED", "b"), deleted("a", 8)], Hold),
        Watch(vec![broken("ADDED", "b"), bookmark(), modified("b", 9)], Hold),
        Status(500),
    ];
    let lines = ["init", "apply shop/a", "apply shop/b", "done", "fresh", "init", "apply shop/b", "done"];
    let (_server, mut told) = check(script, &lines).await;
    assert_eq!((told.services(), told.model.rejections().count()), (vec!["b".to_owned()], 1));
    told.expect(&["apply shop/b"]).await;
    assert_eq!(told.model.rejections().count(), 0);
}

#[tokio::test]
async fn a_kubeconfig_is_read_anew_until_it_is_good() {
    let server = Server::start(vec![Watch(vec![added("a", 1), bookmark()], Hold), Status(500)]).await;
    let kubeconfig = file("no kubeconfig");
    let mut told = Told::by(&options(&kubeconfig));
    let stale = told.next().await;
    assert!(stale.starts_with(&format!("stale: kubeconfig {}: ", kubeconfig.path().display())), "{stale}");
    // A port that nobody listens on.
    let closed = Server::start(vec![]).await;
    tokio::task::yield_now().await;
    std::fs::copy(closed.kubeconfig.path(), kubeconfig.path()).expect("copied");
    while !told.next().await.contains("Connection refused") {}
    std::fs::copy(server.kubeconfig.path(), kubeconfig.path()).expect("copied");
    while told.next().await != "init" {}
    told.expect(&["apply shop/a", "done", "fresh"]).await;
}

#[tokio::test]
async fn an_object_that_is_no_longer_for_us_is_deleted() {
    let mut headless = modified("a", 3);
    headless["object"]["spec"]["clusterIP"] = "None".into();
    let mut nameless = added("x", 4);
    nameless["object"]["metadata"]["name"] = "a/b".into();
    let mut external = modified("a", 5);
    external["object"]["spec"] = json!({"type": "ExternalName", "externalName": "example.com"});
    let events = vec![
        added("a", 1),
        nameless,
        bookmark(),
        headless,
        modified("a", 4),
        external,
        modified("a", 6),
        deleted("a", 7),
    ];
    let expected = ["init", "apply shop/a", "done", "fresh", "delete shop/a", "apply shop/a", "delete shop/a"];
    // The API server tells of a label that the selector excludes as of a deletion.
    let expected = [&expected[..], &["apply shop/a", "delete shop/a"]].concat();
    check(vec![Watch(events, Hold), Status(500)], &expected).await;
}

const PODS: &str = "/api/v1/pods?";

fn pod(name: &str) -> Value {
    json!({"type": "ADDED", "object": {"apiVersion": "v1", "kind": "Pod",
           "metadata": {"name": name, "namespace": "shop", "resourceVersion": "1"}, "spec": {"nodeName": "node-1"}}})
}

#[tokio::test]
async fn pods_that_may_not_be_listed_hold_nothing_up() {
    let script = vec![Status(403), Status(403), Watch(vec![pod("a"), bookmark()], Hold), Status(500)];
    let server = Server::start_for(PODS, script).await;
    let mut told = Told::of(Kind::Pod, &options(&server.kubeconfig));
    told.expect(&["stale: http://127.0.0.1:…"]).await;
    assert!(told.model.is_heard(Kind::Pod));
    told.expect(&["stale: http://127.0.0.1:…", "init", "apply shop/a", "done", "fresh"]).await;
    assert_eq!(told.model.pods().map(|pod| pod.name.to_string()).collect::<Vec<_>>(), ["shop/a"]);
    let query = &server.queries()[0];
    assert!(query.contains("fieldSelector=spec.nodeName%3Dnode-1"), "{query}");
}

#[tokio::test]
async fn of_an_api_server_that_is_away_nobody_knows_whether_pods_may_be_listed() {
    let server = Server::start_for(PODS, vec![Status(503), Status(403), Status(503)]).await;
    let mut told = Told::of(Kind::Pod, &options(&server.kubeconfig));
    told.expect(&["stale: http://127.0.0.1:…"]).await;
    assert!(!told.model.is_heard(Kind::Pod), "it is not ready");
    told.expect(&["stale: http://127.0.0.1:…"]).await;
    assert!(told.model.is_heard(Kind::Pod), "it refuses");

    let closed = Server::start(vec![]).await;
    tokio::task::yield_now().await;
    let mut told = Told::of(Kind::Pod, &options(&closed.kubeconfig));
    while !told.next().await.contains("Connection refused") {}
    assert!(!told.model.is_heard(Kind::Pod));
}

#[tokio::test]
async fn pods_that_do_not_come_are_told_of() {
    let script = vec![Watch(vec![], Hold), Status(500)];
    let server = Server::start_for(PODS, script).await;
    let patience = Duration::from_millis(500);
    let mut told = Told::of(Kind::Pod, &Options { patience, ..options(&server.kubeconfig) });
    told.expect(&["init", "stale: http://127.0.0.1:…"]).await;
    told.kind = Kind::Service;
    while !told.model.has_essentials() {
        told.next().await;
    }
    assert!(!told.model.is_heard(Kind::Pod), "the daemon decides how long they are waited for");
}

#[tokio::test]
async fn the_source_ends_when_nobody_listens() {
    let (_server, told) = check(vec![Watch(vec![bookmark()], Hold), Status(500)], &["init", "done", "fresh"]).await;
    let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    assert!(alive() > 1);
    drop(told);
    let ended = async {
        // The server's task is left.
        while alive() > 1 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), ended).await.expect("the source's tasks end");
}
