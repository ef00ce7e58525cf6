//! `unknown_netns`: a ring buffer by which the programs of sockets tell user space of a network namespace that `netns_*`
//! does not know, so that it looks at once.
//!
//! A [`NetnsKey`](super::netns::NetnsKey) is written only while nothing unread is there: who reads says by that how often it
//! wants to be told, and where nobody reads one is written, once.

use super::{Kind, MapSpec};

/// Size of the ring in bytes: a page, rounded up by the loader where pages are larger.
pub const SIZE: usize = 1 << 12;

/// The map.
pub const SPEC: MapSpec = MapSpec {
    name: "unknown_netns",
    kind: Kind::RingBuf,
    key_size: 0,
    value_size: 0,
    default_size: SIZE,
    resizable: false,
};
