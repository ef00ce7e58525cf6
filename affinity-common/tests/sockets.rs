//! The rules of services at the socket, by a clock that is set.

mod world;

use affinity_common::abi::affinity::refresh_after;
use affinity_common::abi::frontends::Frontend;
use affinity_common::abi::netns::{NODE, NetnsClient, NetnsKey, TC_ONLY};
use affinity_common::abi::sockets::{Socket, SocketKey};
use affinity_common::dp::{Env as _, parse::SYN, sock};
use affinity_common::reason::{Reason, Verdict};
use affinity_common::testing::{FakeSocket, Faults, Wire};
use affinity_common::types::{BackendId, Nanos, Port, Proto, ServiceId, TICK_SHIFT};
use proptest::prelude::*;
use world::{End, Service, State, World};

const CLIENT: End = ([10, 244, 0, 11], 40_000);
const OTHER: [u8; 4] = [10, 244, 0, 12];
const SECOND: u64 = 1_000_000_000;
const NETNS: NetnsKey = NetnsKey { cookie: 4026 };

/// A sticky and a spreading service of TCP, and the same of UDP, for a client that is known.
fn world<F: Wire>() -> World<F> {
    let services = vec![
        Service::new(1, Proto::TCP, 10),
        Service::new(2, Proto::TCP, 0),
        Service::new(3, Proto::UDP, 10),
        Service::new(4, Proto::UDP, 0),
    ];
    let world = World::new(1_000, services);
    know(&world, CLIENT.0, 0);
    world
}

fn know<F: Wire>(world: &World<F>, client: [u8; 4], flags: u32) {
    world.env.set_netns(NETNS, NetnsClient { addr: F::addr(client), flags });
}

/// A socket that names a service.
fn to<F: Wire>(service: &Service, cookie: u64) -> FakeSocket<F> {
    FakeSocket::to(cookie, NETNS, service.proto, service.frontend)
}

/// The place of the backend that a socket names.
fn place_of<F: Wire>(socket: &FakeSocket<F>) -> Option<usize> {
    (0..4).find(|&place| socket.names() == Service::address(place))
}

/// Connects a socket; returns why it ended so, and the socket.
fn connect<F: Wire>(world: &World<F>, service: usize, cookie: u64) -> (Reason, FakeSocket<F>) {
    let mut socket = to(&world.services[service], cookie);
    (sock::connect(&world.env, &mut socket), socket)
}

/// A socket that is connected as it says connects to a service again.
fn reconnect<F: Wire>(world: &World<F>, service: usize, connected: &FakeSocket<F>) -> (Reason, FakeSocket<F>) {
    // Routing has given it its address when it was connected.
    let (source, peer) = (F::addr(CLIENT.0), (connected.addr, connected.port));
    let mut socket = FakeSocket { source, peer, ..to(&world.services[service], connected.cookie) };
    (sock::connect(&world.env, &mut socket), socket)
}

fn a_client_is_the_same_by_socket_and_by_packet<F: Wire>() {
    let world = world::<F>();
    let (reason, socket) = connect(&world, 0, 1);
    assert_eq!(reason, Reason::AffinityNew);
    let place = place_of(&socket).expect("a backend");
    assert_eq!(world.send(0, CLIENT, SYN), (Reason::AffinityHit, place));
    let (reason, socket) = connect(&world, 0, 2);
    assert_eq!((reason, place_of(&socket)), (Reason::AffinityHit, Some(place)));
    assert_eq!(world.env.affinity_entries().len(), 1);
    assert_eq!(world.env.connections(&world.services[0].backend_key(place)), 3);
}

fn a_socket_is_shown_the_service_and_no_other_one_is<F: Wire>() {
    let world = world::<F>();
    let (_, mut socket) = connect(&world, 2, 1);
    let mut stranger = FakeSocket { cookie: 2, ..socket };
    assert_eq!(sock::getpeername(&world.env, &mut stranger), Reason::NotService);
    assert_eq!(sock::recvmsg(&world.env, &mut stranger), Reason::NotReply);
    assert!(place_of(&stranger).is_some());
    let mut heard = socket;
    assert_eq!(sock::recvmsg(&world.env, &mut heard), Reason::Reply);
    assert_eq!(heard.names(), world.services[2].frontend);
    assert_eq!(sock::getpeername(&world.env, &mut socket), Reason::Reply);
    assert_eq!(socket.names(), world.services[2].frontend);
}

