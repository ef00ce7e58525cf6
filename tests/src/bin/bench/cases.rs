//! What is measured: a kind of packet each, brought about by real packets before, and checked by what was counted.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use affinity_common::reason::Reason;
use affinity_tests::packet::{Packet, Tcp};
use anyhow::{Result, ensure};

use crate::frame::{self, Connection, Forget, Forgotten, Step};
use crate::node::{Kind, Node, Run};
use crate::version::Version;

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Its name.
    pub name: &'static str,
    /// The program that is run.
    run: Run,
    /// What its packets are counted as; `None` for programs that count nothing.
    counts_as: Option<Reason>,
    /// What is sent.
    packets: Packets,
}

#[derive(Clone, Copy, Debug)]
enum Packets {
    /// To nobody's service, or from nobody's backend.
    Unrelated(Tcp),
    /// The client's, of a connection that the backend has answered.
    Requests(Kind),
    /// The backend's, of such a connection.
    Replies(Kind),
    /// The client's first, of one connection that is forgotten in between.
    First(Kind, Forget),
    /// As unrelated ones, by the stop watch.
    Timed,
    /// The client's first, of another connection each.
    Fresh(Kind, Step),
    /// A client's from outside that leave the node for the backend, of a connection that it has answered.
    Leaving,
    /// The first of those, of one connection that the node forgets to have sent out in between.
    FirstLeaving,
    /// The backend's, to the node.
    Returning,
}

const fn case(name: &'static str, run: Run, counts_as: Option<Reason>, packets: Packets) -> Case {
    Case { name, run, counts_as, packets }
}

const fn ingress(name: &'static str, counts_as: Reason, packets: Packets) -> Case {
    case(name, Run::Ingress, Some(counts_as), packets)
}

/// A program that does nothing.
pub const NOTHING: Case = case("empty program", Run::Empty, None, Packets::Unrelated(Tcp::ACK));
/// A program that reads the headers.
pub const HEADERS: Case = case("parse only", Run::Parse, None, Packets::Unrelated(Tcp::ACK));
/// The wrapper alone.
pub const OVERHEAD: Case = case("wrapper", Run::Wrapper, None, Packets::Unrelated(Tcp::ACK));
/// The stop watch alone.
pub const STOP_WATCH: Case = case("stop watch", Run::Wrapper, None, Packets::Timed);

/// Not for a service.
pub const NOT_SERVICE: Case = ingress("not for a service", Reason::NotService, Packets::Unrelated(Tcp::ACK));
/// A first packet that is not for a service.
pub const SYN_NOT_SERVICE: Case = ingress("SYN, not for a service", Reason::NotService, Packets::Unrelated(Tcp::SYN));
/// Established, with affinity.
pub const ESTABLISHED_STICKY: Case =
    ingress("established, affinity", Reason::Established, Packets::Requests(Kind::Sticky));
/// Established, without affinity.
pub const ESTABLISHED_PLAIN: Case =
    ingress("established, no affinity", Reason::Established, Packets::Requests(Kind::Plain));
/// First packet, affinity hit.
pub const FIRST_HIT: Case =
    ingress("first packet, affinity hit", Reason::AffinityHit, Packets::First(Kind::Sticky, Forget::Connection));
/// First packet, without affinity.
pub const FIRST_PLAIN: Case =
    ingress("first packet, no affinity", Reason::Hashed, Packets::First(Kind::Plain, Forget::Connection));

/// A backend's, of an established connection.
pub const REPLY: Case = case("reply (egress)", Run::Egress, Some(Reason::Reply), Packets::Replies(Kind::Sticky));
/// First packet, of a client without an affinity entry.
pub const FIRST_NEW: Case =
    ingress("first packet, new client", Reason::AffinityNew, Packets::First(Kind::Sticky, Forget::Client));

/// From outside to a node port, established.
pub const NODE_PORT: Case = ingress("node port, established", Reason::Established, Packets::Requests(Kind::NodePort));
/// From outside to a node port, first packet.
pub const NODE_PORT_FIRST: Case =
    ingress("node port, first packet", Reason::AffinityHit, Packets::First(Kind::NodePort, Forget::Connection));
