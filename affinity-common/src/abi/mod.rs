//! The layout of every BPF map: one file a map, each with its key, its value, its name and its default size.
//!
//! Keys and values are plain memory without implicit padding, asserted by size; whatever is on the wire in network
//! byte order is octets here. Address families have maps of their own, made by one definition.

use crate::family::{Family, V4, V6};

pub mod addresses;
pub mod affinity;
pub mod announced;
pub mod backend_names;
pub mod backend_stats;
pub mod backends;
pub mod config;
pub mod conntrack;
pub mod counters;
pub mod events;
pub mod filter;
pub mod fragments;
pub mod frontends;
pub mod ids;
pub mod lifetimes;
pub mod netns;
pub mod services;
pub mod slots;
pub mod sockets;
pub mod source_ranges;
pub mod tail_calls;
pub mod unknown_netns;
pub mod uplinks;
pub mod work;

/// The version of this layout. A daemon refuses pinned maps of another one.
pub const LAYOUT: u32 = 4;

/// The kinds of map that are in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `BPF_MAP_TYPE_ARRAY`
    Array,
    /// `BPF_MAP_TYPE_PERCPU_ARRAY`
    PerCpuArray,
    /// `BPF_MAP_TYPE_HASH`
    Hash,
    /// `BPF_MAP_TYPE_LRU_HASH`, of the common kind (no list a CPU)
    LruHash,
    /// `BPF_MAP_TYPE_LPM_TRIE`
    LpmTrie,
    /// `BPF_MAP_TYPE_PROG_ARRAY`
    ProgArray,
    /// `BPF_MAP_TYPE_RINGBUF`
    RingBuf,
}

/// What a map is, apart from its contents' meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSpec {
    /// The name in the kernel and of the pin: 15 characters at most.
    pub name: &'static str,
    /// The kind.
    pub kind: Kind,
    /// Size of a key in bytes.
    pub key_size: usize,
    /// Size of a value in bytes.
    pub value_size: usize,
    /// Default number of elements; for a ring buffer its bytes.
    pub default_size: usize,
    /// Whether its size is a setting of the operator's.
    pub resizable: bool,
}

/// Every map, of both families.
pub const MAPS: &[MapSpec] = &[
    frontends::spec::<V4>(),
    frontends::spec::<V6>(),
    addresses::spec::<V4>(),
    addresses::spec::<V6>(),
    backends::spec::<V4>(),
    backends::spec::<V6>(),
    conntrack::spec::<V4>(),
    conntrack::spec::<V6>(),
    affinity::spec::<V4>(),
    affinity::spec::<V6>(),
    fragments::spec::<V4>(),
    fragments::spec::<V6>(),
    netns::spec::<V4>(),
    netns::spec::<V6>(),
    sockets::spec::<V4>(),
    sockets::spec::<V6>(),
    uplinks::spec::<V4>(),
    uplinks::spec::<V6>(),
    source_ranges::spec::<V4>(),
    source_ranges::spec::<V6>(),
    announced::spec::<V4>(),
    announced::spec::<V6>(),
    work::spec::<V4>(),
    work::spec::<V6>(),
    filter::SERVICES,
    filter::DIRECT,
    filter::SNAT,
    slots::SPEC,
    backend_stats::SPEC,
    counters::SPEC,
    config::SPEC,
    lifetimes::SPEC,
    events::SPEC,
    unknown_netns::SPEC,
    ids::SPEC,
    services::SPEC,
    backend_names::SPEC,
    tail_calls::SPEC,
];

/// The name of a family's map.
const fn of_family<F: Family>(v4: &'static str, v6: &'static str) -> &'static str {
    if F::VERSION == V4::VERSION { v4 } else { v6 }
}
