//! Maps that refuse.

use std::time::Duration;

use affinity_common::{
    abi::{
        ids::NextIds,
        source_ranges::{Range, RangeKey},
    },
    types::{BackendId, ServiceId},
};
use nix::errno::Errno;

use super::world::{SIZES, World, frontend, service};
use crate::{
    reconcile::Difference,
    tables::{ONLY, Table, faulty::Fault, memory::Sizes},
};

const REFUSED: Fault = Fault::Errno(Errno::ENOMEM);

#[test]
fn a_service_that_does_not_fit_is_named_and_the_others_work() {
    let mut world = World::new(&Sizes { frontends: 2, ..SIZES });
    world.reconciler.synced();
    world.apply([service(1, [1]), service(2, [1])]);
    let before = world.meaning();
    let report = world.apply([service(3, [1]), service(1, [1])]);
    assert_eq!(report.failed.len(), 1);
    assert_eq!(world.problems(), ["default/s3//TCP: frontends_v4 is full (2): raise --map-size frontends=N"]);
    let still: Vec<_> = world.meaning().into_iter().filter(|line| before.contains(line)).collect();
    assert!(still.iter().any(|line| line.starts_with("frontend 10.96.0.1")));
    assert!(still.iter().any(|line| line.starts_with("frontend 10.96.0.2")));

    world.apply([service(2, [1, 2])]);
    assert_eq!(world.meaning().iter().filter(|line| line.contains("s2")).count(), 4, "one in place can change");
    world.delete("s2");
    world.retry_until_well();
    assert!(world.memory.v4.frontends.get(&frontend(3)).unwrap().is_some());
}

#[test]
fn room_that_is_made_is_used_at_once() {
    let mut world = World::new(&Sizes { frontends: 1, backends: 1, ..SIZES });
    world.reconciler.synced();
    world.apply([service(2, [1])]);
    let changes = [service(1, [1]).plan()].map(crate::reconcile::Change::Apply);
    let gone = crate::reconcile::Change::Delete(service(2, []).plan().name);
    let report = world.reconciler.reconcile(changes.into_iter().chain([gone]));
    assert_eq!((report.failed.len(), world.problems().len()), (0, 0));
    assert!(world.memory.v4.frontends.get(&frontend(1)).unwrap().is_some());
}

#[test]
fn backends_that_do_not_fit_leave_the_old_version_whole_and_the_room_free() {
    let mut world = World::new(&Sizes { backends: 4, ..SIZES });
    world.reconciler.synced();
    world.apply([service(1, [1, 2]).sticky(10), service(2, [1])]);
    let before = world.meaning();
    world.apply([service(1, [3, 4, 5]).sticky(10)]);
    assert_eq!(world.problems(), ["default/s1//TCP: backends_v4 is full (4): raise --map-size backends=N"]);
    assert_eq!(world.meaning(), before);
    assert_eq!(world.apply([service(2, [1, 2])]).failed.len(), 0);
}

#[test]
fn slots_that_do_not_fit_leave_the_old_version_whole() {
    let mut world = World::new(&Sizes { slots: 300, ..SIZES });
    world.reconciler.synced();
    world.apply([service(1, [1, 2]).sticky(10)]);
    let before = world.meaning();
    world.apply([service(1, [1, 3]).sticky(10)]);
    assert_eq!(
        world.problems(),
        ["default/s1//TCP: slots has no 251 free in a row (of 300): raise --map-size slots=N"]
    );
    let after = world.meaning();
    assert!(
        before
            .iter()
            .filter(|line| !line.starts_with("names") && !line.starts_with("counters"))
            .all(|l| after.contains(l))
    );
}

#[test]
fn a_frontend_that_can_not_be_switched_keeps_its_slots() {
    let mut world = World::new(&SIZES);
    world.reconciler.synced();
    let two_frontends = |backends| {
        let mut service = service(1, backends);
        service.frontends.push(std::net::SocketAddr::from(([10, 96, 0, 100], 80)));
        service
    };
    world.apply([two_frontends([1, 2])]);
    // An id, a row with its name and counter, two slots, a frontend: and then the other one.
    world.faults.fail_nth(1 + 3 + 2 + 1, REFUSED);
    assert_eq!(world.apply([two_frontends([1, 3])]).failed.len(), 1);
    let halfway = world.memory.v4.frontends.entries().unwrap();
    assert_ne!(halfway[0].1.first_slot, halfway[1].1.first_slot);
    // The others look for slots, and the watcher looks at which they take.
    world.advance(Duration::from_secs(10));
    world.faults.fail_map("frontends_v4", REFUSED);
    world.apply([service(2, [1, 2]), service(3, [1, 2])]);
    assert_eq!(world.problems().len(), 3);
    world.faults.clear();
    world.retry_until_well();
}