fn what_is_no_services_is_left_alone<F: Wire>() {
    let world = world::<F>();
    let service = &world.services[0];
    let elsewhere = FakeSocket::<F> { addr: F::addr([192, 0, 2, 1]), ..to(service, 1) };
    let ping = FakeSocket::<F> { proto: Proto { number: 1 }, ..to(service, 1) };
    let asks_for_its_source = FakeSocket::<F> { proto: Proto::UDP, ..to(service, 1) };
    let no_port = FakeSocket::<F> { port: Port::default(), ..to(service, 1) };
    for asked in [elsewhere, ping, asks_for_its_source, no_port] {
        let mut socket = asked;
        assert_eq!(sock::connect(&world.env, &mut socket), Reason::NotService, "{asked:?}");
        assert_eq!((socket.addr, socket.port), (asked.addr, asked.port));
    }
    assert_eq!(world.env.writes(), 0);
}

fn another_port_of_a_service_is_refused<F: Wire>() {
    let world = world::<F>();
    let mut tcp = FakeSocket::<F> { port: Port::new(81), ..to(&world.services[0], 1) };
    assert_eq!(sock::connect(&world.env, &mut tcp), Reason::NoSuchPort);
    let mut udp = FakeSocket::<F> { port: Port::new(81), ..to(&world.services[2], 1) };
    assert_eq!(sock::sendmsg(&world.env, &mut udp), Reason::NoSuchPort);
    assert_ne!(Reason::NoSuchPort.verdict(), Verdict::Pass);
}

/// Its packets are not seen by TC, so that nobody else would refuse them.
fn in_the_nodes_own_namespace_a_connected_socket_is_refused_too_unless_it_only_asks_for_its_source<F: Wire>() {
    for (flags, refused) in [(0, Reason::NotService), (TC_ONLY, Reason::NotService), (NODE, Reason::NoSuchPort)] {
        let world = world::<F>();
        know(&world, CLIENT.0, flags);
        for (port, reason) in
            [(81, refused), (0, Reason::NotService), (9, Reason::NotService), (65_535, Reason::NotService)]
        {
            let mut udp = FakeSocket::<F> { port: Port::new(port), ..to(&world.services[2], 1) };
            assert_eq!(sock::connect(&world.env, &mut udp), reason, "{port} {flags}");
        }
        let mut other =
            FakeSocket::<F> { proto: Proto { number: 1 }, port: Port::new(81), ..to(&world.services[2], 1) };
        assert_eq!(sock::connect(&world.env, &mut other), Reason::NotService);
        let mut elsewhere =
            FakeSocket::<F> { addr: F::addr([192, 0, 2, 1]), port: Port::new(81), ..to(&world.services[2], 1) };
        assert_eq!(sock::connect(&world.env, &mut elsewhere), Reason::NotService);
    }
}

fn user_space_is_told_of_an_unknown_namespace_and_of_no_other<F: Wire>() {
    let world = world::<F>();
    let service = &world.services[0];
    let connect = |netns, service| {
        let mut socket = FakeSocket::<F> { netns, ..to(service, 1) };
        sock::connect(&world.env, &mut socket)
    };
    connect(NETNS, service);
    assert_eq!(world.env.take_unknown(), None);
    let stranger = NetnsKey { cookie: 1 };
    assert_eq!(connect(stranger, service), Reason::UnknownClient);
    assert_eq!(connect(NetnsKey { cookie: 2 }, service), Reason::UnknownClient);
    assert_eq!(world.env.take_unknown(), Some(stranger), "one at a time");
    // Of no interest.
    let nowhere = Service { frontend: ([192, 0, 2, 1], 80), ..service.clone() };
    assert_eq!(connect(stranger, &nowhere), Reason::NotService);
    know(&world, CLIENT.0, TC_ONLY);
    assert_eq!(connect(NETNS, service), Reason::LeftToTc);
    assert_eq!(world.env.take_unknown(), None);
}

