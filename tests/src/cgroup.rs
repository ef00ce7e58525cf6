//! Cgroups for single threads, so that a daemon's programs see the sockets of one test and of no other.
//!
//! A socket belongs to the cgroup of the thread that makes it. Each test's thread has a cgroup of its own here, and so have
//! the threads that it starts; what stays in the file system is the empty directory of them all, `affinity-tests`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use affinity_user::loader::cgroup;
use anyhow::{Context as _, Result, anyhow};

use crate::wait;

/// A cgroup that the calling thread is in until this is dropped.
#[derive(Debug)]
pub struct ThreadCgroup {
    path: PathBuf,
}

impl ThreadCgroup {
    /// Makes one and moves the calling thread into it.
    ///
    /// # Errors
    /// Where there is no cgroup v2 file system, or it can't be written to.
    pub fn enter() -> Result<Self> {
        static MOVING: Mutex<()> = Mutex::new(());
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let process = cgroup::find(None)?.join("affinity-tests");
        fs::create_dir_all(&process).with_context(|| process.display().to_string())?;
        {
            // The whole process first: threads can be parted only below the cgroup of their process. Once, for it takes along
            // threads that have a cgroup of their own already.
            let _one_by_one = MOVING.lock().unwrap_or_else(PoisonError::into_inner);
            if !in_cgroup(&process)? {
                write(&process.join("cgroup.procs"), "0")?;
            }
        }
        let path = process.join(format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        let cgroup = Self { path };
        write(&cgroup.path.join("cgroup.type"), "threaded")?;
        cgroup.join()?;
        Ok(cgroup)
    }

    /// Moves the calling thread into it too, and with it the threads that it starts from then on.
    ///
    /// # Errors
    /// Where the thread is not of the process that made the cgroup.
    pub fn join(&self) -> Result<()> {
        write(&self.path.join("cgroup.threads"), "0")
    }

    /// Does something by a thread that is not in it, nor is any that it starts.
    ///
    /// # Errors
    /// What the work returns, and where the thread can't leave.
    pub fn outside<R: Send>(&self, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
        let process = self.path.parent().unwrap_or(&self.path).join("cgroup.threads");
        thread::scope(|scope| {
            let outside = scope.spawn(|| {
                write(&process, "0")?;
                work()
            });
            outside.join().map_err(|_| anyhow!("the thread outside has panicked"))?
        })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ThreadCgroup {
    fn drop(&mut self) {
        let process = self.path.parent().unwrap_or(&self.path);
        let emptied = || {
            // Those, too, that the test has started and that serve others: they make no sockets of clients.
            for thread in fs::read_to_string(self.path.join("cgroup.threads")).unwrap_or_default().lines() {
                let _ = write(&process.join("cgroup.threads"), thread);
            }
            Ok(fs::remove_dir(&self.path).is_ok())
        };
        // Threads that end are in the way until they have.
        let _ = wait::until_true("an empty cgroup", Duration::from_secs(2), emptied);
    }
}

/// Whether this process is in a cgroup or, with some of its threads, below it.
fn in_cgroup(process: &Path) -> Result<bool> {
    let name = process.file_name().unwrap_or_default().to_string_lossy();
    let own = fs::read_to_string("/proc/thread-self/cgroup")?;
    Ok(own.lines().any(|line| line.strip_prefix("0::").is_some_and(|path| path.split('/').any(|part| part == name))))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("{text} to {}", path.display()))
}
