//! Any bytes: whatever comes, no program panics or writes outside of the frame, and what is not for a service leaves as it
//! came, to the bit.

mod world;

use affinity_common::abi::tail_calls::Stage;
use affinity_common::dp::Packet as _;
use affinity_common::dp::parse::{ACK, SYN};
use affinity_common::family::{V4, V6};
use affinity_common::reason::{Program, Reason, Verdict};
use affinity_common::testing::{
    FakePacket, IcmpError, Part, Segment, Trouble, Wire, destination, run, run_stage, source,
};
use affinity_common::types::Proto;
use proptest::prelude::*;
use world::{End, Service, State, World, backend_of, cases::cases};

const CLIENT: End = ([10, 244, 0, 11], 40_000);

/// A change of a frame's bytes.
#[derive(Clone, Debug)]
enum Spoil {
    Flip { at: usize, bit: u8 },
    Set { at: usize, byte: u8 },
    Cut { to: usize },
    Append(Vec<u8>),
    Insert { at: usize, bytes: Vec<u8> },
    Remove { at: usize, len: usize },
    Copy { from: usize, to: usize, len: usize },
}

impl Spoil {
    fn apply(&self, frame: &mut Vec<u8>) {
        let len = frame.len();
        if len == 0 {
            return;
        }
        match self {
            Self::Flip { at, bit } => frame[at % len] ^= 1 << bit,
            Self::Set { at, byte } => frame[at % len] = *byte,
            Self::Cut { to } => frame.truncate(to % len),
            Self::Append(bytes) => frame.extend(bytes),
            Self::Insert { at, bytes } => drop(frame.splice(at % len..at % len, bytes.iter().copied())),
            Self::Remove { at, len: removed } => drop(frame.drain(at % len..(at % len + removed).min(len))),
            Self::Copy { from, to, len: copied } => {
                let copy: Vec<u8> = frame[from % len..].iter().take(*copied).copied().collect();
                let to = to % len;
                let copied = copy.len().min(len - to);
                frame[to..to + copied].copy_from_slice(&copy[..copied]);
            }
        }
    }
}

fn spoil() -> impl Strategy<Value = Spoil> {
    // Most of what matters lies in the headers.
    let at = || prop_oneof![4 => 12..60usize, 1 => 0..200usize];
    let bytes = || proptest::collection::vec(any::<u8>(), 1..40);
    let byte = prop_oneof![any::<u8>(), prop::sample::select(vec![0u8, 1, 5, 6, 17, 43, 44, 50, 51, 58, 59, 60, 255])];
    prop_oneof![
        4 => (at(), 0..8u8).prop_map(|(at, bit)| Spoil::Flip { at, bit }),
        4 => (at(), byte).prop_map(|(at, byte)| Spoil::Set { at, byte }),
        1 => (0..200usize).prop_map(|to| Spoil::Cut { to }),
        1 => bytes().prop_map(Spoil::Append),
        1 => (at(), bytes()).prop_map(|(at, bytes)| Spoil::Insert { at, bytes }),
        1 => (at(), 1..40usize).prop_map(|(at, len)| Spoil::Remove { at, len }),
        1 => (at(), at(), 1..24usize).prop_map(|(from, to, len)| Spoil::Copy { from, to, len }),
    ]
}

/// A program that a frame comes to, with whatever note another one might have left.
#[derive(Clone, Copy, Debug)]
enum Entry {
    Program(Program),
    Stage(Stage, u32),
}

fn entry() -> impl Strategy<Value = Entry> {
    let note = 0..u32::try_from(Reason::ALL.len()).expect("few reasons") + 2;
    prop_oneof![
        2 => prop::sample::select(Program::TC.to_vec()).prop_map(Entry::Program),
        1 => (prop::sample::select(Stage::ALL.to_vec()), note).prop_map(|(stage, note)| Entry::Stage(stage, note)),
    ]
}

