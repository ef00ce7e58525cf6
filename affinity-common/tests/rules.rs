//! Each rule of the datapath at its bounds, by a clock that is set.

mod world;

use affinity_common::abi::affinity::Affinity;
use affinity_common::abi::conntrack::Conntrack;
use affinity_common::abi::frontends::{Frontend, LOCAL, OTHERS};
use affinity_common::dp::{Env as _, parse};
use affinity_common::reason::{Program, Reason, Verdict};
use affinity_common::testing::{FakePacket, Faults, Offload, Segment, Wire, destination, run, source};
use affinity_common::types::{BackendId, Nanos, Port, Proto, TICK_SHIFT, Ticks};
use world::{End, Service, State, World, backend_of};

const SYN: u8 = parse::SYN;
const ACK: u8 = parse::ACK;
const CLIENT: End = ([10, 244, 0, 11], 40_000);
const MS: u64 = 1_000_000;
const SECOND: u64 = 1_000 * MS;
const TICK: u64 = 1 << TICK_SHIFT;

/// A sticky and a spreading service of TCP, and a sticky one of UDP.
fn world<F: Wire>() -> World<F> {
    World::new(
        1_000,
        vec![Service::new(1, Proto::TCP, 10), Service::new(2, Proto::TCP, 0), Service::new(3, Proto::UDP, 10)],
    )
}

fn port(number: u16) -> End {
    (CLIENT.0, number)
}

fn entry<F: Wire>(world: &World<F>) -> Affinity {
    world.env.peek_affinity(&world.services[0].affinity_key(CLIENT.0)).expect("an entry")
}

/// When the recorded use lies exactly `age` back.
fn age_to<F: Wire>(world: &World<F>, age: u64) {
    let used = entry(world).last_used;
    world.env.set_now(Nanos((u64::from(used.at) << TICK_SHIFT) + age));
}

fn affinity_holds_up_to_its_bound_and_not_at_it<F: Wire>() {
    for (age, reason) in [
        (0, Reason::AffinityHit),
        (10 * SECOND - 1, Reason::AffinityHit),
        (10 * SECOND, Reason::AffinityExpired),
        (10 * SECOND + 1, Reason::AffinityExpired),
        (86_400 * SECOND, Reason::AffinityExpired),
    ] {
        let world = world::<F>();
        let (first, place) = world.send(0, CLIENT, SYN);
        assert_eq!(first, Reason::AffinityNew);
        age_to(&world, age);
        let (found, then) = world.send(0, port(40_001), SYN);
        assert_eq!(found, reason, "{age} ns");
        assert!(reason == Reason::AffinityExpired || then == place);
    }
}

fn a_use_is_recorded_anew_only_when_the_record_is_older_than_its_bound<F: Wire>() {
    // min(1 s, 10 s / 16)
    for (age, refreshed) in [(625 * MS, false), (625 * MS + 1, true)] {
        let world = world::<F>();
        world.send(0, CLIENT, SYN);
        let before = entry(&world);
        age_to(&world, age);
        let writes = world.env.writes();
        assert_eq!(world.send(0, CLIENT, SYN).0, Reason::AffinityHit);
        assert_eq!(world.env.writes(), writes, "a hit writes no map entry");
        assert_eq!(entry(&world).last_used != before.last_used, refreshed, "{age} ns");
        assert_eq!(entry(&world).since, before.since);
    }
}

fn every_packet_of_a_flow_keeps_its_client<F: Wire>() {
    let world = world::<F>();
    let (_, place) = world.send(0, CLIENT, SYN);
    world.reply(0, CLIENT, place, SYN | ACK);
    let writes = world.env.writes();
    for packet in 0..60 {
        world.env.sleep(Nanos(SECOND));
        match packet % 2 {
            0 => assert_eq!(world.send(0, CLIENT, ACK), (Reason::Established, place)),
            _ => world.reply(0, CLIENT, place, ACK),
        }
        assert!(entry(&world).last_used.age(world.env.clock()).0 < TICK, "packet {packet}");
    }
    assert_eq!(world.env.writes(), writes, "an established flow writes no map entry");
    assert_eq!(world.send(0, port(40_001), SYN), (Reason::AffinityHit, place));
}

fn a_flow_refreshes_its_own_eligible_backends_entry_and_no_other<F: Wire>() {
    let mut world = world::<F>();
    let (_, place) = world.send(0, CLIENT, SYN);
    let key = world.services[0].affinity_key(CLIENT.0);
    let other = Affinity { backend: world.services[0].backend_id((place + 1) % 4), ..entry(&world) };
    world.env.set_affinity(&key, other);
    world.env.sleep(Nanos(5 * SECOND));
    world.send(0, CLIENT, ACK);
    assert_eq!(entry(&world), other);
    let own = Affinity { backend: world.services[0].backend_id(place), ..other };
    world.env.set_affinity(&key, own);
    world.services[0].backends[place] = State::Draining;
    world.program(0);
    world.env.sleep(Nanos(2 * SECOND));
    assert_eq!(world.send(0, CLIENT, ACK), (Reason::Established, place));
    assert_eq!(entry(&world), own);
    // An entry that is gone is not made by an established flow.
    world.env.evict_affinity(&key);
    world.env.sleep(Nanos(2 * SECOND));
    world.send(0, CLIENT, ACK);
    assert_eq!(world.env.peek_affinity(&key), None);
}

