//! A daemon that takes over from another.

use affinity_common::{
    abi::{
        addresses::{Address, AddressKey},
        backends::{Backend, BackendKey, ELIGIBLE},
        filter::{FilterWord, Place},
        frontends::{CLUSTER, Frontend, LOCAL},
        source_ranges::{Range, RangeKey},
    },
    family::V4,
    types::{BackendId, ServiceId},
};

use super::world::{SIZES, World, frontend, service};
use crate::{
    model::ServiceName,
    plan::{Scope, Scopes},
    reconcile::Change,
    tables::Table,
};

/// Everything with its ids, but for the datapath's maps.
fn exactly(world: &World) -> Vec<String> {
    crate::tables::dump::dump(&world.memory.tables()).unwrap()
}

#[test]
fn ids_outlive_the_daemon_and_are_not_given_out_again() {
    let mut world = World::new(&SIZES);
    world.apply([service(1, [1, 2]), service(2, [1]).sticky(10)]);
    world.reconciler.synced();
    let before = exactly(&world);
    world.restart();
    world.apply([service(2, [1]).sticky(10), service(1, [1, 2])]);
    world.reconciler.synced();
    assert_eq!(exactly(&world), before);

    let old = world.service_ids();
    world.delete("s1");
    world.delete("s2");
    world.restart();
    world.reconciler.synced();
    world.apply([service(1, [1, 2])]);
    let new = world.service_id("s1");
    assert!(old.values().all(|id| *id < new), "{old:?} {new:?}");
    let backends = world.memory.v4.backends.keys().unwrap();
    assert_eq!(backends.iter().map(|key| key.backend.id).collect::<Vec<_>>(), [4, 5]);
}

#[test]
fn nothing_is_taken_out_before_every_source_has_synced() {
    let mut world = World::new(&SIZES);
    world.apply([service(1, [1, 2]), service(2, [1]), service(4, [1])]);
    world.reconciler.synced();
    let before = world.meaning();

    world.restart();
    let report = world.apply([service(1, [1]), service(3, [1]), service(4, [1, 2])]);
    assert_eq!(report.waiting.len(), 1);
    assert_eq!(report.programmed.len(), 2, "one that is new, and one that only grows");
    let report = world.delete("s4");
    assert_eq!(report.waiting.len(), 1);
    let now = world.meaning();
    for line in before.iter().filter(|line| line.contains("s1") || line.contains("s2")) {
        assert!(now.contains(line), "{line}");
    }
    assert_eq!(world.reconciler.next_sweep(), None);
    world.reconciler.audit().unwrap();
    assert_eq!(world.meaning(), now);

    world.reconciler.synced();
    let mut fresh = World::new(&SIZES);
    fresh.apply([service(1, [1]), service(3, [1])]);
    assert_eq!(world.meaning(), fresh.meaning());
}

#[test]
fn what_is_withheld_stays_until_it_is_planned_or_gone() {
    let mut world = World::new(&SIZES);
    world.apply([service(1, [1, 2]), service(2, [1]).sticky(10), service(3, [1])]);
    world.reconciler.synced();
    let whole = world.meaning();
    world.restart();
    world.apply([service(3, [1])]);
    let bad = |name: &ServiceName| ["s1", "s2"].contains(&&*name.name);
    assert_eq!(world.reconciler.withhold(bad).writes, 0);
    world.reconciler.synced();
    world.reconciler.audit().unwrap();
    assert_eq!(world.meaning(), whole);

    // One is understood now, the other is gone.
    world.apply([service(1, [1])]);
    world.reconciler.withhold(|_| false);
    let mut fresh = World::new(&SIZES);
    fresh.apply([service(1, [1]), service(3, [1])]);
    assert_eq!(world.meaning(), fresh.meaning());
}

