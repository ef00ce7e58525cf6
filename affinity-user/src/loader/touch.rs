//! The refresh of affinity from user space, by the datapath's own compare-and-exchange: user space itself could only
//! overwrite what a packet has just written.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use affinity_common::abi::sockets::{Socket, SocketKey};
use affinity_common::family::Family;

use crate::syscall;

/// A handle of the program that refreshes affinity, for any thread.
#[derive(Debug)]
pub struct Touch {
    program: OwnedFd,
}

impl Touch {
    /// The name of the program in the object.
    pub(super) const PROGRAM: &str = "affinity_touch";

    pub(super) fn new(program: OwnedFd) -> Self {
        Self { program }
    }

    /// The client of a socket is there: its affinity is refreshed, if it is the socket's backend's. Returns whether there
    /// was affinity to look after: whether the frontend is still the same service's, and keeps its clients.
    ///
    /// # Errors
    /// Where the kernel does not run the program.
    pub fn touch<F: Family>(&self, key: &SocketKey<F>, socket: &Socket<F>) -> io::Result<bool> {
        syscall::run(self.program.as_fd(), &frame(key, socket)).map(|returned| returned == 1)
    }
}

/// An Ethernet header of the family, and the two in place of a packet.
fn frame<F: Family>(key: &SocketKey<F>, socket: &Socket<F>) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend(F::ETHERTYPE);
    frame.extend(bytemuck::bytes_of(key));
    frame.extend(bytemuck::bytes_of(socket));
    frame
}
