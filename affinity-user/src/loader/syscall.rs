//! What `bpf(2)` can do and aya has no way for: links of cgroups, and a program run from any thread.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_link_info};

/// Attributes that are all zero, which is what the kernel takes for "not given".
fn attributes() -> bpf_attr {
    // SAFETY: a union of plain C data, for which all zeroes is a value.
    unsafe { std::mem::zeroed() }
}

/// # Safety
/// Pointers in the attributes must be good for what the command does with them.
unsafe fn bpf(command: bpf_cmd, attributes: &mut bpf_attr) -> io::Result<RawFd> {
    // SAFETY: the attributes are as large as is said; what they point to is the caller's promise.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command as libc::c_int, &raw mut *attributes, size_of::<bpf_attr>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { RawFd::try_from(result).map_err(io::Error::other) }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn length<T>(of: &[T]) -> io::Result<u32> {
    u32::try_from(of.len()).map_err(io::Error::other)
}

/// Opens what is pinned at a path.
pub(super) fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = attributes();
    attributes.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    // SAFETY: the path ends with a zero and outlives the call.
    let fd = unsafe { bpf(bpf_cmd::BPF_OBJ_GET, &mut attributes) }?;
    // SAFETY: a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The number of the cgroup that a link is attached to; 0 where that is gone.
pub(super) fn cgroup_of_link(link: BorrowedFd<'_>) -> io::Result<u64> {
    // SAFETY: plain C data, for which all zeroes is a value.
    let mut info: bpf_link_info = unsafe { std::mem::zeroed() };
    let mut attributes = attributes();
    attributes.info.bpf_fd = number(link);
    attributes.info.info_len = u32::try_from(size_of::<bpf_link_info>()).map_err(io::Error::other)?;
    attributes.info.info = (&raw mut info) as u64;
    // SAFETY: the kernel writes as many bytes at most as is said.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attributes) }?;
    // SAFETY: of a link of another kind it is another number, and no cgroup's.
    Ok(unsafe { info.__bindgen_anon_1.cgroup.cgroup_id })
}

/// Puts another program into a link, in one step.
pub(super) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = attributes();
    attributes.link_update.link_fd = number(link);
    attributes.link_update.__bindgen_anon_1.new_prog_fd = number(program);
    // SAFETY: two descriptors, no pointer.
    unsafe { bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attributes) }.map(drop)
}

/// Takes a link off what it is attached to.
pub(super) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = attributes();
    attributes.link_detach.link_fd = number(link);
    // SAFETY: a descriptor, no pointer.
    unsafe { bpf(bpf_cmd::BPF_LINK_DETACH, &mut attributes) }.map(drop)
}

/// Runs a program once on a frame; returns what it returned.
pub(super) fn run(program: BorrowedFd<'_>, frame: &[u8]) -> io::Result<u32> {
    let mut attributes = attributes();
    attributes.test.prog_fd = number(program);
    attributes.test.data_in = frame.as_ptr() as u64;
    attributes.test.data_size_in = length(frame)?;
    // SAFETY: the kernel reads as many bytes as is said, and has nowhere to write to.
    unsafe { bpf(bpf_cmd::BPF_PROG_TEST_RUN, &mut attributes) }?;
    // SAFETY: the command's own part of the union, which the kernel has written.
    Ok(unsafe { attributes.test.retval })
}
