//! An uplink, as far as neighbours are told something on it.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use nix::sys::socket::{MsgFlags, send};

use crate::syscall::packet;

/// A socket on an uplink. It leaves every group when this is dropped.
#[derive(Debug)]
pub struct Link {
    ifindex: u32,
    socket: OwnedFd,
    groups: BTreeSet<[u8; 6]>,
}

impl Link {
    /// Opens one.
    ///
    /// # Errors
    /// Where there is no such interface, or no leave (`CAP_NET_RAW`).
    pub fn open(ifindex: u32) -> io::Result<Self> {
        Ok(Self { ifindex, socket: packet::open(ifindex)?, groups: BTreeSet::new() })
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
        let mut result = Ok(());
        let changes: Vec<[u8; 6]> = self.groups.symmetric_difference(groups).copied().collect();
        for group in changes {
            let joins = groups.contains(&group);
            match packet::set_member(self.socket.as_fd(), self.ifindex, group, joins) {
                Ok(()) if joins => drop(self.groups.insert(group)),
                Ok(()) => drop(self.groups.remove(&group)),
                Err(error) => result = result.and(Err(error)),
            }
        }
        result
    }
}
