//! Random sequences of packets, clock steps, changes of the services, evictions and full maps, held against a reference
//! model: for each packet the plain rules of what may become of it, said from what the maps held before.
//!
//! The model knows the rules and no code of the datapath's: no hashes (a first choice may be any slot's, but must be the
//! same for the same client), no times of the next look (a use that is older than its bound is recorded anew within two
//! ticks), no order of writes.

mod world;

use std::collections::{BTreeMap, BTreeSet};

use affinity_common::abi::affinity::Affinity;
use affinity_common::abi::conntrack::{Conntrack, ConntrackKey};
use affinity_common::dp::parse::{ACK, FIN, RST, SYN};
use affinity_common::family::{V4, V6};
use affinity_common::reason::Reason;
use affinity_common::testing::{Faults, Segment, Wire};
use affinity_common::types::{Nanos, Proto, TICK_SHIFT};
use proptest::prelude::*;
use world::{End, Service, State, World, backend_of};

const TICK: u64 = 1 << TICK_SHIFT;

/// One step.
#[derive(Clone, Debug)]
enum Step {
    /// A client sends a packet to a service.
    Send { service: usize, client: End, flags: u8 },
    /// A backend sends a packet to a client.
    Answer { service: usize, client: End, place: usize, flags: u8 },
    /// Time passes.
    Sleep(Nanos),
    /// A backend changes.
    Backend { service: usize, place: usize, state: State },
    /// A service's affinity changes.
    Timeout { service: usize, seconds: u32 },
    /// An affinity entry is evicted.
    EvictClient { service: usize, client: End },
    /// The entries of a connection are evicted, one direction or both.
    EvictFlow { service: usize, client: End, place: Option<usize> },
    /// Maps refuse new entries, or take them again.
    Faults(Faults),
}

fn step() -> impl Strategy<Value = Step> {
    let service = 0..3usize;
    // Few of each, so that they meet.
    let client = (1..4u8, 0..3u16).prop_map(|(host, port)| ([10, 244, 0, 10 + host], 40_000 + port));
    let flags = prop_oneof![3 => Just(SYN), 4 => Just(ACK), 1 => Just(FIN | ACK), 1 => Just(RST), 1 => Just(SYN | ACK)];
    let place = 0..4usize;
    let state = prop_oneof![3 => Just(State::Eligible), 1 => Just(State::Draining), 1 => Just(State::Gone)];
    let millis = prop_oneof![
        Just(0u64),
        Just(16),
        Just(62),
        Just(70),
        Just(500),
        Just(1_000),
        Just(1_020),
        Just(2_000),
        Just(2_983),
        Just(3_000),
        Just(5_000),
        Just(29_990),
        Just(30_010),
        Just(121_000),
        0..200_000u64
    ];
    let sleep = millis.prop_map(|millis| Nanos(millis * 1_000_000));
    prop_oneof![
        10 => (service.clone(), client.clone(), flags.clone())
            .prop_map(|(service, client, flags)| Step::Send { service, client, flags }),
        6 => (service.clone(), client.clone(), place.clone(), flags)
            .prop_map(|(service, client, place, flags)| Step::Answer { service, client, place, flags }),
        5 => sleep.prop_map(Step::Sleep),
        3 => (service.clone(), place.clone(), state)
            .prop_map(|(service, place, state)| Step::Backend { service, place, state }),
        1 => (service.clone(), prop_oneof![Just(0u32), Just(1), Just(3), Just(10_800)])
            .prop_map(|(service, seconds)| Step::Timeout { service, seconds }),
        1 => (service.clone(), client.clone()).prop_map(|(service, client)| Step::EvictClient { service, client }),
        2 => (service, client, proptest::option::of(place))
            .prop_map(|(service, client, place)| Step::EvictFlow { service, client, place }),
        1 => (any::<bool>(), any::<bool>())
            .prop_map(|(conntrack_full, affinity_full)| Step::Faults(Faults { conntrack_full, affinity_full })),
    ]
}

/// The world, and what the model remembers beside.
struct Model<F: Wire> {
    world: World<F>,
    faults: Faults,
    /// The first choices since a service's eligible backends last changed.
    first_choices: BTreeMap<(usize, [u8; 4]), usize>,
    /// The ways back that were evicted: another connection may have taken them.
    evicted: BTreeSet<ConntrackKey<F>>,
}