#[test]
fn of_two_ids_for_one_service_port_the_one_with_frontends_is_trusted() {
    let mut world = World::unwatched(&SIZES);
    world.apply([service(1, [1]), service(2, [])]);
    let (first, second) = (world.service_id("s1"), world.service_id("s2"));
    let mut services = world.memory.services.clone();
    let one = services.get(&first).unwrap().unwrap();
    services.insert(&second, &one).unwrap();
    services.insert(&ServiceId { id: 20 }, &one).unwrap();
    services.insert(&ServiceId { id: 30 }, &bytemuck::Zeroable::zeroed()).unwrap();
    world.memory.v4.frontends.remove(&frontend(1)).unwrap();

    world.restart();
    assert_eq!(world.apply([service(1, [1])]).waiting.len(), 1, "it had a frontend, which is to go");
    world.reconciler.synced();
    assert_eq!(world.memory.v4.frontends.get(&frontend(1)).unwrap().unwrap().service, second);
    assert_eq!(world.service_ids().into_values().collect::<Vec<_>>(), [second]);
    world.apply([service(3, [])]);
    assert_eq!(world.service_id("s3"), ServiceId { id: 31 }, "beyond all that were found");
}

#[test]
fn of_two_ids_for_one_backend_the_one_in_the_slots_is_trusted() {
    let mut world = World::new(&SIZES);
    world.apply([service(1, [1])]);
    let (key, row) = world.memory.v4.backends.entries().unwrap()[0];
    for (id, service) in [(0, key.service), (9, key.service), (5, ServiceId { id: 40 })] {
        world.memory.v4.backends.insert(&BackendKey { service, backend: BackendId { id } }, &row).unwrap();
    }
    world.restart();
    world.apply([service(1, [1])]);
    assert_eq!(world.memory.v4.backends.len().unwrap(), 4);
    world.reconciler.synced();
    assert_eq!(world.memory.v4.backends.entries().unwrap(), [(key, row)]);
    world.apply([service(1, [1, 2])]);
    assert!(world.memory.v4.backends.keys().unwrap().iter().any(|key| key.backend.id == 10));
}

#[test]
fn what_is_not_understood_is_taken_out_after_the_sync() {
    let mut world = World::unwatched(&SIZES);
    let value = Frontend { service: ServiceId { id: 50 }, first_slot: 8_000, slot_count: 1_000, ..Frontend::default() };
    world.memory.v4.frontends.insert(&frontend(7), &value).unwrap();
    let overlapping = Frontend { service: ServiceId { id: 51 }, first_slot: 3, slot_count: 10, ..value };
    world.memory.v4.frontends.insert(&frontend(8), &overlapping).unwrap();
    let overlapping = Frontend { service: ServiceId { id: 52 }, first_slot: 5, ..overlapping };
    world.memory.v4.frontends.insert(&frontend(9), &overlapping).unwrap();
    let key = BackendKey { service: ServiceId { id: 60 }, backend: BackendId { id: 70 } };
    world.memory.v4.backends.insert(&key, &Backend::default()).unwrap();
    world.memory.backend_stats.insert(&key, &bytemuck::Zeroable::zeroed()).unwrap();

    world.restart();
    world.apply([service(1, [1, 2]).sticky(10)]);
    assert_eq!(world.memory.v4.frontends.len().unwrap(), 4);
    world.reconciler.synced();
    let mut fresh = World::new(&SIZES);
    fresh.apply([service(1, [1, 2]).sticky(10)]);
    assert_eq!(world.meaning(), fresh.meaning());
    assert_eq!((world.service_id("s1").id, world.problems().len()), (61, 0));
}

