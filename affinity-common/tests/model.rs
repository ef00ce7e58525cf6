//! Random sequences of packets, clock steps, changes of the services, evictions and full maps, held against a reference
//! model: for each packet the plain rules of what may become of it, said from what the maps held before.
//!
//! The model knows the rules and no code of the datapath's: no hashes (a first choice may be any slot's, but must be the
//! same for the same client), no times of the next look (a use that is older than its bound is recorded anew within two
//! ticks), no order of writes.

mod world;

use std::collections::{BTreeMap, BTreeSet};

use affinity_common::abi::affinity::Affinity;
use affinity_common::abi::conntrack::{Conntrack, ConntrackKey, REVERSE};
use affinity_common::dp::parse::{ACK, FIN, RST, SYN};
use affinity_common::family::{V4, V6};
use affinity_common::reason::{Reason, Verdict};
use affinity_common::testing::{Faults, Segment, Wire, source};
use affinity_common::types::{Nanos, Port, Proto, TICK_SHIFT};
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
    /// Whoever answers in the `nth` way back that there is sends a packet.
    AnswerAny { nth: usize, flags: u8 },
    /// A client sends a packet to a pod, past all services.
    Direct { client: End, place: usize, proto: Proto, flags: u8 },
    /// A client sends a packet to a service's address, and a port that no service has there.
    NoPort { service: usize, client: End, flags: u8 },
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
    // The last one is a backend itself.
    let host = prop_oneof![5 => 11..14u8, 1 => Just(101u8)];
    let client = (host, 0..3u16).prop_map(|(host, port)| ([10, 244, 0, host], 40_000 + port));
    let proto = prop_oneof![Just(Proto::TCP), Just(Proto::UDP)];
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
        6 => (service.clone(), client.clone(), place.clone(), flags.clone())
            .prop_map(|(service, client, place, flags)| Step::Answer { service, client, place, flags }),
        3 => (0..64usize, flags.clone()).prop_map(|(nth, flags)| Step::AnswerAny { nth, flags }),
        4 => (client.clone(), place.clone(), proto, flags.clone())
            .prop_map(|(client, place, proto, flags)| Step::Direct { client, place, proto, flags }),
        1 => (service.clone(), client.clone(), flags)
            .prop_map(|(service, client, flags)| Step::NoPort { service, client, flags }),
        5 => sleep.prop_map(Step::Sleep),
        3 => (service.clone(), place.clone(), state)
            .prop_map(|(service, place, state)| Step::Backend { service, place, state }),
        1 => (service.clone(), prop_oneof![Just(0u32), Just(1), Just(3), Just(10_800)])
            .prop_map(|(service, seconds)| Step::Timeout { service, seconds }),
        1 => (service.clone(), client.clone()).prop_map(|(service, client)| Step::EvictClient { service, client }),
        2 => (service, client, proptest::option::of(place))
            .prop_map(|(service, client, place)| Step::EvictFlow { service, client, place }),
        1 => (any::<bool>(), any::<bool>())
            .prop_map(|(conntrack_full, affinity_full)| Step::Faults(Faults { conntrack_full, affinity_full, ..Faults::default() })),
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
            Step::AnswerAny { nth, flags } => self.answer_any(*nth, *flags),
            Step::Direct { client, place, proto, flags } => self.direct(*client, *place, *proto, *flags),
            Step::NoPort { service, client, flags } => self.no_port(*service, *client, *flags),
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

        // A pod's packets to itself go back, from the service's address.
        let frame = if reason == Reason::Hairpin { turned(&sent) } else { sent };
        let Some(place) = backend_of::<F>(&frame).filter(|_| reason.verdict() != Verdict::Drop) else {
            if reason != Reason::NoBackend {
                assert_eq!(frame, segment.build::<F>(), "dropped as it came");
            }
            return self.check_drop(service, client, reason, known.is_some());
        };
        let (from, seen) = source::<F>(&frame).expect("a source");
        assert_eq!(reason == Reason::Hairpin, client.0 == Service::address(place).0);
        assert_eq!(from, if reason == Reason::Hairpin { of.frontend.0 } else { client.0 });
        assert!(seen == client.1 || seen >= 61_000, "{seen}");
        // Translated whole, to a backend of this service, with a way back.
        assert_eq!(frame, Segment { src: (from, seen), dst: Service::address(place), ..segment.clone() }.build::<F>());
        let way_back = if reason == Reason::Hairpin {
            let (addr, port) = Service::address(place);
            ConntrackKey::forward(F::addr(addr), Port::new(port), F::addr(from), Port::new(seen), of.proto)
        } else {
            of.reverse((client.0, seen), place)
        };
        if let Some(back) = self.world.env.peek_conntrack(&way_back) {
            let lost = known.is_some() && self.evicted.contains(&way_back);
            let to = ((F::name(&back.addr), back.port.get()), back.client_port.get());
            let right = if reason == Reason::Hairpin { (client, of.frontend.1) } else { (of.frontend, client.1) };
            assert!(lost || to == right, "the way back leads to {back:?}");
        } else {
            assert!(known.is_some(), "a new connection has a way back");
        }

        let established = known.is_some_and(|held| self.is_known(service, &held, flags));
        let at_edge = known.is_some_and(|held| of.proto == Proto::UDP && self.is_at_edge(&held));
        let is_hairpin = reason == Reason::Hairpin;
        if is_hairpin && at_edge {
            // Which of the two it was, the reason does not tell.
            return;
        }
        if established && !(at_edge && reason != Reason::Established) {
            assert!(is_hairpin || reason == Reason::Established, "{reason:?}");
            let held = known.expect("known");
            assert_eq!((F::name(&held.addr), held.port.get()), Service::address(place), "conntrack wins");
            assert_eq!(held.client_port.get(), seen, "with both ends");
            self.check_touch(service, place, before, after);
            return;
        }
        assert!(is_hairpin || reason.is_selection(), "{reason:?}");
        self.check_selection(service, client, flags, (!is_hairpin).then_some(reason), place, before, after);
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
            Reason::NoBackend | Reason::NoBackendDropped => {
                assert!(of.backends.iter().all(|state| *state != State::Eligible));
            }
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
        reason: Option<Reason>,
        place: usize,
        before: Option<Affinity>,
        after: Option<Affinity>,
    ) {
        let of = self.world.services[service].clone();
        let now = self.world.env.clock().ticks();
        let middle = of.proto == Proto::TCP && flags & (SYN | ACK) != SYN;
        if of.timeout == 0 {
            let expected = if middle { Reason::Rebuilt } else { Reason::Hashed };
            assert_eq!(reason.unwrap_or(expected), expected);
            assert_eq!(after, before, "without affinity no entry is touched");
            assert_eq!(self.state(service, place), State::Eligible);
            return;
        }
        let recalled = before.as_ref().map(|entry| self.place(service, entry));
        if middle && let Some(recalled) = recalled.filter(|&recalled| self.state(service, recalled) != State::Gone) {
            assert_eq!((reason.unwrap_or(Reason::Rebuilt), place), (Reason::Rebuilt, recalled), "where the entry says");
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
        let told = if middle { Reason::Rebuilt } else { expected };
        assert_eq!(reason.unwrap_or(told), told);
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
        // What a pod sends to itself does not leave it like that.
        if Service::address(place).0 != client.0 {
            let segment = self.world.services[service].answer(client, place, flags);
            self.check_answer(&segment);
        }
    }

    fn answer_any(&mut self, nth: usize, flags: u8) {
        let mut entries = self.world.env.conntrack_entries();
        entries.retain(|(key, _)| key.direction == REVERSE);
        let Some((key, _)) = entries.get(nth % entries.len().max(1)) else { return };
        let (from, to) = ((F::name(&key.peer), key.peer_port.get()), (F::name(&key.client), key.client_port.get()));
        self.check_answer(&match key.proto {
            Proto::TCP => Segment::tcp(from, to, flags),
            _ => Segment::udp(from, to),
        });
    }

    fn check_answer(&mut self, segment: &Segment) {
        let (from, to) = (segment.src, segment.dst);
        let (addr, port) = (F::addr(to.0), Port::new(to.1));
        let key = ConntrackKey::reverse(addr, port, F::addr(from.0), Port::new(from.1), segment.proto);
        let known = self.world.env.peek_conntrack(&key);
        let before = self.world.env.affinity_entries();
        let (reason, sent) = self.world.egress(segment);
        let Some(held) = known else {
            return assert_eq!((reason, sent), (Reason::NotReply, segment.build::<F>()));
        };
        if reason == Reason::NotReply {
            // Its time was up.
            let silent = held.last_seen.age(self.world.env.clock()).0;
            assert!(segment.proto == Proto::UDP && silent >= 30_000_000_000 - 2 * TICK);
            return assert_eq!(sent, segment.build::<F>());
        }
        assert_eq!(reason, Reason::Reply);
        let peer = (F::name(&held.addr), held.port.get());
        let as_seen = Segment { src: peer, dst: (to.0, held.client_port.get()), ..segment.clone() };
        assert_eq!(sent, as_seen.build::<F>(), "the client sees whom it talked to");
        assert!(peer == from || self.world.services.iter().any(|service| service.frontend == peer));
        for (key, entry) in before {
            let now = self.world.env.peek_affinity(&key).expect("an entry stays");
            assert_eq!(now.backend, entry.backend, "a reply moves nobody");
            if now.last_used != entry.last_used {
                assert_eq!(F::name(&key.client), to.0);
                assert_eq!(now.last_used, self.world.env.clock().ticks());
            }
        }
    }

    /// Past services a packet keeps its addresses; its port only where its answers can be told from a reply.
    fn direct(&mut self, client: End, place: usize, proto: Proto, flags: u8) {
        let to = Service::address(place);
        if to.0 == client.0 {
            return;
        }
        let flags = if proto == Proto::TCP { flags } else { 0 };
        let segment = match proto {
            Proto::TCP => Segment::tcp(client, to, flags),
            _ => Segment::udp(client, to),
        };
        let (addr, port) = (F::addr(client.0), Port::new(client.1));
        let key = ConntrackKey::reverse(addr, port, F::addr(to.0), Port::new(to.1), proto);
        let forward = ConntrackKey::forward(addr, port, F::addr(to.0), Port::new(to.1), proto);
        let known = self.world.env.peek_conntrack(&forward);
        let entries = self.world.env.affinity_entries();
        let (reason, sent) = self.world.ingress(&segment);
        assert_eq!(self.world.env.affinity_entries(), entries, "no affinity without a service");
        let meets = self.world.env.peek_conntrack(&key);
        match reason {
            Reason::NotService => {
                assert_eq!(sent, segment.build::<F>());
                let opens = proto == Proto::UDP || flags & (SYN | ACK) == SYN;
                assert!(!opens || meets.is_none(), "its answers would be taken for another's: {meets:?}");
                assert!(opens || known.is_none(), "it has another port from its first packet on: {known:?}");
            }
            Reason::Direct => {
                let (_, seen) = source::<F>(&sent).expect("a source");
                assert_eq!(sent, Segment { src: (client.0, seen), ..segment }.build::<F>());
                let back = ConntrackKey::reverse(addr, Port::new(seen), F::addr(to.0), Port::new(to.1), proto);
                if let Some(back) = self.world.env.peek_conntrack(&back) {
                    let leads_to = ((F::name(&back.addr), back.port.get()), back.client_port.get());
                    assert_eq!(leads_to, (to, client.1), "{seen}");
                } else {
                    assert_eq!(reason, Reason::Direct);
                }
            }
            Reason::ConntrackRefused => assert!(self.faults.conntrack_full),
            reason => panic!("{reason:?}"),
        }
    }

    fn no_port(&mut self, service: usize, client: End, flags: u8) {
        let of = self.world.services[service].clone();
        let entries = self.world.env.conntrack_entries();
        let flags = if of.proto == Proto::TCP { flags } else { 0 };
        let segment = Segment { dst: (of.frontend.0, 81), ..of.segment(client, flags) };
        let (reason, sent) = self.world.ingress(&segment);
        if flags & RST != 0 {
            assert_eq!((reason, sent), (Reason::NoSuchPortDropped, segment.build::<F>()));
        } else {
            assert_eq!(reason, Reason::NoSuchPort);
            assert_eq!(turned(&sent)[..12], segment.build::<F>()[..12]);
        }
        assert_eq!(self.world.env.conntrack_entries().len(), entries.len());
    }
}

/// A frame with its link-layer addresses the other way round.
fn turned(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[..12].rotate_left(6);
    frame
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
