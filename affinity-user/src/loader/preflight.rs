//! What the node must have, checked before anything is touched.

use std::fs;
use std::io;
use std::path::Path;

use caps::{CapSet, Capability};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use nix::sys::utsname::uname;

use super::LoadError;

/// The oldest kernel that is supported, by major and minor number.
const OLDEST: (u32, u32) = (6, 1);
/// What programs are loaded and attached with, by the names that containers' manifests have; and whether `CAP_SYS_ADMIN` includes it
/// (as before Linux 5.8, which took that one apart).
const NEEDED: [(Capability, &str, bool); 3] = [
    (Capability::CAP_NET_ADMIN, "NET_ADMIN", false),
    (Capability::CAP_BPF, "BPF", true),
    (Capability::CAP_PERFMON, "PERFMON", true),
];

/// Checks rights, kernel, BTF and bpffs, and mounts the latter where it is missing.
pub fn check(pin_dir: &Path) -> Result<(), LoadError> {
    check_node()?;
    mount_bpffs(pin_dir)?;
    fs::create_dir_all(pin_dir).map_err(|source| LoadError::Directory { path: pin_dir.to_owned(), source })
}

/// Checks rights, kernel and BTF: what programs are loaded with, pinned or not.
pub fn check_node() -> Result<(), LoadError> {
    // Where the kernel does not say, it refuses later.
    let missing = missing(|capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(true));
    if !missing.is_empty() {
        return Err(LoadError::Rights { missing: missing.join(", ") });
    }
    let release = uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
    if version(&release).is_some_and(|version| version < OLDEST) {
        return Err(LoadError::Kernel { found: release });
    }
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        return Err(LoadError::NoBtf);
    }
    Ok(())
}

/// The names of those that are needed and missing.
fn missing(has: impl Fn(Capability) -> bool) -> Vec<&'static str> {
    let is_missing = |(capability, _, is_included): &&(Capability, &str, bool)| {
        !(has(*capability) || *is_included && has(Capability::CAP_SYS_ADMIN))
    };
    NEEDED.iter().filter(is_missing).map(|(_, name, _)| *name).collect()
}

/// Major and minor number of a kernel's release; `None` where it has another shape.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Sees to it that the pin directory lies in a BPF file system: mounts one on its parent where there is none.
///
/// # Errors
/// Where it can't be mounted.
pub fn mount_bpffs(pin_dir: &Path) -> Result<(), LoadError> {
    // The nearest directory that exists decides.
    let existing = pin_dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    if statfs(existing).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC) {
        return Ok(());
    }
    let parent = pin_dir.parent().unwrap_or(pin_dir);
    let failed = |source| LoadError::Bpffs { path: parent.to_owned(), source };
    fs::create_dir_all(parent).map_err(failed)?;
    mount(Some("bpf"), parent, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
        .map_err(|errno| failed(io::Error::from(errno)))?;
    tracing::info!(path = %parent.display(), "mounted bpffs");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(version("6.18.44-fc-v657"), Some((6, 18)));
        assert_eq!(version("6.1.0-37-cloud-amd64"), Some((6, 1)));
        assert!(version("5.15.0").is_some_and(|version| version < OLDEST));
        assert_eq!(version("next"), None);
    }

    #[test]
    fn capabilities_are_named() {
        let missing_with = |given: &[Capability]| missing(|capability| given.contains(&capability));
        assert_eq!(missing_with(&[]), ["NET_ADMIN", "BPF", "PERFMON"]);
        assert_eq!(missing_with(&[Capability::CAP_NET_ADMIN]), ["BPF", "PERFMON"]);
        assert_eq!(missing_with(&[Capability::CAP_NET_ADMIN, Capability::CAP_BPF]), ["PERFMON"]);
        assert!(missing_with(&[Capability::CAP_NET_ADMIN, Capability::CAP_SYS_ADMIN]).is_empty());
        assert_eq!(missing_with(&[Capability::CAP_SYS_ADMIN]), ["NET_ADMIN"]);
    }
}
