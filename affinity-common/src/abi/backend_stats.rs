//! `backend_stats`: how often each backend was chosen. Made and removed by user space, counted by the datapath.

use super::{Kind, MapSpec, backends::BackendKey};
use crate::pod::pod;

pod! {
    /// What a backend was given.
    #[derive(Default, PartialEq, Eq)]
    pub struct BackendStats: 8 {
        /// New connections that were sent to it.
        pub connections: u64,
    }
}

/// Default number of backends, of both families.
pub const DEFAULT_SIZE: usize = super::backends::DEFAULT_SIZE;

/// The map.
pub const SPEC: MapSpec = MapSpec {
    name: "backend_stats",
    kind: Kind::Hash,
    key_size: size_of::<BackendKey>(),
    value_size: size_of::<BackendStats>(),
    default_size: DEFAULT_SIZE,
    resizable: true,
};