impl<F: Wire> Model<F> {
    fn new() -> Self {
        let services =
            vec![Service::new(1, Proto::TCP, 3), Service::new(2, Proto::TCP, 0), Service::new(3, Proto::UDP, 1)];
        Self {
            world: World::new(256, services),
            faults: Faults::default(),
            first_choices: BTreeMap::new(),
            evicted: BTreeSet::new(),
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Send { service, client, flags } => self.send(*service, *client, *flags),
            Step::Answer { service, client, place, flags } => self.answer(*service, *client, *place, *flags),
            Step::Sleep(span) => self.world.env.sleep(*span),
            Step::Backend { service, place, state } => {
                self.world.services[*service].backends[*place] = *state;
                self.changed(*service);
            }
            Step::Timeout { service, seconds } => {
                self.world.services[*service].timeout = *seconds;
                self.changed(*service);
            }
            Step::EvictClient { service, client } => {
                self.world.env.evict_affinity(&self.world.services[*service].affinity_key(client.0));
            }
            Step::EvictFlow { service, client, place } => {
                let service = &self.world.services[*service];
                let key = place.map_or_else(|| service.forward(*client), |place| service.reverse(*client, place));
                self.world.env.evict_conntrack(&key);
                self.evicted.insert(key);
            }
            Step::Faults(faults) => {
                self.faults = *faults;
                self.world.env.set_faults(*faults);
            }
        }
    }

    fn changed(&mut self, service: usize) {
        self.world.program(service);
        self.first_choices.retain(|(of, _), _| *of != service);
    }

    fn state(&self, service: usize, place: usize) -> State {
        self.world.services[service].backends[place]
    }

    /// The place of a backend id of a service.
    fn place(&self, service: usize, entry: &Affinity) -> usize {
        let service = &self.world.services[service];
        (0..4).find(|&place| service.backend_id(place) == entry.backend).expect("a backend of the service")
    }

    fn age(&self, entry: &Affinity) -> u64 {
        entry.last_used.age(self.world.env.clock()).0
    }

    /// Whether a connection's entry still speaks for its flow.
    fn is_known(&self, service: usize, held: &Conntrack<F>, flags: u8) -> bool {
        let of = &self.world.services[service];
        if of.proto == Proto::TCP {
            return flags & (SYN | ACK) != SYN;
        }
        let silent = held.last_seen.age(self.world.env.clock()).0;
        let lifetime = if held.seen & 1 != 0 { 120 } else { 30 };
        let place = (0..4).find(|&place| of.backend_id(place) == held.backend).expect("a backend of the service");
        silent.div_ceil(TICK) < (lifetime * 1_000_000_000u64).div_ceil(TICK) + 1
            && self.state(service, place) != State::Gone
    }

    fn send(&mut self, service: usize, client: End, flags: u8) {
        let of = self.world.services[service].clone();
        let flags = if of.proto == Proto::TCP { flags } else { 0 };
        let segment = of.segment(client, flags);
        let key = of.affinity_key(client.0);
        let before = self.world.env.peek_affinity(&key);
        let known = self.world.env.peek_conntrack(&of.forward(client));
        let others = self.world.env.affinity_entries();
        let (reason, sent) = self.world.ingress(&segment);
        let after = self.world.env.peek_affinity(&key);
        self.check_others(&others, &key);

        let Some(place) = backend_of::<F>(&sent) else {
            assert_eq!(sent, segment.build::<F>(), "dropped as it came");
            return self.check_drop(service, client, reason, known.is_some());
        };
        // Translated whole, to a backend of this service, with a way back.
        assert_eq!(sent, Segment { dst: Service::address(place), ..segment }.build::<F>());
        if let Some(back) = self.world.env.peek_conntrack(&of.reverse(client, place)) {
            let lost = reason == Reason::Established && self.evicted.contains(&of.reverse(client, place));
            assert!(lost || (F::name(&back.addr), back.port.get()) == of.frontend, "the way back leads to {back:?}");
        } else {
            assert_eq!(reason, Reason::Established, "a new connection has a way back");
        }

        let established = known.is_some_and(|held| self.is_known(service, &held, flags));
        let at_edge = known.is_some_and(|held| of.proto == Proto::UDP && self.is_at_edge(&held));
        if established && !(at_edge && reason != Reason::Established) {
            assert_eq!(reason, Reason::Established);
            let held = known.expect("known");
            assert_eq!((F::name(&held.addr), held.port.get()), Service::address(place), "conntrack wins");
            self.check_touch(service, place, before, after);
            return;
        }
        assert!(reason.is_selection(), "{reason:?}");
        self.check_selection(service, client, flags, reason, place, before, after);
    }

