//! Clients from outside of the cluster: to backends elsewhere as the node's own, to those on the node as themselves.

mod world;

use std::collections::BTreeSet;

use affinity_common::abi::announced::{Announced, AnnouncedKey};
use affinity_common::abi::backends::{BY_SCOPE, Backend, ELIGIBLE, ELIGIBLE_LOCAL};
use affinity_common::abi::conntrack::{Conntrack, ConntrackKey, OPENED, REPLIED};
use affinity_common::abi::frontends::{Frontend, HAS_RANGES, KIND, LOCAL, NODE_PORT, OTHERS, PARTS_OUTSIDERS};
use affinity_common::abi::source_ranges::RangeKey;
use affinity_common::abi::tail_calls::Stage;
use affinity_common::abi::uplinks::Uplink;
use affinity_common::dp::snat::{FIRST_PORT, PORTS, is_of_range};
use affinity_common::dp::{Env as _, neighbour, parse};
use affinity_common::family::{Family, V4, V6};
use affinity_common::reason::{Program, Reason};
use affinity_common::testing::{
    FakePacket, IcmpError, Offload, Part, Segment, Trouble, Wire, destination, run, run_stage, source,
};
use affinity_common::types::{Nanos, Port, Proto, ServiceId};
use world::checksums::{verify, verify_error};
use world::{End, Service, State, World, backend_of};

const SYN: u8 = parse::SYN;
const ACK: u8 = parse::ACK;
const FIN: u8 = parse::FIN;
const RST: u8 = parse::RST;
/// The interface that leads outside, and to other nodes.
const UPLINK: u32 = 2;
/// The interface of a pod.
const POD: u32 = 7;
const NODE: [u8; 4] = [172, 18, 0, 2];
const MAC: [u8; 6] = [2, 0, 0, 0, 9, 9];
const CLIENT: End = ([192, 0, 2, 7], 40_000);
const POD_CLIENT: End = ([10, 244, 0, 11], 40_000);
const SECOND: u64 = 1_000_000_000;

/// A sticky service of TCP, one of UDP, and a spreading one of TCP, on a node with an uplink.
fn world<F: Wire>(lru_size: usize) -> World<F> {
    let services =
        vec![Service::new(1, Proto::TCP, 10), Service::new(2, Proto::UDP, 10), Service::new(3, Proto::TCP, 0)];
    let world = World::new(lru_size, services);
    world.env.set_uplink(UPLINK, Uplink { addr: F::addr(NODE), mac: MAC, zero: [0; 2] });
    world
}

/// A frame goes through a program of an interface; returns why it ended as it did, and what left.
fn frame<F: Wire>(world: &World<F>, program: Program, ifindex: u32, frame: Vec<u8>) -> (Reason, Vec<u8>) {
    let mut packet = FakePacket::raw(frame);
    packet.ifindex = ifindex;
    let reason = run(&world.env, program, &mut packet);
    (reason, packet.sent())
}

/// A segment goes through a program, with its checksum left to hardware and not: both times the same leaves.
fn through<F: Wire>(world: &World<F>, program: Program, ifindex: u32, segment: &Segment) -> (Reason, Vec<u8>) {
    let mut packet = FakePacket::new::<F>(segment, Offload::Partial);
    packet.ifindex = ifindex;
    let reason = run(&world.env, program, &mut packet);
    verify(&packet.sent());
    (reason, packet.sent())
}

/// Sends a packet of a client's from outside to a service; returns the place of the backend and what it sees the client as.
fn send<F: Wire>(world: &World<F>, service: usize, client: End, flags: u8) -> (usize, End) {
    let segment = world.services[service].segment(client, flags);
    let (_, sent) = through(world, Program::Ingress, UPLINK, &segment);
    let place = backend_of::<F>(&sent).expect("a backend");
    let onward = Segment { dst: Service::address(place), ..segment };
    assert_eq!(sent, onward.build::<F>());
    let (reason, sent) = through(world, Program::Egress, UPLINK, &onward);
    assert_eq!(reason, Reason::Snat);
    let seen = source::<F>(&sent).expect("a source");
    assert_eq!(sent, Segment { src: seen, ..onward }.build::<F>());
    assert!(seen.0 == NODE && is_of_range(Port::new(seen.1)), "{seen:?}");
    (place, seen)
}

