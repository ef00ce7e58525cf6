use proptest::prelude::*;

use super::*;
use crate::ipam::pool::{Block, LoadBalancerPoolSpec};

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn name(name: &str) -> ServiceName {
    ServiceName::new("default", name)
}

#[expect(clippy::unnecessary_wraps, reason = "as objects have it")]
fn at(second: i64) -> Option<Timestamp> {
    Some(Timestamp::from_second(second).expect("a time"))
}

/// A pool of blocks as `CIDR` or `FIRST-LAST`, made at a second.
fn pool(name: &str, second: i64, blocks: &[&str]) -> Pool {
    let blocks = blocks.iter().map(|text| match text.split_once('-') {
        Some((start, stop)) => Block { cidr: None, start: Some(start.into()), stop: Some(stop.into()) },
        None => Block { cidr: Some((*text).into()), ..Block::default() },
    });
    let spec = LoadBalancerPoolSpec { blocks: blocks.collect(), ..LoadBalancerPoolSpec::default() };
    Pool { created: at(second), ..Pool::read(&LoadBalancerPool::new(name, spec)) }
}

fn service(second: i64) -> LbService {
    LbService { created: at(second), is_ours: true, families: vec![IpFamily::V4], ..LbService::default() }
}

fn has(second: i64, addresses: &[&str]) -> LbService {
    LbService { has: addresses.iter().map(|text| ip(text)).collect(), ..service(second) }
}

fn wants(second: i64, addresses: &[&str]) -> LbService {
    LbService { wanted: addresses.iter().map(|text| ip(text)).collect(), ..service(second) }
}

/// Marks a service as one that this has seen to before.
fn known(service: LbService) -> LbService {
    LbService { condition: Some(("True".into(), "Assigned".into(), String::new())), ..service }
}

fn all<const N: usize>(services: [(&str, LbService); N]) -> BTreeMap<ServiceName, LbService> {
    services.into_iter().map(|(text, service)| (name(text), service)).collect()
}

/// The addresses and problems of a service, as text.
fn told(allocation: &Allocation, service: &str) -> (Vec<String>, Vec<String>) {
    let outcome = &allocation.services[&name(service)];
    (
        outcome.shares.iter().map(|share| share.address.to_string()).collect(),
        outcome.problems.iter().map(ToString::to_string).collect(),
    )
}

fn addresses(allocation: &Allocation, service: &str) -> Vec<String> {
    let (addresses, problems) = told(allocation, service);
    assert_eq!(problems, [""; 0], "{service}");
    addresses
}

#[test]
fn the_oldest_service_gets_the_first_address() {
    let services = all([("young", service(2)), ("old", service(1)), ("other", service(3))]);
    let allocation = allocate(&[pool("p", 0, &["192.0.2.0/30"])], &services);
    assert_eq!(addresses(&allocation, "old"), ["192.0.2.1"]);
    assert_eq!(addresses(&allocation, "young"), ["192.0.2.2"]);
    let (got, problems) = told(&allocation, "other");
    assert_eq!((got.len(), problems.as_slice()), (0, ["no IPv4 address is free in p".to_owned()].as_slice()));
    assert_eq!(allocation.pools["p"].ipv4, Usage { total: 2, used: 2, available: 0 });
    assert_eq!(allocation.pools["p"].reserved.len(), 2, "what is not in a status yet is reserved first");
    assert!(!allocation.services[&name("old")].shares[0].is_safe);
}

#[test]
fn what_a_service_has_it_keeps() {
    let services = all([("new", service(1)), ("old", has(2, &["192.0.2.1"]))]);
    let allocation = allocate(&[pool("p", 0, &["192.0.2.0/24"])], &services);
    assert_eq!(addresses(&allocation, "old"), ["192.0.2.1"]);
    assert_eq!(addresses(&allocation, "new"), ["192.0.2.2"]);
    assert!(allocation.services[&name("old")].shares[0].is_safe);
}

#[test]
fn an_address_that_no_pool_has_any_more_is_kept_and_told() {
    let services = all([("web", known(has(1, &["192.0.2.200"])))]);
    let allocation = allocate(&[pool("p", 0, &["192.0.2.0/28"])], &services);
    assert_eq!(addresses(&allocation, "web"), ["192.0.2.200"]);
    assert_eq!(allocation.services[&name("web")].shares[0].pool, None);
    assert_eq!(allocation.pools["p"].outside, [(ip("192.0.2.200"), name("web"))]);
    assert_eq!(allocation.pools["p"].ipv4.used, 0);
}