fn a_namespace_that_is_not_known_or_left_to_tc_is_left_alone<F: Wire>() {
    let world = world::<F>();
    for bound in [F::Addr::default(), F::addr(CLIENT.0)] {
        let service = &world.services[0];
        let mut socket = FakeSocket::<F> { netns: NetnsKey { cookie: 1 }, source: bound, ..to(service, 1) };
        assert_eq!(sock::connect(&world.env, &mut socket), Reason::UnknownClient);
        know(&world, CLIENT.0, TC_ONLY);
        let mut left = FakeSocket::<F> { source: bound, ..to(service, 1) };
        assert_eq!(sock::connect(&world.env, &mut left), Reason::LeftToTc);
        assert_eq!([socket.names(), left.names()], [service.frontend; 2]);
    }
    assert_eq!(world.env.writes(), 0);
}

fn a_bound_source_is_who_the_socket_is_unless_it_is_of_an_earlier_connection<F: Wire>() {
    let world = world::<F>();
    let mut bound = FakeSocket::<F> { source: F::addr(OTHER), ..to(&world.services[0], 1) };
    assert_eq!(sock::connect(&world.env, &mut bound), Reason::AffinityNew);
    let entries = world.env.affinity_entries();
    assert!(entries.len() == 1 && entries[0].0.client == F::addr(OTHER));
    // Routing has given this one its address when it was connected.
    let (_, first) = connect(&world, 2, 2);
    let peer = (first.addr, first.port);
    let mut again = FakeSocket::<F> { source: F::addr(OTHER), peer, ..to(&world.services[2], 2) };
    assert_eq!(sock::connect(&world.env, &mut again), Reason::Established);
    assert_eq!((again.addr, again.port), peer);
    assert_eq!(world.env.affinity_entries().len(), 2);
}

fn a_datagram_of_a_known_socket_writes_no_map_and_is_no_connection<F: Wire>() {
    for (service, first) in [(2, Reason::AffinityNew), (3, Reason::Hashed)] {
        let world = world::<F>();
        let send = || {
            let mut socket = to::<F>(&world.services[service], 7);
            (sock::sendmsg(&world.env, &mut socket), place_of(&socket).expect("a backend"))
        };
        let (reason, place) = send();
        assert_eq!(reason, first);
        let writes = world.env.writes();
        for _ in 0..60 {
            world.env.sleep(Nanos(SECOND));
            // Without a refresh the affinity would end after 10 s.
            assert_eq!(send(), (Reason::Established, place));
        }
        assert_eq!(world.env.writes(), writes);
        assert_eq!(world.env.connections(&world.services[service].backend_key(place)), 1);
    }
}

/// What its namespace is now is asked only where the choice does not stand.
fn a_connected_socket_that_asks_again_keeps_its_backend_without_a_further_look<F: Wire>() {
    for service in [2, 3] {
        let world = world::<F>();
        let (_, socket) = connect(&world, service, 7);
        let (writes, place) = (world.env.writes(), place_of(&socket).expect("a backend"));
        know(&world, CLIENT.0, TC_ONLY);
        for _ in 0..4 {
            world.env.sleep(Nanos(SECOND / 10));
            let (reason, again) = reconnect(&world, service, &socket);
            assert_eq!((reason, place_of(&again)), (Reason::Established, Some(place)));
            let mut sends = FakeSocket { peer: (socket.addr, socket.port), ..to(&world.services[service], 7) };
            assert_eq!(sock::sendmsg(&world.env, &mut sends), Reason::Established);
            assert_eq!(place_of(&sends), Some(place));
        }
        assert_eq!(world.env.writes(), writes);
        assert_eq!(world.env.connections(&world.services[service].backend_key(place)), 1);
        world.env.sleep(Nanos(SECOND / 10));
        assert_eq!(reconnect(&world, service, &socket).0, Reason::LeftToTc, "half a second is over");
    }
}

