//! `bpf-linker`: makes one BPF object with BTF out of the compiler's bitcode, so it must know that LLVM's bitcode.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};

use super::version::llvm_in_strings;
use crate::{cargo, machine, process, say, workspace};

const VERSION: &str = "0.13.0";
/// The LLVM versions that this `bpf-linker` can be built with.
const BUILDS_WITH: std::ops::RangeInclusive<u32> = 21..=23;

/// A linker of this LLVM: the one installed by [`install`], or the user's own.
pub fn find(llvm: u32) -> Option<PathBuf> {
    let own = own_root(llvm).ok().map(|root| root.join("bin/bpf-linker"));
    if let Some(own) = own.filter(|path| machine::is_executable(path)) {
        return Some(own);
    }
    let users = cargo::home().map(|home| home.join("bin/bpf-linker")).filter(|path| machine::is_executable(path));
    let candidates = [machine::find_program("bpf-linker"), users];
    candidates.into_iter().flatten().find(|path| llvm_of(path) == Some(llvm))
}

/// Whether [`install`] can do without further packages.
pub fn installable(llvm: u32) -> bool {
    BUILDS_WITH.contains(&llvm) && config(llvm).is_some()
}

/// Builds a linker of this LLVM into our own cache, so that the user's own stays what it is.
pub fn install(llvm: u32) -> Result<PathBuf> {
    let headers = format!("llvm-{llvm}-dev");
    if config(llvm).is_none() {
        machine::apt_install(&[&headers])?;
    }
    let prefix = config(llvm).with_context(|| format!("no llvm-config of LLVM {llvm}: install {headers}"))?;
    let root = own_root(llvm)?;
    say::progress("Installing", &format!("bpf-linker {VERSION} for LLVM {llvm} to {} (a minute)", root.display()));
    let mut cargo = cargo::host();
    cargo.args(["install", "bpf-linker", "--version", VERSION, "--locked", "--no-default-features", "--features"]);
    cargo.arg(format!("llvm-{llvm}")).arg("--root").arg(&root);
    let mut path = vec![prefix.join("bin")];
    path.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    cargo
        .env("PATH", env::join_paths(path).context("PATH")?)
        .env("LLVM_PREFIX", &prefix)
        .env(format!("LLVM_SYS_{llvm}1_PREFIX"), &prefix)
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTFLAGS");
    process::quiet("cargo install bpf-linker", cargo)?;
    find(llvm).with_context(|| format!("bpf-linker is not in {}", root.display()))
}

fn own_root(llvm: u32) -> Result<PathBuf> {
    Ok(workspace::cache()?.join(format!("bpf-linker/{VERSION}-llvm-{llvm}")))
}

/// The prefix of an LLVM with its headers.
fn config(llvm: u32) -> Option<PathBuf> {
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{llvm}"));
    machine::is_executable(&prefix.join("bin/llvm-config")).then_some(prefix)
}

/// It does not say by any option. grep is quicker in its 40 MB than an unoptimised loop.
fn llvm_of(linker: &Path) -> Option<u32> {
    let mut grep = Command::new("grep");
    grep.args(["-aoE", "-m1", r"libLLVM[-.a-z]*[0-9]+|LLVM[0-9]{2}\.[0-9]+\.[0-9]+"]).arg(linker);
    grep.env("LC_ALL", "C").stderr(Stdio::null());
    llvm_in_strings(&process::capture(grep).ok()?)
}
