//! The packets that are measured: whole frames that carry, in their payload, what the wrapper around the pipelines
//! makes them anew from (`restore` in `affinity-ebpf/src/bench.rs` has the layout).

use std::net::{Ipv4Addr, SocketAddrV4};

use affinity_tests::packet::{ETHERNET, Packet, Tcp};

/// What changes from one run to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing: packets of one connection.
    Same,
    /// The source's port: connections of one client.
    Port,
    /// The source's address: clients.
    Address,
}

impl Step {
    /// What is added to a [`position`] for each run.
    fn increment(self) -> u64 {
        match self {
            Self::Same => 0,
            Self::Port => 1,
            Self::Address => 1 << 16,
        }
    }
}

/// What the wrapper forgets before each run; where it does, it times the pipeline itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forget {
    /// Nothing.
    Nothing,
    /// The connection.
    Connection,
    /// The connection and the client.
    Client,
}

/// A packet's source as the number that steps: after the last port comes the next address.
pub fn position(source: SocketAddrV4) -> u64 {
    u64::from(u32::from(*source.ip())) << 16 | u64::from(source.port())
}

/// The source at so many steps from another.
pub fn advance(source: SocketAddrV4, step: Step, runs: u32) -> SocketAddrV4 {
    let at = position(source) + step.increment() * u64::from(runs);
    let [_, _, a, b, c, d, high, low] = at.to_be_bytes();
    SocketAddrV4::new(Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([high, low]))
}

/// A TCP packet.
pub fn tcp(from: SocketAddrV4, to: SocketAddrV4, flags: Tcp) -> Packet {
    Packet::tcp(from.to_string().as_str(), to.to_string().as_str()).flags(flags).payload([0; PAYLOAD])
}

/// A UDP packet.
pub fn udp(from: SocketAddrV4, to: SocketAddrV4) -> Packet {
    // As long as the TCP packets: the wrapper finds its part at the same place.
    Packet::udp(from.to_string().as_str(), to.to_string().as_str()).payload([0; PAYLOAD + 12])
}

/// What the wrapper needs, in bytes.
const PAYLOAD: usize = 40;
/// Of it, the stop watch.
const WATCH: usize = 8;
/// Where it is: behind 20 bytes of IPv4 header and as many of whatever follows.
const AT: usize = ETHERNET + 40;

/// The packet's frame, for the wrapper to make it anew before each run and to step its source first.
pub fn repeated(packet: &Packet, from: SocketAddrV4, step: Step, forget: Forget) -> Vec<u8> {
    let mut frame = packet.build();
    let copies = [30..34, 36..38, 24..26, 40..42, 50..52].map(|range| frame[range].to_vec()).concat();
    // The wrapper steps before the first run.
    let before = position(from).wrapping_sub(step.increment());
    let payload = [
        &before.to_ne_bytes()[..],
        &step.increment().to_ne_bytes(),
        &copies,
        &(forget as u32).to_ne_bytes(),
        &[0; WATCH],
    ]
    .concat();
    frame[AT..AT + PAYLOAD].copy_from_slice(&payload);
    frame
}

/// Nanoseconds on the stop watch of a frame that comes out of the wrapper.
pub fn watch(frame: &[u8]) -> Option<u64> {
    let bytes = frame.get(AT + PAYLOAD - WATCH..)?.first_chunk()?;
    Some(u64::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_the_last_port_comes_the_next_address() {
        let last = SocketAddrV4::new(Ipv4Addr::new(10, 0, 0, 255), u16::MAX);
        assert_eq!(advance(last, Step::Port, 1), SocketAddrV4::new(Ipv4Addr::new(10, 0, 1, 0), 0));
        assert_eq!(advance(last, Step::Address, 1), SocketAddrV4::new(Ipv4Addr::new(10, 0, 1, 0), u16::MAX));
    }

    #[test]
    fn frames_have_room_for_the_wrapper_s_part() {
        let (a, b) = (SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1), SocketAddrV4::new(Ipv4Addr::LOCALHOST, 2));
        for packet in [tcp(a, b, Tcp::ACK), udp(a, b)] {
            assert_eq!(repeated(&packet, a, Step::Same, Forget::Nothing).len(), AT + PAYLOAD);
        }
    }
}
