//! The programs of sockets, at a cgroup: they see the calls of every process below it, in whatever network namespace.
//!
//! Links are pinned. The next process puts its programs into them one by one, so that there is no moment without a program
//! and none with two.

mod mount;

use std::error::Error;
use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, Program, ProgramError};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use serde::{Deserialize, Serialize};

use super::{LoadError, links_dir};
use crate::causes;
use crate::syscall;

/// A place in the kernel where a program of sockets runs.
struct Hook {
    /// The program.
    program: &'static str,
    /// The kernel's name of the place, as in a program's section.
    name: &'static str,
    /// The first Linux that has it.
    since: &'static str,
}

impl Hook {
    const fn new(program: &'static str, name: &'static str, since: &'static str) -> Self {
        Self { program, name, since }
    }

    /// Why its program can't be loaded: the kernel says no word where it does not know the hook.
    fn refused(&self, error: ProgramError, verifier_log: bool) -> LoadError {
        match &error {
            ProgramError::LoadError { io_error, verifier_log: log }
                if io_error.raw_os_error() == Some(libc::EINVAL) && log.to_string().trim().is_empty() =>
            {
                LoadError::NoHook { program: self.program, hook: self.name, since: self.since }
            }
            _ => LoadError::verifier(self.program, error, verifier_log),
        }
    }
}

/// The hooks, in the order in which they are taken: a socket is translated only when it would be told of it, too.
const HOOKS: [Hook; 9] = [
    Hook::new("affinity_release", "cgroup/sock_release", "5.9"),
    Hook::new("affinity_getpeername4", "cgroup/getpeername4", "5.8"),
    Hook::new("affinity_getpeername6", "cgroup/getpeername6", "5.8"),
    Hook::new("affinity_recvmsg4", "cgroup/recvmsg4", "5.2"),
    Hook::new("affinity_recvmsg6", "cgroup/recvmsg6", "5.2"),
    Hook::new("affinity_sendmsg4", "cgroup/sendmsg4", "4.18"),
    Hook::new("affinity_sendmsg6", "cgroup/sendmsg6", "4.18"),
    Hook::new("affinity_connect4", "cgroup/connect4", "4.17"),
    Hook::new("affinity_connect6", "cgroup/connect6", "4.17"),
];

/// The programs of the hooks.
pub(super) fn programs() -> impl Iterator<Item = &'static str> {
    HOOKS.iter().map(|hook| hook.program)
}

/// What the names of the pins begin with; a program's name without its own beginning follows.
const PIN: &str = "cgroup-";

/// A cgroup whose sockets are served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupAttachment {
    /// Its directory, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Its number: the inode of its directory.
    pub id: u64,
}

/// The cgroup to attach to: the given one, or the root of the node's hierarchy as this process sees it.
///
/// # Errors
/// Where it is no directory of a cgroup v2 file system, or there is none.
pub fn find(given: Option<&Path>) -> Result<PathBuf, LoadError> {
    let path = match given {
        Some(path) => path.to_owned(),
        None => mount::find().ok_or(LoadError::NoCgroup)?,
    };
    check(&path)?;
    Ok(path)
}

fn check(path: &Path) -> Result<(), LoadError> {
    let not = |why: String| LoadError::Cgroup { path: path.to_owned(), why };
    let found = statfs(path).map_err(|errno| not(errno.desc().to_owned()))?;
    if found.filesystem_type() != CGROUP2_SUPER_MAGIC || !path.is_dir() {
        return Err(not("it is no directory of a cgroup2 file system".to_owned()));
    }
    Ok(())
}

fn pin(links: &Path, program: &str) -> PathBuf {
    links.join(format!("{PIN}{}", program.trim_start_matches("affinity_")))
}

/// Loads the programs and attaches them, in place of those that an earlier process attached.
pub(super) fn attach(
    object: &mut Ebpf,
    pin_dir: &Path,
    path: &Path,
    verifier_log: bool,
) -> Result<CgroupAttachment, LoadError> {
    check(path)?;
    let not = |why: String| LoadError::Cgroup { path: path.to_owned(), why };
    let cgroup = File::open(path).map_err(|error| not(error.to_string()))?;
    let id = cgroup.metadata().map_err(|error| not(error.to_string()))?.ino();
    load(object, verifier_log)?; // All of them, before any is attached.
    let links = links_dir(pin_dir);
    for Hook { program: name, .. } in HOOKS {
        let program = object.program_mut(name).ok_or(LoadError::NoProgram(name))?;
        let failed = |message: String| LoadError::AttachCgroup { program: name, path: path.to_owned(), message };
        let pin = pin(&links, name);
        if pin.exists() {
            if adopt(program, &pin, id) {
                continue;
            }
            // Of another cgroup, or of one that has gone.
            remove(&pin);
        }
        let link = link(program, &cgroup).map_err(|error| failed(causes::in_full(&*error)))?;
        link.pin(&pin).map_err(|error| failed(causes::in_full(&error)))?;
    }
    Ok(CgroupAttachment { path: Some(path.to_owned()), id })
}

