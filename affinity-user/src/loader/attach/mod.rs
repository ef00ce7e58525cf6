//! Programs on interfaces: by TCX where the kernel has it (6.6), by a filter of the clsact qdisc elsewhere.

mod clsact;
mod grace;
mod qdisc;
mod tcx;

use std::fmt;
use std::path::Path;

use aya::Ebpf;
use aya::programs::TcAttachType;
use nix::net::if_::if_nametoindex;
use serde::{Deserialize, Serialize};

use super::{Attachment, LoadError, links_dir};
pub use grace::GracePeriods;
pub(super) use grace::{Setting, take_back};

/// How programs are to be attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttachMode {
    /// By TCX if the kernel has it, else by clsact.
    #[default]
    Auto,
    /// By TCX alone.
    Tcx,
    /// By clsact alone.
    Clsact,
}

/// How programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// A TCX link.
    Tcx,
    /// A filter of the clsact qdisc.
    Clsact,
}

impl Mode {
    /// The name for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The two programs of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    pub(crate) const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// The name of the program in the object.
    pub(crate) const fn program(self) -> &'static str {
        match self {
            Self::Ingress => "affinity_ingress",
            Self::Egress => "affinity_egress",
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    const fn hook(self) -> TcAttachType {
        match self {
            Self::Ingress => TcAttachType::Ingress,
            Self::Egress => TcAttachType::Egress,
        }
    }
}

/// An interface to attach to.
struct Target<'a> {
    ifindex: u32,
    name: &'a str,
}

impl Target<'_> {
    fn failed(&self, direction: Direction, mode: Mode, error: &dyn std::error::Error) -> LoadError {
        // aya knows interfaces by name: one that has gone, or has another name now, is not there.
        let gone = if_nametoindex(self.name) != Ok(self.ifindex);
        LoadError::Attach {
            program: direction.program(),
            interface: self.name.to_owned(),
            mode: mode.name(),
            message: crate::causes::in_full(error),
            gone,
        }
    }
}

/// Attaches both programs in the wanted way, and takes off what an earlier process attached in the other one.
pub(super) fn attach(
    object: &mut Ebpf,
    pin_dir: &Path,
    wanted: AttachMode,
    grace: &Setting,
    ifindex: u32,
    name: &str,
) -> Result<Mode, LoadError> {
    let target = Target { ifindex, name };
    let links = links_dir(pin_dir);
    let by_tcx =
        |object: &mut Ebpf| Direction::ALL.iter().try_for_each(|d| tcx::attach(object, &links, &target, *d, grace));
    let by_clsact = |object: &mut Ebpf| Direction::ALL.iter().try_for_each(|d| clsact::attach(object, &target, *d));
    let mode = match wanted {
        AttachMode::Tcx => by_tcx(object).map(|()| Mode::Tcx),
        AttachMode::Clsact => by_clsact(object).map(|()| Mode::Clsact),
        AttachMode::Auto => match by_tcx(object) {
            Ok(()) => Ok(Mode::Tcx),
            // Links that are there go on until they can be replaced.
            Err(error) if error.is_gone() || tcx::has_links(&links, ifindex) => Err(error),
            // A kernel before 6.6 knows no such link.
            Err(_) => by_clsact(object).map(|()| Mode::Clsact),
        },
    }?;
    match mode {
        Mode::Tcx => clsact::detach(name),
        Mode::Clsact => tcx::detach(&links, |pin| pin.ifindex == ifindex),
    }
    Ok(mode)
}

/// Takes both programs off an interface, however they are attached; one that has gone is no error.
pub(super) fn detach(pin_dir: &Path, ifindex: u32, name: &str) {
    tcx::detach(&links_dir(pin_dir), |pin| pin.ifindex == ifindex);
    if if_nametoindex(name) == Ok(ifindex) {
        clsact::detach(name);
    }
}

/// Whether there are pinned links of an interface.
pub(super) fn has_links(pin_dir: &Path, ifindex: u32) -> bool {
    tcx::has_links(&links_dir(pin_dir), ifindex)
}

/// Takes the programs off all interfaces but those that are to keep them.
pub(super) fn drop_others(pin_dir: &Path, keep: impl Fn(u32) -> bool) {
    tcx::detach(&links_dir(pin_dir), |pin| !keep(pin.ifindex));
    for interface in names() {
        if if_nametoindex(&*interface).is_ok_and(|ifindex| !keep(ifindex)) {
            clsact::detach(&interface);
        }
    }
}

/// Whether a packet still meets our programs anywhere.
pub(super) fn is_met_anywhere() -> bool {
    names().iter().any(|interface| tcx::is_met(interface) || clsact::is_attached(interface))
}

/// Where programs are, as the pins and the kernel tell without a daemon.
pub(super) fn attached(pin_dir: &Path) -> Vec<Attachment> {
    let links = links_dir(pin_dir);
    let attachment = |interface: String| {
        let ifindex = if_nametoindex(&*interface).ok()?;
        let by_clsact = || clsact::is_attached(&interface).then_some(Mode::Clsact);
        let mode = if tcx::is_attached(&links, ifindex) { Some(Mode::Tcx) } else { by_clsact() }?;
        Some(Attachment { interface, ifindex, mode })
    };
    names().into_iter().filter_map(attachment).collect()
}

/// The names of all interfaces.
fn names() -> Vec<String> {
    let interfaces = nix::net::if_::if_nameindex();
    interfaces
        .map(|list| list.iter().map(|one| one.name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default()
}
