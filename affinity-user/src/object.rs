//! The BPF object inside this library.

/// The ELF object with the datapath's programs and maps, as `cargo xtask build` made it.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("AFFINITY_BPF_OBJECT"));