/// Sends a backend's answer to what it sees as its client, and has it reach the client as the service's.
fn answer<F: Wire>(world: &World<F>, service: usize, client: End, place: usize, seen: End, flags: u8) {
    let segment = world.services[service].answer(seen, place, flags);
    let (reason, sent) = through(world, Program::Ingress, UPLINK, &segment);
    assert_eq!((reason, destination::<F>(&sent)), (Reason::SnatReply, Some(client)));
    let onward = Segment { dst: client, ..segment };
    assert_eq!(sent, onward.build::<F>());
    let (reason, sent) = through(world, Program::Egress, UPLINK, &onward);
    assert_eq!(reason, Reason::Reply);
    assert_eq!(sent, Segment { src: world.services[service].frontend, ..onward }.build::<F>());
}

fn events_say_who_comes_from_outside_and_by_what<F: Wire>() {
    let world = world::<F>(1_000);
    let key = world.services[0].frontend_key::<F>();
    let value = world.env.frontend(&key).expect("a frontend");
    world.env.set_frontend(key, Frontend { flags: NODE_PORT, ..value });
    world.env.want_events(true);
    send(&world, 0, CLIENT, SYN);
    let segment = world.services[0].segment(POD_CLIENT, SYN);
    through(&world, Program::Ingress, POD, &segment);
    let told: Vec<_> = world.env.take_events().iter().map(|it| (it.outside, it.frontend_flags & KIND)).collect();
    assert_eq!(told, [(1, NODE_PORT), (0, NODE_PORT)]);
}

fn who_comes_from_outside_leaves_as_the_node_and_is_answered_as_itself<F: Wire>() {
    let world = world::<F>(1_000);
    for service in 0..3 {
        let (place, seen) = send(&world, service, CLIENT, SYN);
        answer(&world, service, CLIENT, place, seen, SYN | ACK);
        let writes = world.env.writes();
        for _ in 0..20 {
            world.env.sleep(Nanos(SECOND / 2));
            assert_eq!(send(&world, service, CLIENT, ACK), (place, seen));
            answer(&world, service, CLIENT, place, seen, ACK);
        }
        assert_eq!(world.env.writes(), writes, "an established flow writes no map entry");
    }
}

fn who_goes_to_a_pod_of_the_node_keeps_its_address<F: Wire>() {
    let world = world::<F>(1_000);
    let segment = world.services[0].segment(CLIENT, SYN);
    let (_, sent) = through(&world, Program::Ingress, UPLINK, &segment);
    let place = backend_of::<F>(&sent).expect("a backend");
    let onward = Segment { dst: Service::address(place), ..segment };
    assert_eq!(through(&world, Program::Egress, POD, &onward), (Reason::NotReply, onward.build::<F>()));
    let back = world.services[0].answer(CLIENT, place, SYN | ACK);
    assert_eq!(through(&world, Program::Ingress, POD, &back), (Reason::NotService, back.build::<F>()));
    let (reason, sent) = through(&world, Program::Egress, UPLINK, &back);
    assert_eq!((reason, source::<F>(&sent)), (Reason::Reply, Some(world.services[0].frontend)));
}

fn pods_and_what_is_masqueraded_already_leave_as_they_are<F: Wire>() {
    let world = world::<F>(1_000);
    // Somebody from outside has been led to each backend, so that all of them are looked at.
    for port in 0..64 {
        send(&world, 2, (CLIENT.0, 41_000 + port), SYN);
    }
    let segment = world.services[0].segment(POD_CLIENT, SYN);
    let (_, sent) = through(&world, Program::Ingress, POD, &segment);
    let place = backend_of::<F>(&sent).expect("a backend");
    for src in [POD_CLIENT, (NODE, 50_000), (CLIENT.0, 50_001)] {
        let segment = Segment { src, dst: Service::address(place), ..segment.clone() };
        assert_eq!(through(&world, Program::Egress, UPLINK, &segment), (Reason::NotReply, segment.build::<F>()));
        // Nor is it taken for an answer when one comes.
        let back = Segment { src: segment.dst, dst: segment.src, flags: SYN | ACK, ..segment };
        assert_eq!(through(&world, Program::Ingress, UPLINK, &back).0, Reason::NotService);
    }
}

fn clients_are_kept_by_their_own_address_and_told_apart<F: Wire>() {
    let world = world::<F>(10_000);
    let (mut seen, mut places) = (BTreeSet::new(), BTreeSet::new());
    for host in 0..50 {
        let client = ([192, 0, 2, host], 40_000);
        let first = send(&world, 0, client, SYN);
        places.insert(first.0);
        assert!(seen.insert((first.0, first.1)), "two clients have one port");
        for port in 1..5 {
            let more = send(&world, 0, (client.0, 40_000 + port), SYN);
            assert_eq!(more.0, first.0, "a client's backend");
            assert!(seen.insert(more));
        }
    }
    assert_eq!(places.len(), 4);
}