#[test]
fn who_has_addresses_of_somebody_elses_is_left_alone() {
    let services = all([("cloud", has(1, &["203.0.113.1"])), ("other", LbService { is_ours: false, ..service(1) })]);
    let allocation = allocate(&[pool("p", 0, &["192.0.2.0/28"])], &services);
    assert!(allocation.services.is_empty(), "{allocation:?}");
}

#[test]
fn an_address_of_a_service_of_another_class_is_taken() {
    let other = LbService { is_ours: false, ..has(1, &["192.0.2.1"]) };
    let services = all([("other", other), ("web", service(2))]);
    let allocation = allocate(&[pool("p", 0, &["192.0.2.0/24"])], &services);
    assert_eq!(addresses(&allocation, "web"), ["192.0.2.2"]);
}

#[test]
fn without_pools_nobody_is_seen_to() {
    assert_eq!(allocate(&[], &all([("web", service(1))])), Allocation::default());
}

#[test]
fn an_address_that_is_asked_for_is_given_or_a_reason() {
    let selector = ServiceSelector { namespaces: vec!["other".into()], ..ServiceSelector::default() };
    let pools = [
        pool("p", 0, &["192.0.2.0/24"]),
        Pool { selector, ..pool("others", 0, &["198.51.100.0/24"]) },
        Pool { disabled: true, ..pool("off", 0, &["203.0.113.0/24"]) },
    ];
    let services = all([
        ("a", wants(1, &["192.0.2.9"])),
        ("b", wants(2, &["192.0.2.9"])),
        ("c", wants(3, &["10.0.0.1"])),
        ("d", wants(4, &["198.51.100.1"])),
        ("e", wants(5, &["203.0.113.1"])),
        ("f", wants(6, &["2001:db8::1"])),
        ("g", wants(7, &["192.0.2.10", "192.0.2.11"])),
        ("h", LbService { not_addresses: vec!["x".into()], ..service(8) }),
        ("i", LbService { has: vec![ip("192.0.2.77")], ..wants(9, &["192.0.2.12"]) }),
        ("j", LbService { has: vec![ip("192.0.2.78")], ..wants(10, &["192.0.2.9"]) }),
    ]);
    let allocation = allocate(&pools, &services);
    let reason = |service| allocation.services[&name(service)].problems.iter().map(Problem::reason).collect::<Vec<_>>();
    assert_eq!(addresses(&allocation, "a"), ["192.0.2.9"]);
    assert_eq!(told(&allocation, "b").1, ["192.0.2.9 is asked for, and taken by Service default/a"]);
    for (service, reason_expected) in [
        ("b", "AddressTaken"),
        ("c", "OutsidePools"),
        ("d", "NotSelected"),
        ("e", "PoolDisabled"),
        ("f", "BadRequest"),
        ("h", "BadRequest"),
    ] {
        assert_eq!(reason(service)[0], reason_expected, "{service}");
        // Another address than that which it asks for is of no use; of a family that it does not ask for, one is.
        assert_eq!(told(&allocation, service).0.len(), usize::from(service == "f"), "{service}");
    }
    assert_eq!(told(&allocation, "g").0, ["192.0.2.10"]);
    assert_eq!(reason("g"), ["BadRequest"]);
    assert_eq!(addresses(&allocation, "i"), ["192.0.2.12"], "it moves to what it asks for");
    assert_eq!(told(&allocation, "j").0, ["192.0.2.78"], "it keeps what it has until it can");
    assert_eq!(reason("j"), ["AddressTaken"]);
}

#[test]
fn a_pool_that_overlaps_an_older_one_is_not_used() {
    let pools = [
        pool("young", 2, &["192.0.2.128-192.0.3.1"]),
        pool("old", 1, &["192.0.2.0/24"]),
        pool("younger", 3, &["192.0.3.0/24"]),
    ];
    let allocation = allocate(&pools, &all([("web", wants(1, &["192.0.3.1"]))]));
    let conflict = |pool: &str| allocation.pools[pool].conflict.as_deref();
    assert_eq!((conflict("old"), conflict("young"), conflict("younger")), (None, Some("old"), None));
    assert_eq!(addresses(&allocation, "web"), ["192.0.3.1"]);
}

