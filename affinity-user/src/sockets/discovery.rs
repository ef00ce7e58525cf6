//! The network namespaces of the node: those of processes, and those that are held by a mount or a file.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// A network namespace: device and inode of its file in nsfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Namespace {
    device: u64,
    inode: u64,
}

impl Namespace {
    /// The namespace whose file it is.
    pub fn of(file: &Metadata) -> Self {
        Self { device: file.dev(), inode: file.ino() }
    }
}

/// Where `ip netns` and CNI plugins hold namespaces.
pub const DIRECTORY: &str = "/run/netns";

/// This process's own namespace.
pub const OWN: &str = "/proc/self/ns/net";

/// The namespace that a file stands for; `None` where it is none, or no longer there.
pub fn of(path: &Path, own: Namespace) -> Option<Namespace> {
    let metadata = fs::metadata(path).ok()?;
    // Every namespace is a file of the one nsfs.
    let namespace = Namespace::of(&metadata);
    (metadata.dev() == own.device).then_some(namespace)
}

/// This process's own namespace.
///
/// # Errors
/// Without `/proc`.
pub fn own() -> io::Result<Namespace> {
    Ok(Namespace::of(&fs::metadata(OWN)?))
}

/// The calling thread's namespace.
///
/// # Errors
/// Without `/proc`.
pub fn here() -> io::Result<Namespace> {
    Ok(Namespace::of(&fs::metadata("/proc/thread-self/ns/net")?))
}

/// Every namespace that can be seen, with a path to it. What disappears meanwhile is left out.
///
/// # Errors
/// Without `/proc`.
pub fn find(directories: &[PathBuf]) -> io::Result<BTreeMap<Namespace, PathBuf>> {
    let own = own()?;
    let mut found = BTreeMap::from([(own, PathBuf::from(OWN))]);
    let processes = fs::read_dir("/proc")?.flatten().map(|entry| entry.path()).filter(|path| is_process(path));
    let held = directories.iter().filter_map(|path| path.read_dir().ok()).flatten().flatten().map(|entry| entry.path());
    let mounted = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mounted: Vec<PathBuf> = mounted.lines().filter_map(mount_of_namespace).collect();
    for path in held.chain(mounted).chain(processes.map(|path| path.join("ns/net"))) {
        if let Some(namespace) = of(&path, own) {
            found.entry(namespace).or_insert(path);
        }
    }
    Ok(found)
}

fn is_process(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit))
}

/// Where a line of `mountinfo` says that a network namespace is mounted: its root is `net:[INODE]`.
fn mount_of_namespace(line: &str) -> Option<PathBuf> {
    let mut fields = line.split(' ').skip(3);
    let (root, place) = (fields.next()?, fields.next()?);
    // Blanks in paths are octal there; no namespace of a pod has any.
    (root.starts_with("net:[")).then(|| PathBuf::from(place))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_namespaces_are_told_from_others() {
        let line = "712 25 0:4 net:[4026532610] /run/netns/cni-1 rw shared:1 - nsfs nsfs rw";
        assert_eq!(mount_of_namespace(line), Some("/run/netns/cni-1".into()));
        assert_eq!(mount_of_namespace("25 1 0:4 mnt:[1] /run/x rw - nsfs nsfs rw"), None);
        assert_eq!(mount_of_namespace("25 1 0:4 / /proc rw - proc proc rw"), None);
        assert_eq!(mount_of_namespace("25"), None);
    }

    #[test]
    fn the_own_namespace_is_found_and_files_are_none() {
        let own = own().expect("proc");
        let file = tempfile::NamedTempFile::new().expect("a file");
        let directory = file.path().parent().expect("a directory").to_owned();
        assert!(find(&[directory, "/does/not/exist".into()]).expect("proc").contains_key(&own));
        assert_eq!(of(file.path(), own), None);
        assert_eq!(of(Path::new(OWN), own), Some(own));
    }
}
