//! Where cgroup v2 is mounted: `/sys/fs/cgroup`, `/sys/fs/cgroup/unified` beside v1, or elsewhere.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

/// The mount of the cgroup v2 hierarchy that shows the most of it.
pub(super) fn find() -> Option<PathBuf> {
    find_in(&fs::read_to_string("/proc/self/mountinfo").ok()?)
}

/// By the text of `/proc/PID/mountinfo` (proc(5)).
fn find_in(mounts: &str) -> Option<PathBuf> {
    let found = mounts.lines().filter_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        file_system.starts_with("cgroup2 ").then(|| (depth(root), unescaped(point)))
    });
    found.min_by_key(|(depth, _)| *depth).map(|(_, point)| point)
}

/// How far below our cgroup namespace's root a mount's root is. A container that has the node's hierarchy mounted, too, sees
/// the root of that above its own, as `/../..`.
fn depth(root: &str) -> isize {
    root.split('/').filter(|part| !part.is_empty()).map(|part| if part == ".." { -1 } else { 1 }).sum()
}

/// Space, tab, newline and backslash are `\\` and three octal digits.
fn unescaped(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut path = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes.get(at + 1..at + 4).and_then(|digits| str::from_utf8(digits).ok());
        let escaped = octal.filter(|_| bytes[at] == b'\\').and_then(|digits| u8::from_str_radix(digits, 8).ok());
        path.push(escaped.unwrap_or(bytes[at]));
        at += if escaped.is_some() { 4 } else { 1 };
    }
    OsString::from_vec(path).into()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const HYBRID: &str = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
        32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
        41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:3 - cgroup2 cgroup2 rw\n";

    #[test]
    fn the_hierarchy_is_found_wherever_it_is() {
        assert_eq!(find_in(HYBRID).as_deref(), Some(Path::new("/sys/fs/cgroup/unified")));
        let with_parts =
            "40 31 0:38 /pods /run/a\\040b rw - cgroup2 cgroup2 rw\n41 31 0:38 / /run/c\\134d rw - cgroup2 none rw";
        assert_eq!(find_in(with_parts).as_deref(), Some(Path::new("/run/c\\d")));
        assert_eq!(
            find_in("40 31 0:38 / /run/a\\040b rw - cgroup2 cgroup2 rw").as_deref(),
            Some(Path::new("/run/a b"))
        );
        // In a pod: its own cgroup, and the node's root from outside of its namespace.
        let pod = "40 31 0:38 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n\
                   41 31 0:38 /../../.. /host/cgroup ro - cgroup2 cgroup2 rw";
        assert_eq!(find_in(pod).as_deref(), Some(Path::new("/host/cgroup")));
        assert_eq!(find_in("32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"), None);
    }
}
