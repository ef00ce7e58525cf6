//! An uplink, as far as neighbours are told something on it.

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv6Addr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use nix::sys::socket::{MsgFlags, send};
use socket2::{Domain, Socket, Type};

use crate::syscall::packet;

/// A socket on an uplink. It leaves every group when this is dropped.
#[derive(Debug)]
pub struct Link {
    ifindex: u32,
    socket: OwnedFd,
    groups: BTreeSet<[u8; 6]>,
    /// As whose the kernel tells of multicast groups by MLD, from the first one on.
    member: Option<Socket>,
    member_of: BTreeSet<Ipv6Addr>,
}

impl Link {
    /// Opens one.
    ///
    /// # Errors
    /// Where there is no such interface, or no leave (`CAP_NET_RAW`).
    pub fn open(ifindex: u32) -> io::Result<Self> {
        let socket = packet::open(ifindex)?;
        Ok(Self { ifindex, socket, groups: BTreeSet::new(), member: None, member_of: BTreeSet::new() })
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// Where the interface is down, or has gone.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        send(self.socket.as_raw_fd(), frame, MsgFlags::empty())?;
        Ok(())
    }

    /// Is in these groups of link-layer addresses, and in no others, from now on.
    ///
    /// # Errors
    /// That of the first one which it can't join or leave; it is in the others as it should be.
    pub fn set_groups(&mut self, groups: &BTreeSet<[u8; 6]>) -> io::Result<()> {
        let (socket, ifindex) = (self.socket.as_fd(), self.ifindex);
        settle(&mut self.groups, groups, |group, joins| packet::set_member(socket, ifindex, group, joins))
    }

    /// Is a member of these multicast groups, and of no others, from now on, which the kernel tells by MLD (RFC 3810): a switch
    /// that follows that forwards to nobody else what is sent to them.
    ///
    /// # Errors
    /// That of the first one which it can't join or leave; of the others it is a member as it should be.
    pub fn set_member_of(&mut self, groups: &BTreeSet<Ipv6Addr>) -> io::Result<()> {
        if self.member_of == *groups {
            return Ok(());
        }
        let member = match self.member.take() {
            Some(member) => member,
            None => Socket::new(Domain::IPV6, Type::DGRAM, None)?,
        };
        let ifindex = self.ifindex;
        let member = self.member.insert(member);
        settle(&mut self.member_of, groups, |group, joins| {
            if joins { member.join_multicast_v6(&group, ifindex) } else { member.leave_multicast_v6(&group, ifindex) }
        })
    }
}

/// Has what is joined be what is wanted, as far as it can be; returns the first error.
fn settle<T: Ord + Copy>(
    joined: &mut BTreeSet<T>,
    wanted: &BTreeSet<T>,
    mut set: impl FnMut(T, bool) -> io::Result<()>,
) -> io::Result<()> {
    let mut result = Ok(());
    for one in joined.symmetric_difference(wanted).copied().collect::<Vec<T>>() {
        let joins = wanted.contains(&one);
        match set(one, joins) {
            Ok(()) if joins => drop(joined.insert(one)),
            Ok(()) => drop(joined.remove(&one)),
            Err(error) => result = result.and(Err(error)),
        }
    }
    result
}
