//! Debian's own Rust, which ships a compiled `core` for the BPF target.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::{Compiler, Core, TARGET};
use crate::{machine, workspace};

const PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"];
const CLIPPY: [&str; 1] = ["rust-web-clippy"];
const RUSTC: &str = "/usr/bin/rustc";
const CARGO: &str = "/usr/bin/cargo";
const RUSTLIB: &str = "/usr/lib/rustlib";

/// The packaged compiler, where it is installed with its BPF target.
pub fn compiler() -> Option<Compiler> {
    if !Path::new(RUSTLIB).join(TARGET).is_dir() {
        return None;
    }
    Compiler::probe("Debian's rustc", PathBuf::from(CARGO), Path::new(RUSTC), Core::Prebuilt)
}

/// Installs it.
pub fn install() -> Result<Compiler> {
    machine::apt_install(&PACKAGES).context(
        "installing the BPF toolchain (or type `rustup toolchain install nightly --component rust-src` and install \
         bpf-linker yourself)",
    )?;
    compiler().with_context(|| {
        let oldest = workspace::RUST_VERSION;
        format!(
            "{RUSTC} of Debian's packages is older than {oldest} or has no {TARGET}: use a newer Debian or a nightly"
        )
    })
}

/// Installs the packaged compiler's clippy.
pub fn install_clippy() -> Result<()> {
    machine::apt_install(&CLIPPY)
}