fn a_client_moves_when_its_backend_is_no_longer_eligible_and_stays_moved<F: Wire>() {
    for state in [State::Draining, State::Gone] {
        let mut world = world::<F>();
        let (_, place) = world.send(0, CLIENT, SYN);
        world.services[0].backends[place] = state;
        world.program(0);
        assert_eq!(world.send(0, CLIENT, ACK), (Reason::Established, place), "an established connection stays");
        let (reason, next) = world.send(0, port(40_001), SYN);
        assert_eq!(reason, Reason::AffinityFailover);
        assert_ne!(next, place);
        world.services[0].backends[place] = State::Eligible;
        world.program(0);
        assert_eq!(world.send(0, port(40_002), SYN), (Reason::AffinityHit, next));
    }
}

fn an_expired_client_is_spread_over_all_backends<F: Wire>() {
    let world = world::<F>();
    world.send(0, CLIENT, SYN);
    let mut met = std::collections::BTreeSet::new();
    for _ in 0..60 {
        world.env.sleep(Nanos(11 * SECOND));
        let (reason, place) = world.send(0, port(40_001), SYN);
        assert_eq!(reason, Reason::AffinityExpired);
        met.insert(place);
    }
    assert_eq!(met.len(), 4);
}

fn a_first_choice_is_the_same_on_every_node_and_after_an_eviction<F: Wire>() {
    let (one, other) = (world::<F>(), world::<F>());
    for host in 0..50 {
        let client = ([10, 244, 1, host], 40_000);
        let (_, place) = one.send(0, client, SYN);
        assert_eq!(other.send(0, client, SYN).1, place);
        one.env.evict_affinity(&one.services[0].affinity_key(client.0));
        assert_eq!(one.send(0, (client.0, 40_001), SYN), (Reason::AffinityNew, place));
    }
}

/// What another CPU has written in between, and what this packet makes of it.
fn who_loses_a_race_adopts_the_winners_choice<F: Wire>() {
    // Missing: the other inserts first.
    let world = world::<F>();
    let key = world.services[0].affinity_key(CLIENT.0);
    let at = world.env.clock().ticks();
    for winner in 0..4 {
        world.env.evict_affinity(&key);
        let value =
            Affinity { backend: world.services[0].backend_id(winner), last_used: at, since: at, ..Affinity::default() };
        world.env.before_affinity_write(Box::new(move |env| env.set_affinity(&key, value)));
        assert_eq!(world.send(0, CLIENT, SYN), (Reason::AffinityAdopted, winner));
    }
    // Expired: the other replaces first.
    for winner in 0..4 {
        world.env.sleep(Nanos(20 * SECOND));
        let now = world.env.clock().ticks();
        let backend = world.services[0].backend_id(winner);
        world.env.before_affinity_write(Box::new(move |env| {
            env.change_affinity(&key, Affinity { backend, last_used: now, since: now, zero: 0 });
        }));
        assert_eq!(world.send(0, CLIENT, SYN), (Reason::AffinityAdopted, winner));
    }
}

fn a_recycled_element_is_not_written_for_another_client<F: Wire>() {
    let world = world::<F>();
    world.send(0, CLIENT, SYN);
    let key = world.services[0].affinity_key(CLIENT.0);
    world.env.sleep(Nanos(20 * SECOND));
    // While the packet holds the element, the LRU gives it to another client, with a use of its own.
    let stranger = Affinity {
        backend: world.services[0].backend_id(3),
        last_used: world.env.clock().ticks(),
        ..Affinity::default()
    };
    world.env.before_affinity_write(Box::new(move |env| env.change_affinity(&key, stranger)));
    world.send(0, CLIENT, SYN);
    assert_eq!(entry(&world), stranger);
}

fn where_the_affinity_map_refuses_the_own_choice_stands<F: Wire>() {
    let world = world::<F>();
    world.env.set_faults(Faults { affinity_full: true, ..Faults::default() });
    let (reason, place) = world.send(0, CLIENT, SYN);
    assert_eq!(reason, Reason::AffinityRefused);
    world.reply(0, CLIENT, place, SYN | ACK);
    assert_eq!(world.send(0, port(40_001), SYN), (Reason::AffinityRefused, place), "by hash it is the same again");
}

fn a_client_whose_entry_changes_under_every_attempt_gets_its_own_choice<F: Wire>() {
    let world = world::<F>();
    world.send(0, CLIENT, SYN);
    let key = world.services[0].affinity_key(CLIENT.0);
    world.env.sleep(Nanos(20 * SECOND));
    for round in 0..9 {
        // Each time another entry that has expired, too.
        let value = Affinity { backend: BackendId { id: 100 }, last_used: Ticks { at: round }, ..Affinity::default() };
        world.env.before_affinity_write(Box::new(move |env| env.change_affinity(&key, value)));
    }
    assert_eq!(world.send(0, CLIENT, SYN).0, Reason::AffinityRefused);
}

