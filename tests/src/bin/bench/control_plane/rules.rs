//! What the kernel tells of nftables rules as they change, in one network namespace: when a change is in force.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use affinity_tests::netns::Netns;
use anyhow::{Result, bail};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

/// The bit of the group `NFNLGRP_NFTABLES`: changes of rules.
const GROUP: u32 = 1 << 6;
/// The type of the message that ends what is told of one commit: `NFNL_SUBSYS_NFTABLES`, `NFT_MSG_NEWGEN`.
const NEW_GENERATION: u16 = (10 << 8) | 15;
/// How much may wait to be read, in bytes: the kernel tells of every rule and element.
const BACKLOG: usize = 64 << 20;
/// The longest datagram, in bytes: several messages each.
const DATAGRAM: usize = 1 << 18;
/// How long a look waits for more, in milliseconds.
const LOOK: i64 = 100;
/// A netlink message's head, in bytes; its length (4) and its type (2) come first.
const HEAD: usize = 16;

/// A subscription to changes of rules.
pub struct Rules {
    socket: OwnedFd,
    datagram: Vec<u8>,
}

impl Rules {
    /// Subscribes to a namespace's.
    pub fn follow(netns: &Netns) -> Result<Self> {
        let socket = netns.enter(|| {
            let flags = SockFlag::SOCK_CLOEXEC;
            let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)?;
            setsockopt(&socket, sockopt::RcvBufForce, &BACKLOG)?;
            setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(LOOK))?;
            bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUP))?;
            Ok(socket)
        })?;
        Ok(Self { socket, datagram: vec![0; DATAGRAM] })
    }

    /// Takes what has been told up to now.
    pub fn catch_up(&mut self) -> Result<()> {
        while self.receive(MsgFlags::MSG_DONTWAIT)?.is_some() {}
        Ok(())
    }

    /// Waits for the commit of a change that has one of these texts in it; returns when the kernel was heard to have made it.
    pub fn wait(&mut self, texts: &[&[u8]], patience: Duration) -> Result<Instant> {
        let deadline = Instant::now() + patience;
        let mut named = false;
        while Instant::now() < deadline {
            let Some(datagram) = self.receive(MsgFlags::empty())? else { continue };
            let now = Instant::now();
            named |= texts.iter().any(|text| contains(datagram, text));
            if named && ends_commit(datagram) {
                return Ok(now);
            }
        }
        let texts: Vec<_> = texts.iter().map(|text| text.escape_ascii().to_string()).collect();
        bail!("no change of nftables rules has {} in it within {patience:?}", texts.join(" or "))
    }

    /// A datagram; `None` where there is none, or some were lost.
    fn receive(&mut self, flags: MsgFlags) -> Result<Option<&[u8]>> {
        match recv(self.socket.as_raw_fd(), &mut self.datagram, flags) {
            Ok(length) => Ok(self.datagram.get(..length)),
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            // Told too fast; whoever waits for a single change has lost none.
            Err(Errno::ENOBUFS) => Ok(Some(&[])),
            Err(error) => Err(error.into()),
        }
    }
}

fn contains(bytes: &[u8], text: &[u8]) -> bool {
    bytes.windows(text.len()).any(|window| window == text)
}

/// Whether the last message of a commit is among those of a datagram.
fn ends_commit(mut datagram: &[u8]) -> bool {
    while let Some((head, _)) = datagram.split_first_chunk::<HEAD>() {
        let [l0, l1, l2, l3, t0, t1, ..] = *head;
        if u16::from_ne_bytes([t0, t1]) == NEW_GENERATION {
            return true;
        }
        let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
        // Each begins at a multiple of four.
        datagram = datagram.get(length.max(HEAD).next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEAD + body.len()).expect("a short one");
        let mut message = [length.to_ne_bytes().as_slice(), &kind.to_ne_bytes(), &[0; 10], body].concat();
        message.resize(message.len().next_multiple_of(4), 0);
        message
    }

    #[test]
    fn a_commit_ends_with_its_generation() {
        let rule = message(0x0a06, b"goto endpoint-x__10.0.0.1/80");
        assert!(!ends_commit(&rule) && contains(&rule, b"10.0.0.1/80") && !contains(&rule, b"10.0.0.1/8080"));
        assert!(ends_commit(&[rule.clone(), message(NEW_GENERATION, b"abc")].concat()));
        assert!(!ends_commit(&[]) && !ends_commit(&[0; 40]));
    }
}
