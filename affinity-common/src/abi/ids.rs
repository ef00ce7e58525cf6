//! `ids`: one element; the ids to give out next, so that none is ever reused. Of user space alone.

use super::{Kind, MapSpec};
use crate::pod::pod;
use crate::types::{BackendId, ServiceId};

pod! {
    /// The ids to give out next.
    #[derive(Default, PartialEq, Eq)]
    pub struct NextIds: 8 {
        /// Greater than every service id that was ever given out.
        pub service: ServiceId,
        /// Greater than every backend id that was ever given out.
        pub backend: BackendId,
    }
}

/// The map.
pub const SPEC: MapSpec = MapSpec {
    name: "ids",
    kind: Kind::Array,
    key_size: 4,
    value_size: size_of::<NextIds>(),
    default_size: 1,
    resizable: false,
};