fn nearly_all_ports_are_used_before_one_is_refused_and_no_flow_is_wrong<F: Wire>() {
    let mut world = world::<F>(200_000);
    // All to one backend.
    for place in 1..4 {
        world.services[2].backends[place] = State::Gone;
    }
    world.program(2);
    let mut ports = std::collections::BTreeMap::new();
    let refused = (0..=u32::from(PORTS)).find(|&number| {
        let [_, _, high, low] = (number / 20_000).to_be_bytes();
        let client = ([198, 51, high, low], 40_000 + u16::try_from(number % 20_000).expect("below 20,000"));
        let segment = world.services[2].segment(client, SYN);
        let (_, sent) = frame(&world, Program::Ingress, UPLINK, segment.build::<F>());
        let (reason, sent) = frame(&world, Program::Egress, UPLINK, sent);
        if reason == Reason::SnatExhausted {
            return true;
        }
        assert_eq!(reason, Reason::Snat);
        let seen = source::<F>(&sent).expect("a source");
        assert_eq!(ports.insert(seen.1, client), None, "one port for two");
        false
    });
    let refused = refused.expect("there are no more ports than that");
    assert!(refused as usize > usize::from(PORTS) * 95 / 100, "{refused} of {PORTS}");
    assert!(ports.keys().all(|port| *port >= FIRST_PORT && *port < FIRST_PORT + PORTS));
    for (port, client) in ports.iter().step_by(997) {
        answer(&world, 2, *client, 0, (NODE, *port), SYN | ACK);
    }
}

/// Gives every port towards a backend of a service to somebody else.
fn fill<F: Wire>(world: &World<F>, service: usize, place: usize) {
    let (to, to_port) = Service::address(place);
    let (seen, last_seen) = (OPENED | REPLIED, world.env.now().ticks());
    let (addr, port) = (F::addr([198, 51, 100, 1]), Port::new(40_000));
    let held = Conntrack { addr, port, client_port: port, seen, last_seen, ..Conntrack::default() };
    for port in FIRST_PORT..FIRST_PORT + PORTS {
        let (port, to_port) = (Port::new(port), Port::new(to_port));
        let key = ConntrackKey::snat_reply(F::addr(NODE), port, F::addr(to), to_port, world.services[service].proto);
        world.env.conntrack_replace(&key, &held).expect("room");
    }
}

/// As by a service that has no backend at all.
fn who_there_is_no_port_for_is_told_so_by_the_address_that_was_asked<F: Wire>() {
    for service in 0..3 {
        let world = world::<F>(200_000);
        let mut empty = self::world::<F>(1_000);
        empty.services[service].backends.fill(State::Gone);
        empty.program(service);
        let segment = world.services[service].segment(CLIENT, SYN);
        let (_, sent) = through(&world, Program::Ingress, UPLINK, &segment);
        let place = backend_of::<F>(&sent).expect("a backend");
        fill(&world, service, place);
        let onward = Segment { dst: Service::address(place), ..segment.clone() };
        let (reason, sent) = through(&world, Program::Egress, UPLINK, &onward);
        assert_eq!(reason, Reason::SnatExhausted);
        assert_eq!(through(&empty, Program::Ingress, UPLINK, &segment), (Reason::NoBackend, sent.clone()));
        let ends = [source::<F>(&sent), destination::<F>(&sent)].map(|end| end.map(|(address, _)| address));
        assert_eq!(ends, [Some(segment.dst.0), Some(CLIENT.0)]);
        // One whose port was another one on its way here has it again.
        let key = ConntrackKey::reverse(
            F::addr(CLIENT.0),
            Port::new(CLIENT.1),
            F::addr(onward.dst.0),
            Port::new(onward.dst.1),
            onward.proto,
        );
        let held = world.env.peek_conntrack(&key).expect("an entry");
        let moved = ConntrackKey { client_port: Port::new(50_000), ..key };
        world.env.conntrack_replace(&moved, &held).expect("room");
        let moved = Segment { src: (CLIENT.0, 50_000), ..onward.clone() };
        assert_eq!(through(&world, Program::Egress, UPLINK, &moved), (Reason::SnatExhausted, sent));
        // What gets no answer, and what is none of ours.
        let large = Segment { payload: vec![1; 40], ..onward.clone() };
        let part = large.carry::<F>(Some(Part { id: 7, eights: 0, more: true }), &large.upper::<F>()[..24]);
        let reset = Segment { flags: RST, ..onward.clone() };
        let is_tcp = onward.proto == Proto::TCP;
        for asked in [part].into_iter().chain(is_tcp.then(|| reset.build::<F>())) {
            let ended = frame(&world, Program::Egress, UPLINK, asked.clone());
            assert_eq!(ended, (Reason::SnatExhaustedDropped, asked));
        }
        let others = Segment { src: (CLIENT.0, 50_001), ..onward };
        let mut packet = FakePacket::new::<F>(&others, Offload::None);
        packet.ifindex = UPLINK;
        let reason = run_stage(&world.env, Stage::SnatRefuse, &mut packet);
        assert_eq!((reason, packet.sent()), (Reason::SnatExhaustedDropped, others.build::<F>()));
    }
}

