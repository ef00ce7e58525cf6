//! The system calls that have no safe wrapper: all the `unsafe` of this crate.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};
use socket2::{Domain, SockAddr, SockAddrStorage, Socket, Type};

/// Has the child of `command` enter `namespaces` in their order and die by SIGKILL with the *thread* that spawns it.
pub fn prepare_child(command: &mut Command, namespaces: Vec<(Arc<OwnedFd>, CloneFlags)>) {
    let parent = Pid::this();
    let before_exec = move || {
        set_pdeathsig(Signal::SIGKILL)?;
        // The parent may have died before the line above took effect.
        if getppid() != parent {
            return Err(Errno::ESRCH.into());
        }
        for (namespace, kind) in &namespaces {
            setns(namespace.as_ref(), *kind)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe functions may run: the closure makes four kinds of plain
    // system calls on values that were made before the fork, and allocates nothing (its errors are bare numbers).
    unsafe { command.pre_exec(before_exec) };
}

/// Waits until every CPU has left what it read by RCU before: what the kernel does where it takes out what others may read.
///
/// # Errors
/// Where the kernel has no membarrier(2).
pub fn grace_period() -> io::Result<()> {
    // SAFETY: the command has no flags and no pointer.
    let done = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, 0, 0) };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

/// One of the offloads that the classic ethtool requests switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Offload {
    /// Receive checksums (`ethtool -K … rx`).
    RxChecksum = 0x15,
    /// Transmit checksums (`tx`); off means that the stack completes every checksum itself.
    TxChecksum = 0x17,
    /// Scatter-gather (`sg`), without which there is no segmentation offload.
    ScatterGather = 0x19,
    /// TCP segmentation (`tso`).
    TcpSegmentation = 0x1f,
    /// Generic segmentation (`gso`).
    GenericSegmentation = 0x24,
    /// Generic receive (`gro`).
    GenericReceive = 0x2c,
}

/// `struct ethtool_value`.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

/// Switches `offload` of `interface` in the calling thread's network namespace.
pub fn set_offload(interface: &str, offload: Offload, on: bool) -> io::Result<()> {
    let name = interface.as_bytes();
    // SAFETY: `ifreq` is plain C data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return Err(Errno::EINVAL.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = from.cast_signed();
    }
    let mut value = EthtoolValue { command: offload as u32, data: u32::from(on) };
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    // SAFETY: SIOCETHTOOL reads a NUL-terminated name and, behind `ifru_data`, an `ethtool_value` for the commands
    // that `Offload` has; both outlive the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    Errno::result(result)?;
    Ok(())
}

/// The address of all frames (`ETH_P_ALL`) on the interface with this index, for a packet socket.
#[expect(clippy::cast_possible_truncation, reason = "small constants of the kernel's, in libc's types")]
pub fn packet_address(interface: u32) -> SockAddr {
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: `sockaddr_ll` is plain C data and one of the kinds of address that the storage is made for.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = libc::AF_PACKET as libc::sa_family_t;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = interface.cast_signed();
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the storage holds a `sockaddr_ll` of that length.
    unsafe { SockAddr::new(storage, length) }
}

/// The address by which a socket that is connected is told to be so no more (`AF_UNSPEC`, connect(2)).
#[expect(clippy::cast_possible_truncation, reason = "a small constant of the kernel's, in libc's type")]
pub fn no_address() -> SockAddr {
    let length = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: all zeroes are an address of the family `AF_UNSPEC`, which has no more to it.
    unsafe { SockAddr::new(SockAddrStorage::zeroed(), length) }
}
