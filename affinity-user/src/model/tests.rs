//! The model: dirtiness, relists, last good states and conflicts.