/// The answer to it, where it leaves the node.
pub const NODE_PORT_REPLY: Case =
    case("node port, reply (egress)", Run::Egress, Some(Reason::Reply), Packets::Replies(Kind::NodePort));
/// What has come by a node port leaves for a backend elsewhere.
pub const SNAT: Case = case("SNAT, established (egress)", Run::Egress, Some(Reason::Snat), Packets::Leaving);
/// The first packet does.
pub const SNAT_FIRST: Case =
    case("SNAT, first packet (egress)", Run::Egress, Some(Reason::Snat), Packets::FirstLeaving);
/// The answer comes in.
pub const SNAT_REPLY: Case = ingress("SNAT, reply (ingress)", Reason::SnatReply, Packets::Returning);

/// What a packet's whole way through the node costs: two rows.
#[derive(Clone, Copy, Debug)]
pub struct Sum {
    /// Its name.
    pub name: &'static str,
    /// Those that are added, round by round.
    pub parts: [Case; 2],
}

/// From outside to a backend elsewhere, established.
pub const WAY: Sum = Sum { name: "SNAT, established, both", parts: [NODE_PORT, SNAT] };
/// From outside to a backend elsewhere, first packet.
pub const WAY_FIRST: Sum = Sum { name: "SNAT, first packet, both", parts: [NODE_PORT_FIRST, SNAT_FIRST] };
/// The way back.
pub const WAY_BACK: Sum = Sum { name: "SNAT, reply, both", parts: [SNAT_REPLY, NODE_PORT_REPLY] };

/// The ways that are summed up.
pub const SUMS: [Sum; 3] = [WAY, WAY_FIRST, WAY_BACK];

/// The rows that are measured with every number of services.
pub const CASES: [Case; 19] = [
    NOT_SERVICE,
    SYN_NOT_SERVICE,
    case("not a reply (egress)", Run::Egress, Some(Reason::NotReply), Packets::Unrelated(Tcp::ACK)),
    ESTABLISHED_STICKY,
    ESTABLISHED_PLAIN,
    REPLY,
    ingress("UDP established, affinity", Reason::Established, Packets::Requests(Kind::StickyUdp)),
    FIRST_HIT,
    FIRST_NEW,
    FIRST_PLAIN,
    NODE_PORT,
    NODE_PORT_FIRST,
    NODE_PORT_REPLY,
    SNAT,
    SNAT_FIRST,
    SNAT_REPLY,
    FRESH[0],
    FRESH[1],
    FRESH[2],
];

/// First packets that meet table rows in no cache; measured again where the tables are full.
pub const FRESH: [Case; 3] = [
    ingress("uncached, affinity hit", Reason::AffinityHit, Packets::Fresh(Kind::Sticky, Step::Port)),
    ingress("uncached, new client", Reason::AffinityNew, Packets::Fresh(Kind::Sticky, Step::Address)),
    ingress("uncached, no affinity", Reason::Hashed, Packets::Fresh(Kind::Plain, Step::Port)),
];

/// What fills the tables of connections and of clients.
pub const FILL: Case = FRESH[1];

/// The client of established connections.
fn client(version: Version) -> SocketAddr {
    let (v4, v6) = (Ipv4Addr::new(10, 244, 0, 0), Ipv6Addr::new(0xfd00, 0x10, 0x244, 0, 0, 0, 0, 0));
    SocketAddr::new(version.address(v4, v6, 11), 40_000)
}

/// Nobody's service, nobody's backend.
fn stranger(version: Version) -> SocketAddr {
    let (v4, v6) = (Ipv4Addr::new(10, 244, 7, 0), Ipv6Addr::new(0xfd00, 0x10, 0x244, 7, 0, 0, 0, 0));
    SocketAddr::new(version.address(v4, v6, 7), 8_080)
}

/// How long a sample takes, by the number of runs.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Runs of a sample.
    pub runs: u32,
    /// Runs of a sample that makes a connection each; they have to fit in the tables.
    pub connections: u32,
}

