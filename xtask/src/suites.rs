//! The executables of the `tests` crate: suites, demonstration, benchmark.

use std::{path::Path, process::Command};

/// The executable, told where the daemon's binary is (`AFFINITY_BIN`).
pub fn command(executable: &Path, daemon: &Path) -> Command {
    let mut command = Command::new(executable);
    command.env("AFFINITY_BIN", daemon);
    command
}
