//! What a daemon does for the cluster, beside serving its node: [giving addresses](crate::ipam) and
//! [answering for them](crate::announce), in a thread of its own, so that no Lease is lost while there is much to program.

use std::io;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kube::Client;
use tokio_util::sync::CancellationToken;

use crate::announce::agent;
use crate::announce::announcer::Announcer;
use crate::ipam;
use crate::lease::Timing;
use crate::sources::kubernetes;

/// How long after a failure it is tried again to make a client of the configuration.
const RETRY: Duration = Duration::from_secs(5);

/// How they are done.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the API server is.
    pub source: kubernetes::Options,
    /// The node's name, under which Leases are held.
    pub node: String,
    /// The namespace of the Leases; by default the pod's own, or the kubeconfig's.
    pub namespace: Option<String>,
    /// How long Leases last.
    pub timing: Timing,
}

/// A handle of the thread. It is ended when this is dropped.
#[derive(Debug)]
pub struct Duties {
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Duties {
    /// Starts the thread.
    ///
    /// # Errors
    /// Where there is none to be had.
    pub fn start(options: Options, announcer: impl Announcer + 'static) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let thread = thread::Builder::new().name("duties".to_owned());
        let thread = thread.spawn(move || runtime.block_on(run(&options, announcer, &stopped)))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Duties {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn run(options: &Options, mut announcer: impl Announcer, stop: &CancellationToken) {
    let Some(client) = stop.run_until_cancelled(connect(options)).await else { return };
    let namespace = options.namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
    let Options { node, timing, .. } = options;
    let gives = ipam::controller::run(client.clone(), &namespace, node, *timing, stop);
    let answers = agent::run(client, &namespace, node, *timing, &mut announcer, stop);
    futures::future::join(Box::pin(gives), Box::pin(answers)).await;
}

async fn connect(options: &Options) -> Client {
    loop {
        match kubernetes::connect(&options.source).await {
            Ok((client, _)) => return client,
            // Those who follow the API server say so.
            Err(error) => tracing::debug!(%error, "no client"),
        }
        tokio::time::sleep(RETRY).await;
    }
}