    /// Whether a flow's time is up within a tick: either is right.
    fn is_at_edge(&self, held: &Conntrack<F>) -> bool {
        let silent = held.last_seen.age(self.world.env.clock()).0;
        [30u64, 120].iter().any(|lifetime| (lifetime * 1_000_000_000).abs_diff(silent) <= 2 * TICK)
    }

    fn check_others(
        &self,
        before: &[(affinity_common::abi::affinity::AffinityKey<F>, Affinity)],
        key: &affinity_common::abi::affinity::AffinityKey<F>,
    ) {
        for (other, entry) in before.iter().filter(|(other, _)| other != key) {
            // It may be evicted (by a full LRU), never changed.
            let now = self.world.env.peek_affinity(other);
            assert!(now.is_none() || now == Some(*entry), "another client's entry");
        }
    }

    fn check_drop(&self, service: usize, client: End, reason: Reason, known: bool) {
        let of = &self.world.services[service];
        match reason {
            Reason::NoBackend => assert!(of.backends.iter().all(|state| *state != State::Eligible)),
            Reason::ConntrackRefused => assert!(self.faults.conntrack_full),
            Reason::Collision => {
                // Some other frontend's connection holds the way back.
                let held = (0..4).filter_map(|place| self.world.env.peek_conntrack(&of.reverse(client, place)));
                assert!(
                    held.into_iter().any(|held| (F::name(&held.addr), held.port.get()) != of.frontend),
                    "known: {known}"
                );
            }
            reason => panic!("dropped: {reason:?}"),
        }
    }

    /// An established flow: its client's entry is recorded anew where it is its own, eligible and old; else untouched.
    fn check_touch(&self, service: usize, place: usize, before: Option<Affinity>, after: Option<Affinity>) {
        let Some(before) = before else {
            return assert_eq!(after, None, "no entry out of nothing");
        };
        let after = after.expect("an entry stays");
        assert_eq!(after.backend, before.backend, "a flow moves nobody");
        let timeout = u64::from(self.world.services[service].timeout) * 1_000_000_000;
        let own = self.place(service, &before) == place && self.state(service, place) == State::Eligible;
        let bound = (timeout / 16).min(1_000_000_000);
        if after.last_used != before.last_used {
            assert!(own && timeout > 0 && self.age(&before) > bound, "refreshed without reason");
            assert_eq!(after.last_used, self.world.env.clock().ticks());
        }
    }

    #[expect(clippy::too_many_arguments, reason = "all that is known of a choice")]
    fn check_selection(
        &mut self,
        service: usize,
        client: End,
        flags: u8,
        reason: Reason,
        place: usize,
        before: Option<Affinity>,
        after: Option<Affinity>,
    ) {
        let of = self.world.services[service].clone();
        let now = self.world.env.clock().ticks();
        let middle = of.proto == Proto::TCP && flags & (SYN | ACK) != SYN;
        if of.timeout == 0 {
            assert_eq!(reason, if middle { Reason::Rebuilt } else { Reason::Hashed });
            assert_eq!(after, before, "without affinity no entry is touched");
            assert_eq!(self.state(service, place), State::Eligible);
            return;
        }
        let recalled = before.as_ref().map(|entry| self.place(service, entry));
        if middle && let Some(recalled) = recalled.filter(|&recalled| self.state(service, recalled) != State::Gone) {
            assert_eq!((reason, place), (Reason::Rebuilt, recalled), "where the entry says");
            assert_eq!(after, before);
            return;
        }
        assert_eq!(self.state(service, place), State::Eligible, "no new session on a backend that is not eligible");
        let live = before.as_ref().is_some_and(|entry| self.age(entry) < u64::from(of.timeout) * 1_000_000_000);
        let stays = live && recalled.is_some_and(|recalled| self.state(service, recalled) == State::Eligible);
        let expected = match (&before, live) {
            _ if stays => Reason::AffinityHit,
            (None, _) if self.faults.affinity_full => Reason::AffinityRefused,
            (None, _) => Reason::AffinityNew,
            (Some(_), true) => Reason::AffinityFailover,
            (Some(_), false) => Reason::AffinityExpired,
        };
        assert_eq!(reason, if middle { Reason::Rebuilt } else { expected });
        if stays {
            assert_eq!(Some(place), recalled, "a live entry is followed");
        }
        if matches!(expected, Reason::AffinityNew | Reason::AffinityRefused | Reason::AffinityFailover) {
            let first = *self.first_choices.entry((service, client.0)).or_insert(place);
            assert_eq!(place, first, "a first choice is always the same");
        }
        if expected == Reason::AffinityRefused {
            return assert_eq!(after, None);
        }
        let after = after.expect("an entry");
        assert_eq!(after.backend, of.backend_id(place));
        let before = before.unwrap_or_default();
        let bound = (u64::from(of.timeout) * 1_000_000_000 / 16).min(1_000_000_000);
        if stays && self.age(&before) <= bound {
            assert_eq!(after, before, "a fresh record is not written");
        } else {
            assert_eq!(after.last_used, now);
        }
    }