/// A world in which there is something to meet: connections of all kinds, datagrams in fragments, a service without backends.
fn world<F: Wire>() -> (World<F>, Vec<Vec<u8>>) {
    let services = vec![
        Service::new(1, Proto::TCP, 10),
        Service::new(2, Proto::TCP, 0),
        Service::new(3, Proto::UDP, 10),
        Service::new(4, Proto::UDP, 0),
        Service::new(5, Proto::UDP, 0),
    ];
    let mut world = World::<F>::new(1_000, services);
    world.services[4].backends.fill(State::Gone);
    world.program(4);
    let mut frames = Vec::new();
    for service in 0..5 {
        for client in [CLIENT, (Service::address(0).0, 40_000)] {
            let of = world.services[service].clone();
            let segment = Segment { payload: (0..64).collect(), ..of.segment(client, SYN) };
            let (_, sent) = world.ingress(&segment);
            frames.push(segment.build::<F>());
            frames.push(Segment { flags: ACK, options: vec![1; 8], ..segment.clone() }.build::<F>());
            let upper = segment.upper::<F>();
            frames.push(segment.carry::<F>(Some(Part { id: 7, eights: 0, more: true }), &upper[..24]));
            frames.push(segment.carry::<F>(Some(Part { id: 7, eights: 3, more: false }), &upper[24..]));
            let about =
                IcmpError { src: client.0, dst: of.frontend.0, trouble: Trouble::TooBig(1280), quote: Vec::new() };
            let quote = Segment { src: of.frontend, dst: client, ..segment.clone() }.build::<F>().split_off(14);
            frames.push(IcmpError { quote, ..about.clone() }.build::<F>());
            // What comes back of it.
            let (Some(pod), Some(seen)) = (destination::<F>(&sent), source::<F>(&sent)) else { continue };
            if backend_of::<F>(&sent).is_some() {
                let answer = Segment { src: pod, dst: (client.0, seen.1), flags: SYN | ACK, ..segment.clone() };
                frames.push(answer.build::<F>());
                frames.push(Segment { dst: seen, ..answer.clone() }.build::<F>());
                let upper = answer.upper::<F>();
                frames.push(answer.carry::<F>(Some(Part { id: 9, eights: 0, more: true }), &upper[..24]));
                frames.push(answer.carry::<F>(Some(Part { id: 9, eights: 3, more: false }), &upper[24..]));
                let quote = sent[14..].to_vec();
                frames.push(IcmpError { src: pod.0, dst: client.0, quote, ..about }.build::<F>());
                frames.push(Segment { src: client, dst: pod, ..segment }.build::<F>());
            }
        }
    }
    for frame in &frames {
        for program in Program::TC {
            run(&world.env, program, &mut FakePacket::raw(frame.clone()));
        }
    }
    (world, frames)
}

/// Where the addresses of a frame are.
fn addresses<F: Wire>() -> std::ops::Range<usize> {
    if F::VERSION == 4 { 26..34 } else { 22..54 }
}

fn is_of_a_pod<F: Wire>(addr: &[u8]) -> bool {
    (0..4).any(|place| F::addr(Service::address(place).0).as_ref() == addr)
}

