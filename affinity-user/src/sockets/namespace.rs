//! What is in a network namespace: seen by a thread that enters it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd as _};
use std::path::Path;
use std::thread;

use affinity_common::abi::netns::NetnsKey;
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::discovery::{self, Namespace};

/// A network namespace as it was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its cookie.
    pub key: NetnsKey,
    /// Its addresses that others can know: none of a loopback interface, and none of the link alone.
    pub addresses: BTreeSet<IpAddr>,
}

/// Looks into a namespace by a path to it.
///
/// # Errors
/// Where it has gone, or can't be entered.
pub fn look(namespace: Namespace, path: &Path) -> io::Result<Seen> {
    within(namespace, path, || Seen::new(&addresses()?))
}

impl Seen {
    /// The namespace that the calling thread is in, with what [`addresses`] has found.
    ///
    /// # Errors
    /// Before Linux 5.14.
    pub fn new(addresses: &BTreeMap<String, BTreeSet<IpAddr>>) -> io::Result<Self> {
        let addresses = addresses.values().flatten().copied().collect();
        Ok(Self { key: NetnsKey { cookie: cookie()? }, addresses })
    }
}

/// Does something within a namespace, by a thread that ends with it.
///
/// # Errors
/// Where it has gone (the path may stand for another one meanwhile: a process's number is given out again), or can't be
/// entered, and what the work returns.
pub fn within<R: Send>(
    namespace: Namespace,
    path: &Path,
    work: impl FnOnce() -> io::Result<R> + Send,
) -> io::Result<R> {
    let file = File::open(path)?;
    if Namespace::of(&file.metadata()?) != namespace {
        return Err(io::Error::new(io::ErrorKind::NotFound, "it stands for another network namespace by now"));
    }
    // Where we are, nothing needs to be entered, which takes a right.
    let is_elsewhere = discovery::here()? != namespace;
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            if is_elsewhere {
                setns(&file, CloneFlags::CLONE_NEWNET).map_err(refused)?;
            }
            work()
        });
        inside.join().unwrap_or_else(|_| Err(io::Error::other("the thread within the namespace has ended early")))
    })
}

fn refused(errno: Errno) -> io::Error {
    match errno {
        Errno::EPERM => io::Error::new(io::ErrorKind::PermissionDenied, "entering it takes CAP_SYS_ADMIN"),
        errno => errno.into(),
    }
}

/// The cookie of the namespace that the calling thread is in.
///
/// # Errors
/// Before Linux 5.14.
pub fn cookie() -> io::Result<u64> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    cookie_of(&socket)
}

fn cookie_of(socket: &impl AsFd) -> io::Result<u64> {
    let mut cookie = 0_u64;
    #[expect(clippy::cast_possible_truncation, reason = "eight, in libc's type")]
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the option is a number of 64 bits, for which there is room; both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    match Errno::result(result) {
        Err(Errno::ENOPROTOOPT) => {
            let why = "the kernel has no SO_NETNS_COOKIE: it takes Linux 5.14 or newer; --socket-lb off does without";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        result => result?,
    };
    Ok(cookie)
}

/// The addresses of the calling thread's namespace that others can know, by the names of their interfaces; those that have
/// none are left out.
///
/// # Errors
/// Where the kernel does not tell.
pub fn addresses() -> io::Result<BTreeMap<String, BTreeSet<IpAddr>>> {
    let mut found: BTreeMap<String, BTreeSet<IpAddr>> = BTreeMap::new();
    for one in getifaddrs()?.filter(|one| !one.flags.contains(InterfaceFlags::IFF_LOOPBACK)) {
        let Some(address) = one.address else { continue };
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        let address = v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())));
        if let Some(address) = address.filter(|address| is_known_to_others(*address)) {
            // An address may have a label of its own (`eth0:1`).
            let interface = one.interface_name.split(':').next().unwrap_or_default();
            found.entry(interface.to_owned()).or_default().insert(address);
        }
    }
    Ok(found)
}

/// Whether an address means something beyond its link (RFC 3927, RFC 4291).
fn is_known_to_others(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(ip) => !ip.is_link_local() && !ip.is_loopback(),
        IpAddr::V6(ip) => !ip.is_unicast_link_local() && !ip.is_loopback(),
    }
}

/// The address of the calling thread's namespace that routing gives a packet to the world outside; `None` without a route
/// there. Nothing is sent.
pub fn routed_source(is_ipv4: bool) -> Option<IpAddr> {
    // Of the blocks for documentation (RFC 5737, RFC 3849): nobody's own.
    let (any, outside) = if is_ipv4 {
        (IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)))
    } else {
        (IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)))
    };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).ok()?;
    socket.connect(SocketAddr::new(outside, 9)).ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|address| is_known_to_others(*address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_the_link_alone_are_left_out() {
        for (address, known) in [
            ("10.0.0.1", true),
            ("169.254.1.1", false),
            ("127.0.0.1", false),
            ("fd00::1", true),
            ("fe80::1", false),
            ("::1", false),
        ] {
            assert_eq!(is_known_to_others(address.parse().expect("an address")), known, "{address}");
        }
    }

    #[test]
    fn a_path_that_is_no_namespace_or_another_one_is_an_error() {
        let own = discovery::own().expect("proc");
        assert!(look(own, Path::new("/does/not/exist")).is_err());
        assert!(look(own, Path::new("/proc/self/status")).is_err());
        let other = look(own, Path::new("/proc/self/ns/mnt")).expect_err("another one");
        assert_eq!(other.kind(), io::ErrorKind::NotFound);
    }
}