fn where_the_conntrack_map_refuses_nothing_is_let_through_without_a_way_back<F: Wire>() {
    let world = world::<F>();
    world.env.set_faults(Faults { conntrack_full: true, ..Faults::default() });
    assert_eq!(world.ingress(&world.services[0].segment(CLIENT, SYN)).0, Reason::ConntrackRefused);
    world.env.set_faults(Faults::default());
    assert_eq!(world.send(0, CLIENT, SYN).0, Reason::AffinityHit);
}

fn evicted_entries_are_rebuilt_on_the_same_backend<F: Wire>() {
    for service in [0, 1] {
        let world = world::<F>();
        let (_, place) = world.send(service, CLIENT, SYN);
        world.reply(service, CLIENT, place, SYN | ACK);
        let forward = world.services[service].forward(CLIENT);
        let reverse = world.services[service].reverse(CLIENT, place);
        world.env.evict_conntrack(&forward);
        assert_eq!(world.send(service, CLIENT, ACK), (Reason::Rebuilt, place));
        world.env.evict_conntrack(&forward);
        world.env.evict_conntrack(&reverse);
        assert_eq!(world.send(service, CLIENT, ACK), (Reason::Rebuilt, place));
        world.reply(service, CLIENT, place, ACK);
        // Within about a second each direction rebuilds the other.
        world.env.evict_conntrack(&reverse);
        world.env.sleep(Nanos(SECOND + 2 * TICK));
        assert_eq!(world.send(service, CLIENT, ACK), (Reason::Established, place));
        world.reply(service, CLIENT, place, ACK);
        world.env.evict_conntrack(&forward);
        world.env.sleep(Nanos(SECOND + 2 * TICK));
        world.reply(service, CLIENT, place, ACK);
        assert_eq!(world.send(service, CLIENT, ACK), (Reason::Established, place));
    }
}

fn the_middle_of_a_connection_goes_where_the_entry_says_though_it_has_expired_or_drains<F: Wire>() {
    let mut world = world::<F>();
    let (_, place) = world.send(0, CLIENT, SYN);
    world.services[0].backends[place] = State::Draining;
    world.program(0);
    world.env.evict_conntrack(&world.services[0].forward(CLIENT));
    assert_eq!(world.send(0, CLIENT, ACK), (Reason::Rebuilt, place));
    world.env.sleep(Nanos(60 * SECOND));
    world.env.evict_conntrack(&world.services[0].forward(CLIENT));
    assert_eq!(world.send(0, CLIENT, ACK), (Reason::Rebuilt, place));
}

fn udp_flows_end_with_their_time<F: Wire>() {
    // Not answered; answered once; gone on by either side since.
    for (answered, goes_on, lifetime) in
        [(false, None, 30), (true, None, 30), (true, Some(false), 120), (true, Some(true), 120)]
    {
        for (silence, known) in [(lifetime * SECOND - TICK, true), (lifetime * SECOND + TICK, false)] {
            let world = world::<F>();
            let (_, place) = world.send(2, CLIENT, 0);
            if answered {
                world.reply(2, CLIENT, place, 0);
            }
            if let Some(by_backend) = goes_on {
                world.env.sleep(Nanos(SECOND + 2 * TICK));
                if by_backend {
                    world.reply(2, CLIENT, place, 0);
                } else {
                    world.send(2, CLIENT, 0);
                }
            }
            world.env.sleep(Nanos(silence));
            let (reason, sent) = world.egress(&world.services[2].answer(CLIENT, place, 0));
            assert_eq!(reason == Reason::Reply, known, "{silence} ns: {sent:?}");
            let (reason, _) = world.send(2, CLIENT, 0);
            // The reply has made it one that is alive.
            assert_eq!(reason == Reason::Established, known, "{answered} {goes_on:?} {silence} ns");
        }
    }
}

fn one_direction_of_udp_keeps_the_other_alive<F: Wire>() {
    let world = world::<F>();
    let (_, place) = world.send(2, CLIENT, 0);
    for _ in 0..200 {
        world.env.sleep(Nanos(SECOND));
        assert_eq!(world.send(2, CLIENT, 0).0, Reason::Established);
    }
    world.reply(2, CLIENT, place, 0);
}

fn a_udp_flow_leaves_a_removed_backend_but_not_a_draining_one<F: Wire>() {
    let mut world = world::<F>();
    let (_, place) = world.send(2, CLIENT, 0);
    world.services[2].backends[place] = State::Draining;
    world.program(2);
    assert_eq!(world.send(2, CLIENT, 0), (Reason::Established, place));
    world.services[2].backends[place] = State::Gone;
    world.program(2);
    let (reason, next) = world.send(2, CLIENT, 0);
    assert_eq!(reason, Reason::AffinityFailover);
    assert_ne!(next, place);
    let late = world.services[2].answer(CLIENT, place, 0);
    assert_eq!(world.egress(&late), (Reason::NotReply, late.build::<F>()));
}