/// Sends a frame to a program, and sees that nothing happens which must not.
fn meets<F: Wire>(world: &World<F>, entry: Entry, frame: &[u8], said_len: Option<usize>) {
    let mut packet = FakePacket::raw(frame.to_vec());
    packet.said_len = said_len;
    let keys = |world: &World<F>| {
        let connections: Vec<_> = world.env.conntrack_entries().into_iter().map(|(key, _)| key).collect();
        (connections, world.env.affinity_entries())
    };
    let before = keys(world);
    let reason = match entry {
        Entry::Program(program) => run(&world.env, program, &mut packet),
        Entry::Stage(stage, note) => {
            packet.leave_note(note);
            run_stage(&world.env, stage, &mut packet)
        }
    };
    assert!(!packet.has_strayed(), "{reason:?}: a write outside of the frame");
    assert_ne!(reason, Reason::RewriteFailed);
    let got = &packet.bytes;
    let is_untouched = matches!(
        reason,
        Reason::NotIp
            | Reason::OtherProtocol
            | Reason::Malformed
            | Reason::Fragment
            | Reason::NotService
            | Reason::NotReply
    );
    if is_untouched || reason.verdict() == Verdict::Drop {
        assert_eq!(got, frame, "{reason:?}");
    }
    if is_untouched {
        let (connections, clients) = keys(world);
        assert!(connections.iter().all(|key| before.0.contains(key)), "{reason:?}: a new connection");
        assert_eq!(clients, before.1, "{reason:?}: somebody's affinity");
        return;
    }
    if let Entry::Stage(..) = entry {
        return;
    }
    let (src, dst) = {
        let range = addresses::<F>();
        let half = range.len() / 2;
        (range.start..range.start + half, range.start + half..range.end)
    };
    match reason.verdict() {
        Verdict::Drop => {}
        Verdict::SendBack if reason == Reason::Hairpin => {
            assert_eq!(got.len(), frame.len());
            assert!(is_of_a_pod::<F>(&got[dst]), "to itself");
        }
        Verdict::SendBack => {
            assert_eq!(got[dst], frame[src.clone()], "to whom it came from");
            assert_eq!(got[src.clone()], frame[src.end..src.end + src.len()], "from whom it was sent to");
        }
        Verdict::Pass => {
            assert_eq!(got.len(), frame.len());
            assert_eq!(got[..14], frame[..14]);
            if matches!(entry, Entry::Program(Program::Ingress)) {
                assert_eq!(got[src.clone()], frame[src], "ingress changes destinations");
                assert!(got[dst.clone()] == frame[dst.clone()] || is_of_a_pod::<F>(&got[dst]), "{reason:?}");
            } else {
                assert_eq!(got[dst.clone()], frame[dst], "egress changes sources");
                let is_frontends = |of: &Service| F::addr(of.frontend.0).as_ref() == &got[src.clone()];
                assert!(got[src.clone()] == frame[src.clone()] || world.services.iter().any(is_frontends));
            }
        }
    }
}

/// A frame with one of the families' types, and any bytes behind it.
fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..160)
}

/// An IPv6 extension header: its number, the length that it says, in units of eight bytes behind the first ones, and how
/// many bytes there are in truth.
type Extension = (u8, u8, usize);

fn extension() -> impl Strategy<Value = Extension> {
    let number =
        prop_oneof![6 => Just(0u8), 6 => Just(60u8), 1 => prop::sample::select(vec![43u8, 44, 50, 51, 59, 135, 6, 17])];
    let said = prop_oneof![6 => 0..4u8, 1 => any::<u8>()];
    (number, said, prop_oneof![8 => Just(None), 1 => (0..40usize).prop_map(Some)])
        .prop_map(|(number, said, bytes)| (number, said, bytes.unwrap_or(8 + 8 * usize::from(said))))
}

/// A packet to a service behind extension headers, the next of which is named by the one before it, or, `looped`, by itself.
fn behind(extensions: &[Extension], looped: bool, segment: &Segment, lies_by: i16) -> Vec<u8> {
    let upper = segment.upper::<V6>();
    let mut chain = Vec::new();
    for (nth, (number, said, bytes)) in extensions.iter().enumerate() {
        let next = extensions.get(nth + 1).map_or(segment.proto.number, |next| next.0);
        let mut header = vec![if looped { *number } else { next }, *said];
        header.resize(*bytes, 0);
        chain.extend(header);
    }
    let mut frame = segment.carry::<V6>(None, &[chain, upper].concat());
    if let Some((first, ..)) = extensions.first() {
        frame[20] = *first;
    }
    let len = u16::from_be_bytes([frame[18], frame[19]]).wrapping_add_signed(lies_by);
    frame[18..20].copy_from_slice(&len.to_be_bytes());
    frame
}

/// How many extension headers are passed over: hop-by-hop options, and twice destination options.
const MOST_EXTENSIONS: usize = 3;

/// What a frame of IPv6 has for its transport header: where it is, or that it has none that is ours to read. By the letter of
/// RFC 8200, and the limit that is stated.
fn transport(frame: &[u8]) -> Option<(u8, usize)> {
    let len = usize::from(u16::from_be_bytes([frame[18], frame[19]]));
    let end = 54 + len;
    let (mut next, mut at) = (frame[20], 54);
    if len == 0 || end > frame.len() {
        return None;
    }
    for _ in 0..MOST_EXTENSIONS {
        if next == 0 || next == 60 {
            next = *frame.get(at)?;
            at += 8 + 8 * usize::from(*frame.get(at + 1)?);
        }
    }
    let mut is_first_part = false;
    if next == 44 {
        let offset = u16::from_be_bytes([*frame.get(at + 2)?, *frame.get(at + 3)?]);
        if offset >> 3 != 0 {
            return None;
        }
        is_first_part = offset & 1 != 0;
        (next, at) = (*frame.get(at)?, at + 8);
    }
    let left = end.checked_sub(at)?;
    let least = if next == 6 { 20 } else { 8 };
    let header = match next {
        _ if is_first_part => least,
        6 => usize::from(*frame.get(at + 12)? >> 4) * 4,
        17 => usize::from(u16::from_be_bytes([*frame.get(at + 4)?, *frame.get(at + 5)?])),
        _ => return None,
    };
    (matches!(next, 6 | 17) && least <= header && header <= left && left >= least).then_some((next, at))
}

