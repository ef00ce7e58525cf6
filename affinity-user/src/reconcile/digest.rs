//! What was written, to be compared with what is found: a hash of it, where it would be too much to keep.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use bytemuck::NoUninit;

/// A hash of plain memory, the same within a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Digest(u64);

impl Digest {
    /// The digest of values.
    pub fn of<T: NoUninit>(values: &[T]) -> Self {
        let mut hasher = DefaultHasher::new();
        bytemuck::cast_slice::<T, u8>(values).hash(&mut hasher);
        Self(hasher.finish())
    }
}
