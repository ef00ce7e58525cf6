//! What is seen on a wire, and frames put onto one.
//!
//! A capture in the node sees an arriving frame *before* the programs at TC ingress, and a leaving one *after* those at TC
//! egress. With offloads on, a frame between namespaces still has a partial checksum, and may be longer than the MTU:
//! verify checksums in captures of labs without offloads.

use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::sys::socket::{LinkAddr, recvfrom};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::netlink;
use crate::netns::Netns;
use crate::{sys, wait};

/// Longer than the longest GSO frame without big TCP.
const MAX_FRAME: usize = 70_000;
/// How often the capturing thread looks whether it should end.
const INTERVAL: Duration = Duration::from_millis(50);

/// One frame as it was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Whether it left by the interface; otherwise it arrived.
    pub outgoing: bool,
    /// From the Ethernet header on, without checksum and VLAN tag.
    pub bytes: Vec<u8>,
}

/// Records every frame of an interface until it is dropped.
#[derive(Debug)]
pub struct Capture {
    frames: Arc<Mutex<Vec<Frame>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Capture {
    /// Starts recording; what is sent after this call is seen.
    ///
    /// # Errors
    /// Where the interface does not exist.
    pub fn start(netns: &Netns, interface: &str) -> Result<Self> {
        let (socket, _) = open(netns, interface)?;
        socket.set_read_timeout(Some(INTERVAL))?;
        let frames = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (seen, ended) = (Arc::clone(&frames), Arc::clone(&stop));
        let thread = std::thread::Builder::new()
            .name(format!("capture {interface}@{}", netns.name()))
            .spawn(move || record(&socket, &seen, &ended))?;
        Ok(Self { frames, stop, thread: Some(thread) })
    }

    /// Everything seen so far.
    pub fn frames(&self) -> Vec<Frame> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets everything seen so far.
    pub fn clear(&self) {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Waits until a frame is seen for which `wanted` holds, and returns it.
    ///
    /// # Errors
    /// After `timeout`.
    pub fn wait_for(&self, what: &str, timeout: Duration, mut wanted: impl FnMut(&Frame) -> bool) -> Result<Frame> {
        wait::until(what, timeout, || Ok(self.frames().into_iter().find(|frame| wanted(frame))))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn record(socket: &Socket, frames: &Mutex<Vec<Frame>>, stop: &AtomicBool) -> Result<()> {
    let mut buffer = vec![0; MAX_FRAME];
    while !stop.load(Ordering::Relaxed) {
        match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) {
            Ok((length, from)) => {
                let kind = from.context("a frame without an address")?.pkttype();
                frames
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(Frame { outgoing: kind == libc::PACKET_OUTGOING, bytes: buffer[..length].to_vec() });
            }
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ENETDOWN) => {}
            Err(error) => bail!("capture: {error}"),
        }
    }
    Ok(())
}

/// Puts whole frames onto an interface, whatever is wrong with them.
#[derive(Debug)]
pub struct Injector {
    socket: Socket,
    address: SockAddr,
}

impl Injector {
    /// Opens an interface. Frames sent on a pod's `eth0` arrive at the node's side of its veth.
    ///
    /// # Errors
    /// Where the interface does not exist.
    pub fn open(netns: &Netns, interface: &str) -> Result<Self> {
        let (socket, address) = open(netns, interface)?;
        Ok(Self { socket, address })
    }

    /// Sends one frame, from the Ethernet header on.
    ///
    /// # Errors
    /// Where it is shorter than an Ethernet header or longer than the MTU.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        let sent = self.socket.send_to(frame, &self.address)?;
        if sent != frame.len() {
            bail!("sent {sent} bytes of {}", frame.len());
        }
        Ok(())
    }
}

fn open(netns: &Netns, interface: &str) -> Result<(Socket, SockAddr)> {
    let index = netns.netlink(async |handle| Ok(netlink::link(&handle, interface).await?.index))?;
    let address = sys::packet_address(index);
    let socket = netns.enter(|| {
        // Of protocol 0, so that nothing of other interfaces is queued before it is bound to this one.
        let none = Some(Protocol::from(0));
        let socket = Socket::new(Domain::PACKET, Type::RAW, none)?;
        socket.bind(&address)?;
        Ok(socket)
    })?;
    Ok((socket, address))
}
