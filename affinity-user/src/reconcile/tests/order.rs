//! What is written, and in which order.

use affinity_common::types::Seconds;

use super::world::{SIZES, World, frontend, service};
use crate::tables::{Table, memory::Sizes};

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
