//! The packets that are measured: whole frames that carry, in their payload, what the wrapper around the pipelines
//! makes them anew from (`restore` in `affinity-ebpf/src/bench.rs` has the layout).

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use affinity_common::abi::affinity::AffinityKey;
use affinity_common::abi::conntrack::ConntrackKey;
use affinity_common::family::{Family, V4, V6};
use affinity_common::types::{Port, Proto, ServiceId};
use affinity_tests::packet::{ETHERNET, Packet, Tcp};
use anyhow::{Context as _, Result};

use crate::version::Version;

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

/// What the wrapper forgets, and by which keys: two of the connection's, and the client's.
#[derive(Clone, Debug)]
pub struct Forgotten {
    forget: Forget,
    keys: Vec<u8>,
}

/// A connection that is forgotten.
#[derive(Clone, Copy, Debug)]
pub struct Connection {
    /// The client's end.
    pub client: SocketAddr,
    /// Whom it talks to.
    pub frontend: SocketAddr,
    /// Who answers.
    pub backend: SocketAddr,
    /// TCP or UDP.
    pub proto: Proto,
    /// The service port.
    pub service: ServiceId,
    /// The node's end, where what is forgotten is that its packets leave the node as the node's own.
    pub leaves_as: Option<SocketAddr>,
}

impl Forgotten {
    /// Nothing.
    pub const NOTHING: Self = Self { forget: Forget::Nothing, keys: Vec::new() };

    /// A connection or its client too.
    pub fn of(forget: Forget, it: &Connection) -> Result<Self> {
        let keys = match Version::of_address(it.client) {
            Version::V4 => keys::<V4>(it),
            Version::V6 => keys::<V6>(it),
        };
        Ok(Self { forget, keys: keys? })
    }
}

fn keys<F: Family>(it: &Connection) -> Result<Vec<u8>> {
    let addr = |of: SocketAddr| F::from_ip(of.ip()).with_context(|| format!("{of} is not of {}", F::NAME));
    let port = |of: SocketAddr| Port::new(of.port());
    let (client, client_port) = (addr(it.client)?, port(it.client));
    let (backend, backend_port) = (addr(it.backend)?, port(it.backend));
    let [there, back] = match it.leaves_as {
        None => [
            ConntrackKey::<F>::forward(client, client_port, addr(it.frontend)?, port(it.frontend), it.proto),
            ConntrackKey::reverse(client, client_port, backend, backend_port, it.proto),
        ],
        // The way back, which remembers the port, is that of the packet's way in.
        Some(node) => [ConntrackKey::snat_reply(addr(node)?, port(node), backend, backend_port, it.proto); 2],
    };
    let affinity = AffinityKey::<F>::new(client, it.service, 0);
    Ok([bytemuck::bytes_of(&there), bytemuck::bytes_of(&back), bytemuck::bytes_of(&affinity)].concat())
}

/// A packet's source as the number that steps: after the last port comes the next address.
pub fn position(source: SocketAddr) -> u64 {
    let address = match source.ip() {
        IpAddr::V4(address) => address.to_bits(),
        IpAddr::V6(address) => low(address),
    };
    u64::from(address) << 16 | u64::from(source.port())
}

/// The last 32 bits of an address.
fn low(address: Ipv6Addr) -> u32 {
    let [.., a, b, c, d] = address.octets();
    u32::from_be_bytes([a, b, c, d])
}

/// The source at so many steps from another.
pub fn advance(source: SocketAddr, step: Step, runs: u32) -> SocketAddr {
    let at = position(source) + step.increment() * u64::from(runs);
    let [_, _, address @ .., a, b] = at.to_be_bytes();
    let ip = match source.ip() {
        IpAddr::V4(_) => IpAddr::from(address),
        IpAddr::V6(before) => {
            let mut octets = before.octets();
            octets[12..].copy_from_slice(&address);
            octets.into()
        }
    };
    SocketAddr::new(ip, u16::from_be_bytes([a, b]))
}

/// A TCP packet.
pub fn tcp(from: SocketAddr, to: SocketAddr, flags: Tcp) -> Packet {
    Packet::tcp(from.to_string().as_str(), to.to_string().as_str()).flags(flags).payload(vec![0; payload(from)])
}

/// A UDP packet.
pub fn udp(from: SocketAddr, to: SocketAddr) -> Packet {
    // As long as the TCP packets: the wrapper finds its part at the same place.
    Packet::udp(from.to_string().as_str(), to.to_string().as_str()).payload(vec![0; payload(from) + 12])
}