fn a_choice_stands_only_while_nothing_of_it_has_changed<F: Wire>() {
    type Change<F> = fn(&mut World<F>, &mut FakeSocket<F>);
    fn change_frontend<F: Wire>(world: &World<F>, change: fn(&mut Frontend)) {
        let key = world.services[2].frontend_key();
        let mut frontend = world.env.frontend(&key).expect("a frontend");
        change(&mut frontend);
        world.env.set_frontend(key, frontend);
    }
    let changes: [(&str, Change<F>, Reason); 9] = [
        ("nothing", |_, _| {}, Reason::Established),
        ("its slots", |world, _| world.program(2), Reason::LeftToTc),
        ("its slots are none", |world, _| change_frontend(world, |it| it.slot_count = 0), Reason::LeftToTc),
        ("its service", |world, _| change_frontend(world, |it| it.service = ServiceId { id: 9 }), Reason::LeftToTc),
        ("its entry", |world, _| world.env.evict_sockets(), Reason::LeftToTc),
        ("its connection", |_, socket| socket.port = Port::default(), Reason::LeftToTc),
        ("its peer", |_, socket| socket.port = Port::new(1), Reason::LeftToTc),
        ("the socket", |_, socket| socket.cookie += 1, Reason::LeftToTc),
        (
            "the frontend is gone",
            |world, _| world.env.remove_frontend(&world.services[2].frontend_key()),
            Reason::NotService,
        ),
    ];
    for (what, change, reason) in changes {
        let mut world = world::<F>();
        let (_, mut socket) = connect(&world, 2, 7);
        know(&world, CLIENT.0, TC_ONLY);
        change(&mut world, &mut socket);
        assert_eq!(reconnect(&world, 2, &socket).0, reason, "{what}");
    }
    // Another service is asked for, with the same pods.
    let world = world::<F>();
    let (_, socket) = connect(&world, 2, 7);
    assert_eq!(reconnect(&world, 3, &socket).0, Reason::Hashed);
}

fn a_connected_socket_moves_as_soon_as_its_backend_is_no_longer_eligible<F: Wire>() {
    for service in [2, 3] {
        for state in [State::Draining, State::Gone] {
            let mut world = world::<F>();
            let (_, socket) = connect(&world, service, 7);
            let place = place_of(&socket).expect("a backend");
            world.services[service].backends[place] = state;
            world.program(service);
            let (reason, moved) = reconnect(&world, service, &socket);
            assert!(reason.is_selection() && place_of(&moved).is_some_and(|other| other != place), "{reason:?}");
            // One more change, which does not touch it: the choice stands, by the new slots.
            world.program(service);
            assert_eq!(reconnect(&world, service, &moved).0, Reason::Established);
            let writes = world.env.writes();
            assert_eq!(place_of(&reconnect(&world, service, &moved).1), place_of(&moved));
            assert_eq!(world.env.writes(), writes);
            world.services[service].backends.fill(state);
            world.program(service);
            assert_eq!(reconnect(&world, service, &moved).0, Reason::NoBackend);
        }
    }
}

/// However often it asks: a use is recorded when the last one is as old as it may be, and not later.
fn a_socket_that_asks_again_and_again_refreshes_its_clients_affinity_in_time<F: Wire>(timeout: u32, waits: &[u64]) {
    let mut world = world::<F>();
    world.services[2].timeout = timeout;
    world.program(2);
    let (_, mut socket) = connect(&world, 2, 7);
    let frontend = world.env.frontend(&world.services[2].frontend_key()).expect("a frontend");
    let late = refresh_after(frontend.timeout).0 + (1 << TICK_SHIFT);
    for wait in waits {
        world.env.sleep(Nanos(wait * 1_000_000));
        let (reason, again) = reconnect(&world, 2, &socket);
        let used = world.env.affinity_entries()[0].1.last_used.age(world.env.clock());
        assert!(used.0 <= late, "{reason:?}: recorded {} ns ago", used.0);
        if *wait < u64::from(timeout) * 900 {
            assert_eq!((reason, place_of(&again)), (Reason::Established, place_of(&socket)));
        }
        socket = again;
    }
    assert_ne!(world.env.affinity_entries()[0].1.backend, BackendId::default());
}

proptest! {
    #[test]
    fn affinity_is_refreshed_in_time_by_reconnecting_sockets(
        timeout in 1_u32..40,
        waits in prop::collection::vec(prop_oneof![0_u64..40, 0_u64..700, 0_u64..4_000], 1..60),
    ) {
        use affinity_common::family::{V4, V6};
        a_socket_that_asks_again_and_again_refreshes_its_clients_affinity_in_time::<V4>(timeout, &waits);
        a_socket_that_asks_again_and_again_refreshes_its_clients_affinity_in_time::<V6>(timeout, &waits);
    }
}

