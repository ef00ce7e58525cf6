//! Whether the daemon is alive and ready: what `/healthz` and `/readyz` answer.

use std::fmt::{self, Write as _};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::time::timeout;

use crate::metrics::Published;

/// How long an answer is waited for: a kubelet gives a probe a second.
const PATIENCE: Duration = Duration::from_millis(500);
/// How long the daemon's task may be busy with one thing until it counts as stuck. Tens of thousands of services, all at
/// once, take it seconds.
const BOUND: Duration = Duration::from_secs(15);

/// What the daemon's task gets to answer.
pub type Ping = oneshot::Sender<()>;

/// Asks the daemon's task whether it goes on.
#[derive(Debug)]
pub struct Pulse {
    pings: mpsc::Sender<Ping>,
    /// The question that waits for its answer, and since when.
    waiting: Mutex<Option<(Instant, oneshot::Receiver<()>)>>,
}

/// The daemon's task does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stuck {
    /// It has been busy with one thing for so long.
    For(Duration),
    /// It has ended.
    Ended,
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::For(time) => write!(f, "the daemon's task has not answered for {:.1} s", time.as_secs_f64()),
            Self::Ended => f.write_str("the daemon's task has ended"),
        }
    }
}

impl Pulse {
    /// A pulse, and what the daemon's task is to answer.
    pub fn new() -> (Self, mpsc::Receiver<Ping>) {
        let (pings, asked) = mpsc::channel(1);
        (Self { pings, waiting: Mutex::new(None) }, asked)
    }

    /// Whether the daemon's task goes on. Answers soon in any case: a task that is busy is alive for a while.
    ///
    /// # Errors
    /// Where it is stuck.
    pub async fn check(&self) -> Result<(), Stuck> {
        self.check_within(PATIENCE, BOUND).await
    }

    async fn check_within(&self, patience: Duration, bound: Duration) -> Result<(), Stuck> {
        let mut waiting = self.waiting.lock().await;
        let (since, answer) = waiting.get_or_insert_with(|| {
            let (ping, answer) = oneshot::channel();
            // Where there is no room or nobody to read it, the answer never comes, or says so.
            let _ = self.pings.try_send(ping);
            (Instant::now(), answer)
        });
        match timeout(patience, answer).await {
            Ok(answered) => {
                *waiting = None;
                answered.map_err(|_| Stuck::Ended)
            }
            Err(_) if since.elapsed() < bound => Ok(()),
            Err(_) => Err(Stuck::For(since.elapsed())),
        }
    }
}

/// What is said where [`is_going`].
pub const GOING: &str = "the node is being deleted, or marked by the cluster's autoscaler: it takes no new clients\n";

/// Whether the node is about to go, so that load balancers are to send it no new clients (KEP-3836).
pub fn is_going(published: Option<&Published>) -> bool {
    published.and_then(|published| published.status.node.as_ref()).is_some_and(|node| node.going)
}

/// Whether the daemon is ready (every source heard out and programmed, and the programs attached), and in words what is
/// missing: a line a condition, as Kubernetes' own components have them.
///
/// A service port that can't be programmed, or an interface that can't be attached to, is told of but keeps no node from
/// being ready: to start again would not help it.
pub fn readiness(published: Option<&Published>) -> (bool, String) {
    let Some(Published { status, seen_interfaces, .. }) = published else {
        return (false, "[-]started: the datapath is being loaded\n".to_owned());
    };
    let mut text = String::new();
    let mut condition = |name, holds: bool, missing: &str| {
        // Writing to a string can't fail.
        let _ = if holds { writeln!(text, "[+]{name}") } else { writeln!(text, "[-]{name}: {missing}") };
        holds
    };
    let error = status.source.last_error.as_deref().unwrap_or("it has not told all objects yet");
    let source = format!("{} ({}): {error}", status.source.kind, status.source.detail);
    let synced = condition("synced", status.synced, &source);
    let attached = condition("attached", *seen_interfaces, "the node's interfaces are not known yet");
    for problem in &status.problems {
        let _ = writeln!(text, "note: {}: {}", problem.object, problem.message);
    }
    (synced && attached, text)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::metrics::IgnoredTriggers;
    use crate::reconcile::Counts;
    use crate::status::{NodeStatus, ProblemStatus, SourceStatus, StatusFile};

    #[tokio::test]
    async fn a_task_is_alive_while_it_answers_in_time() {
        let (pulse, mut asked) = Pulse::new();
        let long = Duration::from_mins(1);
        let answers = async {
            let ping = asked.recv().await.expect("a question");
            ping.send(()).expect("somebody waits");
        };
        let (checked, ()) = tokio::join!(pulse.check_within(long, long), answers);
        assert_eq!(checked, Ok(()));
        // Busy: alive as long as the bound has not passed, and asked but once.
        assert_eq!(pulse.check_within(Duration::ZERO, long).await, Ok(()));
        assert!(matches!(pulse.check_within(Duration::ZERO, Duration::ZERO).await, Err(Stuck::For(_))));
        let ping = asked.recv().await.expect("a question");
        assert!(asked.try_recv().is_err());
        // It comes back.
        ping.send(()).expect("somebody waits");
        assert_eq!(pulse.check_within(long, Duration::ZERO).await, Ok(()));
        drop(asked);
        assert_eq!(pulse.check_within(long, long).await, Err(Stuck::Ended));
    }

    #[test]
    fn readiness_says_what_is_missing() {
        assert!(!readiness(None).0);
        let mut published = Published {
            status: StatusFile::new(SourceStatus::new("kubernetes", "https://127.0.0.1:1")).expect("proc"),
            seen_interfaces: true,
            counts: Counts::default(),
            sources: BTreeMap::new(),
            ignored: IgnoredTriggers::default(),
        };
        published.status.source.last_error = Some("connection refused".to_owned());
        let (ready, text) = readiness(Some(&published));
        assert!(!ready && text.contains("[-]synced: kubernetes (https://127.0.0.1:1): connection refused\n"), "{text}");
        assert!(text.contains("[+]attached\n"), "{text}");
        published.status.synced = true;
        let problem =
            ProblemStatus { object: "default/web/TCP".to_owned(), message: "frontends_v4 is full".to_owned() };
        published.status.problems.push(problem);
        let (ready, text) = readiness(Some(&published));
        assert!(ready && text.ends_with("[+]attached\nnote: default/web/TCP: frontends_v4 is full\n"), "{text}");
        assert!(!is_going(None) && !is_going(Some(&published)));
        for going in [false, true] {
            let node = NodeStatus { name: "a".to_owned(), known: true, zone: None, going };
            published.status.node = Some(node);
            assert_eq!(is_going(Some(&published)), going);
            assert!(readiness(Some(&published)).0, "who is there is served on");
        }
        published.seen_interfaces = false;
        assert!(!readiness(Some(&published)).0);
    }
}