/// Where the sources of first packets go on, so that none comes twice.
pub struct Fresh {
    client: SocketAddr,
    clients: SocketAddr,
}

impl Fresh {
    /// Of a family, from the start.
    pub fn new(version: Version) -> Self {
        let at = |net: u8| {
            let (v4, v6) = (Ipv4Addr::new(net, 0, 0, 0), Ipv6Addr::new(0xfd00, 0x10, net.into(), 0, 0, 0, 0, 0));
            SocketAddr::new(version.address(v4, v6, 1), 1_024)
        };
        Self { client: at(20), clients: at(100) }
    }

    fn take(&mut self, step: Step, runs: u32) -> SocketAddr {
        let next = if step == Step::Address { &mut self.clients } else { &mut self.client };
        let first = *next;
        *next = frame::advance(first, step, runs);
        first
    }
}

impl Case {
    /// The row whose cost is not the packet's.
    pub fn overhead(&self) -> Self {
        if self.is_timed() { STOP_WATCH } else { OVERHEAD }
    }

    /// Whether the wrapper's stop watch measures it.
    fn is_timed(&self) -> bool {
        matches!(self.packets, Packets::First(..) | Packets::FirstLeaving | Packets::Timed)
    }

    /// Whether it leaves connections behind, and clients.
    fn makes_entries(&self) -> bool {
        matches!(self.packets, Packets::Fresh(..))
    }

    /// Whether its packets come in from outside, or leave there.
    fn is_outside(&self) -> bool {
        match self.packets {
            Packets::Requests(kind) | Packets::Replies(kind) | Packets::First(kind, _) => kind == Kind::NodePort,
            Packets::Leaving | Packets::FirstLeaving | Packets::Returning => true,
            Packets::Unrelated(_) | Packets::Timed | Packets::Fresh(..) => false,
        }
    }

    /// Takes a sample: nanoseconds a run. `keep` leaves the tables as they are then.
    pub fn sample(&self, node: &mut Node, fresh: &mut Fresh, effort: Effort, keep: bool) -> Result<f64> {
        let runs = if self.makes_entries() { effort.connections } else { effort.runs };
        if self.is_outside() {
            node.lead_outside(true)?;
        }
        // The first of them only warm the caches up for the others.
        let warm_up = runs / 20 + 1;
        let frame = self.frame(node, fresh, warm_up)?;
        node.run(self.run, &frame, warm_up)?;
        let frame = self.frame(node, fresh, runs)?;
        let done = node.run(self.run, &frame, runs)?;
        if self.is_outside() {
            node.lead_outside(false)?;
        }
        if let Some(reason) = self.counts_as {
            let as_meant = done.counted.iter().find(|(counted, _)| *counted == reason).map_or(0, |(_, n)| *n);
            // A client that starts anew, an entry whose second is over: one in some thousand.
            let counted = &done.counted;
            ensure!(as_meant * 100 >= u64::from(runs) * 99, "{}: {runs} packets counted as {counted:?}", self.name);
        }
        if self.makes_entries() && !keep {
            node.forget()?;
        }
        Ok(if self.is_timed() { done.watch } else { done.nanos })
    }

