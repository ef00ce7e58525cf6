//! Filters of the clsact qdisc, at one fixed place each: a new program replaces the old one there, and none is left twice.

use aya::Ebpf;
use aya::programs::SchedClassifier;
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, SchedClassifierLinkId, TcAttachOptions, TcHandle, qdisc_add_clsact,
    qdisc_detach_program,
};

use super::{Direction, Mode, Target, qdisc};
use crate::loader::{LoadError, program};

/// Before all others: the CNI's filters are to see what we have made of the packet.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0, 0xaff);

pub(super) fn attach(object: &mut Ebpf, target: &Target<'_>, direction: Direction) -> Result<(), LoadError> {
    let program = program(object, direction.program())?;
    // It may be there; if it can't be made, the filter can't either, and says why.
    let _ = qdisc_add_clsact(target.name);
    let attached = replace(program, target, direction).or_else(|| {
        let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
        Some(program.attach_with_options(target.name, direction.hook(), TcAttachOptions::Netlink(options)))
    });
    let link = match attached {
        Some(attached) => attached.and_then(|id| program.take_link(id)),
        None => return Ok(()),
    };
    let link = link.map_err(|error| target.failed(direction, Mode::Clsact, &error))?;
    // A filter goes with its link; ours is to stay.
    std::mem::forget(link);
    Ok(())
}

/// Replaces the program of our filter, if there is one.
fn replace(
    program: &mut SchedClassifier,
    target: &Target<'_>,
    direction: Direction,
) -> Option<Result<SchedClassifierLinkId, aya::programs::ProgramError>> {
    let link = SchedClassifierLink::attached(target.name, direction.hook(), PRIORITY, HANDLE, None).ok()?;
    program.attach_to_link(link).ok().map(Ok)
}

/// Removes our filters from an interface, and its clsact qdisc if nothing else is in it.
pub(super) fn detach(interface: &str) {
    let mut removed = false;
    for direction in Direction::ALL {
        // There may be none.
        removed |= qdisc_detach_program(interface, direction.hook(), direction.program()).is_ok();
    }
    if removed {
        qdisc::remove_empty(interface);
    }
}

/// Whether our filters are on an interface.
pub(super) fn is_attached(interface: &str) -> bool {
    qdisc::has_filter(interface, PRIORITY, HANDLE.into())
}
