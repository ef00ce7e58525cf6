//! One step of a walk, and how it is drawn: few clients, services and times, so that they meet.

use affinity_common::dp::parse::{ACK, FIN, RST, SYN};
use affinity_common::testing::{Faults, Trouble};
use affinity_common::types::{Nanos, Proto};
use proptest::prelude::*;

use crate::world::{End, State};

/// One step.
#[derive(Clone, Debug)]
pub enum Step {
    /// A client sends a packet to a service.
    Send { service: usize, client: End, flags: u8, shape: Shape },
    /// A backend sends a packet to a client.
    Answer { service: usize, client: End, place: usize, flags: u8, shape: Shape },
    /// Whoever answers in the `nth` way back that there is sends a packet.
    AnswerAny { nth: usize, flags: u8, shape: Shape },
    /// A client sends a packet to a pod, past all services.
    Direct { client: End, place: usize, proto: Proto, flags: u8 },
    /// A client sends a packet to a service's address, and a port that no service has there.
    NoPort { service: usize, client: End, flags: u8 },
    /// A fragment that is not its datagram's first.
    Fragment(Fragment),
    /// So many datagrams begin, and none of them ends.
    NeverEnding { service: usize, client: End, datagrams: u32 },
    /// An ICMP error.
    Error(Error),
    /// A socket's call.
    Socket(SocketCall),
    /// What the node knows of a namespace changes.
    Namespace { host: u8, knows: Namespace },
    /// Time passes.
    Sleep(Nanos),
    /// Time passes until an entry's last use lies back by exactly one of its bounds, and some nanoseconds.
    SleepTo { service: usize, client: End, bound: Bound, nanos: i8 },
    /// A backend changes.
    Backend { service: usize, place: usize, state: State },
    /// A service's affinity changes.
    Timeout { service: usize, seconds: u32 },
    /// An entry is evicted.
    Evict(Evict),
    /// Maps refuse new entries, or take them again.
    Faults(Faults),
}

/// What a packet looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Plain.
    Whole,
    /// With IP options, or an extension header.
    Options,
    /// The first fragment of a datagram of this identification.
    First(u32),
}

/// A fragment that is not its datagram's first.
#[derive(Clone, Debug)]
pub struct Fragment {
    pub from: Sender,
    /// The datagram's identification.
    pub id: u32,
    /// Where it begins, in units of eight bytes: fragments may overlap.
    pub eights: u16,
    pub more: bool,
}

/// Who sends a fragment.
#[derive(Clone, Copy, Debug)]
pub enum Sender {
    /// A client, to a service.
    Client { service: usize, client: End },
    /// A client, to a pod.
    PastServices { client: End, place: usize, proto: Proto },
    /// A backend, to a client.
    Backend { service: usize, client: End, place: usize },
}

/// An ICMP error.
#[derive(Clone, Debug)]
pub struct Error {
    /// To the client, about what it has sent; or from it, about what it was sent.
    pub to_client: bool,
    /// Which connection it is about, of those that there are.
    pub nth: usize,
    pub trouble: Trouble,
    /// Found by a host on the way; otherwise by the packet's receiver.
    pub on_the_way: bool,
    /// How many bytes of the packet's transport header and payload are quoted.
    pub quoted: usize,
    pub flags: u8,
    /// What is wrong with the quote.
    pub forged: Option<Forgery>,
}

/// What can be wrong with what an error quotes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgery {
    /// The packet's ports are nobody's.
    Stranger,
    /// The quote ends within the ports, or before them.
    Truncated(usize),
    /// It says that it is of another IP version.
    Version,
    /// It is of another protocol.
    Protocol(u8),
    /// It is no first fragment, which has no ports.
    LaterFragment,
}

/// What a socket calls.
#[derive(Clone, Debug)]
pub enum SocketCall {
    /// It connects to a service, as a new one if it can't again.
    Connect { socket: usize, host: u8, service: usize, bound: bool },
    /// It sends to a service, to which it is not connected.
    Send { socket: usize, host: u8, service: usize, bound: bool },
    /// It hears of a datagram from a backend.
    Receive { socket: usize, place: usize },
    /// It asks whom it is connected to.
    PeerName { socket: usize },
    /// It is closed.
    Release { socket: usize },
    /// User space has seen the `nth` entry's socket alive.
    Touch { nth: usize },
    /// It connects to a port that no service has, at a service's address.
    NoPort { socket: usize, host: u8, service: usize },
    /// It connects to a pod.
    Past { socket: usize, host: u8, place: usize },
}

