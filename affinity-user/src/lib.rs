//! Sticky Kubernetes Services in eBPF, the user-space side: what the `affinity` daemon and its tools are made of.
//!
//! A change goes from stage to stage: [`sources`] turn objects into the terms of the [`model`], which knows what they
//! touch; [`plan`] says what the datapath ought to hold for one service.

pub mod loader;
pub mod model;
pub mod object;
pub mod plan;
pub mod sources;