#[test]
fn attempts_that_fail_leave_nothing_behind() {
    let mut world = World::new(&Sizes { frontends: 1, backends: 4, slots: 8, ..SIZES });
    world.reconciler.synced();
    world.apply([service(1, [1])]);
    let free = (world.memory.v4.backends.len().unwrap(), world.memory.backend_stats.len().unwrap());
    for i in 2..50 {
        world.apply([service(2, [i, i + 1])]);
        assert_eq!(world.problems().len(), 1);
        assert!(world.memory.v4.backends.len().unwrap() <= 3);
        world.advance(Duration::from_secs(2));
    }
    world.delete("s2");
    assert_eq!((world.memory.v4.backends.len().unwrap(), world.memory.backend_stats.len().unwrap()), free);
    assert_eq!(world.problems().len(), 0);
}

#[test]
fn room_is_not_lost_by_writes_that_fail() {
    let mut world = World::new(&Sizes { backends: 2, slots: 2, ..SIZES });
    world.reconciler.synced();
    // The two ids and the service, a row each of the first backend; then the second's, and at last a slot.
    for n in [3 + 3 + 2, 2, 1] {
        world.faults.fail_nth(n, REFUSED);
        world.apply([service(1, [1, 2])]);
        assert!(world.problems()[0].ends_with("ENOMEM: Out of memory"), "{:?}", world.problems());
        world.apply([]);
    }
    world.retry_until_well();
    assert_eq!(world.memory.v4.frontends.get(&frontend(1)).unwrap().unwrap().slot_count, 2);
}

#[test]
fn every_single_write_can_fail_and_the_end_is_the_same() {
    let lan = ([10, 1, 0, 0], 16);
    let before = [
        service(1, [1, 2, 3]).sticky(10).dual(),
        service(2, [1, 2]),
        service(4, [1, 2]).node_port(1, 30_080).local([1]),
        service(5, [1, 2]).balanced(5).ranges([lan]),
    ];
    let after = [
        service(1, [2, 4]).dual(),
        service(2, []),
        service(3, [1]),
        service(4, [1, 3]).node_port(1, 30_080),
        service(5, [1, 2]).balanced(5).ranges([([10, 2, 0, 0], 16)]).local([2]),
    ];
    let mut fresh = World::new(&SIZES);
    fresh.apply(after.clone());
    for fault in [REFUSED, Fault::Full] {
        for n in 0.. {
            let mut world = World::new(&SIZES);
            world.reconciler.synced();
            world.apply(before.clone());
            let writes = world.faults.writes();
            world.faults.fail_nth(n, fault);
            world.apply(after.clone());
            if world.faults.writes() <= writes + n {
                assert!(n > 30, "{n} writes");
                break;
            }
            world.retry_until_well();
            assert_eq!(world.meaning(), fresh.meaning(), "write {n}");
        }
    }
}

#[test]
fn one_service_that_fails_holds_up_no_other() {
    let mut world = World::new(&SIZES);
    world.faults.fail_next(1, REFUSED);
    let report = world.apply([service(1, [1]), service(2, [1])]);
    assert_eq!((report.failed.len(), report.programmed.len()), (1, 1));
    assert_eq!(world.problems(), ["default/s1//TCP: ids: can't write an entry: ENOMEM: Out of memory"]);
    assert_eq!(world.reconciler.next_retry(), Some(world.now() + Duration::from_millis(200)));
    assert_eq!(world.reconciler.retry().programmed.len(), 0, "not yet");
    world.advance(Duration::from_millis(200));
    assert_eq!(world.reconciler.retry().programmed.len(), 1);
    assert_eq!((world.problems().len(), world.reconciler.next_retry()), (0, None));
    let counts = world.reconciler.counts();
    assert_eq!((counts.failures, counts.retries), (1, 1));
}

