//! What `bpf(2)` can do and aya has no way for: links of cgroups, a program run from any thread, many entries of a map by
//! one call. And what sockets can do and `nix` has no way for.

pub mod memory;
pub mod packet;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_link_info, bpf_map_info, bpf_prog_info};
use bytemuck::Pod;

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
pub fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = attributes();
    attributes.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    // SAFETY: the path ends with a zero and outlives the call.
    let fd = unsafe { bpf(bpf_cmd::BPF_OBJ_GET, &mut attributes) }?;
    // SAFETY: a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The number of the cgroup that a link is attached to; 0 where that is gone.
pub fn cgroup_of_link(link: BorrowedFd<'_>) -> io::Result<u64> {
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

/// The instructions of a program as the verifier has left them, of which there are so many bytes; `None` where the kernel does
/// not show them.
pub fn instructions(program: BorrowedFd<'_>, bytes: u32) -> io::Result<Option<Vec<u64>>> {
    let mut instructions = vec![0_u64; bytes as usize / size_of::<u64>()];
    // SAFETY: plain C data, for which all zeroes is a value.
    let mut info: bpf_prog_info = unsafe { std::mem::zeroed() };
    info.xlated_prog_len = length(&instructions)? * 8;
    info.xlated_prog_insns = instructions.as_mut_ptr() as u64;
    let mut attributes = attributes();
    attributes.info.bpf_fd = number(program);
    attributes.info.info_len = u32::try_from(size_of::<bpf_prog_info>()).map_err(io::Error::other)?;
    attributes.info.info = (&raw mut info) as u64;
    // SAFETY: the kernel writes as many bytes at most as is said, of the information and of the instructions.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attributes) }?;
    // Where it has reasons not to, it takes the pointer away.
    Ok((info.xlated_prog_insns != 0).then_some(instructions))
}

/// Puts another program into a link, in one step.
pub fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = attributes();
    attributes.link_update.link_fd = number(link);
    attributes.link_update.__bindgen_anon_1.new_prog_fd = number(program);
    // SAFETY: two descriptors, no pointer.
    unsafe { bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attributes) }.map(drop)
}

/// Takes a link off what it is attached to.
pub fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = attributes();
    attributes.link_detach.link_fd = number(link);
    // SAFETY: a descriptor, no pointer.
    unsafe { bpf(bpf_cmd::BPF_LINK_DETACH, &mut attributes) }.map(drop)
}

/// Runs a program once on a frame; returns what it returned.
pub fn run(program: BorrowedFd<'_>, frame: &[u8]) -> io::Result<u32> {
    let mut attributes = attributes();
    attributes.test.prog_fd = number(program);
    attributes.test.data_in = frame.as_ptr() as u64;
    attributes.test.data_size_in = length(frame)?;
    // SAFETY: the kernel reads as many bytes as is said, and has nowhere to write to.
    unsafe { bpf(bpf_cmd::BPF_PROG_TEST_RUN, &mut attributes) }?;
    // SAFETY: the command's own part of the union, which the kernel has written.
    Ok(unsafe { attributes.test.retval })
}

/// Reads up to as many further entries of a map as there is room for; `position` is where the last call ended, or none at the
/// start. Returns how many there are, and where the next call goes on, or none at the end.
///
/// # Errors
/// `ENOSPC` where the room is less than a hash map's longest bucket needs.
pub fn lookup_batch<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    position: Option<u32>,
    keys: &mut [K],
    values: &mut [V],
) -> io::Result<(usize, Option<u32>)> {
    let room = keys.len().min(values.len());
    lookup_batch_bytes(map, position, room, bytemuck::cast_slice_mut(keys), bytemuck::cast_slice_mut(values))
}

