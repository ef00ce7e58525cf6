//! TCX links, pinned: they stay when the process goes, and the next one puts its program into them in one step.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::SchedClassifier;
use aya::programs::links::{FdLink, LinkError, LinkOrder, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};

use super::{Direction, Mode, Setting, Target};
use crate::loader::{LoadError, program};

/// The name of a link's pin.
pub(super) struct Pin {
    pub(super) ifindex: u32,
}

impl Pin {
    /// `INDEX-ingress`, `INDEX-egress`.
    fn path(links: &Path, ifindex: u32, direction: Direction) -> PathBuf {
        links.join(format!("{ifindex}-{}", direction.name()))
    }

    fn parse(name: &str) -> Option<Self> {
        let (ifindex, direction) = name.split_once('-')?;
        Direction::ALL.iter().find(|known| known.name() == direction)?;
        Some(Self { ifindex: ifindex.parse().ok()? })
    }
}

pub(super) fn attach(
    object: &mut Ebpf,
    links: &Path,
    target: &Target<'_>,
    direction: Direction,
    grace: &Setting,
) -> Result<(), LoadError> {
    let path = Pin::path(links, target.ifindex, direction);
    let program = program(object, direction.program())?;
    if path.exists() {
        match adopt(program, &path, target, direction) {
            Ok(true) => return Ok(()),
            // A link of an interface that had the same index, or no link: it can be no use.
            Ok(false) => drop(fs::remove_file(&path)),
            // What is there goes on until it can be replaced.
            Err(error) => return Err(target.failed(direction, Mode::Tcx, &*error)),
        }
    }
    // Before the CNI's programs, which are to see what we have made of the packet.
    let order = TcAttachOptions::TcxOrder(LinkOrder::first());
    let failed = |error: &dyn Error| target.failed(direction, Mode::Tcx, error);
    let id = {
        let _short = grace.expedite();
        program.attach_with_options(target.name, direction.hook(), order).map_err(|error| failed(&error))?
    };
    let link = program.take_link(id).map_err(|error| failed(&error))?;
    let link = FdLink::try_from(link).map_err(|error| failed(&error))?;
    link.pin(&path).map_err(|error| failed(&error))?;
    Ok(())
}

/// Puts the program into a pinned link, if that is attached to the interface; returns whether it is.
fn adopt(
    program: &mut SchedClassifier,
    path: &Path,
    target: &Target<'_>,
    direction: Direction,
) -> Result<bool, Box<dyn Error>> {
    let opened = PinnedLink::from_pin(path).map(FdLink::from).and_then(|link| Ok((link.info()?, link)));
    let (info, link) = match opened {
        Ok(opened) => opened,
        Err(error) if is_of_the_moment(&error) => return Err(error.into()),
        Err(_) => return Ok(false),
    };
    let (_, attached) = SchedClassifier::query_tcx(target.name, direction.hook())?;
    if !attached.iter().any(|program| program.id() == info.program_id()) {
        return Ok(false);
    }
    // The link goes on by its pin when its descriptor is closed.
    let Ok(link) = SchedClassifierLink::try_from(link) else { return Ok(false) };
    program.attach_to_link(link).and_then(|id| program.take_link(id))?;
    Ok(true)
}

/// Whether a link can't be opened for want of descriptors or memory.
fn is_of_the_moment(error: &LinkError) -> bool {
    let LinkError::SyscallError(error) = error else { return false };
    matches!(error.io_error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM))
}

/// Removes the pinned links that are to go; with its pin a link goes, too.
pub(super) fn detach(links: &Path, goes: impl Fn(&Pin) -> bool) {
    let entries = fs::read_dir(links).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        if Pin::parse(&name.to_string_lossy()).is_some_and(|pin| goes(&pin))
            && let Err(error) = fs::remove_file(entry.path())
        {
            tracing::warn!(pin = %entry.path().display(), %error, "can't remove a link's pin");
        }
    }
}

/// Whether a packet still meets our programs on an interface: the kernel takes a link off some time after its pin.
pub(super) fn is_met(interface: &str) -> bool {
    Direction::ALL.iter().any(|direction| {
        // The kernel cuts names at 15 bytes.
        let ours = |name: &[u8]| !name.is_empty() && direction.program().as_bytes().starts_with(name);
        SchedClassifier::query_tcx(interface, direction.hook())
            .is_ok_and(|(_, programs)| programs.iter().any(|program| ours(program.name())))
    })
}

/// Whether our links are on an interface.
pub(super) fn is_attached(links: &Path, ifindex: u32) -> bool {
    Direction::ALL.iter().all(|direction| Pin::path(links, ifindex, *direction).exists())
}

/// Whether any of them is pinned.
pub(super) fn has_links(links: &Path, ifindex: u32) -> bool {
    Direction::ALL.iter().any(|direction| Pin::path(links, ifindex, *direction).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_name_interface_and_direction() {
        let path = Pin::path(Path::new("/links"), 12, Direction::Egress);
        assert_eq!(path, Path::new("/links/12-egress"));
        assert_eq!(Pin::parse("12-egress").map(|pin| pin.ifindex), Some(12));
        assert!(Pin::parse("12-sideways").is_none() && Pin::parse("x-ingress").is_none() && Pin::parse("12").is_none());
    }
}