#[test]
fn names_that_do_not_fit_keep_no_one_from_being_served() {
    let mut world = World::new(&SIZES);
    world.faults.fail_map("backend_names", Fault::Full);
    world.apply([service(1, [1, 2])]);
    assert_eq!(world.problems().len(), 1);
    assert_eq!(world.memory.v4.frontends.get(&frontend(1)).unwrap().unwrap().slot_count, 2);
}

#[test]
fn ranges_that_do_not_fit_leave_the_old_version_whole() {
    let mut world = World::new(&SIZES);
    world.reconciler.synced();
    let of = |n: u8| service(1, [1]).balanced(1).ranges([([10, n, 0, 0], 16)]);
    world.apply([of(1)]);
    let before = world.meaning();
    world.faults.fail_map("ranges_v4", Fault::Full);
    world.apply([of(2)]);
    assert_eq!(world.problems(), ["default/s1//TCP: ranges_v4 is full (16384): raise --map-size ranges=N"]);
    assert_eq!(world.meaning(), before);
    world.faults.clear();
    world.retry_until_well();
    let mut fresh = World::new(&SIZES);
    fresh.apply([of(2)]);
    assert_eq!(world.meaning(), fresh.meaning());
}

#[test]
fn outsiders_are_not_sent_to_a_frontend_that_finds_no_room() {
    let mut world = World::new(&Sizes { frontends: 2, ..SIZES });
    world.reconciler.synced();
    world.apply([service(1, [1, 2]).node_port(1, 30_080)]);
    let before = world.meaning();
    let still = |world: &World| {
        let now = world.meaning();
        let there = |line: &&String| line.starts_with("frontend 192");
        before.iter().filter(there).all(|line| now.contains(line)) && now.iter().filter(there).count() == 1
    };
    world.apply([service(1, [1, 2]).node_port(1, 30_080).local([1])]);
    assert_eq!(world.problems(), ["default/s1//TCP: frontends_v4 is full (2): raise --map-size frontends=N"]);
    assert!(still(&world), "{:?}", world.meaning());
}

#[test]
fn two_that_want_one_frontend_are_told_apart() {
    let mut world = World::new(&SIZES);
    world.reconciler.synced();
    let mut second = service(2, [1]);
    second.frontends.push(service(1, []).frontends[0]);
    world.apply([service(1, [1])]);
    world.apply([second]);
    assert_eq!(
        world.problems(),
        ["default/s2//TCP: 10.96.0.1:80/TCP belongs to default/s1//TCP: change the address or port of one of them"]
    );
    let owner = |world: &World, n| world.memory.v4.frontends.get(&frontend(n)).unwrap().unwrap().service;
    assert_eq!(owner(&world, 1), world.service_id("s1"));
    assert_eq!(owner(&world, 2), world.service_id("s2"));
    world.delete("s1");
    world.retry_until_well();
    assert_eq!(owner(&world, 1), world.service_id("s2"));
}

#[test]
fn ids_that_have_run_out_are_an_error() {
    let mut world = World::new(&SIZES);
    let last = NextIds { service: ServiceId { id: 5 }, backend: BackendId { id: u32::MAX - 1 } };
    world.memory.ids.insert(&ONLY, &last).unwrap();
    world.restart();
    world.apply([service(1, [1])]);
    assert_eq!(world.problems().len(), 0);
    world.apply([service(1, [1, 2])]);
    assert_eq!(
        world.problems(),
        ["default/s1//TCP: every backend id was given out: run `affinity cleanup` and start again"]
    );
    assert_eq!(world.memory.v4.frontends.get(&frontend(1)).unwrap().unwrap().slot_count, 1);
}