    fn answer(&mut self, service: usize, client: End, place: usize, flags: u8) {
        let of = self.world.services[service].clone();
        let flags = if of.proto == Proto::TCP { flags } else { 0 };
        let segment = of.answer(client, place, flags);
        let known = self.world.env.peek_conntrack(&of.reverse(client, place));
        let before = self.world.env.affinity_entries();
        let (reason, sent) = self.world.egress(&segment);
        let Some(held) = known else {
            return assert_eq!((reason, sent), (Reason::NotReply, segment.build::<F>()));
        };
        if reason == Reason::NotReply {
            // Its time was up.
            assert!(
                of.proto == Proto::UDP && held.last_seen.age(self.world.env.clock()).0 >= 30_000_000_000 - 2 * TICK
            );
            return assert_eq!(sent, segment.build::<F>());
        }
        assert_eq!(reason, Reason::Reply);
        let frontend = (F::name(&held.addr), held.port.get());
        assert_eq!(sent, Segment { src: frontend, ..segment }.build::<F>(), "the client sees whom it talked to");
        assert!(self.world.services.iter().any(|service| service.frontend == frontend));
        for (key, entry) in before {
            let now = self.world.env.peek_affinity(&key).expect("an entry stays");
            assert_eq!(now.backend, entry.backend, "a reply moves nobody");
            if now.last_used != entry.last_used {
                assert_eq!(F::name(&key.client), client.0);
                assert_eq!(now.last_used, self.world.env.clock().ticks());
            }
        }
    }
}

/// An established flow that goes on sends its use on time: within its bound and two ticks, the record is fresh.
fn keeps_its_client<F: Wire>(model: &Model<F>, pace: Nanos, timeout: u32) {
    let client = ([10, 244, 0, 200], 50_000);
    let (_, place) = model.world.send(0, client, SYN);
    let bound = (u64::from(timeout) * 1_000_000_000 / 16).min(1_000_000_000);
    for _ in 0..40 {
        model.world.env.sleep(pace);
        assert_eq!(model.world.send(0, client, ACK), (Reason::Established, place));
        let entry = model.world.env.peek_affinity(&model.world.services[0].affinity_key(client.0)).expect("an entry");
        assert!(model.age(&entry) <= bound + 2 * TICK, "{} ns at a pace of {pace:?}", model.age(&entry));
    }
}

fn walk<F: Wire>(steps: &[Step]) {
    let mut model = Model::<F>::new();
    for step in steps {
        model.step(step);
    }
}

fn goes_on<F: Wire>(millis: u64, timeout: u32) {
    let mut model = Model::<F>::new();
    model.world.services[0].timeout = timeout;
    model.changed(0);
    keeps_its_client(&model, Nanos(millis * 1_000_000), timeout);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn the_datapath_does_what_the_rules_say(steps in proptest::collection::vec(step(), 1..120)) {
        walk::<V4>(&steps);
        walk::<V6>(&steps);
    }

    #[test]
    fn a_flow_that_goes_on_is_a_use_on_time(millis in 1..3_000u64, timeout in 1..40u32) {
        goes_on::<V4>(millis, timeout);
        goes_on::<V6>(millis, timeout);
    }
}
