//! Root, or one line that says so.

use std::io::Write as _;
use std::sync::Once;

use nix::unistd::geteuid;

/// What a suite, the demo or the benchmark says when it was started without root.
pub const NEEDS_ROOT: &str = "needs root (network namespaces, BPF): run it by `cargo xtask test`, which asks sudo";

/// Ends the process with status 1 and one line on standard error unless it runs as root.
///
/// Suites call it first in every test: a suite that cannot run has failed, and is never skipped. It ends the process
/// instead of failing the test so that the line is written once, not once a test with a backtrace each.
pub fn require_root() {
    static ONCE: Once = Once::new();
    if !geteuid().is_root() {
        // Tests run side by side: the others wait here for the end.
        ONCE.call_once(|| {
            // Not `eprintln!`, which the test harness captures.
            let _ = writeln!(std::io::stderr(), "error: {}", message());
            std::process::exit(1);
        });
    }
}

fn message() -> String {
    let program = std::env::current_exe()
        .ok()
        .and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
        .unwrap_or_else(|| "affinity-tests".to_owned());
    format!("{program} {NEEDS_ROOT}")
}