/// Translated by what its headers say, or left alone.
fn is_read_as_it_says(extensions: &[Extension], looped: bool, service: usize, lies_by: i16) {
    let (world, _) = world::<V6>();
    let segment = world.services[service].segment(CLIENT, SYN);
    let frame = behind(extensions, looped, &segment, lies_by);
    let mut packet = FakePacket::raw(frame.clone());
    let reason = run(&world.env, Program::Ingress, &mut packet);
    assert!(!packet.has_strayed());
    // Where a header ends before it says, its rest is read as the next one's.
    let found = transport(&frame).filter(|&(proto, at)| {
        let ports = [&frame[at..at + 4], &[proto]].concat();
        ports == [&segment.upper::<V6>()[..4], &[segment.proto.number]].concat()
    });
    let Some((proto, at)) = found else {
        let is_translated = reason.is_selection() || [Reason::Established, Reason::Hairpin].contains(&reason);
        assert!(!is_translated, "{reason:?}");
        return;
    };
    assert!(reason.is_selection() || reason == Reason::Established, "{reason:?}");
    // Nothing but the destination, its port and the checksum.
    let check = at + if proto == 6 { 16 } else { 6 };
    for (place, (got, was)) in packet.bytes.iter().zip(&frame).enumerate() {
        let may_change =
            (38..54).contains(&place) || (at + 2..at + 4).contains(&place) || (check..check + 2).contains(&place);
        assert!(may_change || got == was, "at {place}");
    }
    assert!(is_of_a_pod::<V6>(&packet.bytes[38..54]));
    assert_eq!(packet.bytes[at + 2..at + 4], 8080u16.to_be_bytes());
}

proptest! {
    #![proptest_config(cases(1_024))]

    #[test]
    fn any_bytes_do_no_harm(mut frame in any_frame(), entry in entry(), said in proptest::option::of(0..200_000usize)) {
        let mut typed = |ethertype: [u8; 2], version: u8| {
            if frame.len() > 14 {
                frame[12..14].copy_from_slice(&ethertype);
                frame[14] = version << 4 | frame[14] & 0x0f;
            }
            frame.clone()
        };
        let (v4, v6) = (typed([0x08, 0x00], 4), typed([0x86, 0xdd], 6));
        meets(&world::<V4>().0, entry, &v4, said);
        meets(&world::<V6>().0, entry, &v6, said);
    }

    #[test]
    fn spoilt_packets_do_no_harm(
        nth in 0..200usize,
        spoils in proptest::collection::vec(spoil(), 0..4),
        entry in entry(),
        said in proptest::option::weighted(0.1, 0..200_000usize),
    ) {
        fn each<F: Wire>(nth: usize, spoils: &[Spoil], entry: Entry, said: Option<usize>) {
            let (world, frames) = world::<F>();
            let mut frame = frames[nth % frames.len()].clone();
            for spoil in spoils {
                spoil.apply(&mut frame);
            }
            meets(&world, entry, &frame, said);
        }
        each::<V4>(nth, &spoils, entry, said);
        each::<V6>(nth, &spoils, entry, said);
    }

    #[test]
    fn extension_headers_are_read_as_they_say_or_left_alone(
        extensions in proptest::collection::vec(extension(), 0..6),
        looped in prop::bool::weighted(0.1),
        service in 0..4usize,
        lies_by in prop_oneof![8 => Just(0i16), 1 => -60..60i16],
    ) {
        is_read_as_it_says(&extensions, looped, service, lies_by);
    }
}