/// The same, of a map whose keys and values are known by their sizes alone: those of the buffers, divided by the room.
///
/// # Errors
/// Also where the buffers are not of the map's sizes.
pub fn lookup_batch_bytes(
    map: BorrowedFd<'_>,
    position: Option<u32>,
    room: usize,
    keys: &mut [u8],
    values: &mut [u8],
) -> io::Result<(usize, Option<u32>)> {
    if room == 0 {
        return Ok((0, position));
    }
    let (key_size, value_size) = sizes(map)?;
    if keys.len() < room * key_size || values.len() < room * value_size {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let (before, mut after) = (position.unwrap_or_default(), 0_u32);
    let mut attributes = attributes();
    attributes.batch.map_fd = number(map);
    attributes.batch.in_batch = position.map_or(0, |_| (&raw const before) as u64);
    attributes.batch.out_batch = (&raw mut after) as u64;
    attributes.batch.keys = keys.as_mut_ptr() as u64;
    attributes.batch.values = values.as_mut_ptr() as u64;
    attributes.batch.count = u32::try_from(room).map_err(io::Error::other)?;
    // SAFETY: keys and values have room for as many as is said, by the map's own sizes; both positions are of
    // the four bytes that arrays and hash maps have.
    let done = unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attributes) };
    // SAFETY: the command's own part of the union, which the kernel has written.
    let count = unsafe { attributes.batch.count } as usize;
    match done {
        Ok(_) => Ok((count, Some(after))),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok((count, None)),
        Err(error) => Err(error),
    }
}

/// What becomes of an entry that is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// It gets the new value.
    Replace,
    /// It stays as it is.
    Keep,
}

/// Writes an entry into a map whose keys and values are known by their sizes alone. Returns whether it was written.
///
/// # Errors
/// Also where key and value are not of the map's sizes.
pub fn update(map: BorrowedFd<'_>, key: &[u8], value: &[u8], existing: Existing) -> io::Result<bool> {
    if (key.len(), value.len()) != sizes(map)? {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut attributes = attributes();
    attributes.__bindgen_anon_2.map_fd = number(map);
    attributes.__bindgen_anon_2.key = key.as_ptr() as u64;
    attributes.__bindgen_anon_2.__bindgen_anon_1.value = value.as_ptr() as u64;
    attributes.__bindgen_anon_2.flags = u64::from(match existing {
        Existing::Replace => aya_obj::generated::BPF_ANY,
        Existing::Keep => aya_obj::generated::BPF_NOEXIST,
    });
    // SAFETY: key and value are of the map's sizes.
    match unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attributes) } {
        Ok(_) => Ok(true),
        Err(error) if existing == Existing::Keep && error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The sizes of a map's keys and values, in bytes.
fn sizes(map: BorrowedFd<'_>) -> io::Result<(usize, usize)> {
    // SAFETY: plain C data, for which all zeroes is a value.
    let mut info: bpf_map_info = unsafe { std::mem::zeroed() };
    let mut attributes = attributes();
    attributes.info.bpf_fd = number(map);
    attributes.info.info_len = u32::try_from(size_of::<bpf_map_info>()).map_err(io::Error::other)?;
    attributes.info.info = (&raw mut info) as u64;
    // SAFETY: the kernel writes as many bytes at most as is said.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attributes) }?;
    Ok((info.key_size as usize, info.value_size as usize))
}

/// Writes entries into a map, in their order. Returns how many, and why it was not all of them.
pub fn update_batch<K: Pod, V: Pod>(map: BorrowedFd<'_>, keys: &[K], values: &[V]) -> (usize, io::Result<()>) {
    let mut attributes = attributes();
    attributes.batch.map_fd = number(map);
    attributes.batch.keys = keys.as_ptr() as u64;
    attributes.batch.values = values.as_ptr() as u64;
    attributes.batch.count = match length(keys).and_then(|keys| Ok(keys.min(length(values)?))) {
        Ok(0) => return (0, Ok(())),
        Ok(length) => length,
        Err(error) => return (0, Err(error)),
    };
    // SAFETY: keys and values are plain memory of the map's sizes, as many as is said.
    let done = unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_BATCH, &mut attributes) };
    // SAFETY: the command's own part of the union, which the kernel has written.
    (unsafe { attributes.batch.count } as usize, done.map(drop))
}

/// Takes entries out of a map, in their order. Returns how many, and why it was not all of them: `ENOENT` where one is not
/// there.
pub fn delete_batch<K: Pod>(map: BorrowedFd<'_>, keys: &[K]) -> (usize, io::Result<()>) {
    let mut attributes = attributes();
    attributes.batch.map_fd = number(map);
    attributes.batch.keys = keys.as_ptr() as u64;
    attributes.batch.count = match length(keys) {
        Ok(length) => length,
        Err(error) => return (0, Err(error)),
    };
    // SAFETY: keys are plain memory of the map's size, as many as is said.
    let done = unsafe { bpf(bpf_cmd::BPF_MAP_DELETE_BATCH, &mut attributes) };
    // SAFETY: the command's own part of the union, which the kernel has written.
    (unsafe { attributes.batch.count } as usize, done.map(drop))
}
