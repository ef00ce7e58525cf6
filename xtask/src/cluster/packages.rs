//! containerd, runc and the CNI plugins: unpacked from Debian's packages, neither installed nor started on the machine.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{machine, process, say, workspace};

const PACKAGES: [&str; 3] = ["containerd", "runc", "containernetworking-plugins"];
/// What must be there of them.
const PROGRAMS: [&str; 5] =
    ["usr/bin/containerd", "usr/bin/containerd-shim-runc-v2", "usr/bin/ctr", "usr/sbin/runc", "usr/lib/cni/ptp"];

/// Returns the directory that they are unpacked in.
pub fn unpack() -> Result<PathBuf> {
    let directory = workspace::cache()?.join("containerd");
    if is_complete(&directory) {
        return Ok(directory);
    }
    let names = PACKAGES.join(", ");
    if !machine::has_apt() {
        bail!("the cluster's nodes run {names}, of Debian's packages, and there is no apt-get to fetch these with");
    }
    say::progress("Unpacking", &format!("Debian packages {names} ({})", directory.display()));
    if let Err(error) = machine::apt_update() {
        say::warning(&format!("{error:#}"));
    }
    let new = directory.with_added_extension(format!("new-{}", std::process::id()));
    let _ = fs::remove_dir_all(&new);
    let unpacked = fetch(&new).and_then(|()| {
        let _ = fs::remove_dir_all(&directory);
        fs::rename(&new, &directory).with_context(|| directory.display().to_string())
    });
    if unpacked.is_err() {
        let _ = fs::remove_dir_all(&new);
    }
    unpacked?;
    if !is_complete(&directory) {
        bail!("{names} have not all of {}", PROGRAMS.join(", "));
    }
    Ok(directory)
}

fn is_complete(directory: &Path) -> bool {
    PROGRAMS.iter().all(|program| machine::is_executable(&directory.join(program)))
}

fn fetch(directory: &Path) -> Result<()> {
    let archives = directory.join("debs");
    fs::create_dir_all(&archives).with_context(|| archives.display().to_string())?;
    let mut download = Command::new("apt-get");
    // As whoever we are: apt's own user could not write here, of which it would warn.
    download.args(["download", "--quiet", "-o", "APT::Sandbox::User=root"]).args(PACKAGES).current_dir(&archives);
    process::quiet("apt-get download", download)?;
    for archive in fs::read_dir(&archives)? {
        let mut dpkg = Command::new("dpkg-deb");
        dpkg.arg("--extract").arg(archive?.path()).arg(directory);
        process::run(dpkg)?;
    }
    fs::remove_dir_all(&archives).with_context(|| archives.display().to_string())
}
