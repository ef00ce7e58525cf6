//! `slots`: where the services' choices are made; each has a run of slots that its frontends point at.
//!
//! A service with affinity has a Maglev table there, one without has each eligible backend once. A run is never changed
//! while a frontend points at it: a new one is written elsewhere, and the frontend's value switches to it.

use super::{Kind, MapSpec};
use crate::pod::pod;
use crate::types::BackendId;

pod! {
    /// A slot.
    #[derive(Default, PartialEq, Eq, Hash)]
    pub struct Slot: 4 {
        /// The backend of whoever is led here.
        pub backend: BackendId,
    }
}

/// Default number of slots, over all services: 10,000 service ports with affinity, of up to twelve backends each (251 slots),
/// and as many again while they change. 32 MiB, as an element takes 8 bytes.
pub const DEFAULT_SIZE: usize = 1 << 22;

/// The map.
pub const SPEC: MapSpec = MapSpec {
    name: "slots",
    kind: Kind::Array,
    key_size: 4,
    value_size: size_of::<Slot>(),
    default_size: DEFAULT_SIZE,
    resizable: true,
};