fn an_address_that_another_service_got_leads_to_that_one<F: Wire>() {
    let mut world = world::<F>();
    let (_, place) = world.send(2, CLIENT, 0);
    // Its service has another address now; this one is a new service's.
    let old = world.services[2].clone();
    world.services[2].id = 9;
    world.program(2);
    let (reason, _) = world.send(2, CLIENT, 0);
    assert_eq!(reason, Reason::AffinityNew);
    assert!(world.env.connections(&old.backend_key(place)) == 1);
    let to_new: u64 = (0..4).map(|index| world.env.connections(&world.services[2].backend_key(index))).sum();
    assert_eq!(to_new, 1);
}

fn a_syn_that_moves_a_connection_ends_the_old_ones_replies<F: Wire>() {
    let mut world = world::<F>();
    let (_, place) = world.send(0, CLIENT, SYN);
    world.services[0].backends[place] = State::Gone;
    world.program(0);
    let (_, next) = world.send(0, CLIENT, SYN);
    world.reply(0, CLIENT, next, SYN | ACK);
    let late = world.services[0].answer(CLIENT, place, SYN | ACK);
    assert_eq!(world.egress(&late), (Reason::NotReply, late.build::<F>()));
}

/// Two services whose only backend is the same.
fn of_one_backend<F: Wire>() -> World<F> {
    let services = [Service::new(1, Proto::TCP, 10), Service::new(2, Proto::TCP, 0)];
    let mut world = World::new(10_000, services.to_vec());
    for service in [0, 1] {
        world.services[service].backends = vec![State::Eligible, State::Gone, State::Gone, State::Gone];
        world.program(service);
    }
    world
}

/// Sends a packet whose client's end is translated too; returns the port that the backend sees.
fn send_from_another_port<F: Wire>(world: &World<F>, service: usize, flags: u8, expected: Reason) -> u16 {
    let segment = world.services[service].segment(CLIENT, flags);
    let (reason, sent) = world.ingress(&segment);
    assert_eq!(reason, expected);
    let (_, port) = source::<F>(&sent).expect("a source");
    assert_eq!(sent, Segment { src: (CLIENT.0, port), dst: Service::address(0), ..segment }.build::<F>());
    port
}

fn the_later_one_of_two_connections_on_the_same_ports_gets_another_port<F: Wire>() {
    let world = of_one_backend::<F>();
    world.send(0, CLIENT, SYN);
    world.reply(0, CLIENT, 0, SYN | ACK);
    let port = send_from_another_port(&world, 1, SYN, Reason::Hashed);
    assert!(port >= 61_000, "{port}");
    assert_eq!(send_from_another_port(&world, 1, SYN, Reason::Hashed), port, "a SYN that comes again");
    assert_eq!(send_from_another_port(&world, 1, ACK, Reason::Established), port);
    // Each answer finds its way.
    world.reply(0, CLIENT, 0, ACK);
    let answer = world.services[1].answer((CLIENT.0, port), 0, SYN | ACK);
    let seen = Segment { src: world.services[1].frontend, dst: CLIENT, ..answer.clone() };
    assert_eq!(world.egress(&answer), (Reason::Reply, seen.build::<F>()));
    // Evicted, either direction is made anew by the other one within about a second.
    world.env.evict_conntrack(&world.services[1].reverse((CLIENT.0, port), 0));
    world.env.sleep(Nanos(SECOND + 2 * TICK));
    assert_eq!(send_from_another_port(&world, 1, ACK, Reason::Established), port);
    assert_eq!(world.egress(&answer).0, Reason::Reply);
    world.env.evict_conntrack(&world.services[1].forward(CLIENT));
    world.env.sleep(Nanos(SECOND + 2 * TICK));
    assert_eq!(world.egress(&answer).0, Reason::Reply);
    assert_eq!(send_from_another_port(&world, 1, ACK, Reason::Established), port);
    // The first one is over: its place is free for a new one, which is not this one.
    world.send(0, CLIENT, parse::RST);
    assert_eq!(send_from_another_port(&world, 1, ACK, Reason::Established), port);
    world.send(0, CLIENT, SYN);
}

fn where_no_port_is_left_a_connection_is_dropped<F: Wire>() {
    let world = of_one_backend::<F>();
    world.send(0, CLIENT, SYN);
    let port = send_from_another_port(&world, 1, SYN, Reason::Hashed);
    let own = world.services[1].reverse((CLIENT.0, port), 0);
    let held = world.env.peek_conntrack(&own).expect("a way back");
    // Others have all ports but for what another one lets go.
    world.env.evict_conntrack(&world.services[1].forward(CLIENT));
    let stranger = Conntrack { client_port: Port::new(1), ..held };
    for port in 61_000..=u16::MAX {
        assert!(
            world.env.conntrack_insert(&world.services[1].reverse((CLIENT.0, port), 0), &stranger).is_ok()
                || port == own.client_port.get()
        );
    }
    world.env.conntrack_replace(&own, &stranger).expect("room");
    let segment = world.services[1].segment(CLIENT, SYN);
    assert_eq!(world.ingress(&segment), (Reason::Collision, segment.build::<F>()));
}

