//! When affinity entries are taken out, and when they are not.

use std::time::Duration;

use affinity_common::{
    abi::affinity::{Affinity, AffinityKey},
    family::V4,
    types::ServiceId,
};
use nix::errno::Errno;

use super::world::{SIZES, World, service};
use crate::tables::{Table, faulty::Fault};

fn remember(world: &mut World, service: ServiceId, clients: u8) {
    for n in 0..clients {
        let key = AffinityKey::<V4>::new([10, 244, 0, n], service, 0);
        world.memory.v4.affinity.insert(&key, &Affinity::default()).unwrap();
    }
}

fn remembered(world: &World) -> Vec<u32> {
    world.memory.v4.affinity.keys().unwrap().iter().map(|key| key.service.id).collect()
}

/// A world with two services with affinity and two clients each.
fn world() -> (World, ServiceId, ServiceId) {
    let mut world = World::new(&SIZES);
    world.apply([service(1, [1, 2]).sticky(10), service(2, [1]).sticky(10)]);
    world.reconciler.synced();
    let (one, two) = (world.service_id("s1"), world.service_id("s2"));
    remember(&mut world, one, 2);
    remember(&mut world, two, 2);
    world.sweep();
    assert_eq!(remembered(&world).len(), 4, "what has affinity keeps its entries, expired or not");
    (world, one, two)
}

#[test]
fn entries_go_with_the_affinity_a_second_later() {
    let (mut world, one, two) = world();
    world.apply([service(1, [1, 2])]);
    assert_eq!(world.reconciler.next_sweep(), Some(world.now() + Duration::from_secs(1)));
    world.reconciler.sweep_affinity(100).unwrap();
    assert_eq!(remembered(&world).len(), 4, "a program may still add some");
    world.sweep();
    assert_eq!(remembered(&world), [two.id, two.id]);
    assert_eq!(world.reconciler.counts().swept, 2);

    remember(&mut world, one, 1);
    world.apply([service(1, [1, 2]).sticky(5)]);
    world.sweep();
    assert_eq!(remembered(&world).len(), 3);
}

#[test]
fn entries_go_with_the_service() {
    let (mut world, _, two) = world();
    world.delete("s1");
    world.sweep();
    assert_eq!(remembered(&world), [two.id, two.id]);
}

#[test]
fn affinity_that_comes_back_starts_afresh_before_it_starts() {
    let (mut world, _, two) = world();
    world.apply([service(1, [1, 2])]);
    world.apply([service(1, [1, 2]).sticky(10)]);
    assert_eq!(remembered(&world), [two.id, two.id]);
    world.apply([service(2, [1])]);
    world.advance(Duration::from_secs(1));
    world.reconciler.sweep_affinity(1).unwrap();
    assert_eq!(remembered(&world).len(), 1, "a sweep is under way");
    world.apply([service(2, [1]).sticky(10)]);
    assert!(remembered(&world).is_empty());
    remember(&mut world, two, 2);
    world.sweep();
    assert_eq!(remembered(&world), [two.id, two.id], "those are new");
}

#[test]
fn entries_survive_a_change_of_the_timeout_and_of_the_backends() {
    let (mut world, ..) = world();
    world.apply([service(1, [3]).sticky(20), service(2, []).sticky(10)]);
    world.sweep();
    world.restart();
    world.apply([service(1, [3]).sticky(20), service(2, []).sticky(10)]);
    world.reconciler.synced();
    world.sweep();
    assert_eq!(remembered(&world).len(), 4);
}

#[test]
fn what_a_dead_daemon_has_left_is_swept() {
    let (mut world, _, two) = world();
    world.apply([service(1, [1, 2])]);
    world.restart();
    world.apply([service(1, [1, 2]), service(2, [1]).sticky(10)]);
    world.sweep();
    assert_eq!(remembered(&world).len(), 4, "not before the sync");
    world.reconciler.synced();
    world.sweep();
    assert_eq!(remembered(&world), [two.id, two.id]);
}

#[test]
fn a_sweep_that_fails_is_made_again() {
    let (mut world, _, two) = world();
    world.delete("s1");
    world.advance(Duration::from_secs(1));
    world.faults.fail_next(1, Fault::Errno(Errno::EBUSY));
    world.reconciler.sweep_affinity(100).unwrap_err();
    world.sweep();
    assert_eq!(remembered(&world), [two.id, two.id]);
}
