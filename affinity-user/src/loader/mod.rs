//! From the BPF object to programs on interfaces: what the node needs, the pinned maps, the programs, where they are
//! attached, and how every trace of them is removed.
//!
//! [`Datapath::open`] checks the node, makes or adopts the pinned maps and loads the programs; [`Datapath::attach`] puts them
//! on an interface, [`Datapath::attach_cgroup`] on sockets. Everything outlives the process: maps, TCX and cgroup links by their pins, clsact filters by themselves.

pub mod attach;
pub mod cgroup;
mod cleanup;
mod error;
mod footprint;
pub mod interfaces;
mod maps;
mod migrate;
pub(crate) mod pin;
mod preflight;
mod touch;
mod unknown;
pub mod uplinks;

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use affinity_common::abi::LAYOUT;
use affinity_common::abi::tail_calls::Stage;
use aya::programs::{ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use serde::{Deserialize, Serialize};

use crate::object::OBJECT;
use maps::Pinned;
use migrate::Migration;

use attach::{AttachMode, Direction, GracePeriods, Mode, Setting};
use cgroup::CgroupAttachment;

pub use cleanup::cleanup;
pub use error::LoadError;
pub use footprint::{Footprint, Footprints, footprints};
pub use maps::Sizes;
pub use pin::name as pin_name;
pub use preflight::mount_bpffs as mount;
pub use touch::Touch;
pub use unknown::UnknownNetns;

/// Where everything is pinned unless told otherwise.
pub const PIN_DIR: &str = "/sys/fs/bpf/affinity";

/// The directory of the pinned links, in the pin directory.
pub(crate) fn links_dir(pin_dir: &Path) -> PathBuf {
    pin_dir.join("links")
}

/// How the datapath is loaded.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where its maps and links are pinned.
    pub pin_dir: PathBuf,
    /// The sizes of its maps; those of maps that are there already stay.
    pub sizes: Sizes,
    /// How it is attached.
    pub attach: AttachMode,
    /// How the kernel waits meanwhile.
    pub grace_periods: GracePeriods,
    /// The level of its own debug log: 0 compiles it out, 1 is errors alone, 4 is debug.
    pub log_level: u8,
    /// Whether a rejection by the verifier comes with its whole log.
    pub verifier_log: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            pin_dir: PIN_DIR.into(),
            sizes: Sizes::default(),
            attach: AttachMode::Auto,
            grace_periods: GracePeriods::AsSet,
            log_level: 0,
            verifier_log: false,
        }
    }
}

/// A program on an interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The interface's name.
    pub interface: String,
    /// Its index.
    pub ifindex: u32,
    /// How the programs are attached.
    pub mode: Mode,
}

/// The loaded programs and where they are attached.
pub struct Datapath {
    object: Ebpf,
    pin_dir: PathBuf,
    attach: AttachMode,
    grace_periods: Setting,
    attached: BTreeMap<u32, Attachment>,
    cgroup: Option<CgroupAttachment>,
    verifier_log: bool,
    warnings: Vec<String>,
    /// Under way until the programs are replaced everywhere.
    migration: Option<Migration>,
}

impl Datapath {
    /// Checks the node, makes or adopts the pinned maps, and loads the programs. Nothing is attached yet.
    ///
    /// # Errors
    /// What the node lacks, pinned maps of another layout, a rejection by the verifier: each in one line that says what
    /// to do.
    pub fn open(options: &Options) -> Result<Self, LoadError> {
        preflight::check(&options.pin_dir)?;
        let Pinned { warnings, migration } = maps::check_pinned(&options.pin_dir, &options.sizes)?;
        let mut loader = EbpfLoader::new();
        if options.verifier_log {
            loader.verifier_log_level(VerifierLogLevel::VERBOSE | VerifierLogLevel::STATS);
        }
        loader.override_global("AYA_LOG_LEVEL", &options.log_level, true);
        let pins = maps::pins(&options.pin_dir);
        for (spec, pin) in &pins {
            loader.map_pin_path(spec.name, pin.as_path());
            if spec.resizable {
                let size = migration.as_ref().map(|migration| migration.size(spec, &options.sizes));
                loader.map_max_entries(spec.name, size.unwrap_or_else(|| options.sizes.of(spec)));
            }
        }
        let mut object = loader.load(OBJECT).map_err(|error| LoadError::load(&error))?;
        if let Some(migration) = &migration {
            let entries = migration.copy()?;
            tracing::info!(from = migrate::FROM, to = LAYOUT, entries, "carries the maps over to another layout");
        } else {
            maps::claim(&mut object, 0, LAYOUT)?;
        }
        load_stages(&mut object, options.verifier_log)?;
        for direction in Direction::ALL {
            load(&mut object, direction.program(), options.verifier_log)?;
        }
        let links = links_dir(&options.pin_dir);
        fs::create_dir_all(&links).map_err(|source| LoadError::Directory { path: links.clone(), source })?;
        Ok(Self {
            object,
            pin_dir: options.pin_dir.clone(),
            attach: options.attach,
            grace_periods: Setting::new(options.grace_periods),
            attached: BTreeMap::new(),
            cgroup: None,
            verifier_log: options.verifier_log,
            warnings,
            migration,
        })
    }

    /// The programs are replaced wherever they were: nobody writes to the maps of an earlier layout any more, and they go.
    ///
    /// # Errors
    /// Where a map can't be read or written. All of it is done again by the next start.
    pub fn finish_migration(&mut self) -> Result<(), LoadError> {
        for stale in pin::STALE {
            let _ = fs::remove_file(self.pin_dir.join(stale));
        }
        let Some(migration) = &self.migration else { return Ok(()) };
        let entries = migration.finish()?;
        maps::claim(&mut self.object, migrate::FROM, LAYOUT)?;
        self.migration = None;
        tracing::info!(layout = LAYOUT, entries, "the maps are of another layout now");
        Ok(())
    }