fn a_port_is_given_on_when_its_connection_is_over_and_what_comes_late_does_not_leave_by_it<F: Wire>() {
    let world = world::<F>(1_000);
    let (place, seen) = send(&world, 0, CLIENT, SYN);
    let (to, to_port) = Service::address(place);
    let key = ConntrackKey::snat_reply(F::addr(NODE), Port::new(seen.1), F::addr(to), Port::new(to_port), Proto::TCP);
    // Another has the port, and is over.
    let other: End = ([192, 0, 2, 99], 41_000);
    let mut held: Conntrack<F> = world.env.peek_conntrack(&key).expect("an entry");
    (held.addr, held.port, held.client_port) = (F::addr(other.0), Port::new(other.1), Port::new(other.1));
    held.seen = affinity_common::abi::conntrack::RESET;
    world.env.conntrack_replace(&key, &held).expect("room");
    let back = |client: End| {
        ConntrackKey::reverse(F::addr(client.0), Port::new(client.1), F::addr(to), Port::new(to_port), Proto::TCP)
    };
    let others_way = world.env.peek_conntrack(&back(CLIENT)).expect("an entry");
    assert_eq!(others_way.snat_port, Port::new(seen.1));
    world.env.conntrack_replace(&back(other), &others_way).expect("room");
    assert_eq!(send(&world, 0, CLIENT, SYN), (place, seen));
    answer(&world, 0, CLIENT, place, seen, SYN | ACK);
    let late = Segment { src: other, dst: (to, to_port), ..world.services[0].segment(other, ACK) };
    let (reason, sent) = through(&world, Program::Egress, UPLINK, &late);
    let leaves_as = source::<F>(&sent).expect("a source");
    assert_eq!((reason, leaves_as.0), (Reason::Snat, NODE));
    assert_ne!(leaves_as.1, seen.1);
    answer(&world, 0, CLIENT, place, seen, ACK);
}

fn what_was_evicted_is_made_again_on_the_same_port<F: Wire>() {
    let world = world::<F>(1_000);
    for service in 0..2 {
        let (place, seen) = send(&world, service, CLIENT, SYN);
        answer(&world, service, CLIENT, place, seen, SYN | ACK);
        let ((to, to_port), proto) = (Service::address(place), world.services[service].proto);
        let (to, to_port) = (F::addr(to), Port::new(to_port));
        let back = ConntrackKey::reverse(F::addr(CLIENT.0), Port::new(CLIENT.1), to, to_port, proto);
        let reply = ConntrackKey::snat_reply(F::addr(NODE), Port::new(seen.1), to, to_port, proto);
        for evicted in [vec![back], vec![reply], vec![back, reply]] {
            for key in evicted {
                world.env.evict_conntrack(&key);
            }
            // The way back is looked after by the client's packets.
            world.env.sleep(Nanos(2 * SECOND));
            assert_eq!(send(&world, service, CLIENT, ACK), (place, seen));
            answer(&world, service, CLIENT, place, seen, ACK);
        }
    }
}

fn errors_about_such_packets_reach_who_has_sent_them<F: Wire>() {
    let world = world::<F>(1_000);
    for service in 0..2 {
        let (place, seen) = send(&world, service, CLIENT, SYN);
        answer(&world, service, CLIENT, place, seen, SYN | ACK);
        let router = [203, 0, 113, 1];
        let quote = |segment: &Segment| segment.build::<F>()[14..].to_vec();
        let (backend, frontend) = (Service::address(place), world.services[service].frontend);
        let asked = world.services[service].segment(CLIENT, ACK);
        // About what has left as the node's: the client sees what it has sent.
        let left = Segment { src: seen, dst: backend, ..asked.clone() };
        let error = |src, dst, of: &Segment| IcmpError { src, dst, trouble: Trouble::TooBig(1280), quote: quote(of) };
        let (reason, sent) = frame(&world, Program::Ingress, UPLINK, error(router, NODE, &left).build::<F>());
        assert_eq!(reason, Reason::IcmpError);
        assert_eq!(sent, error(router, CLIENT.0, &Segment { src: CLIENT, ..left.clone() }).build::<F>());
        let (reason, sent) = frame(&world, Program::Egress, UPLINK, sent);
        assert_eq!(reason, Reason::IcmpError);
        assert_eq!(
            sent,
            error(frontend.0, CLIENT.0, &asked).build::<F>(),
            "nobody on the way is told of its own address"
        );
        verify_error(&sent, quote(&asked).len());
        // About an answer: the backend sees what it has sent.
        let answer = world.services[service].answer(seen, place, ACK);
        let shown = Segment { src: frontend, dst: CLIENT, ..answer.clone() };
        let (reason, sent) = frame(&world, Program::Ingress, UPLINK, error(router, frontend.0, &shown).build::<F>());
        assert_eq!(reason, Reason::IcmpError);
        let (reason, sent) = frame(&world, Program::Egress, UPLINK, sent);
        assert_eq!(reason, Reason::IcmpError);
        assert_eq!(sent, error(NODE, backend.0, &answer).build::<F>());
        verify_error(&sent, quote(&answer).len());
    }
}

