//! What is written, and in which order.

use std::collections::BTreeSet;

use affinity_common::{
    abi::{
        filter::Place,
        frontends::{CLUSTER, LOCAL},
    },
    family::V4,
    types::Seconds,
};

use super::world::{SIZES, Service, World, frontend, node_port, service};
use crate::{
    model::FrontendKind::ClusterIp,
    reconcile::Change,
    tables::{Table, memory::Sizes},
};

#[test]
fn a_service_is_written_from_the_back_to_the_front() {
    let mut world = World::new(&SIZES);
    world.apply([service(1, [1])]);
    assert_eq!(
        world.written(),
        [
            "ids",
            "services",
            "ids",
            "backend_stats",
            "backend_names",
            "backends_v4",
            "slots",
            "service_filter",
            "addresses_v4",
            "frontends_v4"
        ]
    );
    world.reconciler.synced();
    world.delete("s1");
    assert_eq!(
        world.written(),
        [
            "-frontends_v4",
            "-addresses_v4",
            "service_filter",
            "-backends_v4",
            "-backend_stats",
            "-backend_names",
            "-services"
        ]
    );
}

#[test]
fn backends_switch_as_one_by_the_frontends_value() {
    let mut world = World::new(&SIZES);
    world.reconciler.synced();
    world.apply([service(1, [1, 2, 3])]);
    world.written();
    world.apply([service(1, [1, 4, 5])]);
    let written = world.written();
    let switch = written.iter().position(|map| map == "frontends_v4").unwrap();
    assert_eq!(written.iter().filter(|map| *map == "frontends_v4").count(), 1);
    assert_eq!(written[..switch].iter().filter(|map| *map == "backends_v4").count(), 2);
    assert_eq!(written[switch..].iter().filter(|map| *map == "-backends_v4").count(), 2);
    assert_eq!(written[switch - 1], "slots");
}

#[test]
fn a_backend_is_marked_before_and_unmarked_after_slots_name_it() {
    let mut world = World::new(&SIZES);
    world.reconciler.synced();
    world.apply([service(1, [1, 2])]);
    world.written();
    world.apply([service(1, [1, 2]).draining(2)]);
    assert_eq!(world.written(), ["slots", "frontends_v4", "backends_v4"]);
    world.apply([service(1, [1, 2])]);
    assert_eq!(world.written(), ["backends_v4", "slots", "frontends_v4"]);
}

#[test]
fn what_is_there_already_is_not_written() {
    let mut world = World::new(&SIZES);
    let services = [service(1, [1, 2]).sticky(10).dual(), service(2, [1]), service(3, [])];
    world.apply(services.clone());
    world.reconciler.synced();
    let before = world.faults.writes();
    assert_eq!(world.apply(services.clone()).writes, 0);
    assert!(world.reconciler.audit().unwrap().differences.is_empty());
    world.restart();
    assert_eq!(world.apply(services).writes, 0);
    assert_eq!(world.reconciler.synced().writes, 0);
    assert_eq!(world.faults.writes(), before);
}

#[test]
fn a_change_of_the_timeout_is_one_write() {
    let mut world = World::new(&SIZES);
    world.apply([service(1, [1, 2]).sticky(10)]);
    assert_eq!(world.apply([service(1, [1, 2]).sticky(20)]).writes, 1);
    let value = world.memory.v4.frontends.get(&frontend(1)).unwrap().unwrap();
    assert_eq!(value.timeout, Seconds::new(20));
}

#[test]
fn a_change_among_ten_thousand_services_touches_one() {
    let sizes = Sizes { frontends: 10_000, backends: 20_001, services: 10_000, slots: 1 << 16, ..SIZES };
    let mut world = World::unwatched(&sizes);
    let many = (0..10_000u32).map(|n| {
        let [_, _, high, low] = n.to_be_bytes();
        let mut service = service(low, [1, 2]);
        service.name = format!("s{n}");
        service.frontends[0].set_ip([10, 96, high, low].into());
        service
    });
    assert_eq!(world.apply(many).programmed.len(), 10_000);
    world.reconciler.synced();
    let mut changed = service(0, [1, 3]);
    changed.frontends[0].set_ip([10, 96, 0, 0].into());
    // An id, a row each of the backend that comes and of the one that goes, two slots, the switch.
    assert_eq!(world.apply([changed]).writes, 1 + 3 + 3 + 2 + 1);
}

