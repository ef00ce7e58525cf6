//! The reconciler on tables in memory, whose writes are watched and can fail.

mod affinity;
mod contract;
mod failures;
mod order;
mod random;
mod restart;
mod world;