/// What the node knows of a network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// Its address.
    Address,
    /// That it is left to TC.
    TcOnly,
    /// Nothing.
    Nothing,
}

/// A bound of an affinity entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Where it has expired.
    Timeout,
    /// Where its use is to be recorded anew.
    Refresh,
}

/// An eviction.
#[derive(Clone, Debug)]
pub enum Evict {
    /// Of a client's affinity.
    Client { service: usize, client: End },
    /// Of a connection's entry, in the one direction or the other.
    Flow { service: usize, client: End, place: Option<usize> },
    /// Of the `nth` connection's entry.
    AnyFlow { nth: usize },
    /// Of what is noted of the `nth` datagram.
    Datagram { nth: usize },
    /// Of the `nth` entry of a socket.
    Socket { nth: usize },
}

/// How many services there are.
pub const SERVICES: usize = 4;
/// The hosts that are clients; the last one is a backend itself.
pub const HOSTS: [u8; 4] = [11, 12, 13, 101];
/// How many sockets there are at a time.
pub const SOCKETS: usize = 6;
/// How many bytes of transport header and payload a packet has that comes in fragments, and its first one.
pub const DATAGRAM: usize = 96;
pub const FIRST_PART: usize = 40;

/// The steps of a walk.
pub fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        24 => packet(),
        6 => fragment(),
        5 => error().prop_map(Step::Error),
        10 => socket().prop_map(Step::Socket),
        1 => (host(), prop_oneof![2 => Just(Namespace::Address), 1 => Just(Namespace::TcOnly), 1 => Just(Namespace::Nothing)])
            .prop_map(|(host, knows)| Step::Namespace { host, knows }),
        4 => sleep(),
        4 => change(),
        4 => evict().prop_map(Step::Evict),
        1 => any::<[bool; 4]>().prop_map(|[conntrack_full, affinity_full, fragments_full, sockets_full]| {
            Step::Faults(Faults { conntrack_full, affinity_full, fragments_full, sockets_full })
        }),
    ]
}

fn host() -> impl Strategy<Value = u8> {
    prop_oneof![5 => 11..14u8, 1 => Just(101u8)]
}

fn client() -> impl Strategy<Value = End> {
    (host(), 0..3u16).prop_map(|(host, port)| ([10, 244, 0, host], 40_000 + port))
}

fn proto() -> impl Strategy<Value = Proto> {
    prop_oneof![Just(Proto::TCP), Just(Proto::UDP)]
}

fn flags() -> impl Strategy<Value = u8> {
    prop_oneof![3 => Just(SYN), 4 => Just(ACK), 1 => Just(FIN | ACK), 1 => Just(RST), 1 => Just(SYN | ACK)]
}

fn shape() -> impl Strategy<Value = Shape> {
    prop_oneof![6 => Just(Shape::Whole), 1 => Just(Shape::Options), 2 => id().prop_map(Shape::First)]
}

fn id() -> impl Strategy<Value = u32> {
    1..4u32
}

fn packet() -> impl Strategy<Value = Step> {
    let places = 0..4usize;
    prop_oneof![
        10 => (0..SERVICES, client(), flags(), shape())
            .prop_map(|(service, client, flags, shape)| Step::Send { service, client, flags, shape }),
        3 => (0..SERVICES, client(), places.clone(), flags(), shape())
            .prop_map(|(service, client, place, flags, shape)| Step::Answer { service, client, place, flags, shape }),
        6 => (0..64usize, flags(), shape()).prop_map(|(nth, flags, shape)| Step::AnswerAny { nth, flags, shape }),
        4 => (client(), places, proto(), flags())
            .prop_map(|(client, place, proto, flags)| Step::Direct { client, place, proto, flags }),
        1 => (0..SERVICES, client(), flags())
            .prop_map(|(service, client, flags)| Step::NoPort { service, client, flags }),
    ]
}

fn fragment() -> impl Strategy<Value = Step> {
    let sender = prop_oneof![
        4 => (0..SERVICES, client()).prop_map(|(service, client)| Sender::Client { service, client }),
        1 => (client(), 0..4usize, proto())
            .prop_map(|(client, place, proto)| Sender::PastServices { client, place, proto }),
        4 => (0..SERVICES, client(), 0..4usize)
            .prop_map(|(service, client, place)| Sender::Backend { service, client, place }),
    ];
    let later = (sender, id(), 1..12u16, any::<bool>())
        .prop_map(|(from, id, eights, more)| Step::Fragment(Fragment { from, id, eights, more }));
    let never_ending = (0..SERVICES, client(), 1..400u32).prop_map(|(service, client, datagrams)| Step::NeverEnding {
        service,
        client,
        datagrams,
    });
    prop_oneof![40 => later, 1 => never_ending]
}

