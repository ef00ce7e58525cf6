//! What people and programs read: rows made from what the maps hold. [`Snapshot`] reads the maps once; everything else is
//! pure.

mod backends;
mod connections;
mod counters;
mod evictions;
pub mod pods;
mod services;
mod sessions;
mod snapshot;
mod sockets;

use std::net::SocketAddr;

use affinity_common::family::Family;
use affinity_common::types::Port;

pub use backends::{BackendRow, backends};
pub use connections::{ConnectionRow, connections};
pub use counters::{CounterRow, MapRow, counters, maps};
pub use evictions::{Certainty, EvictionRow, evictions};
pub use services::{FrontendRow, ServiceRow, kind_of, services};
pub use sessions::{SessionRow, sessions};
pub use snapshot::{
    Backend, Client, Connection, FrontendAt, Names, Snapshot, SnapshotError, now, open, read_clients, read_frontends,
    read_names,
};
pub use sockets::{SocketRow, sockets};

/// An address and port as the standard library has them.
fn socket<F: Family>(addr: &F::Addr, port: Port) -> SocketAddr {
    SocketAddr::new(F::to_ip(addr), port.get())
}
