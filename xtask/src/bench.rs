//! `cargo xtask bench`: what a packet costs.

use std::{ffi::OsString, path::PathBuf};

use anyhow::{Context as _, Result};

use crate::{
    build::{self, Profile},
    machine, process, suites, workspace,
};

/// Build, then measure the nanoseconds that a packet costs
///
/// Interleaved rounds beside an empty and a parse-only program, with 1, 1,000 and 20,000 services: median and spread. Needs
/// root, and asks sudo for it.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cargo xtask bench\n  cargo xtask bench --json bench.json")]
pub struct Args {
    /// Write the figures to this file too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Further arguments of the benchmark
    #[arg(last = true)]
    rest: Vec<OsString>,
}

/// Runs the verb.
pub fn verb(args: Args) -> Result<()> {
    let (daemon, bench) = build::daemon_and("bench", Profile::Release)?;
    let mut command = suites::command(&bench, &daemon);
    command.arg("--object").arg(workspace::bench_object());
    if let Some(json) = args.json {
        let json = std::path::absolute(&json).with_context(|| json.display().to_string())?;
        command.arg("--json").arg(json);
    }
    command.args(args.rest);
    process::become_it(machine::as_root(command)?)
}