fn fragments_follow_the_first_of_them<F: Wire>() {
    for service in 0..2 {
        let world = world::<F>(1_000);
        let (place, seen) = send(&world, service, CLIENT, SYN);
        answer(&world, service, CLIENT, place, seen, SYN | ACK);
        let pieces = |segment: &Segment, id: u32| -> [Vec<u8>; 2] {
            let upper = segment.upper::<F>();
            [(0, 24), (24, upper.len())].map(|(from, to)| {
                let eights = u16::try_from(from / 8).expect("a short one");
                segment.carry::<F>(Some(Part { id, eights, more: to < upper.len() }), &upper[from..to])
            })
        };
        let asked = Segment { payload: vec![5; 40], ..world.services[service].segment(CLIENT, ACK) };
        let left = Segment { src: seen, dst: Service::address(place), ..asked.clone() };
        for (piece, expected) in pieces(&asked, 77).into_iter().zip(pieces(&left, 77)) {
            let (_, sent) = frame(&world, Program::Ingress, UPLINK, piece);
            let (reason, sent) = frame(&world, Program::Egress, UPLINK, sent);
            assert_eq!((reason, sent), (Reason::Snat, expected));
        }
        let answer = Segment { payload: vec![6; 40], ..world.services[service].answer(seen, place, ACK) };
        let heard = Segment { src: world.services[service].frontend, dst: CLIENT, ..answer.clone() };
        for (piece, expected) in pieces(&answer, 78).into_iter().zip(pieces(&heard, 78)) {
            let (_, sent) = frame(&world, Program::Ingress, UPLINK, piece);
            let (reason, sent) = frame(&world, Program::Egress, UPLINK, sent);
            assert_eq!((reason, sent), (Reason::Reply, expected));
        }
        // Where the first of them is too big, the client is told so of what it has sent.
        let (router, frontend) = ([203, 0, 113, 1], world.services[service].frontend);
        let quote = |segment: &Segment| pieces(segment, 79)[0][14..].to_vec();
        let error = |src, dst, quote| IcmpError { src, dst, trouble: Trouble::TooBig(1280), quote }.build::<F>();
        let (reason, sent) = frame(&world, Program::Ingress, UPLINK, error(router, NODE, quote(&left)));
        let onward = Segment { src: CLIENT, ..left.clone() };
        assert_eq!((reason, &sent), (Reason::IcmpError, &error(router, CLIENT.0, quote(&onward))));
        let (reason, sent) = frame(&world, Program::Egress, UPLINK, sent);
        assert_eq!((reason, sent), (Reason::IcmpError, error(frontend.0, CLIENT.0, quote(&asked))));
    }
}

fn errors_of_who_is_on_the_way_to_a_pod_of_the_node_are_its_services<F: Wire>() {
    let world = world::<F>(1_000);
    for service in &world.services[..2] {
        let asked = service.segment(CLIENT, SYN);
        let (_, sent) = through(&world, Program::Ingress, UPLINK, &asked);
        let place = backend_of::<F>(&sent).expect("a backend");
        let (router, backend) = ([203, 0, 113, 1], Service::address(place));
        let error = |src, dst, of: &Segment| {
            let quote = of.build::<F>()[14..].to_vec();
            IcmpError { src, dst, trouble: Trouble::TooBig(1280), quote }.build::<F>()
        };
        let onward = Segment { dst: backend, ..asked.clone() };
        let (reason, sent) = frame(&world, Program::Egress, UPLINK, error(NODE, CLIENT.0, &onward));
        assert_eq!((reason, sent), (Reason::IcmpError, error(service.frontend.0, CLIENT.0, &asked)));
        let answer = service.answer(CLIENT, place, ACK);
        let shown = Segment { src: service.frontend, ..answer.clone() };
        let (reason, sent) = frame(&world, Program::Ingress, UPLINK, error(router, service.frontend.0, &shown));
        assert_eq!((reason, sent), (Reason::IcmpError, error(router, backend.0, &answer)));
    }
}

