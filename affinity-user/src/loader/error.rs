//! What can go wrong between the object and the interfaces: each in one line that says what to do.

use crate::causes;
use std::io;
use std::path::PathBuf;

use aya::EbpfError;
use aya::programs::ProgramError;
use thiserror::Error;

/// The datapath can't be loaded or attached.
#[derive(Debug, Error)]
pub enum LoadError {
    /// Too few rights.
    #[error(
        "affinity needs root, or the capabilities it lacks: {missing}; run it by sudo, or add them to the container's securityContext"
    )]
    Rights {
        /// The names of those that are missing.
        missing: String,
    },
    /// A kernel before 6.1.
    #[error("the kernel is {found}, affinity needs 6.1 or newer: upgrade the node")]
    Kernel {
        /// Its release.
        found: String,
    },
    /// A kernel without BTF.
    #[error("the kernel has no BTF (/sys/kernel/btf/vmlinux): affinity needs one built with CONFIG_DEBUG_INFO_BTF=y")]
    NoBtf,
    /// No BPF file system, and none to be had.
    #[error("no bpffs at {}, and it can't be mounted ({source}): mount -t bpf bpf {}", path.display(), path.display())]
    Bpffs {
        /// Where it should be.
        path: PathBuf,
        /// Why it can't be mounted.
        source: io::Error,
    },
    /// A directory can't be made.
    #[error("can't make {}: {source}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Pinned maps of another version.
    #[error(
        "the maps pinned under {} have layout {found}, this affinity has layout {ours}: {}, or run `affinity cleanup` first \
         (clients will be given new backends)",
        path.display(),
        if found > ours {
            "a later version made them, go on with that".to_owned()
        } else {
            format!("go by way of a version with layout {}, which carries them over", found + 1)
        }
    )]
    Layout {
        /// The pin directory.
        path: PathBuf,
        /// The layout of the pinned maps.
        found: u32,
        /// Ours.
        ours: u32,
    },
    /// A pinned map that is not what its name says.
    #[error(
        "{} is no map of this affinity ({what}): run `affinity cleanup` first, or give another --pin-dir",
        path.display()
    )]
    Map {
        /// The pin.
        path: PathBuf,
        /// What is different.
        what: String,
    },
    /// A map can't be read or written.
    #[error("map {map}: {source}")]
    MapAccess {
        /// Its name.
        map: &'static str,
        /// Why not.
        source: aya::maps::MapError,
    },
    /// The object can't be loaded.
    #[error("the BPF object can't be loaded: {0}")]
    Load(String),
    /// The object has no such program.
    #[error("the BPF object has no program {0}: build it anew by `cargo xtask build`")]
    NoProgram(&'static str),
    /// The verifier has refused a program.
    #[error("the kernel's verifier refuses {program}: {message}")]
    Verifier {
        /// Which.
        program: &'static str,
        /// The last words of its log, or all of it.
        message: String,
    },
    /// The kernel has no such place for a program of sockets.
    #[error(
        "the kernel has no {hook}, where {program} is to run: it takes Linux {since} or newer with CONFIG_CGROUP_BPF=y; \
         --socket-lb off does without"
    )]
    NoHook {
        /// The program.
        program: &'static str,
        /// The place.
        hook: &'static str,
        /// The first Linux that has it.
        since: &'static str,
    },
    /// There is no cgroup v2 file system.
    #[error(
        "no cgroup2 file system is mounted, which sockets are served by: mount -t cgroup2 none /sys/fs/cgroup/unified, \
         give a cgroup by --cgroup, or do without by --socket-lb off"
    )]
    NoCgroup,
    /// What was given is no cgroup.
    #[error(
        "{} is no cgroup ({why}): give a directory of the cgroup2 file system by --cgroup, or do without by --socket-lb off",
        path.display()
    )]
    Cgroup {
        /// The path.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// A program can't be attached to a cgroup.
    #[error(
        "{program} can't be attached to the cgroup {}: {message} (it needs a kernel with CONFIG_CGROUP_BPF; --socket-lb off \
         does without)",
        path.display()
    )]
    AttachCgroup {
        /// Which.
        program: &'static str,
        /// To which cgroup.
        path: PathBuf,
        /// Why not.
        message: String,
    },
    /// A program can't be attached.
    #[error("{program} can't be attached to {interface} by {mode}: {message}")]
    Attach {
        /// Which.
        program: &'static str,
        /// To which interface.
        interface: String,
        /// How.
        mode: &'static str,
        /// Why not.
        message: String,
        /// Whether the interface has gone.
        gone: bool,
    },
}

impl LoadError {
    /// Whether it only says that an interface has gone meanwhile.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Attach { gone: true, .. })
    }

    pub(super) fn load(error: &EbpfError) -> Self {
        Self::Load(causes::in_full(error))
    }

    pub(super) fn verifier(program: &'static str, error: ProgramError, whole_log: bool) -> Self {
        let message = match error {
            ProgramError::LoadError { io_error, verifier_log } => {
                let log = verifier_log.to_string();
                if whole_log {
                    format!("{io_error}\n{log}")
                } else {
                    let last = log.lines().rev().find(|line| !line.trim().is_empty() && !line.starts_with("processed"));
                    format!("{io_error}: {} (the whole log: --verifier-log)", last.unwrap_or("its log is empty"))
                }
            }
            error => causes::in_full(&error),
        };
        Self::Verifier { program, message }
    }
}