/// What the wrapper needs, in bytes.
fn payload(of: SocketAddr) -> usize {
    KEYS + match Version::of_address(of) {
        Version::V4 => size_of::<[ConntrackKey<V4>; 2]>() + size_of::<AffinityKey<V4>>(),
        Version::V6 => size_of::<[ConntrackKey<V6>; 2]>() + size_of::<AffinityKey<V6>>(),
    }
}

/// Where the keys of what is forgotten are in it.
const KEYS: usize = 76;
/// Where the stop watch is in it.
const WATCH: usize = 32;

/// Where the transport's header is: behind an IP header without options or extensions.
fn transport(frame: &[u8]) -> usize {
    ETHERNET + if is_ipv4(frame) { 20 } else { 40 }
}

/// Where the wrapper's part is: behind 20 bytes of whatever the transport has.
fn part(frame: &[u8]) -> usize {
    transport(frame) + 20
}

fn is_ipv4(frame: &[u8]) -> bool {
    frame[ETHERNET] >> 4 == 4
}

/// Source and destination of a frame that is translated.
pub fn ends(frame: &[u8]) -> (SocketAddr, SocketAddr) {
    let (source, length) = if is_ipv4(frame) { (ETHERNET + 12, 4) } else { (ETHERNET + 8, 16) };
    let end = |address: usize, port: usize| {
        let octets = &frame[address..address + length];
        let ip = match <[u8; 4]>::try_from(octets) {
            Ok(octets) => IpAddr::from(octets),
            Err(_) => <[u8; 16]>::try_from(octets).unwrap_or_default().into(),
        };
        SocketAddr::new(ip, u16::from_be_bytes([frame[port], frame[port + 1]]))
    };
    let ports = transport(frame);
    (end(source, ports), end(source + length, ports + 2))
}

/// The packet's frame, for the wrapper to make it anew before each run and to step its source first.
pub fn repeated(packet: &Packet, from: SocketAddr, step: Step, forgotten: &Forgotten) -> Vec<u8> {
    let mut frame = packet.build();
    let (header, transport, at) = (ETHERNET, transport(&frame), part(&frame));
    let word = |at: usize| [frame[at], frame[at + 1]];
    let header_sum = if is_ipv4(&frame) { word(header + 10) } else { [0; 2] };
    let copies = [word(transport + 2), word(transport + 6), word(transport + 16), header_sum].concat();
    let mut addresses = [0; 28];
    if is_ipv4(&frame) {
        addresses[12..16].copy_from_slice(&frame[header + 16..header + 20]);
    } else {
        addresses[..12].copy_from_slice(&frame[header + 8..header + 20]);
        addresses[12..].copy_from_slice(&frame[header + 24..header + 40]);
    }
    // The wrapper steps before the first run.
    let before = position(from).wrapping_sub(step.increment());
    let payload = [
        &before.to_ne_bytes()[..],
        &step.increment().to_ne_bytes(),
        &copies,
        &(forgotten.forget as u32).to_ne_bytes(),
        &[0; 12],
        &addresses,
        &[0; 8],
        &forgotten.keys,
    ]
    .concat();
    frame[at..at + payload.len()].copy_from_slice(&payload);
    frame
}

/// Nanoseconds on the stop watch of a frame that comes out of the wrapper.
pub fn watch(frame: &[u8]) -> Option<u64> {
    let bytes = frame.get(part(frame) + WATCH..)?.first_chunk()?;
    Some(u64::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().expect("an address and a port")
    }

    #[test]
    fn after_the_last_port_comes_the_next_address() {
        for (last, next, other) in [
            ("10.0.0.255:65535", "10.0.1.0:0", "10.0.1.0:65535"),
            ("[fd00::ffff:255]:65535", "[fd00::ffff:256]:0", "[fd00::ffff:256]:65535"),
        ] {
            assert_eq!(advance(at(last), Step::Port, 1), at(next));
            assert_eq!(advance(at(last), Step::Address, 1), at(other));
        }
    }

    #[test]
    fn frames_have_room_for_the_wrapper_s_part() {
        for (a, b) in [("10.0.0.1:1", "10.0.0.2:2"), ("[fd00::1]:1", "[fd00::2]:2")] {
            let (a, b) = (at(a), at(b));
            for packet in [tcp(a, b, Tcp::ACK), udp(a, b)] {
                let (proto, service) = (Proto::TCP, ServiceId { id: 1 });
                let connection = Connection { client: a, frontend: b, backend: b, proto, service, leaves_as: Some(b) };
                let forgotten = Forgotten::of(Forget::Client, &connection).expect("of one family");
                let frame = repeated(&packet, a, Step::Same, &forgotten);
                assert_eq!(frame.len(), part(&frame) + KEYS + forgotten.keys.len());
                assert_eq!((ends(&frame), watch(&frame)), ((a, b), Some(0)));
            }
        }
    }
}