/// Loads the programs.
///
/// # Errors
/// Where the kernel has no such hook, or the verifier refuses one.
pub fn load(object: &mut Ebpf, verifier_log: bool) -> Result<(), LoadError> {
    for hook in HOOKS {
        let loaded = match object.program_mut(hook.program).ok_or(LoadError::NoProgram(hook.program))? {
            Program::CgroupSockAddr(program) => program.load(),
            Program::CgroupSock(program) => program.load(),
            _ => Err(ProgramError::UnexpectedProgramType),
        };
        loaded.map_err(|error| hook.refused(error, verifier_log))?;
    }
    Ok(())
}

fn link(program: &mut Program, cgroup: &File) -> Result<FdLink, Box<dyn Error>> {
    // A link is one of several at its cgroup whatever the mode says, and the kernel wants no flags for it.
    let mode = CgroupAttachMode::Single;
    Ok(match program {
        Program::CgroupSockAddr(program) => {
            let id = program.attach(cgroup, mode)?;
            FdLink::try_from(program.take_link(id)?)?
        }
        Program::CgroupSock(program) => {
            let id = program.attach(cgroup, mode)?;
            FdLink::try_from(program.take_link(id)?)?
        }
        _ => return Err(ProgramError::UnexpectedProgramType.into()),
    })
}

/// Puts the program into a pinned link, if that is attached to the cgroup of this number.
fn adopt(program: &Program, pin: &Path, id: u64) -> bool {
    let Ok(link) = syscall::open_pinned(pin) else { return false };
    let Ok(program) = program.fd() else { return false };
    syscall::cgroup_of_link(link.as_fd()).is_ok_and(|of| of == id)
        && syscall::update_link(link.as_fd(), program.as_fd()).is_ok()
}

/// Takes a pinned link off its cgroup, at once, and removes the pin.
fn remove(pin: &Path) {
    if let Ok(link) = syscall::open_pinned(pin) {
        // A link whose cgroup has gone is off already.
        let _ = syscall::detach_link(link.as_fd());
    }
    if let Err(error) = fs::remove_file(pin) {
        tracing::warn!(pin = %pin.display(), %error, "can't remove a link's pin");
    }
}

/// Takes all programs off, where they are.
pub(super) fn detach(pin_dir: &Path) {
    let links = links_dir(pin_dir);
    // The other way round: nothing is translated any more when nothing is shown any more.
    for pin in HOOKS.iter().rev().map(|hook| pin(&links, hook.program)).filter(|pin| pin.exists()) {
        remove(&pin);
    }
}

/// Where the programs are, as the pins tell; `None` where one of them is missing, or their cgroup is gone.
pub(super) fn attached(pin_dir: &Path) -> Option<CgroupAttachment> {
    let links = links_dir(pin_dir);
    let ids = HOOKS.iter().map(|hook| {
        let link = syscall::open_pinned(&pin(&links, hook.program)).ok()?;
        syscall::cgroup_of_link(link.as_fd()).ok().filter(|id| *id != 0)
    });
    let ids: Vec<u64> = ids.collect::<Option<_>>()?;
    let id = *ids.first()?;
    ids.iter().all(|other| *other == id).then_some(CgroupAttachment { path: None, id })
}

#[cfg(test)]
mod tests {
    use aya_obj::VerifierLog;
    use nix::errno::Errno;

    use super::*;

    #[test]
    fn pins_are_named_after_their_hooks() {
        let names = HOOKS.map(|hook| pin(Path::new("/links"), hook.program));
        assert_eq!(names[0], Path::new("/links/cgroup-release"));
        assert_eq!(names[8], Path::new("/links/cgroup-connect6"));
    }

    #[test]
    fn a_kernel_without_a_hook_is_told_from_a_program_that_is_wrong() {
        let refused = |error: Errno, log: &str| {
            let verifier_log = VerifierLog::new(log.to_owned());
            HOOKS[3].refused(ProgramError::LoadError { io_error: error.into(), verifier_log }, false).to_string()
        };
        let missing = refused(Errno::EINVAL, "");
        for part in ["cgroup/recvmsg4", "5.2", "CONFIG_CGROUP_BPF", "--socket-lb off"] {
            assert!(missing.contains(part), "{missing}");
        }
        for wrong in [refused(Errno::EINVAL, "R1 type=scalar expected=fp"), refused(Errno::EPERM, "")] {
            assert!(wrong.contains("affinity_recvmsg4") && !wrong.contains("5.2"), "{wrong}");
        }
    }

    #[test]
    fn a_path_that_is_no_cgroup_is_refused_in_a_line() {
        for path in ["/proc", "/nowhere", "/proc/self/mountinfo"] {
            let text = find(Some(Path::new(path))).expect_err("no cgroup").to_string();
            assert!(text.contains(path) && text.contains("--cgroup") && !text.contains('\n'), "{text}");
        }
    }
}
