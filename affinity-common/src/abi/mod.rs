//! The layout of every BPF map: one file a map, each with its key, its value, its name and its default size.
//!
//! Keys and values are plain memory without implicit padding, asserted by size; whatever is on the wire in network
//! byte order is octets here. Address families have maps of their own, made by one definition.

pub mod affinity;
pub mod backend_names;
pub mod backend_stats;
pub mod backends;
pub mod config;
pub mod conntrack;
pub mod counters;
pub mod events;
pub mod frontends;
pub mod ids;
pub mod services;
pub mod slots;

/// The version of this layout. A daemon refuses pinned maps of another one.
pub const LAYOUT: u32 = 1;

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
    frontends::SPEC_V4,
    backends::SPEC_V4,
    conntrack::SPEC_V4,
    affinity::SPEC_V4,
    slots::SPEC,
    backend_stats::SPEC,
    counters::SPEC,
    config::SPEC,
    events::SPEC,
    ids::SPEC,
    services::SPEC,
    backend_names::SPEC,
];

/// Defines map keys and values: `repr(C)`, [`bytemuck::Pod`], without padding, of the asserted size.
///
/// `pub struct Name: SIZE { … }`, or `pub struct Name<F>: V4_SIZE, V6_SIZE { … }` for one that differs by family.
macro_rules! pod {
    () => {};
    ($(#[$meta:meta])* pub struct $name:ident: $size:literal {
        $($(#[$field_meta:meta])* pub $field:ident: $ty:ty,)+
    } $($rest:tt)*) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
        pub struct $name { $($(#[$field_meta])* pub $field: $ty,)+ }
        const _: () = assert!(size_of::<$name>() == $size);
        $crate::abi::pod! { $($rest)* }
    };
    ($(#[$meta:meta])* pub struct $name:ident<F>: $v4:literal, $v6:literal {
        $($(#[$field_meta:meta])* pub $field:ident: $ty:ty,)+
    } $($rest:tt)*) => {
        $(#[$meta])*
        #[repr(C, align(4))]
        #[derive(Clone, Copy, Debug)]
        pub struct $name<F: $crate::family::Family> { $($(#[$field_meta])* pub $field: $ty,)+ }

        const _: () = {
            use $crate::family::{Family, V4, V6};
            const fn fields<F: Family>() -> usize { 0 $(+ size_of::<$ty>())+ }
            const fn plain<T: bytemuck::Pod>() {}
            #[expect(dead_code, reason = "only its type check is wanted")]
            const fn every_field_is_plain<F: Family>() { $(plain::<$ty>();)+ }
            assert!(size_of::<$name<V4>>() == $v4 && fields::<V4>() == $v4);
            assert!(size_of::<$name<V6>>() == $v6 && fields::<V6>() == $v6);
        };
        // SAFETY: every field is `Pod`, hence zeroable.
        unsafe impl<F: $crate::family::Family> bytemuck::Zeroable for $name<F> {}
        // SAFETY: `repr(C)`, every field is `Pod`, and the size is the sum of the fields' sizes for both families, so
        // there is no padding: all asserted above. `Family` is sealed, so there is no third.
        unsafe impl<F: $crate::family::Family> bytemuck::Pod for $name<F> {}
        $crate::abi::pod! { $($rest)* }
    };
}
pub(crate) use pod;
