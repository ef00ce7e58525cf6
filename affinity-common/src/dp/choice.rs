//! What was chosen for a new connection.

use crate::{
    abi::backends::Backend,
    family::Family,
    reason::Reason,
    types::{BackendId, Ticks},
};

/// A choice, and how it came about.
#[derive(Clone, Copy, Debug)]
pub struct Choice<F: Family> {
    /// The backend.
    pub id: BackendId,
    /// Where it is.
    pub backend: Backend<F>,
    /// The backend that the client had before, or none (0).
    pub previous: BackendId,
    /// When the client's affinity was last used, as recorded; without any, now.
    pub used: Ticks,
    /// How it was chosen: [`Reason::is_selection`].
    pub reason: Reason,
}
