//! `affinity run`: from the command line to the daemon.

use std::time::Duration;

use affinity_common::abi::lifetimes::Lifetimes;
use anyhow::{Context as _, Result, anyhow};
use tracing_subscriber::EnvFilter;

use super::args::{Attach, Common, DatapathLog, Grace, LogFormat, RunArgs, SocketLb, node_name, set_lifetime};
use crate::daemon::{self, Sockets, Source};
use crate::lease::Timing;
use crate::loader::attach::{AttachMode, GracePeriods};
use crate::loader::{self, Sizes};
use crate::server::Addresses;
use crate::sockets::keeper;
use crate::sources::kubernetes;

pub(super) fn run(args: RunArgs, common: &Common) -> Result<()> {
    log(&args)?;
    let mut sizes = Sizes::default();
    for (name, size) in &args.map_sizes {
        sizes.set(name, *size).map_err(|error| anyhow!(error))?;
    }
    let mut lifetimes = Lifetimes::default();
    for (state, seconds) in &args.conntrack_timeouts {
        set_lifetime(&mut lifetimes, state, *seconds).map_err(|error| anyhow!(error))?;
    }
    let leases = Timing {
        duration: Duration::from_secs(args.lease_duration),
        renew: Duration::from_secs(args.lease_renew_interval),
    };
    if !leases.is_sound() {
        return Err(anyhow!(
            "--lease-renew-interval: {:?} is not less than half of {:?}",
            leases.renew,
            leases.duration
        ));
    }
    let source = match args.source_dir {
        Some(directory) => Source::Directory(directory),
        None => {
            Source::Kubernetes(kubernetes::Options { access: args.cluster.access(), ..kubernetes::Options::default() })
        }
    };
    let options = daemon::Options {
        node_name: args.node_name.map_or_else(host_name, Ok)?,
        source,
        node_port_addresses: args.nodeport_addresses,
        loader: loader::Options {
            pin_dir: common.pin_dir.clone(),
            sizes,
            attach: match args.attach {
                Attach::Auto => AttachMode::Auto,
                Attach::Tcx => AttachMode::Tcx,
                Attach::Clsact => AttachMode::Clsact,
            },
            grace_periods: match args.grace_periods {
                Grace::Expedited => GracePeriods::Expedited,
                Grace::AsSet => GracePeriods::AsSet,
            },
            log_level: match args.datapath_log {
                DatapathLog::Off => 0,
                DatapathLog::Debug => 4,
            },
            verifier_log: args.verifier_log,
        },
        sockets: match (args.socket_lb, args.cgroup) {
            (SocketLb::Off, _) => Sockets::Off,
            (SocketLb::On, None) => Sockets::Node,
            (SocketLb::On, Some(path)) => Sockets::Cgroup(path),
        },
        lifetimes,
        keeper: keeper::Options {
            directories: args.netns_dirs,
            pods: matches!(args.socket_lb_pods, SocketLb::On),
            look: Duration::from_secs(args.netns_interval),
            sweep: Duration::from_secs(args.socket_sweep_interval),
        },
        interfaces: args.interfaces,
        uplinks: args.uplinks,
        state_dir: common.state_dir.clone(),
        audit_interval: Duration::from_secs(args.audit_interval),
        addresses: Addresses { metrics: args.metrics_address.0, health: args.health_address.0 },
        lease_namespace: args.lease_namespace,
        leases,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(daemon::run(options))?)
}

/// The node's name where none is given: its host's, as the kubelet has it.
fn host_name() -> Result<String> {
    const FILE: &str = "/proc/sys/kernel/hostname";
    let name = std::fs::read_to_string(FILE).context(FILE)?.trim().to_ascii_lowercase();
    node_name(&name).map_err(|error| anyhow!("{name:?} is {error}; give --node-name"))
}

fn log(args: &RunArgs) -> Result<()> {
    let mut filter = EnvFilter::try_new(&args.log_level).context("--log-level")?;
    if args.datapath_log == DatapathLog::Debug {
        // The programs log under the name of their own crate.
        filter = filter.add_directive("affinity=debug".parse()?);
    }
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match args.log_format {
        LogFormat::Text => log.with_target(false).init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}
