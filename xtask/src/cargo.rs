//! Calling cargo from a program that cargo runs.
//!
//! `cargo run` tells its program about the package that it is of. Handed on to another cargo, that would have build scripts
//! run again which look at it (with `ring`'s, half of the dependencies), each time people turn from `cargo` to `cargo xtask`.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use crate::workspace;

/// The cargo that runs us, in the root of the checkout, as people would call it.
pub fn host() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace::root());
    forget(&mut cargo, is_of_our_package);
    cargo
}

/// Takes out of another toolchain's cargo what would lead it to the compiler, the flags or the libraries of ours. What
/// people set for every cargo (home, network, registries, terminal) stays.
pub fn forget_toolchain(command: &mut Command) {
    forget(command, is_of_our_toolchain);
}

fn forget(command: &mut Command, is_ours: fn(&str) -> bool) {
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(is_ours) {
            command.env_remove(name);
        }
    }
    match library_path() {
        Some(path) => command.env("LD_LIBRARY_PATH", path),
        None => command.env_remove("LD_LIBRARY_PATH"),
    };
}

fn is_of_our_package(name: &str) -> bool {
    let of = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"];
    name == "CARGO" || of.iter().any(|start| name.starts_with(start))
}

fn is_of_our_toolchain(name: &str) -> bool {
    const KEPT: [&str; 6] = ["HOME", "NET_", "HTTP_", "REGISTR", "TERM_", "INCREMENTAL"];
    match name.strip_prefix("CARGO_") {
        Some(rest) => !KEPT.iter().any(|kept| rest.starts_with(kept)),
        None => {
            name == "CARGO"
                || name == "RUSTUP_TOOLCHAIN"
                || name.starts_with("RUSTC")
                || name.starts_with("RUSTDOC")
                || name == "RUSTFLAGS"
        }
    }
}

/// The user's own library path: without what `cargo run` put in front of it.
fn library_path() -> Option<OsString> {
    let path = env::var_os("LD_LIBRARY_PATH")?;
    let toolchains = rustup_home().map(|home| home.join("toolchains"));
    let target = workspace::root().join("target");
    let is_cargos = |entry: &Path| {
        entry.starts_with(&target) || toolchains.as_ref().is_some_and(|toolchains| entry.starts_with(toolchains))
    };
    let entries: Vec<PathBuf> = env::split_paths(&path).filter(|entry| !is_cargos(entry)).collect();
    if entries.is_empty() { None } else { env::join_paths(entries).ok() }
}

/// Flags of rustc's by which what it compiles does not tell where the checkout is, nor where crates are kept.
pub fn remapped() -> Vec<String> {
    let places = [(home(), "/cargo"), (Some(workspace::root().to_owned()), "/affinity")];
    let flags =
        places.into_iter().filter_map(|(from, to)| Some(format!("--remap-path-prefix={}={to}", from?.display())));
    flags.collect()
}

/// Where cargo keeps what it installs.
pub fn home() -> Option<PathBuf> {
    home_of("CARGO_HOME", ".cargo")
}

/// Where rustup keeps its toolchains.
pub fn rustup_home() -> Option<PathBuf> {
    home_of("RUSTUP_HOME", ".rustup")
}

fn home_of(variable: &str, directory: &str) -> Option<PathBuf> {
    let set = env::var_os(variable).map(PathBuf::from);
    set.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(directory)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_toolchain_is_forgotten_and_peoples_settings_are_not() {
        for name in
            ["CARGO", "CARGO_PKG_NAME", "CARGO_TARGET_DIR", "CARGO_ENCODED_RUSTFLAGS", "RUSTUP_TOOLCHAIN", "RUSTC"]
        {
            assert!(is_of_our_toolchain(name), "{name}");
        }
        for name in ["CARGO_HOME", "CARGO_NET_OFFLINE", "CARGO_REGISTRIES_CRATES_IO_PROTOCOL", "HOME", "RUSTUP_HOME"] {
            assert!(!is_of_our_toolchain(name), "{name}");
        }
    }

    #[test]
    fn the_same_toolchain_keeps_what_was_set_for_it() {
        assert!(is_of_our_package("CARGO_PKG_NAME") && is_of_our_package("CARGO_MANIFEST_DIR"));
        for name in ["CARGO_TARGET_DIR", "CARGO_HOME", "RUSTFLAGS", "RUSTUP_TOOLCHAIN", "CARGO_BUILD_JOBS"] {
            assert!(!is_of_our_package(name), "{name}");
        }
    }
}
