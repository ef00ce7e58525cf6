//! What was written, to be compared with what is found: a hash of it, where it would be too much to keep.

use std::{hash::Hasher as _, num::NonZeroU64};

use bytemuck::NoUninit;
use rustc_hash::FxHasher;

/// A hash of plain memory, the same within a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Digest(NonZeroU64);

impl Digest {
    /// The digest of values.
    pub fn of<T: NoUninit>(values: &[T]) -> Self {
        let mut hasher = FxHasher::default();
        hasher.write(bytemuck::cast_slice(values));
        Self(NonZeroU64::new(hasher.finish()).unwrap_or(NonZeroU64::MIN))
    }
}