fn a_socket_that_closes_was_in_use_until_then<F: Wire>() {
    let world = world::<F>();
    let (_, socket) = connect(&world, 0, 1);
    world.env.sleep(Nanos(9 * SECOND));
    assert_eq!(sock::release(&world.env, &socket), Reason::Closed);
    assert!(world.env.socket_entries().is_empty());
    world.env.sleep(Nanos(9 * SECOND));
    assert_eq!(connect(&world, 0, 2).0, Reason::AffinityHit);
    assert_eq!(sock::release(&world.env, &socket), Reason::NotService);
}

fn a_touch_refreshes_the_sockets_own_backends_entry_and_no_other<F: Wire>() {
    let mut world = world::<F>();
    let (_, socket) = connect(&world, 0, 1);
    let place = place_of(&socket).expect("a backend");
    let (key, known): (SocketKey<F>, Socket<F>) = world.env.socket_entries()[0];
    let used = |world: &World<F>| world.env.affinity_entries()[0].1.last_used;
    world.env.sleep(Nanos(5 * SECOND));
    let before = used(&world);
    let other = Socket { backend: world.services[0].backend_id((place + 1) % 4), ..known };
    assert!(sock::touch(&world.env, key.proto, &other));
    assert_eq!(used(&world), before);
    assert!(sock::touch(&world.env, key.proto, &known));
    assert_ne!(used(&world), before);
    // The frontend is another service's now, or keeps nobody.
    let stranger = Socket { service: world.services[1].service_id(), ..known };
    assert!(!sock::touch(&world.env, key.proto, &stranger));
    world.services[0].timeout = 0;
    world.program(0);
    assert!(!sock::touch(&world.env, key.proto, &known));
}

fn without_a_backend_a_socket_is_refused_and_leaves_no_trace<F: Wire>() {
    let mut world = world::<F>();
    for service in 0..4 {
        world.services[service].backends.fill(State::Gone);
        world.program(service);
        let mut socket = to::<F>(&world.services[service], 1);
        assert_eq!(sock::connect(&world.env, &mut socket), Reason::NoBackend);
        assert_eq!(sock::sendmsg(&world.env, &mut socket), Reason::NoBackend);
    }
    assert_eq!(world.env.writes(), 0);
    assert_ne!(Reason::NoBackend.verdict(), Verdict::Pass);
}

fn where_the_map_of_sockets_refuses_the_packets_are_translated<F: Wire>() {
    let world = world::<F>();
    world.env.set_faults(Faults { sockets_full: true, ..Faults::default() });
    let (reason, socket) = connect(&world, 0, 1);
    assert_eq!(reason, Reason::SocketRefused);
    assert_eq!((socket.names(), reason.verdict()), (world.services[0].frontend, Verdict::Pass));
    assert_eq!(world.send(0, CLIENT, SYN).0, Reason::AffinityHit);
}

fn a_choice_makes_an_event_while_a_reader_asks<F: Wire>() {
    let world = world::<F>();
    connect(&world, 0, 1);
    assert!(world.env.take_events().is_empty());
    world.env.want_events(true);
    connect(&world, 0, 2);
    let events = world.env.take_events();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].reason, Reason::AffinityHit as u8);
    assert_eq!(events[0].client, F::octets16(&F::addr(CLIENT.0)));
}

in_both_families! {
    a_client_is_the_same_by_socket_and_by_packet,
    a_socket_is_shown_the_service_and_no_other_one_is,
    what_is_no_services_is_left_alone,
    another_port_of_a_service_is_refused,
    in_the_nodes_own_namespace_a_connected_socket_is_refused_too_unless_it_only_asks_for_its_source,
    user_space_is_told_of_an_unknown_namespace_and_of_no_other,
    a_namespace_that_is_not_known_or_left_to_tc_is_left_alone,
    a_bound_source_is_who_the_socket_is_unless_it_is_of_an_earlier_connection,
    a_datagram_of_a_known_socket_writes_no_map_and_is_no_connection,
    a_connected_socket_that_asks_again_keeps_its_backend_without_a_further_look,
    a_choice_stands_only_while_nothing_of_it_has_changed,
    a_connected_socket_moves_as_soon_as_its_backend_is_no_longer_eligible,
    a_socket_that_closes_was_in_use_until_then,
    a_touch_refreshes_the_sockets_own_backends_entry_and_no_other,
    without_a_backend_a_socket_is_refused_and_leaves_no_trace,
    where_the_map_of_sockets_refuses_the_packets_are_translated,
    a_choice_makes_an_event_while_a_reader_asks,
}
