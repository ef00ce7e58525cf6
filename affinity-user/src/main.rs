//! The `affinity` command: the node daemon, and what people ask it.

use std::process::ExitCode;

use affinity_user::causes::in_full;
use affinity_user::cli::{Cli, execute};
use clap::Parser as _;

/// What is kept of a large cluster is millions of small things, among what a list of it leaves behind; the C library's
/// allocator takes half as much again for them. How it is set: `.cargo/config.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    match execute(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("affinity: {}", in_full(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
