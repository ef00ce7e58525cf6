//! Removing every trace: programs off all interfaces, pins, and what the daemon wrote beside.

use std::fs;
use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::{attach, cgroup};

/// How long the kernel may take to detach. (Another pin directory's programs, on the same node, stay.)
const DETACHED: Duration = Duration::from_secs(2);

/// Removes everything that affinity has attached, pinned and written. Maps of any layout will do. Returns what was removed,
/// in lines; nothing where there was nothing.
///
/// # Errors
/// A directory that can't be read or removed.
pub fn cleanup(pin_dir: &Path, state_dir: &Path) -> io::Result<Vec<String>> {
    let mut removed = Vec::new();
    cgroup::detach(pin_dir);
    attach::drop_others(pin_dir, |_| false);
    attach::take_back();
    let patience = Instant::now() + DETACHED;
    while attach::is_met_anywhere() && Instant::now() < patience {
        thread::sleep(Duration::from_millis(5));
    }
    for (directory, what) in [(pin_dir, "maps and links pinned under"), (state_dir, "the daemon's files in")] {
        match remove(directory) {
            Ok(0) => {}
            Ok(count) => removed.push(format!("{what} {} ({count})", directory.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io::Error::new(error.kind(), format!("{}: {error}", directory.display()))),
        }
    }
    Ok(removed)
}

/// Removes all that is in a directory, and it itself, if it can be; returns how many files there were.
fn remove(directory: &Path) -> io::Result<usize> {
    let mut files = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files += remove(&entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
            files += 1;
        }
    }
    match fs::remove_dir(directory) {
        Ok(()) => Ok(files),
        // It is mounted, as in a pod, whose own file system may be read-only: empty will do.
        Err(error) if matches!(error.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::ReadOnlyFilesystem) => {
            Ok(files)
        }
        Err(error) => Err(error),
    }
}