fn a_client_uses_its_port_again_once_both_sides_have_closed<F: Wire>() {
    let world = world::<F>();
    let (_, place) = world.send(1, CLIENT, SYN);
    world.reply(1, CLIENT, place, SYN | ACK);
    world.send(1, CLIENT, parse::FIN | ACK);
    world.reply(1, CLIENT, place, parse::FIN | ACK);
    world.send(1, CLIENT, ACK);
    // Within TIME_WAIT.
    let writes = world.env.writes();
    assert_eq!(world.send(1, CLIENT, SYN), (Reason::Hashed, place));
    assert_eq!(world.env.writes(), writes, "the entries are used again");
    world.reply(1, CLIENT, place, SYN | ACK);
    assert_eq!(world.send(1, CLIENT, ACK), (Reason::Established, place));
}

/// A packet past services.
fn direct(flags: u8) -> Segment {
    Segment::tcp(CLIENT, Service::address(0), flags)
}

fn a_connection_past_services_is_told_from_one_through_them<F: Wire>() {
    let world = of_one_backend::<F>();
    assert_eq!(world.ingress(&direct(SYN)), (Reason::NotService, direct(SYN).build::<F>()), "nothing is in its way");
    world.send(0, CLIENT, SYN);
    world.reply(0, CLIENT, 0, SYN | ACK);
    let (reason, sent) = world.ingress(&direct(SYN));
    assert_eq!(reason, Reason::Direct);
    let (_, port) = source::<F>(&sent).expect("a source");
    assert!(port >= 61_000, "{port}");
    assert_eq!(sent, Segment { src: (CLIENT.0, port), ..direct(SYN) }.build::<F>());
    let answer = Segment::tcp(Service::address(0), (CLIENT.0, port), SYN | ACK);
    let seen = Segment { dst: CLIENT, ..answer.clone() };
    assert_eq!(world.egress(&answer), (Reason::Reply, seen.build::<F>()));
    let (reason, sent) = world.ingress(&direct(ACK));
    assert_eq!((reason, sent), (Reason::Direct, Segment { src: (CLIENT.0, port), ..direct(ACK) }.build::<F>()));
    assert_eq!(world.send(0, CLIENT, ACK), (Reason::Established, 0));
    world.reply(0, CLIENT, 0, ACK);
    // The mark of its pod keeps nothing else from passing as it came.
    let other = Segment::tcp((CLIENT.0, 1), Service::address(0), SYN);
    assert_eq!(world.ingress(&other), (Reason::NotService, other.build::<F>()));
    // Once the one through the service is over, a new one past it has its own port.
    world.send(0, CLIENT, parse::RST);
    assert_eq!(world.ingress(&direct(SYN)), (Reason::NotService, direct(SYN).build::<F>()));
    assert_eq!(world.ingress(&direct(ACK)), (Reason::NotService, direct(ACK).build::<F>()));
}

/// Of a connection past services that was there before, nothing is known; its backend's first answer tells of it.
fn a_connection_leaves_its_ports_to_one_past_services_that_was_there_before<F: Wire>() {
    for (answer, is_its_own) in [(ACK, false), (parse::FIN | ACK, false), (SYN | ACK, true), (parse::RST | ACK, true)] {
        let world = of_one_backend::<F>();
        world.send(0, CLIENT, SYN);
        let segment = world.services[0].answer(CLIENT, 0, answer);
        if is_its_own {
            assert_eq!(world.egress(&segment).0, Reason::Reply, "{answer}");
            continue;
        }
        assert_eq!(world.egress(&segment), (Reason::NotReply, segment.build::<F>()), "{answer}");
        assert_eq!(world.env.peek_conntrack(&world.services[0].forward(CLIENT)), None);
        // The other one goes on as it did.
        assert_eq!(world.ingress(&direct(ACK)), (Reason::NotService, direct(ACK).build::<F>()));
        assert_eq!(world.egress(&segment), (Reason::Reply, segment.build::<F>()));
        world.env.sleep(Nanos(SECOND + 2 * TICK));
        assert_eq!(world.egress(&segment).1, segment.build::<F>());
        // The SYN that comes again has another port, which keeps to itself.
        let port = send_from_another_port(&world, 0, SYN, Reason::AffinityHit);
        assert!(port >= 61_000, "{port}");
        let answer = world.services[0].answer((CLIENT.0, port), 0, SYN | ACK);
        let seen = Segment { src: world.services[0].frontend, dst: CLIENT, ..answer.clone() };
        assert_eq!(world.egress(&answer), (Reason::Reply, seen.build::<F>()));
        assert_eq!(send_from_another_port(&world, 0, ACK, Reason::Established), port);
        assert_eq!(world.egress(&segment).1, segment.build::<F>());
    }
    // A SYN that comes again when it was answered already tells of no other connection.
    let world = of_one_backend::<F>();
    world.send(0, CLIENT, SYN);
    world.reply(0, CLIENT, 0, SYN | ACK);
    world.send(0, CLIENT, SYN);
    world.reply(0, CLIENT, 0, ACK);
    // The middle of a connection that is made anew was not opened by a SYN that anybody knows of.
    let world = of_one_backend::<F>();
    world.send(0, CLIENT, ACK);
    world.reply(0, CLIENT, 0, ACK);
}

