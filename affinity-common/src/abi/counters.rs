//! `counters`: packets and bytes by program and reason, a value a CPU. Written by the datapath.

use super::{Kind, MapSpec};
use crate::pod::pod;
use crate::reason::{Program, Reason};

pod! {
    /// What was counted.
    #[derive(Default, PartialEq, Eq)]
    pub struct Counter: 16 {
        /// Packets.
        pub packets: u64,
        /// Their bytes, link-layer header included.
        pub bytes: u64,
    }
}

/// How many indices a program has; room for reasons to come, so that a new one moves no counter.
pub const REASONS_A_PROGRAM: u32 = 64;
const _: () = assert!(Reason::ALL.len() <= REASONS_A_PROGRAM as usize);

/// The index of a program's reason.
#[inline(always)]
pub const fn index(program: Program, reason: Reason) -> u32 {
    program as u32 * REASONS_A_PROGRAM + reason as u32
}

/// Number of counters.
pub const SIZE: usize = Program::ALL.len() * REASONS_A_PROGRAM as usize;

/// The map.
pub const SPEC: MapSpec = MapSpec {
    name: "counters",
    kind: Kind::PerCpuArray,
    key_size: 4,
    value_size: size_of::<Counter>(),
    default_size: SIZE,
    resizable: false,
};
