//! `packet(7)`: frames as they are on a link. `nix` and `socket2` can send on such a socket, but have no way to name its
//! interface or to join a group on it.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// A socket that sends whole frames on an interface, and receives none.
///
/// # Errors
/// Where there is no such interface, or no leave (`CAP_NET_RAW`).
pub fn open(ifindex: u32) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Packet, SockType::Raw, flags, None).map_err(|errno| match errno {
        Errno::EPERM => io::Error::new(io::ErrorKind::PermissionDenied, "it takes CAP_NET_RAW"),
        errno => errno.into(),
    })?;
    // SAFETY: plain C data, for which all zeroes is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).map_err(io::Error::other)?;
    address.sll_ifindex = index(ifindex)?;
    let length = length_of(&address)?;
    // SAFETY: an address of as many bytes as is said, which outlives the call.
    let done = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(fd) }
}

/// Joins a group of link-layer addresses on an interface, or leaves it: its frames are for the host meanwhile. It ends with the
/// socket at the latest.
///
/// # Errors
/// Where there is no such interface, or the socket has not joined the group that it is to leave.
pub fn set_member(socket: BorrowedFd<'_>, ifindex: u32, group: [u8; 6], joins: bool) -> io::Result<()> {
    // SAFETY: plain C data, for which all zeroes is a value.
    let mut request: libc::packet_mreq = unsafe { std::mem::zeroed() };
    request.mr_ifindex = index(ifindex)?;
    request.mr_type = u16::try_from(libc::PACKET_MR_MULTICAST).map_err(io::Error::other)?;
    request.mr_alen = 6;
    request.mr_address[..6].copy_from_slice(&group);
    let option = if joins { libc::PACKET_ADD_MEMBERSHIP } else { libc::PACKET_DROP_MEMBERSHIP };
    let length = length_of(&request)?;
    // SAFETY: a request of as many bytes as is said, which outlives the call.
    let done =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, option, (&raw const request).cast(), length) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn index(ifindex: u32) -> io::Result<i32> {
    i32::try_from(ifindex).map_err(io::Error::other)
}

fn length_of<T>(value: &T) -> io::Result<libc::socklen_t> {
    libc::socklen_t::try_from(size_of_val(value)).map_err(io::Error::other)
}