    /// What is not as it was asked for, though nothing is wrong.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The loaded object: for the reader of the programs' own log.
    pub fn object(&mut self) -> &mut Ebpf {
        &mut self.object
    }

    /// Attaches both programs to an interface, in place of those that an earlier process attached. Returns how.
    ///
    /// # Errors
    /// Where the kernel refuses. An interface that has gone meanwhile is [`LoadError::is_gone`].
    pub fn attach(&mut self, ifindex: u32, name: &str) -> Result<Mode, LoadError> {
        let Self { object, pin_dir, grace_periods, .. } = self;
        let mode = attach::attach(object, pin_dir, self.attach, grace_periods, ifindex, name)?;
        self.attached.insert(ifindex, Attachment { interface: name.to_owned(), ifindex, mode });
        Ok(mode)
    }

    /// Attaches the programs of sockets to a cgroup, in place of those that an earlier process attached to it or to another
    /// one. See [`cgroup::find`].
    ///
    /// # Errors
    /// Where it is no cgroup, or the kernel refuses.
    pub fn attach_cgroup(&mut self, cgroup: &Path) -> Result<(), LoadError> {
        self.cgroup = Some(cgroup::attach(&mut self.object, &self.pin_dir, cgroup, self.verifier_log)?);
        Ok(())
    }

    /// Takes the programs of sockets off, also those that an earlier process attached.
    pub fn detach_cgroup(&mut self) {
        self.cgroup = None;
        cgroup::detach(&self.pin_dir);
    }

    /// The cgroup whose sockets are served.
    pub fn cgroup(&self) -> Option<&CgroupAttachment> {
        self.cgroup.as_ref()
    }

    /// Loads the program that refreshes affinity for user space.
    ///
    /// # Errors
    /// Where the verifier refuses it, or there are no more file descriptors.
    pub fn touch(&mut self) -> Result<Touch, LoadError> {
        let program = program(&mut self.object, Touch::PROGRAM)?;
        let failed = |error| LoadError::verifier(Touch::PROGRAM, error, self.verifier_log);
        match program.load() {
            Ok(()) | Err(ProgramError::AlreadyLoaded) => {}
            Err(error) => return Err(failed(error)),
        }
        let fd = program.fd().map_err(failed)?.as_fd().try_clone_to_owned();
        fd.map(Touch::new).map_err(|error| failed(error.into()))
    }

    /// Opens what the programs of sockets tell of unknown namespaces. It has one reader.
    ///
    /// # Errors
    /// Where the map can't be opened.
    pub fn unknown_netns(&self) -> Result<UnknownNetns, LoadError> {
        UnknownNetns::open(&self.pin_dir)
    }

    /// Takes both programs off an interface, or forgets one that has gone.
    pub fn detach(&mut self, ifindex: u32) {
        if let Some(attachment) = self.attached.remove(&ifindex) {
            attach::detach(&self.pin_dir, ifindex, &attachment.interface);
        }
    }

    /// An interface has another name now.
    pub fn rename(&mut self, ifindex: u32, name: &str) {
        if let Some(attachment) = self.attached.get_mut(&ifindex) {
            name.clone_into(&mut attachment.interface);
        }
    }

    /// Takes off what earlier processes attached to interfaces that are not attached to now, and are not `to_be`: those that have
    /// gone, and those that the patterns no longer match.
    pub fn drop_others(&self, to_be: impl Fn(u32) -> bool) {
        attach::drop_others(&self.pin_dir, |ifindex| self.attached.contains_key(&ifindex) || to_be(ifindex));
    }

    /// Whether an earlier process has left links on an interface.
    pub fn has_links(&self, ifindex: u32) -> bool {
        attach::has_links(&self.pin_dir, ifindex)
    }

    /// Where the programs are.
    pub fn attachments(&self) -> impl Iterator<Item = &Attachment> {
        self.attached.values()
    }
}

/// Where the programs are, as the pins and the kernel tell: without a daemon, and without loading anything.
pub fn attached(pin_dir: &Path) -> Vec<Attachment> {
    attach::attached(pin_dir)
}

/// Whether maps are pinned in a directory.
pub(crate) fn is_pinned(pin_dir: &Path) -> bool {
    pin_dir.join(affinity_common::abi::config::SPEC.name).exists()
}

/// The cgroup whose sockets are served, as the pins tell.
pub fn attached_cgroup(pin_dir: &Path) -> Option<CgroupAttachment> {
    cgroup::attached(pin_dir)
}

/// Loads the programs that others hand packets over to, and lets those find them.
///
/// # Errors
/// Where the verifier refuses one.
pub fn load_stages(object: &mut Ebpf, verifier_log: bool) -> Result<(), LoadError> {
    for stage in Stage::ALL {
        let name = stage.program();
        load(object, name, verifier_log)?;
        let fd = program(object, name)?
            .fd()
            .and_then(|fd| Ok(fd.try_clone()?))
            .map_err(|error| LoadError::verifier(name, error, false))?;
        maps::hand_over(object, stage as u32, &fd)?;
    }
    Ok(())
}

fn load(object: &mut Ebpf, name: &'static str, verifier_log: bool) -> Result<(), LoadError> {
    program(object, name)?.load().map_err(|error| LoadError::verifier(name, error, verifier_log))
}

pub(crate) fn program<'a>(object: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SchedClassifier, LoadError> {
    let program = object.program_mut(name).ok_or(LoadError::NoProgram(name))?;
    program.try_into().map_err(|error| LoadError::verifier(name, error, false))
}