#[test]
fn a_renamed_port_takes_the_frontend_over_without_a_gap() {
    let mut world = World::new(&SIZES);
    world.reconciler.synced();
    world.apply([service(1, [1, 2])]);
    world.written();
    world.apply([service(1, [1, 2]).port("http")]);
    let written = world.written();
    assert!(!written.contains(&"-frontends_v4".to_owned()), "{written:?}");
    assert_eq!(world.service_ids().len(), 1);
    let mut fresh = World::new(&SIZES);
    fresh.apply([service(1, [1, 2]).port("http")]);
    assert_eq!(world.meaning(), fresh.meaning());
}

/// Whoever takes over, with or without a frontend of outsiders' own: the watcher sees that nobody is sent to nowhere.
#[test]
fn a_renamed_port_takes_outsiders_over_too() {
    let ways: [fn(Service) -> Service; 2] = [|it| it, |it| it.local([1])];
    for (before, after) in ways.iter().flat_map(|before| ways.map(|after| (before, after))) {
        let made = || service(1, [1, 2]).node_port(1, 30_080);
        let mut world = World::new(&SIZES);
        world.reconciler.synced();
        world.apply([before(made())]);
        world.written();
        world.apply([after(made()).port("http")]);
        // The frontends for anybody are taken over; at most the one for outsiders goes.
        assert!(world.written().iter().filter(|map| *map == "-frontends_v4").count() <= 1);
        let mut fresh = World::new(&SIZES);
        fresh.apply([after(made()).port("http")]);
        assert_eq!(world.meaning(), fresh.meaning());
    }
}

#[test]
fn both_families_of_a_service_port_have_one_service_id() {
    let mut world = World::new(&SIZES);
    world.reconciler.synced();
    world.apply([service(1, [1, 2]).dual().sticky(10)]);
    let id = world.service_id("s1");
    assert_eq!(world.memory.v4.frontends.entries().unwrap()[0].1.service, id);
    assert_eq!(world.memory.v6.frontends.entries().unwrap()[0].1.service, id);
    world.apply([service(1, [1, 2]).sticky(10)]);
    assert!(world.memory.v6.backends.is_empty().unwrap());
    assert_eq!(world.service_id("s1"), id);
    world.delete("s1");
    assert!(world.service_ids().is_empty());
    assert!(world.memory.v4.backends.is_empty().unwrap());
}

#[test]
fn both_scopes_have_their_slots_before_outsiders_are_sent_to_theirs() {
    let mut world = World::new(&SIZES);
    world.reconciler.synced();
    let plain = || service(1, [1, 2, 3]).node_port(1, 30_080);
    world.apply([plain()]);
    world.written();
    // The frontend of the node port for anybody changes in its flags alone, after the one for outsiders has come.
    world.apply([plain().local([2])]);
    assert_eq!(world.written(), ["backends_v4", "slots", "frontends_v4", "frontends_v4"]);
    let value = |key| world.memory.v4.frontends.get(&key).unwrap().unwrap();
    let (anybodys, outsiders) = (value(node_port(1)), value(node_port(1).for_outsiders()));
    assert!(anybodys.parts_outsiders() && !outsiders.parts_outsiders());
    assert_eq!((anybodys.slot_count, outsiders.slot_count), (3, 1));
    assert_eq!((anybodys.scope, outsiders.scope), (CLUSTER, LOCAL));
    // A pod goes from one node to another: each scope keeps what it names until its own switch.
    world.apply([plain().local([1])]);
    assert_eq!(world.written(), ["backends_v4", "slots", "frontends_v4", "backends_v4"]);
    // And back: outsiders are not sent there any more, then what was for them goes.
    world.apply([plain()]);
    assert_eq!(world.written(), ["frontends_v4", "-frontends_v4", "backends_v4"]);
    let mut fresh = World::new(&SIZES);
    fresh.apply([plain()]);
    assert_eq!(world.meaning(), fresh.meaning());
}