fn error() -> impl Strategy<Value = Error> {
    let trouble = prop_oneof![Just(Trouble::PortUnreachable), Just(Trouble::TooBig(1280)), Just(Trouble::TimeExceeded)];
    let forged = prop_oneof![
        Just(Forgery::Stranger),
        (0..44usize).prop_map(Forgery::Truncated),
        Just(Forgery::Version),
        prop_oneof![Just(1u8), Just(44), Just(47), Just(58), Just(60), Just(132)].prop_map(Forgery::Protocol),
        Just(Forgery::LaterFragment),
    ];
    let forged = prop_oneof![3 => Just(None), 1 => forged.prop_map(Some)];
    let quoted = prop_oneof![Just(8usize), 8..40usize, Just(1_000)];
    (any::<bool>(), 0..64usize, trouble, any::<bool>(), quoted, flags(), forged).prop_map(
        |(to_client, nth, trouble, on_the_way, quoted, flags, forged)| Error {
            to_client,
            nth,
            trouble,
            on_the_way,
            quoted,
            flags,
            forged,
        },
    )
}

fn socket() -> impl Strategy<Value = SocketCall> {
    let sockets = 0..SOCKETS;
    let opening = || (0..SOCKETS, host(), 0..SERVICES, prop::bool::weighted(0.2));
    prop_oneof![
        6 => opening()
            .prop_map(|(socket, host, service, bound)| SocketCall::Connect { socket, host, service, bound }),
        5 => opening().prop_map(|(socket, host, service, bound)| SocketCall::Send { socket, host, service, bound }),
        3 => (sockets.clone(), 0..4usize).prop_map(|(socket, place)| SocketCall::Receive { socket, place }),
        2 => sockets.clone().prop_map(|socket| SocketCall::PeerName { socket }),
        2 => sockets.clone().prop_map(|socket| SocketCall::Release { socket }),
        2 => (0..64usize).prop_map(|nth| SocketCall::Touch { nth }),
        1 => (sockets.clone(), host(), 0..SERVICES)
            .prop_map(|(socket, host, service)| SocketCall::NoPort { socket, host, service }),
        1 => (sockets, host(), 0..4usize)
            .prop_map(|(socket, host, place)| SocketCall::Past { socket, host, place }),
    ]
}

fn sleep() -> impl Strategy<Value = Step> {
    let millis = prop_oneof![
        Just(0u64),
        Just(16),
        Just(62),
        Just(70),
        Just(500),
        Just(1_000),
        Just(1_020),
        Just(2_000),
        Just(2_983),
        Just(3_000),
        Just(5_000),
        Just(29_990),
        Just(30_010),
        Just(59_990),
        Just(60_010),
        Just(121_000),
        0..200_000u64
    ];
    let bound = prop_oneof![Just(Bound::Timeout), Just(Bound::Refresh)];
    prop_oneof![
        4 => millis.prop_map(|millis| Step::Sleep(Nanos(millis * 1_000_000))),
        2 => (0..SERVICES, client(), bound, -1..2i8)
            .prop_map(|(service, client, bound, nanos)| Step::SleepTo { service, client, bound, nanos }),
    ]
}

fn change() -> impl Strategy<Value = Step> {
    let state = prop_oneof![3 => Just(State::Eligible), 1 => Just(State::Draining), 1 => Just(State::Gone)];
    let seconds = prop_oneof![Just(0u32), Just(1), Just(3), Just(10_800)];
    prop_oneof![
        3 => (0..SERVICES, 0..4usize, state)
            .prop_map(|(service, place, state)| Step::Backend { service, place, state }),
        1 => (0..SERVICES, seconds).prop_map(|(service, seconds)| Step::Timeout { service, seconds }),
    ]
}

fn evict() -> impl Strategy<Value = Evict> {
    prop_oneof![
        2 => (0..SERVICES, client()).prop_map(|(service, client)| Evict::Client { service, client }),
        2 => (0..SERVICES, client(), proptest::option::of(0..4usize))
            .prop_map(|(service, client, place)| Evict::Flow { service, client, place }),
        3 => (0..64usize).prop_map(|nth| Evict::AnyFlow { nth }),
        2 => (0..64usize).prop_map(|nth| Evict::Datagram { nth }),
        2 => (0..64usize).prop_map(|nth| Evict::Socket { nth }),
    ]
}
