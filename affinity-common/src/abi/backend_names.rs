//! `backend_names`: the pod behind each backend, for people. Of user space alone.

use super::{Kind, MapSpec, backends::BackendKey};
use crate::pod::pod;

/// How much of a pod's name is kept: the whole of what controllers make (a pod's hostname is cut at 63).
pub const NAME_MAX: usize = 128;

pod! {
    /// A pod's name.
    #[derive(PartialEq, Eq)]
    pub struct BackendName: 128 {
        /// The name, cut where it is longer; zeroes after it.
        pub name: [u8; NAME_MAX],
    }
}

/// Default number of backends, of both families.
pub const DEFAULT_SIZE: usize = super::backends::DEFAULT_SIZE;

/// The map; its key is a [`BackendKey`].
pub const SPEC: MapSpec = MapSpec {
    name: "backend_names",
    kind: Kind::Hash,
    key_size: size_of::<BackendKey>(),
    value_size: size_of::<BackendName>(),
    default_size: DEFAULT_SIZE,
    resizable: true,
};