#[test]
fn families_are_given_as_the_service_says() {
    let both = vec![IpFamily::V6, IpFamily::V4];
    let pools = [pool("four", 0, &["192.0.2.0/32"]), pool("six", 0, &["2001:db8::/64"])];
    let prefers = LbService { families: both.clone(), ..service(1) };
    let services = all([
        ("a", prefers.clone()),
        ("b", LbService { created: at(2), ..prefers.clone() }),
        ("c", LbService { created: at(3), needs_all_families: true, ..prefers }),
    ]);
    let allocation = allocate(&pools, &services);
    assert_eq!(addresses(&allocation, "a"), ["2001:db8::", "192.0.2.0"]);
    assert_eq!(addresses(&allocation, "b"), ["2001:db8::1"], "one is enough where both are only preferred");
    let (got, problems) = told(&allocation, "c");
    assert_eq!(got, ["2001:db8::2"]);
    assert_eq!(problems, ["no IPv4 address is free in four"]);
    assert_eq!(allocation.pools["six"].ipv6.total, i64::MAX);
}

#[test]
fn what_is_reserved_is_given_to_whom_it_is_reserved_for() {
    let reserved = vec![(ip("192.0.2.9"), name("web")), (ip("192.0.2.1"), name("unseen"))];
    let pools = [Pool { reserved, ..pool("p", 0, &["192.0.2.0/24"]) }];
    let allocation = allocate(&pools, &all([("old", service(1)), ("web", service(2))]));
    assert_eq!(addresses(&allocation, "web"), ["192.0.2.9"]);
    assert!(allocation.services[&name("web")].shares[0].is_safe);
    assert_eq!(addresses(&allocation, "old"), ["192.0.2.2"], "one that is not seen here yet may get the first");
    assert_eq!(allocation.pools["p"].reserved.len(), 3);
    // What has come into the status is reserved no more.
    let allocation = allocate(&pools, &all([("old", has(1, &["192.0.2.2"])), ("web", has(2, &["192.0.2.9"]))]));
    assert_eq!(allocation.pools["p"].reserved, [(ip("192.0.2.1"), name("unseen"))]);
}

#[test]
fn of_two_with_one_address_the_older_keeps_it() {
    let services = all([("old", has(1, &["192.0.2.1"])), ("young", has(2, &["192.0.2.1"]))]);
    let allocation = allocate(&[pool("p", 0, &["192.0.2.0/24"])], &services);
    assert_eq!(addresses(&allocation, "old"), ["192.0.2.1"]);
    assert_eq!(addresses(&allocation, "young"), ["192.0.2.2"]);
}

#[test]
fn a_service_that_its_pool_selects_no_more_gets_another_address() {
    let selector = ServiceSelector { namespaces: vec!["other".into()], ..ServiceSelector::default() };
    let pools = [Pool { selector, ..pool("others", 0, &["192.0.2.0/24"]) }, pool("p", 1, &["198.51.100.0/24"])];
    let allocation = allocate(&pools, &all([("web", has(1, &["192.0.2.1"]))]));
    assert_eq!(addresses(&allocation, "web"), ["198.51.100.1"]);
}

/// Any service: of one of four namespaces, with what it has and wants in or around the pools.
fn any_service() -> impl Strategy<Value = LbService> {
    let address = || (0_u32..40).prop_map(|low| IpAddr::V4((0xC000_0200 + low).into()));
    let six = (0_u128..4).prop_map(|low| IpAddr::V6(((0x2001_0db8 << 96) + low).into()));
    let families = prop::sample::select(vec![
        vec![IpFamily::V4],
        vec![IpFamily::V6],
        vec![IpFamily::V4, IpFamily::V6],
        vec![IpFamily::V6, IpFamily::V4],
    ]);
    let has = prop::collection::vec(prop_oneof![address(), six.clone()], 0..3);
    let wanted = prop_oneof![3 => Just(Vec::new()), 1 => prop::collection::vec(prop_oneof![address(), six], 1..3)];
    (0_i64..50, families, has, wanted, any::<[bool; 3]>()).prop_map(|(second, families, has, wanted, flags)| {
        LbService {
            families,
            has,
            wanted,
            is_ours: flags[0] || flags[1],
            needs_all_families: flags[2],
            condition: flags[1].then(|| ("True".into(), "Assigned".into(), String::new())),
            ..service(second)
        }
    })
}

fn any_pools() -> impl Strategy<Value = Vec<Pool>> {
    let any_pool = (0_u8..40, 0_u8..12, 0_i64..9, any::<[bool; 3]>(), 0_usize..3);
    prop::collection::vec(any_pool, 0..4).prop_map(|pools| {
        let pool = |(index, (first, length, second, flags, namespace)): (usize, (u8, u8, i64, [bool; 3], usize))| {
            let four = format!("192.0.2.{first}-192.0.2.{}", first + length);
            let blocks = if flags[0] { vec![four.as_str(), "2001:db8::/127"] } else { vec![four.as_str()] };
            let namespaces = if flags[1] { vec![format!("n{namespace}")] } else { Vec::new() };
            Pool {
                disabled: flags[2] && namespace == 0,
                selector: ServiceSelector { namespaces, ..ServiceSelector::default() },
                ..pool(&format!("p{index}"), second, &blocks)
            }
        };
        pools.into_iter().enumerate().map(pool).collect()
    })
}