/// Where most ports of a client are taken, one of those that are left is found.
fn among_many_connections_on_the_same_ports_each_gets_its_own<F: Wire>() {
    let world = of_one_backend::<F>();
    let mut taken = std::collections::BTreeSet::new();
    for n in 0..2_000 {
        let client = (CLIENT.0, 10_000 + n);
        world.send(0, client, SYN);
        let segment = world.services[1].segment(client, SYN);
        let (reason, sent) = world.ingress(&segment);
        assert_eq!(reason, Reason::Hashed, "the {n}th");
        assert!(taken.insert(source::<F>(&sent).expect("a source").1), "the {n}th");
    }
}

/// What a pod sends to itself comes back by the interface, from the service's address.
fn a_pod_is_its_own_backend<F: Wire>() {
    let pod = Service::address(0).0;
    let swapped = |segment: &Segment| {
        let mut frame = segment.build::<F>();
        frame[..12].rotate_left(6);
        frame
    };
    for service in 0..3 {
        let mut world = world::<F>();
        world.services[service].backends = vec![State::Eligible, State::Gone, State::Gone, State::Gone];
        world.program(service);
        let of = world.services[service].clone();
        for port in [40_000, 40_001] {
            let client = (pod, port);
            for flags in [SYN, ACK] {
                let there = of.segment(client, flags);
                let as_seen = Segment { src: (of.frontend.0, port), dst: Service::address(0), ..there.clone() };
                assert_eq!(world.ingress(&there), (Reason::Hairpin, swapped(&as_seen)));
                let answer =
                    Segment { src: Service::address(0), dst: (of.frontend.0, port), ..of.segment(client, flags | ACK) };
                let back = Segment { src: of.frontend, dst: client, ..answer.clone() };
                assert_eq!(world.ingress(&answer), (Reason::Hairpin, swapped(&back)));
            }
        }
        // Others reach the pod as ever.
        let (_, place) = world.send(service, CLIENT, SYN);
        world.reply(service, CLIENT, place, SYN | ACK);
        if of.timeout > 0 {
            let entry = world.env.peek_affinity(&of.affinity_key(pod)).expect("an entry");
            assert_eq!(entry.backend, of.backend_id(0));
        }
    }
}

fn no_backend_is_no_choice_and_leaves_no_trace<F: Wire>() {
    let mut world = world::<F>();
    world.services[0].backends = vec![State::Draining; 4];
    world.program(0);
    let segment = world.services[0].segment(CLIENT, SYN);
    let (reason, sent) = world.ingress(&segment);
    assert_eq!(reason, Reason::NoBackend);
    let mut reset = Segment { flags: parse::RST | ACK, ..world.services[0].answer(CLIENT, 0, 0) };
    reset.src = world.services[0].frontend;
    assert_eq!(source::<F>(&sent), source::<F>(&reset.build::<F>()), "from the address that was asked");
    assert_eq!(destination::<F>(&sent), Some(CLIENT));
    assert_eq!(world.env.writes(), 0);
}

fn where_all_backends_are_out_of_scope_packets_are_dropped<F: Wire>() {
    let mut world = world::<F>();
    for service in 0..3 {
        world.services[service].backends = vec![State::Draining; 4];
        world.program(service);
        let key = world.services[service].frontend_key();
        let frontend = world.env.frontend(&key).expect("a frontend");
        world.env.set_frontend(key, Frontend { scope: LOCAL, flags: OTHERS, ..frontend });
        assert_eq!(world.ingress(&world.services[service].segment(CLIENT, SYN)).0, Reason::NoLocalBackend);
    }
    assert_eq!(world.env.writes(), 0);
    assert_eq!(Reason::NoLocalBackend.verdict(), Verdict::Drop);
}

/// A frontend of another scope sees other backends: what a client has there is no affinity here.
fn a_client_has_an_entry_in_each_scope<F: Wire>() {
    let world = world::<F>();
    let key = world.services[0].frontend_key();
    let cluster = world.env.frontend(&key).expect("a frontend");
    assert_eq!(world.send(0, CLIENT, SYN).0, Reason::AffinityNew);
    world.env.set_frontend(key, Frontend { scope: LOCAL, ..cluster });
    assert_eq!(world.send(0, port(40_001), SYN).0, Reason::AffinityNew);
    assert_eq!(world.send(0, port(40_002), SYN).0, Reason::AffinityHit);
    world.env.set_frontend(key, cluster);
    assert_eq!(world.send(0, port(40_003), SYN).0, Reason::AffinityHit);
}

