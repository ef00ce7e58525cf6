//! Where things are: in the checkout, in its target directory, and in the cache that all checkouts share.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// The oldest Rust that compiles the workspace.
pub const RUST_VERSION: &str = env!("CARGO_PKG_RUST_VERSION");

/// The root of the checkout.
pub fn root() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// Where `affinity-user/build.rs` looks for the BPF object.
pub fn object() -> PathBuf {
    root().join("target/bpf/affinity.o")
}

/// Where the benchmark looks for the BPF object that it measures.
pub fn bench_object() -> PathBuf {
    root().join("target/bpf/bench.o")
}

/// Where what takes long to make is kept for all checkouts: `$XDG_CACHE_HOME/affinity`.
pub fn cache() -> Result<PathBuf> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CACHE_HOME")
        .or_else(|| Some(absolute("HOME")?.join(".cache")))
        .map(|cache| cache.join("affinity"))
        .context("neither XDG_CACHE_HOME nor HOME is set: type `export HOME=...`")
}

/// The path as seen from the root of the checkout, where it is below that.
pub fn short(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}
