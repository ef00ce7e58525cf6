//! Random sequences of plans, faults, restarts and damage end, once nothing fails any more, in the maps that a daemon
//! makes that only knows the last plans.

use std::{collections::BTreeMap, time::Duration};

use affinity_common::abi::frontends::ANYBODY;
use nix::errno::Errno;
use proptest::prelude::*;

use super::world::{SIZES, Service, World, service};
use crate::{
    reconcile::Change,
    tables::{Table, faulty::Fault},
};

#[derive(Clone, Debug)]
enum Step {
    /// Services change together: the new state of each, or `None` where it goes.
    Change(Vec<(u8, Option<Service>)>),
    /// The daemon dies in the middle of a change, after so many writes.
    Crash(u64, Vec<(u8, Option<Service>)>),
    /// A write fails, so many from now.
    Fail(u64, bool),
    Wait(u64),
    Retry,
    Restart,
    Audit,
    Sweep,
    /// Another hand takes out a backend or a frontend.
    Damage(usize),
}

fn any_service(n: u8) -> impl Strategy<Value = Service> {
    let backends = prop::collection::btree_map(1..6u8, any::<bool>(), 0..5);
    // The address is one of its own or one that moves between the services.
    let frontends = prop::sample::subsequence(vec![n, n + 10, n + 20], 1..3);
    // Two node ports at an address that all have in common, and a load balancer's address.
    let outside = prop::sample::subsequence(vec![0, 1, 2], 0..3);
    let local = prop::option::of(prop::collection::vec(1..6u8, 0..3));
    let ranges = prop::option::of(prop::collection::vec((0..3u8).prop_map(|n| ([10, n, 0, 0], 16)), 0..3));
    let outside = (outside, local, ranges);
    (backends, frontends, prop::option::weighted(0.3, 1..100u32), any::<bool>(), any::<bool>(), outside).prop_map(
        move |(backends, frontends, affinity, dual, named, (outside, local, ranges))| {
            let mut made = service(n, backends.keys().copied());
            made.frontends = frontends.iter().map(|i| service(*i, []).frontends[0]).collect();
            made.affinity = affinity;
            made.port = if named { "http" } else { "" };
            (made.local, made.ranges) = (local, ranges);
            for which in outside {
                made =
                    if which == 2 { made.balanced(n) } else { made.node_port(1, 30_080 + 10 * which + u16::from(n)) };
            }
            for (i, eligible) in backends {
                made = if eligible { made } else { made.draining(i) };
            }
            if dual { made.dual() } else { made }
        },
    )
}

fn any_change() -> impl Strategy<Value = (u8, Option<Service>)> {
    (0..4u8).prop_flat_map(|n| (Just(n), prop::option::weighted(0.8, any_service(n))))
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => prop::collection::vec(any_change(), 1..4).prop_map(Step::Change),
        1 => (0..60u64, prop::collection::vec(any_change(), 1..4)).prop_map(|(n, changes)| Step::Crash(n, changes)),
        3 => (0..60u64, any::<bool>()).prop_map(|(n, full)| Step::Fail(n, full)),
        1 => (1..3000u64).prop_map(Step::Wait),
        1 => Just(Step::Retry),
        1 => Just(Step::Restart),
        1 => Just(Step::Audit),
        1 => Just(Step::Sweep),
        1 => (0..100usize).prop_map(Step::Damage),
    ]
}

proptest! {
    #[test]
    fn the_end_depends_on_the_last_plans_alone(steps in prop::collection::vec(any_step(), 1..25)) {
        let mut world = World::new(&SIZES);
        world.reconciler.synced();
        let mut services: BTreeMap<u8, Service> = BTreeMap::new();
        let (mut ids, mut names) = (BTreeMap::new(), BTreeMap::new());
        for step in steps {
            match step {
                Step::Change(changes) => change(&mut world, &mut services, changes),
                Step::Crash(n, changes) => {
                    world.faults.fail_from(n, Fault::Errno(Errno::EPERM));
                    change(&mut world, &mut services, changes);
                    world.faults.clear();
                    restart(&mut world, &services);
                }
                Step::Fail(n, full) => {
                    world.faults.fail_nth(n, if full { Fault::Full } else { Fault::Errno(Errno::ENOMEM) });
                }
                Step::Wait(millis) => world.advance(Duration::from_millis(millis)),
                Step::Retry => drop(world.reconciler.retry()),
                Step::Restart => restart(&mut world, &services),
                Step::Audit => drop(world.reconciler.audit()),
                Step::Sweep => drop(world.reconciler.sweep_affinity(10)),
                Step::Damage(n) => damage(&world, n),
            }
            // An id means one service port for ever, and a new one is beyond the last.
            for (name, id) in world.service_ids() {
                let meant = names.entry(id).or_insert_with(|| name.clone());
                prop_assert_eq!(&*meant, &name);
                let last = ids.insert(name, id);
                prop_assert!(last.is_none_or(|last| last <= id));
            }
        }
        world.faults.clear();
        world.reconciler.audit().unwrap();
        world.retry_until_well();
        prop_assert!(world.reconciler.audit().unwrap().differences.is_empty());

        let mut fresh = World::new(&SIZES);
        fresh.apply(services.into_values());
        prop_assert_eq!(world.meaning(), fresh.meaning());
    }
}

fn change(world: &mut World, services: &mut BTreeMap<u8, Service>, changes: Vec<(u8, Option<Service>)>) {
    for (n, service) in &changes {
        match service {
            Some(service) => drop(services.insert(*n, service.clone())),
            None => drop(services.remove(n)),
        }
    }
    world.reconciler.reconcile(changes.into_iter().map(|(n, made)| match made {
        Some(made) => Change::Apply(made.plan()),
        None => Change::Delete(service(n, []).plan().name),
    }));
}

fn restart(world: &mut World, services: &BTreeMap<u8, Service>) {
    world.restart();
    // A source tells of its objects one by one.
    for service in services.values() {
        world.apply([service.clone()]);
    }
    world.reconciler.synced();
}

/// Takes an entry out of a map without the watcher's knowledge, in the order that keeps his promise.
fn damage(world: &World, n: usize) {
    let (mut frontends, mut names) = (world.memory.v4.frontends.clone(), world.memory.backend_names.clone());
    let anybodys: Vec<_> = frontends.keys().unwrap().into_iter().filter(|key| key.origin == ANYBODY).collect();
    if let Some(key) = anybodys.get(n) {
        frontends.remove(key).unwrap();
    } else if let Some(key) = names.keys().unwrap().get(n % 7) {
        names.remove(key).unwrap();
    }
}