#[test]
fn addresses_and_their_filter_are_put_right() {
    let mut world = World::unwatched(&SIZES);
    world.apply([service(1, [1]), service(2, [1]).dual()]);
    world.reconciler.synced();
    let before = exactly(&world);
    let known = AddressKey { addr: frontend(1).addr };
    let place = Place::of::<V4>(&known.addr);

    // Taken out behind the daemon's back; and an address, and a bit, that nobody wants.
    let (mut addresses, mut filter) = (world.memory.v4.addresses.clone(), world.memory.service_filter.clone());
    addresses.remove(&known).unwrap();
    addresses.insert(&AddressKey { addr: [9, 9, 9, 9] }, &Address::default()).unwrap();
    filter.insert(&place.word, &FilterWord::default()).unwrap();
    filter.insert(&(place.word ^ 1), &FilterWord { bits: 4 }).unwrap();
    let audit = world.reconciler.audit().unwrap();
    assert_eq!(audit.differences.total(), 4, "{}", audit.differences);
    assert_eq!(exactly(&world), before);
    assert!(world.reconciler.audit().unwrap().differences.is_empty());

    // A daemon that finds them so when it starts.
    addresses.remove(&known).unwrap();
    filter.insert(&place.word, &FilterWord::default()).unwrap();
    world.restart();
    world.apply([service(1, [1]), service(2, [1]).dual()]);
    world.reconciler.synced();
    assert_eq!(exactly(&world), before);
    world.delete("s1");
    world.delete("s2");
    assert!(addresses.is_empty().unwrap());
    assert!(filter.entries().unwrap().iter().all(|(_, word)| word.bits == 0));
}

/// Rows of an earlier version have one eligibility, of whichever scope the service's frontends had.
#[test]
fn rows_of_an_earlier_version_are_written_anew_without_a_gap() {
    for scope in [CLUSTER, LOCAL] {
        let mut world = World::new(&SIZES);
        let services = || {
            let mut plan = service(1, [1, 2]).sticky(10).draining(2).plan();
            let family = &mut plan.ports[0].v4;
            if scope == LOCAL {
                family.frontends.iter_mut().for_each(|frontend| frontend.scope = Scope::Local);
                family
                    .backends
                    .iter_mut()
                    .for_each(|it| it.eligible = Scopes { cluster: false, local: it.eligible.cluster });
            }
            [Change::Apply(plan)]
        };
        world.reconciler.reconcile(services());
        world.reconciler.synced();
        let after = exactly(&world);
        for (key, row) in world.memory.v4.backends.entries().unwrap() {
            let flags = if row.is_eligible(scope) { ELIGIBLE } else { 0 };
            world.memory.v4.backends.insert(&key, &Backend { flags, ..row }).unwrap();
        }
        world.restart();
        world.written();
        let report = world.reconciler.reconcile(services());
        assert_eq!((report.waiting.len(), report.programmed.len()), (0, 1), "nothing is taken from anyone");
        world.reconciler.synced();
        assert!(world.written().iter().all(|map| map == "backends_v4"));
        assert_eq!(exactly(&world), after);
        // Whoever is moved on the way has what it had until its slots are others.
        for (key, row) in world.memory.v4.backends.entries().unwrap() {
            world.memory.v4.backends.insert(&key, &Backend { flags: ELIGIBLE, ..row }).unwrap();
        }
        world.restart();
        world.apply([service(1, [1, 3]).sticky(10).node_port(1, 30_080).local([3])]);
        world.reconciler.synced();
        let mut fresh = World::new(&SIZES);
        fresh.apply([service(1, [1, 3]).sticky(10).node_port(1, 30_080).local([3])]);
        assert_eq!(world.meaning(), fresh.meaning());
    }
}

#[test]
fn ranges_are_taken_over_and_those_of_nobody_taken_out() {
    let mut world = World::new(&SIZES);
    let (lan, other) = (([10, 1, 0, 0], 16), ([10, 2, 0, 0], 16));
    let of = |ranges: &[([u8; 4], u8)]| service(1, [1]).balanced(1).ranges(ranges.iter().copied());
    world.apply([of(&[lan, other])]);
    world.reconciler.synced();
    let stray = RangeKey::of_range(ServiceId { id: 70 }, [10, 9, 0, 0], 16);
    world.memory.v4.ranges.insert(&stray, &Range::default()).unwrap();
    world.restart();
    assert_eq!(world.apply([of(&[lan])]).waiting.len(), 1, "somebody would no longer be let in");
    assert_eq!(world.memory.v4.ranges.len().unwrap(), 3);
    world.reconciler.synced();
    assert_eq!(world.memory.v4.ranges.len().unwrap(), 1);
    world.apply([service(2, [])]);
    assert_eq!(world.service_id("s2"), ServiceId { id: 71 }, "beyond all that were found");
}
