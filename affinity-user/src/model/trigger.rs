//! When something happened that a version of an object answers.

use jiff::Timestamp;

/// When something happened that a version answers, by the word of who has written it: the annotation
/// `endpoints.kubernetes.io/last-change-trigger-time` of an `EndpointSlice`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Trigger {
    /// Nobody says.
    #[default]
    Unknown,
    /// Then.
    At(Timestamp),
    /// What is said is no time.
    Unreadable,
}