/// Has a service keep outsiders to the backend of one place, which is on this node; `is_there`: whether it is.
fn keep_local<F: Wire>(world: &World<F>, is_there: bool) {
    let service = &world.services[0];
    let key = service.frontend_key::<F>();
    let value = world.env.frontend(&key).expect("a frontend");
    for place in 0..4 {
        let (addr, port) = Service::address(place);
        let flags = BY_SCOPE | ELIGIBLE | if is_there && place == 3 { ELIGIBLE_LOCAL } else { 0 };
        let backend = Backend { addr: F::addr(addr), port: Port::new(port), flags, zero: 0 };
        world.env.set_backend(service.backend_key(place), backend);
    }
    world.env.set_slots(5_000, &[service.backend_id(3)]);
    let outsiders = Frontend {
        first_slot: 5_000,
        slot_count: u32::from(is_there),
        scope: LOCAL,
        flags: if is_there { 0 } else { OTHERS },
        ..value
    };
    world.env.set_frontend(key.for_outsiders(), outsiders);
    world.env.set_frontend(key, Frontend { flags: value.flags | PARTS_OUTSIDERS, ..value });
}

fn outsiders_are_kept_to_the_node_and_pods_are_not<F: Wire>() {
    let world = world::<F>(1_000);
    keep_local(&world, true);
    let mut places = BTreeSet::new();
    for host in 0..30 {
        let segment = world.services[0].segment(([192, 0, 2, host], 40_000), SYN);
        let (reason, sent) = through(&world, Program::Ingress, UPLINK, &segment);
        assert_eq!((reason, backend_of::<F>(&sent)), (Reason::AffinityNew, Some(3)));
        // Its affinity is refreshed in its own scope.
        world.env.sleep(Nanos(2 * SECOND));
        let later = world.services[0].segment(([192, 0, 2, host], 40_000), ACK);
        assert_eq!(through(&world, Program::Ingress, UPLINK, &later).0, Reason::Established);
        let again = world.services[0].segment(([192, 0, 2, host], 40_001), SYN);
        assert_eq!(through(&world, Program::Ingress, UPLINK, &again).0, Reason::AffinityHit);
        let segment = world.services[0].segment(([10, 244, 0, host], 40_000), SYN);
        let (_, sent) = through(&world, Program::Ingress, POD, &segment);
        places.extend(backend_of::<F>(&sent));
    }
    assert_eq!(places.len(), 4);
    keep_local(&world, false);
    let segment = world.services[0].segment(([192, 0, 2, 1], 40_009), SYN);
    assert_eq!(through(&world, Program::Ingress, UPLINK, &segment).0, Reason::NoLocalBackend);
}

fn only_clients_of_the_ranges_are_let_in<F: Wire>() {
    let world = world::<F>(1_000);
    let service = &world.services[0];
    let key = service.frontend_key::<F>();
    let value = world.env.frontend(&key).expect("a frontend");
    let (open, _) = send(&world, 0, ([203, 0, 113, 9], 40_000), SYN);
    world.env.set_frontend(key, Frontend { flags: HAS_RANGES, ..value });
    let bits = RangeKey::<F>::address_bits();
    world.env.let_in(RangeKey::of_range(service.service_id(), F::addr([192, 0, 2, 0]), bits - 8));
    world.env.let_in(RangeKey::of_range(ServiceId { id: 99 }, F::addr([203, 0, 113, 0]), bits - 8));
    send(&world, 0, CLIENT, SYN);
    for (client, program_of) in [(([203, 0, 113, 7], 40_000), UPLINK), (POD_CLIENT, POD)] {
        let segment = service.segment(client, SYN);
        assert_eq!(through(&world, Program::Ingress, program_of, &segment).0, Reason::NotAllowed);
    }
    // Who was let in before stays.
    let (then, _) = send(&world, 0, ([203, 0, 113, 9], 40_000), ACK);
    assert_eq!(then, open);
}

/// It does not come straight back: nobody would answer the node's own.
fn a_pod_elsewhere_reaches_itself_as_anybody<F: Wire>() {
    let world = world::<F>(1_000);
    let (own, _) = Service::address(0);
    let mut places = BTreeSet::<usize>::new();
    for port in 40_000..40_032 {
        let client = (own, port);
        let (place, seen) = send(&world, 2, client, SYN);
        answer(&world, 2, client, place, seen, SYN | ACK);
        assert_eq!(send(&world, 2, client, ACK), (place, seen));
        places.insert(place);
    }
    assert!(places.contains(&0) && places.len() > 1, "{places:?}");
}

