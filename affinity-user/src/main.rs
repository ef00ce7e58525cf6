//! The `affinity` command: the node daemon, and what people ask it.

use std::process::ExitCode;

use affinity_user::causes::in_full;
use affinity_user::cli::{Cli, execute};
use clap::Parser as _;

fn main() -> ExitCode {
    match execute(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("affinity: {}", in_full(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