    fn frame(&self, node: &Node, fresh: &mut Fresh, runs: u32) -> Result<Vec<u8>> {
        let version = node.version;
        let (client, stranger) = (client(version), stranger(version));
        // Of a connection with a backend.
        let forgotten = |kind: Kind, forget, backend, leaves_as| {
            let (frontend, proto, service) = (kind.frontend(version), kind.proto(), kind.service());
            Forgotten::of(forget, &Connection { client, frontend, backend, proto, service, leaves_as })
        };
        let same = |packet: &Packet, from| frame::repeated(packet, from, Step::Same, &Forgotten::NOTHING);
        Ok(match self.packets {
            Packets::Unrelated(flags) => same(&frame::tcp(client, stranger, flags), client),
            Packets::Timed => {
                let forgotten = forgotten(Kind::Sticky, Forget::Connection, stranger, None)?;
                frame::repeated(&frame::tcp(client, stranger, Tcp::SYN), client, Step::Same, &forgotten)
            }
            Packets::First(kind, forget) => {
                let forgotten = forgotten(kind, forget, open(node, kind)?, None)?;
                frame::repeated(&first(kind, client), client, Step::Same, &forgotten)
            }
            Packets::Fresh(kind, step) => {
                let from = fresh.take(step, runs);
                frame::repeated(&first(kind, from), from, step, &Forgotten::NOTHING)
            }
            Packets::Requests(kind) => {
                open(node, kind)?;
                same(&later(kind, client, kind.frontend(version)), client)
            }
            Packets::Replies(kind) => {
                let backend = open(node, kind)?;
                same(&later(kind, backend, client), backend)
            }
            Packets::Leaving => {
                let (backend, _) = send_out(node)?;
                same(&later(Kind::NodePort, client, backend), client)
            }
            Packets::FirstLeaving => {
                let (backend, end) = send_out(node)?;
                let forgotten = forgotten(Kind::NodePort, Forget::Connection, backend, Some(end))?;
                frame::repeated(&frame::tcp(client, backend, Tcp::SYN), client, Step::Same, &forgotten)
            }
            Packets::Returning => {
                let (backend, end) = send_out(node)?;
                same(&later(Kind::NodePort, backend, end), backend)
            }
        })
    }
}

/// The first packet of a connection.
fn first(kind: Kind, from: SocketAddr) -> Packet {
    let to = kind.frontend(Version::of_address(from));
    match kind {
        Kind::Sticky | Kind::Plain | Kind::NodePort => frame::tcp(from, to, Tcp::SYN),
        Kind::StickyUdp => frame::udp(from, to),
    }
}

/// The backend's answer to it.
fn answer(kind: Kind, from: SocketAddr, to: SocketAddr) -> Packet {
    match kind {
        Kind::Sticky | Kind::Plain | Kind::NodePort => frame::tcp(from, to, Tcp::SYN | Tcp::ACK),
        Kind::StickyUdp => frame::udp(from, to),
    }
}

/// A later packet of a connection.
fn later(kind: Kind, from: SocketAddr, to: SocketAddr) -> Packet {
    match kind {
        Kind::Sticky | Kind::Plain | Kind::NodePort => frame::tcp(from, to, Tcp::ACK),
        Kind::StickyUdp => frame::udp(from, to),
    }
}

/// Makes the client's connection to a service: both sides have sent something. Returns the backend.
fn open(node: &Node, kind: Kind) -> Result<SocketAddr> {
    let (client, frontend) = (client(node.version), kind.frontend(node.version));
    let (_, backend) = pass(node, Run::Ingress, &first(kind, client), client)?;
    ensure!(backend != frontend, "the first packet to {kind:?} was not translated");
    let (source, _) = pass(node, Run::Egress, &answer(kind, backend, client), backend)?;
    ensure!(source == frontend, "the answer of {kind:?} was not translated");
    pass(node, Run::Ingress, &later(kind, client, frontend), client)?;
    Ok(backend)
}

/// Makes the connection of a client outside to a backend elsewhere, as whose packets' end the node stands. Returns the
/// backend, and that end.
fn send_out(node: &Node) -> Result<(SocketAddr, SocketAddr)> {
    let (kind, client) = (Kind::NodePort, client(node.version));
    let backend = open(node, kind)?;
    let (end, to) = pass(node, Run::Egress, &frame::tcp(client, backend, Tcp::SYN), client)?;
    ensure!(to == backend && end.ip() == kind.frontend(node.version).ip(), "from {client} there left {end} to {to}");
    let (from, to) = pass(node, Run::Ingress, &answer(kind, backend, end), backend)?;
    ensure!((from, to) == (backend, client), "the answer to {end} came in as one from {from} to {to}");
    pass(node, Run::Egress, &later(kind, client, backend), client)?;
    Ok((backend, end))
}

/// Passes a packet; returns the ends that it has then.
fn pass(node: &Node, run: Run, packet: &Packet, from: SocketAddr) -> Result<(SocketAddr, SocketAddr)> {
    Ok(frame::ends(&node.pass(run, &frame::repeated(packet, from, Step::Same, &Forgotten::NOTHING))?))
}
