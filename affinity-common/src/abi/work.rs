//! `work_v4`, `work_v6`: what a program has in hand, for each CPU, as a program's stack is small. Means nothing to others.

use super::{
    Kind, MapSpec,
    conntrack::{Conntrack, ConntrackKey},
};
use crate::{family::Family, pod::pod};

pod! {
    /// What is known of the packet that a CPU is at.
    #[derive(Default)]
    pub struct Work<F>: 80, 128 {
        /// The key of its connection's entry.
        pub key: ConntrackKey<F>,
        /// What that holds.
        pub held: Conntrack<F>,
        /// An entry that is to be made.
        pub way: Conntrack<F>,
    }
}

/// The map of a family.
pub const fn spec<F: Family>() -> MapSpec {
    MapSpec {
        name: super::of_family::<F>("work_v4", "work_v6"),
        kind: Kind::PerCpuArray,
        key_size: 4,
        value_size: size_of::<Work<F>>(),
        default_size: 1,
        resizable: false,
    }
}
