//! `affinity VERB`: what is asked, and how it is printed.

mod args;
mod cluster;
mod duties;
mod pods;
mod print;
mod run;
mod show;

use std::io;

use anyhow::Result;

use crate::loader;
pub use args::Cli;
use args::{AnnounceVerb, BackendVerb, ConntrackVerb, PoolVerb, ServiceVerb, SessionVerb, SocketVerb, Verb};

/// Does what was asked.
///
/// # Errors
/// In words for people, to be printed in one line.
pub fn execute(cli: Cli) -> Result<()> {
    let Cli { verb, common } = cli;
    let done = match verb {
        Verb::Run(args) => return run::run(*args, &common),
        Verb::Service(ServiceVerb::List) => show::services(&common),
        Verb::Service(ServiceVerb::Get { name, cluster, lease_namespace }) => {
            show::service(&common, &name, cluster, lease_namespace.as_deref())
        }
        Verb::Backend(BackendVerb::List { service }) => show::backends(&common, service.as_deref()),
        Verb::Session(SessionVerb::List { service, client, live }) => {
            show::sessions(&common, service.as_deref(), client, live)
        }
        Verb::Conntrack(ConntrackVerb::List { client }) => show::connections(&common, client),
        Verb::Conntrack(ConntrackVerb::Flush { client, service, all: _ }) => {
            show::flush(&common, client, service.as_deref())
        }
        Verb::Socket(SocketVerb::List { service, client }) => show::sockets(&common, service.as_deref(), client),
        Verb::Pool(PoolVerb::List { cluster }) => cluster::pools(&common, cluster),
        Verb::Announce(AnnounceVerb::List { cluster, lease_namespace }) => {
            cluster::announcements(&common, cluster, lease_namespace.as_deref())
        }
        Verb::Monitor => show::monitor(&common),
        Verb::Status { pods: true } => pods::show(&common),
        Verb::Status { pods: false } => show::status(&common),
        Verb::Crds => print::text(crate::crds::yaml()),
        Verb::Mount => Ok(loader::mount(&common.pin_dir)?),
        Verb::Programs { verifier_log } => show::programs(&common, verifier_log),
        Verb::Cleanup { stay } => show::cleanup(&common, stay),
    };
    match done {
        // Nobody reads on: `affinity session list | head`.
        Err(error) if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) => {
            Ok(())
        }
        done => done,
    }
}
