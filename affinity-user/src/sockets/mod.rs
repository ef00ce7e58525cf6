//! What socket load balancing needs of user space: who the sockets of each network namespace are, which clients are still
//! there, and an end for datagram sockets whose backend has gone.
//!
//! - [`discovery`]: the network namespaces of the node. [`namespace`]: what is in one. [`identity`]: who that is.
//!   [`pods`]: which of them are left out. [`wiring`]: which interfaces of the node lead to one.
//! - [`live`]: the sockets of a namespace, by `sock_diag`; and how one is destroyed.
//! - [`keeper`]: the thread that does it all, beside the daemon's; at what pace, where it is called: `pace`.

pub mod discovery;
pub mod identity;
pub mod keeper;
pub mod live;
pub mod namespace;
mod pace;
pub mod pods;
pub mod wiring;