fn a_connection_that_is_over_leaves_its_entries_to_the_collector<F: Wire>() {
    let world = world::<F>(1_000);
    let (place, seen) = send(&world, 0, CLIENT, SYN);
    answer(&world, 0, CLIENT, place, seen, SYN | ACK);
    send(&world, 0, CLIENT, ACK | FIN);
    answer(&world, 0, CLIENT, place, seen, ACK | FIN);
    send(&world, 0, CLIENT, ACK);
    let (to, to_port) = Service::address(place);
    let (to, to_port) = (F::addr(to), Port::new(to_port));
    let back = ConntrackKey::reverse(F::addr(CLIENT.0), Port::new(CLIENT.1), to, to_port, Proto::TCP);
    let reply = ConntrackKey::snat_reply(F::addr(NODE), Port::new(seen.1), to, to_port, Proto::TCP);
    for key in [back, reply] {
        assert!(world.env.peek_conntrack(&key).expect("an entry").is_over(), "{key:?}");
    }
}

/// Its port is not given on, whatever the connection before it on the same ports has come to.
fn a_connection_on_the_ports_of_one_that_is_over_starts_anew<F: Wire>() {
    for is_evicted in [false, true] {
        let world = world::<F>(1_000);
        let (place, seen) = send(&world, 0, CLIENT, SYN);
        answer(&world, 0, CLIENT, place, seen, SYN | ACK);
        send(&world, 0, CLIENT, ACK | FIN);
        answer(&world, 0, CLIENT, place, seen, ACK | FIN);
        let (to, to_port) = Service::address(place);
        let (to, to_port) = (F::addr(to), Port::new(to_port));
        let back = ConntrackKey::reverse(F::addr(CLIENT.0), Port::new(CLIENT.1), to, to_port, Proto::TCP);
        let reply = ConntrackKey::snat_reply(F::addr(NODE), Port::new(seen.1), to, to_port, Proto::TCP);
        if is_evicted {
            world.env.evict_conntrack(&back);
        }
        for (flags, back) in [(SYN, SYN | ACK), (ACK, ACK)] {
            assert_eq!(send(&world, 0, CLIENT, flags), (place, seen));
            answer(&world, 0, CLIENT, place, seen, back);
        }
        for key in [back, reply] {
            assert!(!world.env.peek_conntrack(&key).expect("an entry").is_over(), "{key:?}");
        }
    }
}

in_both_families!(
    events_say_who_comes_from_outside_and_by_what,
    who_comes_from_outside_leaves_as_the_node_and_is_answered_as_itself,
    who_goes_to_a_pod_of_the_node_keeps_its_address,
    pods_and_what_is_masqueraded_already_leave_as_they_are,
    clients_are_kept_by_their_own_address_and_told_apart,
    nearly_all_ports_are_used_before_one_is_refused_and_no_flow_is_wrong,
    who_there_is_no_port_for_is_told_so_by_the_address_that_was_asked,
    a_port_is_given_on_when_its_connection_is_over_and_what_comes_late_does_not_leave_by_it,
    what_was_evicted_is_made_again_on_the_same_port,
    errors_about_such_packets_reach_who_has_sent_them,
    fragments_follow_the_first_of_them,
    errors_of_who_is_on_the_way_to_a_pod_of_the_node_are_its_services,
    outsiders_are_kept_to_the_node_and_pods_are_not,
    only_clients_of_the_ranges_are_let_in,
    a_pod_elsewhere_reaches_itself_as_anybody,
    a_connection_that_is_over_leaves_its_entries_to_the_collector,
    a_connection_on_the_ports_of_one_that_is_over_starts_anew,
);

/// Has the node answer for an address on its uplink, for ten seconds.
fn announce<F: Wire>(world: &World<F>, address: [u8; 4]) {
    let until = Nanos(world.env.clock().0 + 10 * SECOND).ticks();
    world.env.announce(AnnouncedKey { addr: F::addr(address), ifindex: UPLINK }, Announced { until });
}

/// A question of ARP, by RFC 826's own words: who has `wanted`, tell `asker`.
fn arp(asker: [u8; 4], wanted: [u8; 4]) -> Vec<u8> {
    let from = [2, 0, 0, 0, 0, 1];
    [&[0xff; 6][..], &from, &[0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1], &from, &asker, &[0; 6], &wanted].concat()
}