fn ports_that_share_affinity_keep_a_client_on_one_pod<F: Wire>() {
    let mut world = world::<F>();
    world.services[1] = Service { shares: Some(1), ..Service::new(2, Proto::TCP, 10) };
    world.program(1);
    let mut places = std::collections::BTreeSet::new();
    for last in 1..40 {
        let client = ([10, 244, 0, last], 40_000);
        let (first, place) = world.send(0, client, SYN);
        assert_eq!(first, Reason::AffinityNew);
        assert_eq!(world.send(1, (client.0, 40_001), SYN), (Reason::AffinityHit, place));
        places.insert(place);
    }
    assert!(places.len() > 1);
    // Expired for both, and chosen anew for both.
    world.env.sleep(Nanos(11 * SECOND));
    let (reason, place) = world.send(1, port(40_001), SYN);
    assert_eq!(reason, Reason::AffinityExpired);
    assert_eq!(world.send(0, port(40_002), SYN), (Reason::AffinityHit, place));
    // A flow of one port keeps the client for the other.
    for _ in 0..3 {
        world.env.sleep(Nanos(6 * SECOND));
        assert_eq!(world.send(1, port(40_001), ACK), (Reason::Established, place));
    }
    assert_eq!(world.send(0, port(40_003), SYN), (Reason::AffinityHit, place));
    // The pod has gone from one of the ports: its clients move on both, together.
    world.services[1].backends[place] = State::Gone;
    world.program(1);
    let (reason, other) = world.send(1, port(40_004), SYN);
    assert_eq!(reason, Reason::AffinityFailover);
    assert_ne!(other, place);
    assert_eq!(world.send(0, port(40_005), SYN), (Reason::AffinityHit, other));
}

fn events_are_made_while_a_reader_asks<F: Wire>() {
    let mut world = world::<F>();
    world.send(0, CLIENT, SYN);
    assert!(world.env.take_events().is_empty());
    world.env.want_events(true);
    let (_, place) = world.send(0, port(40_001), SYN);
    world.send(0, port(40_001), ACK);
    world.services[0].backends[place] = State::Draining;
    world.program(0);
    let (_, next) = world.send(0, port(40_002), SYN);
    let events = world.env.take_events();
    let told: Vec<_> = events.iter().map(|event| (Reason::from_number(event.reason), event.previous)).collect();
    let old = world.services[0].backend_id(place);
    assert_eq!(told, [(Some(Reason::AffinityHit), old), (Some(Reason::AffinityFailover), old)]);
    assert_eq!(events[1].backend, world.services[0].backend_id(next));
    assert_eq!(events[1].client_ip(), F::to_ip(&F::addr(CLIENT.0)));
}

fn affinity_is_switched_and_its_timeout_changed_while_it_runs<F: Wire>() {
    let mut world = world::<F>();
    let (_, place) = world.send(0, CLIENT, SYN);
    world.services[0].timeout = 0;
    world.program(0);
    assert_eq!(world.send(0, port(40_001), SYN).0, Reason::Hashed);
    assert_eq!(world.send(0, CLIENT, ACK), (Reason::Established, place));
    world.services[0].timeout = 3;
    world.program(0);
    world.env.sleep(Nanos(3 * SECOND));
    assert_eq!(world.send(0, port(40_002), SYN).0, Reason::AffinityExpired, "the new timeout holds for old entries");
}

fn checksums_are_right_whoever_computes_them<F: Wire>() {
    for service in 0..3 {
        for offload in [Offload::None, Offload::Partial, Offload::Complete] {
            let world = world::<F>();
            let mut segment = world.services[service].segment(CLIENT, SYN);
            segment.options = vec![1; 8];
            segment.payload = b"odd length".to_vec();
            let mut packet = FakePacket::new::<F>(&segment, offload);
            let reason = run(&world.env, Program::Ingress, &mut packet);
            assert!(reason.is_selection(), "{reason:?}");
            let place = backend_of::<F>(&packet.sent()).expect("translated");
            assert_eq!(packet.sent(), Segment { dst: Service::address(place), ..segment }.build::<F>(), "{offload:?}");
            let answer = world.services[service].answer(CLIENT, place, SYN | ACK);
            let mut packet = FakePacket::new::<F>(&answer, offload);
            assert_eq!(run(&world.env, Program::Egress, &mut packet), Reason::Reply);
            assert_eq!(packet.sent(), Segment { src: world.services[service].frontend, ..answer }.build::<F>());
        }
    }
}

fn a_packet_that_cannot_be_written_is_dropped<F: Wire>() {
    // The transport's checksum by address and by port, then the ends.
    const WRITES: usize = 3;
    for after in 0..=WRITES {
        let world = world::<F>();
        let mut packet = FakePacket::new::<F>(&world.services[0].segment(CLIENT, SYN), Offload::None);
        packet.fail_after = Some(after);
        let expected = if after < WRITES { Reason::RewriteFailed } else { Reason::AffinityNew };
        assert_eq!(run(&world.env, Program::Ingress, &mut packet), expected, "after {after} writes");
    }
}

