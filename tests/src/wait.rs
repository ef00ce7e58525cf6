//! Waiting for something to become true, within bounds.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often [`until`] looks.
const INTERVAL: Duration = Duration::from_millis(20);

/// Calls `look` until it gives a value, and returns that.
///
/// # Errors
/// Those of `look` at once; and after `timeout` one that names `what`.
pub fn until<T>(what: &str, timeout: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            bail!("{what}: not within {timeout:?}");
        }
        thread::sleep(INTERVAL);
    }
}

/// Calls `look` until it says true.
///
/// # Errors
/// As [`until`].
pub fn until_true(what: &str, timeout: Duration, mut look: impl FnMut() -> Result<bool>) -> Result<()> {
    until(what, timeout, || Ok(look()?.then_some(())))
}

/// Calls `attempt` until it succeeds; what went wrong the last time is in the error.
///
/// # Errors
/// The last error of `attempt`, with `what` for context.
pub fn until_ok<T>(what: &str, timeout: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + timeout;
    loop {
        match attempt() {
            Ok(done) => return Ok(done),
            Err(error) if Instant::now() >= deadline => {
                return Err(error.context(format!("{what}: not within {timeout:?}")));
            }
            Err(_) => thread::sleep(INTERVAL),
        }
    }
}