#[test]
fn scopes_that_have_the_same_backends_share_their_slots() {
    let mut world = World::new(&SIZES);
    world.apply([service(1, [1, 2]).sticky(10).node_port(1, 30_080).local([1, 2])]);
    let frontends = world.memory.v4.frontends.entries().unwrap();
    let runs: BTreeSet<_> = frontends.iter().map(|(_, value)| (value.first_slot, value.slot_count)).collect();
    assert_eq!((frontends.len(), runs.len()), (3, 1));
}

#[test]
fn a_service_with_parts_is_taken_out_from_the_front_to_the_back() {
    let mut world = World::new(&SIZES);
    world.reconciler.synced();
    world.apply([service(1, [1]).balanced(1).local([1]).ranges([([10, 1, 0, 0], 16)])]);
    world.written();
    world.delete("s1");
    let written = world.written();
    let last = |map: &str| written.iter().rposition(|it| it == map).unwrap();
    assert!(last("-frontends_v4") < last("-backends_v4") && last("-frontends_v4") < last("-ranges_v4"), "{written:?}");
    assert!(world.memory.v4.ranges.is_empty().unwrap());
}

#[test]
fn ranges_are_there_before_and_until_after_they_are_asked_for() {
    let mut world = World::new(&SIZES);
    world.reconciler.synced();
    let (lan, other) = (([10, 1, 0, 0], 16), ([10, 2, 0, 0], 16));
    let plain = || service(1, [1]).balanced(1);
    world.apply([plain()]);
    world.written();
    world.apply([plain().ranges([lan])]);
    assert_eq!(world.written(), ["ranges_v4", "frontends_v4"]);
    world.apply([plain().ranges([other])]);
    assert_eq!(world.written(), ["ranges_v4", "-ranges_v4"]);
    world.apply([plain().ranges([])]);
    assert_eq!(world.written(), ["-ranges_v4"], "nobody is let in");
    world.apply([plain().ranges([lan, other])]);
    world.written();
    world.apply([plain()]);
    assert_eq!(world.written(), ["frontends_v4", "-ranges_v4", "-ranges_v4"]);
}

#[test]
fn a_node_port_does_not_make_the_address_the_services() {
    let mut world = World::new(&SIZES);
    world.reconciler.synced();
    let node = Place::of::<V4>(&node_port(1).addr);
    let has_bit = |world: &World| node.is_in(world.memory.service_filter.get(&node.word).unwrap().unwrap());
    world.apply([service(1, [1]).node_port(1, 30_080), service(2, [1]).node_port(1, 30_081)]);
    let addresses = |world: &World| world.memory.v4.addresses.keys().unwrap().len();
    assert_eq!((addresses(&world), has_bit(&world)), (2, true), "those of the cluster IPs");
    world.delete("s1");
    assert_eq!((addresses(&world), has_bit(&world)), (1, true));
    // A daemon that takes over knows it.
    world.restart();
    world.apply([service(2, [1]).node_port(1, 30_081)]);
    assert_eq!(world.reconciler.synced().writes, 0);
    world.apply([service(2, [1])]);
    assert_eq!((addresses(&world), has_bit(&world)), (1, false));

    // An external address becomes the node's own, and is given up again.
    let external = |alone| {
        let mut plan = service(3, [1]).balanced(3).plan();
        plan.ports[0].v4.frontends.iter_mut().for_each(|it| it.port_alone |= alone && it.kind != ClusterIp);
        [Change::Apply(plan)]
    };
    for (alone, expected) in [(false, 3), (true, 2), (false, 3)] {
        world.reconciler.reconcile(external(alone));
        assert_eq!(addresses(&world), expected);
        assert!(world.reconciler.audit().unwrap().differences.is_empty());
    }
}