/// Cut off anywhere, and with every bit of the headers wrong: untouched, or translated whole.
fn malformed_packets_pass_untouched_and_leave_no_trace<F: Wire>() {
    let world = world::<F>();
    for service in [0, 2] {
        let mut segment = world.services[service].segment(CLIENT, SYN);
        segment.options = vec![1; 4];
        let whole = segment.build::<F>();
        let writes = world.env.writes();
        for len in 0..whole.len() {
            let mut packet = FakePacket::raw(whole[..len].to_vec());
            let reason = match parse::ethertype(&packet) {
                Some(_) => run(&world.env, Program::Ingress, &mut packet),
                None => Reason::NotIp,
            };
            assert!(matches!(reason, Reason::Malformed | Reason::NotIp), "{len} bytes: {reason:?}");
            assert_eq!(packet.bytes, whole[..len]);
        }
        assert_eq!(world.env.writes(), writes);
        for at in 14..whole.len() {
            for bit in 0..8 {
                let mut spoilt = whole.clone();
                spoilt[at] ^= 1 << bit;
                let mut packet = FakePacket::raw(spoilt.clone());
                let reason = run(&world.env, Program::Ingress, &mut packet);
                if reason.verdict() == Verdict::SendBack {
                    continue;
                }
                let translated = packet.bytes != spoilt;
                assert_eq!(
                    translated,
                    reason.is_selection() || reason == Reason::Established,
                    "{at}/{bit}: {reason:?}"
                );
                let to = destination::<F>(&packet.bytes).map(|(addr, _)| addr);
                assert!(
                    !translated || (0..4).any(|place| to == Some(Service::address(place).0)),
                    "{at}/{bit}: {reason:?} {to:?}"
                );
            }
        }
    }
}

fn a_packet_beyond_64_kilobytes_says_no_length<F: Wire>() {
    let world = world::<F>();
    let mut bytes = world.services[0].segment(CLIENT, SYN).build::<F>();
    // The IPv4 header's total length, the IPv6 header's payload length.
    let at = if F::VERSION == 4 { 16 } else { 18 };
    bytes[at..at + 2].fill(0);
    let mut packet = FakePacket::raw(bytes.clone());
    assert_eq!(run(&world.env, Program::Ingress, &mut packet), Reason::Malformed);
    packet.said_len = Some(14 + 100_000);
    assert_eq!(run(&world.env, Program::Ingress, &mut packet), Reason::AffinityNew);
}

in_both_families! {
    affinity_holds_up_to_its_bound_and_not_at_it,
    a_use_is_recorded_anew_only_when_the_record_is_older_than_its_bound,
    every_packet_of_a_flow_keeps_its_client,
    a_flow_refreshes_its_own_eligible_backends_entry_and_no_other,
    a_client_moves_when_its_backend_is_no_longer_eligible_and_stays_moved,
    an_expired_client_is_spread_over_all_backends,
    a_first_choice_is_the_same_on_every_node_and_after_an_eviction,
    who_loses_a_race_adopts_the_winners_choice,
    a_recycled_element_is_not_written_for_another_client,
    where_the_affinity_map_refuses_the_own_choice_stands,
    a_client_whose_entry_changes_under_every_attempt_gets_its_own_choice,
    where_the_conntrack_map_refuses_nothing_is_let_through_without_a_way_back,
    evicted_entries_are_rebuilt_on_the_same_backend,
    the_middle_of_a_connection_goes_where_the_entry_says_though_it_has_expired_or_drains,
    udp_flows_end_with_their_time,
    one_direction_of_udp_keeps_the_other_alive,
    a_udp_flow_leaves_a_removed_backend_but_not_a_draining_one,
    an_address_that_another_service_got_leads_to_that_one,
    a_syn_that_moves_a_connection_ends_the_old_ones_replies,
    the_later_one_of_two_connections_on_the_same_ports_gets_another_port,
    where_no_port_is_left_a_connection_is_dropped,
    a_client_uses_its_port_again_once_both_sides_have_closed,
    a_connection_past_services_is_told_from_one_through_them,
    a_connection_leaves_its_ports_to_one_past_services_that_was_there_before,
    among_many_connections_on_the_same_ports_each_gets_its_own,
    a_pod_is_its_own_backend,
    no_backend_is_no_choice_and_leaves_no_trace,
    where_all_backends_are_out_of_scope_packets_are_dropped,
    ports_that_share_affinity_keep_a_client_on_one_pod,
    a_client_has_an_entry_in_each_scope,
    events_are_made_while_a_reader_asks,
    affinity_is_switched_and_its_timeout_changed_while_it_runs,
    checksums_are_right_whoever_computes_them,
    a_packet_that_cannot_be_written_is_dropped,
    malformed_packets_pass_untouched_and_leave_no_trace,
    a_packet_beyond_64_kilobytes_says_no_length,
}
