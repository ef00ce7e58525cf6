//! What was chosen for a new connection.

use crate::{abi::backends::Backend, family::Family, reason::Reason, types::BackendId};

/// A choice, and how it came about.
#[derive(Clone, Copy, Debug)]
pub struct Choice<F: Family> {
    /// The backend.
    pub id: BackendId,
    /// Where it is.
    pub backend: Backend<F>,
    /// The backend that the client had before, or none (0).
    pub previous: BackendId,
    /// How it was chosen: [`Reason::is_selection`].
    pub reason: Reason,
}
