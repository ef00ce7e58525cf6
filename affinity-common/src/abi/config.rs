//! `config`: one element; what user space tells the datapath while it runs, and the layout's version.

use super::{Kind, MapSpec};
use crate::pod::pod;

pod! {
    /// The configuration.
    #[derive(Default, PartialEq, Eq)]
    pub struct Config: 16 {
        /// [`super::LAYOUT`] of whoever made the maps; 0 in maps that nobody has claimed yet.
        pub layout: u32,
        /// Zero.
        pub zero: u32,
        /// Until when a reader wants events, on the coarse monotonic clock in nanoseconds. A reader that dies is
        /// forgotten by it.
        pub monitor_until: u64,
    }
}

/// The map.
pub const SPEC: MapSpec = MapSpec {
    name: "config",
    kind: Kind::Array,
    key_size: 4,
    value_size: size_of::<Config>(),
    default_size: 1,
    resizable: false,
};
