//! The executables of the `tests` crate: suites, demonstration, benchmark.

use std::{env, path::Path, process::Command};

use crate::machine;

/// The executable, told where the daemon's binary is (`AFFINITY_BIN`), and with root's programs in its `PATH`.
pub fn command(executable: &Path, daemon: &Path) -> Command {
    let mut command = Command::new(executable);
    command.env("AFFINITY_BIN", daemon);
    if let Ok(path) = env::join_paths(machine::search_path()) {
        command.env("PATH", path);
    }
    command
}
