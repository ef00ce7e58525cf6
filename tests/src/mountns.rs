//! Private mount namespaces: a node's own bpffs, so that its pins vanish with the lab.

use std::fmt;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::netns::on_thread;

/// Where bpffs is mounted on every node.
pub const BPFFS: &str = "/sys/fs/bpf";

/// A mount namespace, held open by a file descriptor; clones are the same namespace.
#[derive(Clone)]
pub struct MountNs {
    fd: Arc<OwnedFd>,
}

impl MountNs {
    /// Makes a copy of this process's mounts, private in both directions, and runs `arrange` in it.
    ///
    /// # Errors
    /// Those of `arrange`, and where the process may not make mount namespaces.
    pub fn new(arrange: impl FnOnce() -> Result<()> + Send) -> Result<Self> {
        let fd = on_thread("mount namespace", || {
            unshare(CloneFlags::CLONE_NEWNS).context("unshare(CLONE_NEWNS): needs root")?;
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
                .context("making / private")?;
            arrange()?;
            let path = "/proc/thread-self/ns/mnt";
            Ok(OwnedFd::from(File::open(path).context(path)?))
        })?;
        Ok(Self { fd: Arc::new(fd) })
    }

    /// What a node has: a bpffs of its own, empty, and an empty `/run`.
    ///
    /// # Errors
    /// Where something cannot be mounted.
    pub fn for_node() -> Result<Self> {
        Self::new(|| {
            unmount(BPFFS)?;
            mount_bpffs(BPFFS)?;
            mount_tmpfs("/run")
        })
    }

    /// A node on which nobody has mounted bpffs yet.
    ///
    /// # Errors
    /// Where something cannot be mounted or unmounted.
    pub fn without_bpffs() -> Result<Self> {
        Self::new(|| {
            unmount(BPFFS)?;
            mount_tmpfs("/run")
        })
    }

    /// Runs `work` with the mounts of this namespace, on a thread of its own.
    ///
    /// # Errors
    /// Those of `work`, and of entering.
    pub fn enter<R: Send>(&self, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
        on_thread("mount namespace", || {
            self.join()?;
            work()
        })
    }

    /// Moves the calling thread for good; only for threads that the caller owns.
    pub(crate) fn join(&self) -> Result<()> {
        // The kernel moves only a thread that shares its root and working directory with no other.
        unshare(CloneFlags::CLONE_FS).context("unshare(CLONE_FS)")?;
        setns(self.fd.as_ref(), CloneFlags::CLONE_NEWNS).context("entering a mount namespace")
    }

    pub(crate) fn shared_fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }
}

impl fmt::Debug for MountNs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MountNs")
    }
}

/// Mounts a new, empty bpffs. For use in a namespace of the caller's own.
///
/// # Errors
/// Where the directory does not exist or the kernel has no BPF.
pub fn mount_bpffs(at: impl AsRef<Path>) -> Result<()> {
    let at = at.as_ref();
    mount(Some("bpf"), at, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
        .with_context(|| format!("mounting bpffs on {}", at.display()))
}

/// Mounts a new, empty tmpfs. For use in a namespace of the caller's own.
///
/// # Errors
/// Where the directory does not exist.
pub fn mount_tmpfs(at: impl AsRef<Path>) -> Result<()> {
    let at = at.as_ref();
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))
        .with_context(|| format!("mounting tmpfs on {}", at.display()))
}

/// Unmounts whatever is mounted there, as often as something is. For use in a namespace of the caller's own.
///
/// # Errors
/// Where a mount is busy.
pub fn unmount(at: impl AsRef<Path>) -> Result<()> {
    let at = at.as_ref();
    loop {
        match umount2(at, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            // Nothing (more) is mounted there.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(error) => {
                return Err(error).with_context(|| format!("unmounting {}", at.display()));
            }
        }
    }
}

/// The names in a directory, sorted; none where the directory does not exist. For looking at pins.
///
/// # Errors
/// Where it exists and cannot be read.
pub fn list(directory: impl AsRef<Path>) -> Result<Vec<String>> {
    let directory = directory.as_ref();
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| directory.display().to_string()),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