#[test]
fn an_audit_repairs_every_map() {
    let lan = ([10, 1, 0, 0], 16);
    let services = [service(1, [1, 2]).sticky(10), service(2, [1, 2]), service(3, [1]).balanced(3).ranges([lan])];
    let mut world = World::unwatched(&SIZES);
    world.apply(services);
    world.reconciler.synced();
    let (good, ids) = (world.meaning(), world.service_ids());
    let differences = |map: &str, difference| [((map.to_owned(), difference), 1)].into();
    let repaired = |world: &mut World, map: &str, difference| {
        let audit = world.reconciler.audit().unwrap();
        assert_eq!(audit.differences.by_map, differences(map, difference));
        assert_eq!(audit.report.failed, []);
        assert_eq!((world.meaning(), world.service_ids()), (good.clone(), ids.clone()));
        assert!(world.reconciler.audit().unwrap().differences.is_empty());
    };
    let memory = world.memory.clone();

    let value = memory.v4.frontends.get(&frontend(1)).unwrap().unwrap();
    memory.v4.frontends.clone().remove(&frontend(1)).unwrap();
    repaired(&mut world, "frontends_v4", Difference::Missing);
    memory.v4.frontends.clone().insert(&frontend(9), &value).unwrap();
    repaired(&mut world, "frontends_v4", Difference::Extra);
    memory.v4.frontends.clone().insert(&frontend(2), &value).unwrap();
    repaired(&mut world, "frontends_v4", Difference::Changed);

    let (key, row) = memory.v4.backends.entries().unwrap()[0];
    memory.v4.backends.clone().remove(&key).unwrap();
    repaired(&mut world, "backends_v4", Difference::Missing);
    let other = affinity_common::abi::backends::Backend { addr: [1, 2, 3, 4], ..row };
    memory.v4.backends.clone().insert(&key, &other).unwrap();
    repaired(&mut world, "backends_v4", Difference::Changed);
    let stray = affinity_common::abi::backends::BackendKey { backend: BackendId { id: 77 }, ..key };
    memory.v4.backends.clone().insert(&stray, &row).unwrap();
    repaired(&mut world, "backends_v4", Difference::Extra);

    let range = memory.v4.ranges.keys().unwrap()[0];
    memory.v4.ranges.clone().remove(&range).unwrap();
    repaired(&mut world, "ranges_v4", Difference::Missing);
    let of_nobody = RangeKey { service: ServiceId { id: 98 }, ..range };
    for extra in [RangeKey { addr: [10, 2, 0, 0], ..range }, of_nobody] {
        memory.v4.ranges.clone().insert(&extra, &Range::default()).unwrap();
        repaired(&mut world, "ranges_v4", Difference::Extra);
    }

    let slot = memory.v4.frontends.get(&frontend(2)).unwrap().unwrap().first_slot;
    memory.slots.clone().remove(&slot).unwrap();
    repaired(&mut world, "slots", Difference::Changed);

    let id = ids["default/s1//TCP"];
    let name = memory.services.get(&id).unwrap().unwrap();
    memory.services.clone().remove(&id).unwrap();
    repaired(&mut world, "services", Difference::Missing);
    memory.services.clone().insert(&ServiceId { id: 99 }, &name).unwrap();
    repaired(&mut world, "services", Difference::Extra);

    memory.backend_stats.clone().remove(&key).unwrap();
    repaired(&mut world, "backend_stats", Difference::Missing);
    memory.backend_names.clone().insert(&stray, &bytemuck::Zeroable::zeroed()).unwrap();
    repaired(&mut world, "backend_names", Difference::Extra);

    memory.ids.clone().remove(&ONLY).unwrap();
    repaired(&mut world, "ids", Difference::Changed);
    assert_ne!(memory.ids.get(&ONLY).unwrap().unwrap(), NextIds::default());
    assert_eq!(world.reconciler.counts().differences, 15);
}

#[test]
fn a_filter_that_can_not_be_put_right_is_told_of_and_tried_again() {
    let mut world = World::new(&SIZES);
    world.reconciler.synced();
    world.apply([service(1, [1])]);
    let (mut filter, before) = (world.memory.service_filter.clone(), world.memory.service_filter.entries().unwrap());
    let (word, _) = *before.iter().find(|(_, word)| word.bits != 0).expect("a bit");
    filter.remove(&word).unwrap();
    world.faults.fail_map("service_filter", REFUSED);
    world.reconciler.audit().unwrap();
    assert_eq!(world.problems(), ["services' addresses: service_filter: can't write an entry: ENOMEM: Out of memory"]);
    world.faults.clear();
    world.retry_until_well();
    assert_eq!(world.memory.service_filter.entries().unwrap(), before);
}
