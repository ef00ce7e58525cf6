//! The tests of the whole, on a cluster of two nodes that `cargo xtask cluster` has started: the image, the manifests of
//! `kind/deploy`, real pods, kubelets and controllers; over sockets and over TC, over IPv4 and over IPv6.
//!
//! Every request of every client is counted: one without a right answer as failed, one that another pod answers than the one
//! before it as moved.

mod client;
mod lab;
mod load;
mod steps;
mod suite;

use std::path::PathBuf;
use std::process::ExitCode;

use affinity_tests::privilege::NEEDS_ROOT;
use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};
use nix::unistd::geteuid;

use lab::Lab;
use suite::Suite;

/// Tests Affinity on a cluster.
#[derive(Debug, Parser)]
#[command(name = "cluster", args_conflicts_with_subcommands = true)]
struct Args {
    #[command(subcommand)]
    role: Option<Role>,
    /// Where the cluster's files are
    #[arg(long, value_name = "DIR", default_value = "target/cluster")]
    state: PathBuf,
    /// The program
    #[arg(long, value_name = "FILE", default_value = "kubectl")]
    kubectl: PathBuf,
    /// Where containerd's programs are
    #[arg(long, value_name = "DIR", default_value = "/")]
    system: PathBuf,
    /// The core of it, in minutes
    #[arg(long)]
    short: bool,
    /// The steps to run, by what their names begin with; by default all
    #[arg(value_name = "STEP")]
    only: Vec<String>,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// A load: what the suite starts itself again as
    #[command(hide = true)]
    Load {
        /// JSON
        order: String,
    },
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("cluster: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args) -> Result<bool> {
    if let Some(Role::Load { order }) = &args.role {
        let seen = load::run(&serde_json::from_str(order).context("the order")?)?;
        println!("{}", serde_json::to_string(&seen)?);
        return Ok(true);
    }
    if !geteuid().is_root() {
        bail!("{NEEDS_ROOT}");
    }
    let (state, kubectl, system) = (args.state.clone(), args.kubectl.clone(), args.system.clone());
    let lab = Lab { state, kubectl, system };
    let mut suite = Suite::new(&args.only);
    steps::run(&lab, &mut suite, args.short)?;
    Ok(suite.finish())
}
