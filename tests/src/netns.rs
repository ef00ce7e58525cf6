//! Network namespaces that vanish with this process, whatever ends it.
//!
//! A namespace here has no name in the file system: it lives as long as a file descriptor, a thread or a child of this
//! process is in it. People enter one by `nsenter --net=` and [`Netns::path`], or by the id of a process in it.

use std::fmt;
use std::fs::{self, File};
use std::future::Future;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::panic;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use affinity_user::sockets::namespace;
use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::geteuid;

use crate::netlink;
use crate::privilege::NEEDS_ROOT;
use crate::process::{Place, Process};

/// A network namespace, held open by a file descriptor; clones are the same namespace.
#[derive(Clone)]
pub struct Netns {
    name: Arc<str>,
    fd: Arc<OwnedFd>,
}

impl Netns {
    /// Makes a new namespace with its loopback up. The name is for messages and thread names only.
    ///
    /// # Errors
    /// Where the process is not root, or may not make namespaces.
    pub fn new(name: &str) -> Result<Self> {
        if !geteuid().is_root() {
            bail!("network namespace {name}: {NEEDS_ROOT}");
        }
        let fd = on_thread(name, || {
            unshare(CloneFlags::CLONE_NEWNET).context("unshare(CLONE_NEWNET)")?;
            open_own()
        })
        .with_context(|| format!("making network namespace {name}"))?;
        let netns = Self { name: name.into(), fd: Arc::new(fd) };
        netns.netlink(async |handle| netlink::set_up(&handle, "lo").await)?;
        Ok(netns)
    }

    /// A namespace that exists already, by a path to it (`/proc/PID/ns/net`).
    ///
    /// # Errors
    /// Where there is none.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().display().to_string();
        let file = File::open(&path).with_context(|| path.clone())?;
        Ok(Self { name: path.into(), fd: Arc::new(file.into()) })
    }

    /// The name it was made with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` in this namespace, on a thread of its own, and returns what it returns.
    ///
    /// Sockets that `work` makes stay in this namespace wherever they are used afterwards. A panic goes through.
    ///
    /// # Errors
    /// Those of `work`, and of entering.
    pub fn enter<R: Send>(&self, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
        on_thread(&self.name, || {
            self.join()?;
            work()
        })
    }

    /// Runs `work` in this namespace on a thread that goes on after this call.
    ///
    /// # Errors
    /// Where no thread can be made. What goes wrong on it comes out of the handle.
    pub fn spawn<R: Send + 'static>(
        &self,
        thread: &str,
        work: impl FnOnce() -> Result<R> + Send + 'static,
    ) -> Result<JoinHandle<Result<R>>> {
        let netns = self.clone();
        let thread = thread::Builder::new().name(format!("{thread}@{}", self.name));
        Ok(thread.spawn(move || {
            netns.join()?;
            work()
        })?)
    }

    /// Runs `work` in this namespace with a netlink connection of it.
    ///
    /// # Errors
    /// Those of `work`, and of connecting.
    pub fn netlink<R, F, W>(&self, work: W) -> Result<R>
    where
        R: Send,
        F: Future<Output = Result<R>>,
        W: FnOnce(rtnetlink::Handle) -> F + Send,
    {
        self.enter(|| netlink::block_on(work)).with_context(|| format!("in network namespace {}", self.name))
    }

    /// Sets a sysctl below `net`, by its dotted name (`net.ipv4.ip_forward`).
    ///
    /// # Errors
    /// Where it does not exist or does not take the value.
    pub fn set_sysctl(&self, name: &str, value: &str) -> Result<()> {
        self.enter(|| fs::write(sysctl_path(name), value).map_err(Into::into))
            .with_context(|| format!("sysctl {name}={value} in {}", self.name))
    }

    /// Sets several sysctls, as [`Netns::set_sysctl`] does, in their order.
    ///
    /// # Errors
    /// At the first that does not exist or does not take its value.
    pub fn set_sysctls(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.enter(|| {
            for (name, value) in settings {
                fs::write(sysctl_path(name), value).with_context(|| format!("sysctl {name}={value}"))?;
            }
            Ok(())
        })
        .with_context(|| format!("in network namespace {}", self.name))
    }

    /// Reads a sysctl below `net`, without the line's end.
    ///
    /// # Errors
    /// Where it does not exist.
    pub fn sysctl(&self, name: &str) -> Result<String> {
        self.enter(|| Ok(fs::read_to_string(sysctl_path(name))?.trim_end().to_owned()))
            .with_context(|| format!("sysctl {name} in {}", self.name))
    }

    /// Its cookie, which the kernel gives to no other one.
    ///
    /// # Errors
    /// Where the kernel has none.
    pub fn cookie(&self) -> Result<u64> {
        self.enter(|| Ok(namespace::cookie()?))
    }

    /// A path to it that holds while this process lives: `nsenter --net=PATH`.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd()))
    }

    /// Runs a command in this namespace to its end and returns its standard output.
    ///
    /// # Errors
    /// Where it cannot run or fails; standard error is in the error.
    pub fn output(&self, command: Command) -> Result<String> {
        Process::output(command, &self.place())
    }

    /// This namespace as a place for processes, with the file systems of this process.
    pub fn place(&self) -> Place {
        Place { net: Some(self.clone()), mount: None }
    }

    /// Moves the calling thread for good; only for threads that the caller owns.
    fn join(&self) -> Result<()> {
        setns(self.fd.as_ref(), CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("entering network namespace {}", self.name))
    }

    pub(crate) fn shared_fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Netns {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl fmt::Debug for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Netns({})", self.name)
    }
}

/// Runs `work` on a new thread to its end, so that what it does to its own namespaces stays with that thread.
pub(crate) fn on_thread<R: Send>(name: &str, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name(format!("in {name}")).spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
    })
}

/// The thread's, not the process's: `/proc/self` is the main thread.
fn open_own() -> Result<OwnedFd> {
    let path = "/proc/thread-self/ns/net";
    Ok(File::open(path).context(path)?.into())
}

fn sysctl_path(name: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(name.replace('.', "/"))
}