/// What the world is once all has been written.
fn written(allocation: &Allocation, services: &BTreeMap<ServiceName, LbService>) -> BTreeMap<ServiceName, LbService> {
    let mut services = services.clone();
    for (name, outcome) in &allocation.services {
        let service = services.get_mut(name).expect("known");
        service.has = outcome.shares.iter().map(|share| share.address).collect();
        service.condition = Some(("True".into(), "Assigned".into(), String::new()));
    }
    services
}

proptest! {
    // No seeds are kept: they mean nothing once a generator has changed.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_address_is_given_twice_and_what_is_given_stays(
        pools in any_pools(),
        services in prop::collection::vec((0_usize..4, any_service()), 0..16),
    ) {
        let services: BTreeMap<ServiceName, LbService> = services.into_iter().enumerate()
            .map(|(index, (namespace, service))| (ServiceName::new(format!("n{namespace}"), format!("s{index}")), service))
            .collect();
        let mut world = services;
        for round in 0..4 {
            let allocation = allocate(&pools, &world);
            let mut given = BTreeMap::new();
            for (name, outcome) in &allocation.services {
                for share in &outcome.shares {
                    prop_assert_eq!(given.insert(share.address, name), None, "given twice");
                    // New ones are of a pool that selects the service and is in use.
                    if !world[name].has.contains(&share.address) {
                        let pool = pools.iter().find(|pool| Some(&pool.name) == share.pool.as_ref()).expect("a pool");
                        prop_assert!(pool.has(share.address) && !pool.disabled && !share.is_safe);
                        prop_assert!(pool.selector.matches(name, &world[name].labels));
                        prop_assert_eq!(&allocation.pools[&pool.name].conflict, &None);
                        // Nobody has it in the world as it is.
                        prop_assert!(world.iter().all(|(_, service)| !service.has.contains(&share.address)));
                        prop_assert!(allocation.pools[&pool.name].reserved.contains(&(share.address, name.clone())));
                    }
                }
            }
            let after = written(&allocation, &world);
            if round > 0 {
                // What was given once moves only to what was asked for, where that has become free.
                for (name, service) in &after {
                    let moved = service.has.iter().find(|address| !world[name].has.contains(address));
                    prop_assert!(moved.is_none_or(|address| service.wanted.contains(address) || {
                        // Or it had none of that family, and one has become free.
                        !world[name].has.iter().any(|had| had.is_ipv4() == address.is_ipv4())
                    }), "{} moved from {:?} to {:?}", name, world[name].has, service.has);
                }
            }
            world = after;
        }
    }

    #[test]
    fn a_restart_in_the_middle_gives_the_same(
        pools in any_pools(),
        services in prop::collection::vec(any_service(), 0..12),
        order in prop::collection::vec(any::<bool>(), 12),
    ) {
        let world: BTreeMap<ServiceName, LbService> = services.into_iter().enumerate()
            .map(|(index, service)| (name(&format!("s{index}")), service)).collect();
        let first = allocate(&pools, &world);
        // Everything is reserved, and some of it is written; then another leader looks.
        let pools: Vec<Pool> = pools.into_iter().map(|pool| {
            let reserved = first.pools[&pool.name].reserved.clone();
            Pool { reserved, ..pool }
        }).collect();
        let all_written = written(&first, &world);
        let mixed: BTreeMap<ServiceName, LbService> = world.iter().enumerate()
            .map(|(index, (name, service))| {
                (name.clone(), if order[index] { all_written[name].clone() } else { service.clone() })
            })
            .collect();
        let second = allocate(&pools, &mixed);
        for (name, outcome) in &second.services {
            let before: Vec<IpAddr> = first.services[name].shares.iter().map(|share| share.address).collect();
            for share in &outcome.shares {
                prop_assert!(
                    before.contains(&share.address) || !before.iter().any(|it| it.is_ipv4() == share.address.is_ipv4())
                        || mixed[name].wanted.contains(&share.address)
                        // Two had it before anything was given, and the other one has let go of it.
                        || mixed[name].has.contains(&share.address),
                    "{}: {:?}, then {:?}", name, before, share
                );
            }
        }
    }
}
