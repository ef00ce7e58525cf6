//! Clients: processes of the cluster from whose place loads are run.

use std::io::Read as _;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::lab::{Pod, process_of};
use crate::load::{Order, Question, Seen};

/// How long a load rests between requests, unless it is to hurry.
pub const PACE: Duration = Duration::from_millis(5);

/// A place that requests come from.
#[derive(Clone, Debug)]
pub struct Client {
    /// The pod's name.
    pub name: String,
    /// A process of it, by its id out here.
    pub pid: u32,
    /// Whether it is in the node's own network namespace.
    pub is_host: bool,
}

/// A load that goes on until it is asked what it has seen.
pub struct Running {
    /// `client question address`, for messages.
    pub what: String,
    child: Child,
}

impl Client {
    /// A pod as a client.
    pub fn of(pod: &Pod) -> Result<Self> {
        let pid = process_of(&pod.uid).with_context(|| format!("pod {}", pod.name))?;
        Ok(Self { name: format!("{}@{}", pod.name, pod.node), pid, is_host: pod.is_host })
    }

    /// The node that it is on.
    pub fn node(&self) -> &str {
        self.name.rsplit_once('@').map_or("", |(_, node)| node)
    }

    /// Asks this often, and returns what came of it.
    pub fn ask(&self, question: Question, server: SocketAddr, count: u64) -> Result<Seen> {
        self.begin(question, server, Some(count), Duration::ZERO)?.wait()
    }

    /// Starts to ask without end.
    pub fn start(&self, question: Question, server: SocketAddr) -> Result<Running> {
        self.begin(question, server, None, PACE)
    }

    /// Starts to ask this often.
    pub fn begin(
        &self,
        question: Question,
        server: SocketAddr,
        count: Option<u64>,
        pause: Duration,
    ) -> Result<Running> {
        let order = Order { like: self.pid, question, server, count, pause };
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["load", &serde_json::to_string(&order)?]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = command.spawn().context("starting a load")?;
        Ok(Running { what: format!("{} {question:?} {server}", self.name), child })
    }
}

impl Running {
    /// Ends it, and returns what it has seen.
    pub fn stop(mut self) -> Result<Seen> {
        drop(self.child.stdin.take());
        self.wait()
    }

    /// Waits until it ends by itself.
    pub fn wait(mut self) -> Result<Seen> {
        let mut output = String::new();
        if let Some(mut stdout) = self.child.stdout.take() {
            stdout.read_to_string(&mut output)?;
        }
        let status = self.child.wait()?;
        if !status.success() {
            bail!("the load {} ended: {status}", self.what);
        }
        serde_json::from_str(&output).with_context(|| self.what.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It would end by itself when its input is closed, but not before its request is over.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
