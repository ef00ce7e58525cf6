//! Datagrams in fragments, many at a time: they arrive whole, as etherparse puts them together.

mod world;

use affinity_common::dp::parse::{ACK, SYN};
use affinity_common::family::{V4, V6};
use affinity_common::reason::{Program, Reason};
use affinity_common::testing::{FakePacket, Part, Segment, Wire, run};
use affinity_common::types::Proto;
use etherparse::{SlicedPacket, defrag::IpDefragPool};
use proptest::prelude::*;
use world::{End, Service, World, cases::cases, checksums::verify};

/// A datagram, and how it is cut.
#[derive(Clone, Debug)]
struct Datagram {
    service: usize,
    client: End,
    /// From the backend, not to it.
    is_answer: bool,
    payload: Vec<u8>,
    /// How long each part is, in units of eight bytes; the last one has the rest.
    cuts: Vec<usize>,
    /// The order of the parts behind the first one.
    order: u64,
}

fn datagram() -> impl Strategy<Value = Datagram> {
    let payload = proptest::collection::vec(any::<u8>(), 40..400);
    let client = (11..14u8, 0..2u16).prop_map(|(host, port)| ([10, 244, 0, host], 40_000 + port));
    (0..4usize, client, any::<bool>(), payload, proptest::collection::vec(1..8usize, 0..8), any::<u64>()).prop_map(
        |(service, client, is_answer, payload, cuts, order)| Datagram {
            service,
            client,
            is_answer,
            payload,
            cuts,
            order,
        },
    )
}

/// The parts of a segment's transport header and payload: the first of at least the header, then the others in some order.
fn parts<F: Wire>(of: &Datagram, segment: &Segment, id: u32) -> Vec<Vec<u8>> {
    let upper = segment.upper::<F>();
    let mut bounds = vec![0, 24];
    for cut in &of.cuts {
        bounds.push(bounds.last().expect("a bound") + cut * 8);
    }
    bounds.retain(|&at| at < upper.len());
    bounds.push(upper.len());
    let part = |ends: &[usize]| {
        let eights = u16::try_from(ends[0] / 8).expect("a short one");
        segment.carry::<F>(Some(Part { id, eights, more: ends[1] < upper.len() }), &upper[ends[0]..ends[1]])
    };
    let mut parts: Vec<_> = bounds.windows(2).map(part).collect();
    let mut order = of.order;
    for last in (2..parts.len()).rev() {
        parts.swap(1 + usize::try_from(order % (last as u64)).expect("few parts"), last);
        order = order.rotate_left(7).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    parts
}

/// What becomes of datagrams whose parts come by turns.
fn arrive<F: Wire>(datagrams: &[Datagram], turns: &[usize]) {
    let services = (1..=4).map(|id| Service::new(id, if id < 3 { Proto::TCP } else { Proto::UDP }, id % 2 * 10));
    let world = World::<F>::new(1_000, services.collect());
    let mut sent: Vec<_> = datagrams
        .iter()
        .zip(1..)
        .map(|(of, id)| {
            let service = &world.services[of.service];
            let (_, place) = world.send(of.service, of.client, SYN);
            world.reply(of.service, of.client, place, SYN | ACK);
            let segment =
                if of.is_answer { service.answer(of.client, place, ACK) } else { service.segment(of.client, ACK) };
            let segment = Segment { payload: of.payload.clone(), ..segment };
            let mut parts = parts::<F>(of, &segment, id);
            parts.reverse();
            (segment, parts)
        })
        .collect();
    let mut pool = IpDefragPool::<(), ()>::new();
    let mut arrived = Vec::new();
    let mut turns = turns.iter().copied().cycle();
    while sent.iter().any(|(_, parts)| !parts.is_empty()) {
        let which = turns.next().expect("turns") % sent.len();
        let which = (which..sent.len()).chain(0..which).find(|&which| !sent[which].1.is_empty()).expect("one of them");
        let mut packet = FakePacket::raw(sent[which].1.pop().expect("a part"));
        let (program, expected) = if datagrams[which].is_answer {
            (Program::Egress, Reason::Reply)
        } else {
            (Program::Ingress, Reason::Established)
        };
        assert_eq!(run(&world.env, program, &mut packet), expected);
        verify(&packet.bytes);
        let slice = SlicedPacket::from_ethernet(&packet.bytes).expect("IP");
        if let Some(whole) = pool.process_sliced_packet(&slice, (), ()).expect("no overlap") {
            arrived.push((which, packet.bytes.clone(), whole.payload));
        }
    }
    assert_eq!(arrived.len(), datagrams.len());
    for (which, last, upper) in arrived {
        let (segment, of) = (&sent[which].0, &datagrams[which]);
        let service = &world.services[of.service];
        // Whole again, as whoever has the addresses of its parts checks it.
        let seen = if of.is_answer {
            Segment { src: service.frontend, ..segment.clone() }
        } else {
            let (_, place) = world.send(of.service, of.client, ACK);
            Segment { dst: Service::address(place), ..segment.clone() }
        };
        let whole = seen.carry::<F>(None, &upper);
        verify(&whole);
        assert_eq!(whole, seen.build::<F>());
        let addresses = if F::VERSION == 4 { 26..34 } else { 22..54 };
        assert_eq!(last[addresses.clone()], whole[addresses]);
    }
}

/// The flow of a client, a port and a service has one backend at a time: others of the same client and port, with the same
/// backend, have another port, and their answers come to that.
fn one_of_each_flow(datagrams: Vec<Datagram>) -> Vec<Datagram> {
    let mut kept: Vec<Datagram> = Vec::new();
    for datagram in datagrams {
        let is_new = |of: &Datagram| of.client != datagram.client || of.service == datagram.service;
        if kept.iter().all(is_new) {
            kept.push(datagram);
        }
    }
    kept
}

proptest! {
    #![proptest_config(cases(512))]

    #[test]
    fn datagrams_in_fragments_arrive_whole(
        datagrams in proptest::collection::vec(datagram(), 1..8).prop_map(one_of_each_flow),
        turns in proptest::collection::vec(0..8usize, 1..40),
    ) {
        arrive::<V4>(&datagrams, &turns);
        arrive::<V6>(&datagrams, &turns);
    }
}
