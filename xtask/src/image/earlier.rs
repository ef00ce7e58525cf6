//! The image of an earlier commit, which the cluster is upgraded from: other code in the binary and in the BPF object.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, Result, bail};

use crate::{cargo, process, say, workspace};

use super::{pack, write};

/// The commit. Its maps have the layout of this one, so that one can go back to it; whoever makes a new layout names a commit
/// of that here.
const COMMIT: &str = "cec69dde8eed4881c284636c8c2fe7030c0fd935";
/// The image's name, as `tests/src/bin/cluster` has it.
const NAME: &str = "localhost/affinity:earlier";

/// Builds the image and returns where it is: once, it takes minutes.
pub fn build() -> Result<PathBuf> {
    let path = workspace::root().join("target/image/earlier.tar");
    let made_of = path.with_extension("commit");
    if path.is_file() && fs::read_to_string(&made_of).is_ok_and(|commit| commit == COMMIT) {
        return Ok(path);
    }
    let started = Instant::now();
    let checkout = workspace::root().join("target/earlier");
    let built = daemon(&checkout).and_then(|binary| pack(&binary, NAME));
    write(&path, &built?.bytes)?;
    fs::write(&made_of, COMMIT).with_context(|| made_of.display().to_string())?;
    fs::remove_dir_all(&checkout).with_context(|| checkout.display().to_string())?;
    let took = say::duration(started.elapsed());
    say::progress("Built", &format!("{} ({NAME}, of {COMMIT}, in {took})", workspace::short(&path)));
    Ok(path)
}

/// Its own `cargo xtask image` in a checkout of its own.
fn daemon(checkout: &Path) -> Result<PathBuf> {
    say::progress("Building", &format!("the image of {COMMIT}, to upgrade from (minutes, once)"));
    // Where that was interrupted it goes on.
    fs::create_dir_all(checkout).with_context(|| checkout.display().to_string())?;
    let archive = checkout.join("earlier.tar");
    let mut git = Command::new("git");
    git.args(["archive", "--output"]).arg(&archive).arg(COMMIT).current_dir(workspace::root());
    process::run(git).context("an upgrade begins with an earlier commit: this takes a checkout with its history")?;
    let mut tar = Command::new("tar");
    tar.arg("--extract").arg("--file").arg(&archive).current_dir(checkout);
    process::run(tar)?;
    let mut image = cargo::host();
    image.args(["xtask", "image"]).current_dir(checkout).env("CARGO_TARGET_DIR", checkout.join("target"));
    process::quiet("cargo xtask image", image)?;
    let targets = fs::read_dir(checkout.join("target"))?.flatten();
    let mut binaries = targets.map(|target| target.path().join("release/affinity")).filter(|binary| binary.is_file());
    match (binaries.next(), binaries.next()) {
        (Some(binary), None) => Ok(binary),
        _ => bail!("{COMMIT} has not built one `affinity` under {}", checkout.display()),
    }
}
