//! The world of the tests: an environment and packets for [`crate::dp`] in plain collections, with a clock that stands until
//! it is set, and with faults on demand.

mod checksum;
mod env;
mod packet;
mod programs;
mod socket;
mod wire;

pub use checksum::checksum;
pub use env::{FakeEnv, Faults, Hook};
pub use packet::{FakePacket, Offload};
pub use programs::{run, run_stage};
pub use socket::FakeSocket;
pub use wire::{IcmpError, Part, Segment, Trouble, Wire, destination, source};
