//! The world of the tests: an environment and packets for [`crate::dp`] in plain collections, with a clock that stands until
//! it is set, and with faults on demand.

mod env;
mod packet;
mod programs;

pub use env::{FakeEnv, Faults, Hook};
pub use packet::{FakePacket, Offload, Segment, Wire, checksum, destination, source};
pub use programs::run;
