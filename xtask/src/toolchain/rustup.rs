//! A nightly of rustup's that has `rust-src`, from which cargo builds `core` for the BPF target.

use std::{fs, path::Path};

use super::{Compiler, Core};
use crate::cargo;

/// The newest nightly with `rust-src`.
pub fn compiler() -> Option<Compiler> {
    let home = cargo::rustup_home()?;
    let names = fs::read_dir(home.join("toolchains")).ok()?.flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    by_preference(names.collect()).into_iter().find_map(|name| {
        let toolchain = home.join("toolchains").join(name);
        let program = |name| toolchain.join("bin").join(name);
        if !has_source(&toolchain) {
            return None;
        }
        Compiler::probe("rustup's nightly", program("cargo"), &program("rustc"), Core::Source)
    })
}

fn has_source(toolchain: &Path) -> bool {
    toolchain.join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file()
}

/// `nightly-<host>` first, then the dated ones from the newest.
fn by_preference(mut names: Vec<String>) -> Vec<String> {
    names.retain(|name| name.starts_with("nightly-"));
    let is_dated = |name: &str| name["nightly-".len()..].starts_with(|c: char| c.is_ascii_digit());
    names.sort_by(|a, b| is_dated(a).cmp(&is_dated(b)).then_with(|| b.cmp(a)));
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_undated_nightly_comes_first_then_the_newest() {
        let names = ["nightly-2026-01-02-x86_64", "stable-x86_64", "nightly-x86_64", "nightly-2026-05-20-x86_64"];
        assert_eq!(
            by_preference(names.map(str::to_owned).to_vec()),
            ["nightly-x86_64", "nightly-2026-05-20-x86_64", "nightly-2026-01-02-x86_64"]
        );
    }
}
