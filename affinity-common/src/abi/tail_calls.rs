//! `tail_calls`: the programs that another one hands a packet over to. Written by user space.

use super::{Kind, MapSpec};

/// The index of the program that answers for a service without backends.
pub const REFUSE: u32 = 0;

/// Number of programs.
pub const SIZE: usize = 1;

/// The map.
pub const SPEC: MapSpec = MapSpec {
    name: "tail_calls",
    kind: Kind::ProgArray,
    key_size: 4,
    value_size: 4,
    default_size: SIZE,
    resizable: false,
};