#[test]
fn a_question_of_arp_is_answered_where_the_address_is_announced() {
    let world = world::<V4>(100);
    let (address, asker) = ([203, 0, 113, 80], [203, 0, 113, 1]);
    announce(&world, address);
    let ask = |frame: Vec<u8>, ifindex| {
        let mut packet = FakePacket::raw(frame);
        packet.ifindex = ifindex;
        (neighbour::arp(&world.env, &mut packet), packet.bytes)
    };
    let expected = [
        &[2, 0, 0, 0, 0, 1][..],
        &MAC,
        &[0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 2],
        &MAC,
        &address,
        &[2, 0, 0, 0, 0, 1],
        &asker,
    ]
    .concat();
    assert_eq!(ask(arp(asker, address), UPLINK), (Reason::Announced, expected.clone()));
    // What is none of ours, on another interface, an answer, somebody's own announcement, and what is cut off.
    for (frame, ifindex) in [
        (arp(asker, [203, 0, 113, 81]), UPLINK),
        (arp(asker, address), POD),
        (expected, UPLINK),
        (arp(address, address), UPLINK),
    ] {
        assert_eq!(ask(frame.clone(), ifindex), (Reason::NotIp, frame));
    }
    // Its time is over: another node may answer by now.
    world.env.sleep(Nanos(10 * SECOND));
    assert_eq!(ask(arp(asker, address), UPLINK).0, Reason::NotIp);
    for len in 0..41 {
        let cut = arp(asker, address)[..len].to_vec();
        assert_eq!(ask(cut.clone(), UPLINK), (Reason::Malformed, cut));
    }
}

/// A neighbour solicitation (RFC 4861, section 4.3), with the option of the asker's own link-layer address.
fn solicitation(asker: [u8; 4], wanted: [u8; 4], hops: u8) -> Vec<u8> {
    message(asker, wanted, hops, &[135, 0, 0, 0, 0, 0, 0, 0], V6::addr(wanted), &[1, 1, 2, 0, 0, 0, 0, 1])
}

fn message(src: [u8; 4], dst: [u8; 4], hops: u8, head: &[u8], target: [u8; 16], option: &[u8]) -> Vec<u8> {
    let error = IcmpError {
        src,
        dst,
        trouble: Trouble::PortUnreachable,
        quote: [&head[4..], &target[..], option].concat()[4..].to_vec(),
    };
    let mut frame = error.build::<V6>();
    // The type, and the checksum that it changes.
    let old = u32::from(u16::from_be_bytes([frame[54], frame[55]]));
    frame[54..56].copy_from_slice(&head[..2]);
    frame[58..62].copy_from_slice(&head[4..8]);
    let new = [0usize, 4].map(|at| u32::from(u16::from_be_bytes([frame[54 + at], frame[55 + at]])));
    let sum = u32::from(!u16::from_be_bytes([frame[56], frame[57]]));
    let mut sum = sum + (0xffff - old) + new[0] + new[1];
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    let [high, low] = (!u16::try_from(sum).expect("folded")).to_be_bytes();
    (frame[56], frame[57], frame[21]) = (high, low, hops);
    verify(&frame);
    frame
}

#[test]
fn a_solicitation_is_answered_where_the_address_is_announced() {
    let world = world::<V6>(100);
    let (address, asker) = ([203, 0, 113, 80], [203, 0, 113, 1]);
    announce(&world, address);
    let ask = |frame_in: Vec<u8>, ifindex| frame(&world, Program::Ingress, ifindex, frame_in);
    let (reason, sent) = ask(solicitation(asker, address, 255), UPLINK);
    assert_eq!(reason, Reason::Announced);
    let option = [&[2, 1][..], &MAC].concat();
    let mut expected = message(address, asker, 255, &[136, 0, 0, 0, 0x60, 0, 0, 0], V6::addr(address), &option);
    expected[..12].copy_from_slice(&[&[2, 0, 0, 0, 0, 1][..], &MAC].concat());
    assert_eq!(sent, expected);
    verify(&sent);
    for (frame_in, ifindex) in [
        (solicitation(asker, [203, 0, 113, 81], 255), UPLINK),
        (solicitation(asker, address, 255), POD),
        // It has come over a router: forged.
        (solicitation(asker, address, 254), UPLINK),
    ] {
        assert_eq!(ask(frame_in.clone(), ifindex), (Reason::OtherProtocol, frame_in));
    }
}

/// A program that another one hands over to does no harm to a packet that is not for it.
#[test]
fn an_answer_to_nobody_goes_the_way_of_any_packet() {
    let world = world::<V4>(100);
    let segment = Segment::tcp(([10, 244, 0, 101], 8080), (NODE, 2_000), ACK);
    let mut packet = FakePacket::new::<V4>(&segment, Offload::None);
    let reason = run_stage(&world.env, Stage::SnatReply, &mut packet);
    assert_eq!((reason, packet.sent()), (Reason::NotService, segment.build::<V4>()));
    assert_eq!(V4::NAME, "v4");
}
