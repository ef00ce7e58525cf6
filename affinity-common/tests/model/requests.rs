//! What a client sends to a service.

use affinity_common::abi::conntrack::{Conntrack, ConntrackKey, STREAM};
use affinity_common::dp::parse::{ACK, RST, SYN};
use affinity_common::reason::{Program, Reason, Verdict};
use affinity_common::testing::{FakePacket, Part, Segment, Wire, run, source};
use affinity_common::types::Proto;

use crate::model::{Model, Noted, SECOND, TICK, port};
use crate::step::{DATAGRAM, FIRST_PART, Shape};
use crate::world::{End, Service, State, backend_of, checksums::verify};

impl Shape {
    /// A segment of this shape, and the frame of it.
    pub fn of(self, segment: &Segment) -> Segment {
        match self {
            Self::Whole => segment.clone(),
            Self::Options => Segment { options: vec![1; 8], ..segment.clone() },
            Self::First(_) => in_fragments(segment),
        }
    }

    pub fn frame<F: Wire>(self, segment: &Segment) -> Vec<u8> {
        match self {
            Self::Whole | Self::Options => segment.build::<F>(),
            Self::First(id) => {
                segment.carry::<F>(Some(Part { id, eights: 0, more: true }), &segment.upper::<F>()[..FIRST_PART])
            }
        }
    }
}

/// A segment that is large enough to come in fragments.
pub fn in_fragments(segment: &Segment) -> Segment {
    let header = if segment.proto == Proto::TCP { 20 } else { 8 };
    Segment {
        payload: (0..DATAGRAM - header).map(|n| u8::try_from(n).expect("a short one")).collect(),
        ..segment.clone()
    }
}

/// A frame with its link-layer addresses the other way round.
pub fn turned(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[..12].rotate_left(6);
    frame
}

impl<F: Wire> Model<F> {
    /// Runs a frame, whose checksums have to be right afterwards, if they were before.
    pub fn run(&self, program: Program, frame: Vec<u8>) -> (Reason, Vec<u8>) {
        verify(&frame);
        let mut packet = FakePacket::raw(frame);
        let reason = run(&self.world.env, program, &mut packet);
        verify(&packet.bytes);
        (reason, packet.bytes)
    }

    /// Notes a first fragment as the datapath ought to.
    pub fn note(&mut self, segment: &Segment, shape: Shape) {
        if let Shape::First(id) = shape
            && !self.faults.fragments_full
        {
            let noted = Noted { src_port: segment.src.1, dst_port: segment.dst.1, at: self.tick() };
            self.datagrams.insert((segment.src.0, segment.dst.0, id, segment.proto), noted);
        }
    }

    /// Whether a connection's entry still speaks for its flow.
    fn is_known(&self, service: usize, held: &Conntrack<F>, flags: u8) -> bool {
        let of = &self.world.services[service];
        if of.proto == Proto::TCP {
            return flags & (SYN | ACK) != SYN;
        }
        let silent = held.last_seen.age(self.world.env.clock()).0;
        let lifetime = if held.seen & STREAM != 0 { 120 } else { 30 };
        let place = (0..4).find(|&place| of.backend_id(place) == held.backend).expect("a backend of the service");
        silent.div_ceil(TICK) < (lifetime * SECOND).div_ceil(TICK) + 1 && self.state(service, place) != State::Gone
    }

    /// Whether a flow's time is up within a tick: either is right.
    fn is_at_edge(&self, held: &Conntrack<F>) -> bool {
        let silent = held.last_seen.age(self.world.env.clock()).0;
        [30u64, 120].iter().any(|lifetime| (lifetime * SECOND).abs_diff(silent) <= 2 * TICK)
    }

    /// Whether a flow of which nothing was seen for so long has to look after what belongs to it.
    pub fn has_to_look(&self, held: &Conntrack<F>) -> bool {
        held.last_seen.age(self.world.env.clock()).0 > SECOND + 3 * TICK
    }

    pub fn send(&mut self, service: usize, client: End, flags: u8, shape: Shape) {
        let of = self.world.services[service].clone();
        let flags = if of.proto == Proto::TCP { flags } else { 0 };
        let segment = shape.of(&of.segment(client, flags));
        let known = self.world.env.peek_conntrack(&of.forward(client));
        self.note(&segment, shape);
        let (reason, sent) = self.run(Program::Ingress, shape.frame::<F>(&segment));

        // A pod's packets to itself go back, from the service's address.
        let frame = if reason == Reason::Hairpin { turned(&sent) } else { sent };
        let Some(place) = backend_of::<F>(&frame).filter(|_| reason.verdict() != Verdict::Drop) else {
            if reason.verdict() == Verdict::Drop {
                assert_eq!(frame, shape.frame::<F>(&segment), "dropped as it came");
            }
            self.dropped(service, client, flags, shape, reason);
            // What was chosen before the way back was refused stands.
            return self.adopt(service, client.0);
        };
        let (from, seen) = source::<F>(&frame).expect("a source");
        assert_eq!(reason == Reason::Hairpin, client.0 == Service::address(place).0);
        assert_eq!(from, if reason == Reason::Hairpin { of.frontend.0 } else { client.0 });
        assert!(seen == client.1 || seen >= 61_000, "{seen}");
        // Translated whole, to a backend of this service, with a way back.
        let expected = Segment { src: (from, seen), dst: Service::address(place), ..segment.clone() };
        assert_eq!(frame, shape.frame::<F>(&expected));
        self.check_way_back(service, client, (from, seen), place, known.as_ref());

        let established = known.is_some_and(|held| self.is_known(service, &held, flags));
        let at_edge = known.is_some_and(|held| of.proto == Proto::UDP && self.is_at_edge(&held));
        let is_hairpin = reason == Reason::Hairpin;
        if is_hairpin && at_edge {
            // Which of the two it was, the reason does not tell.
            return self.adopt(service, client.0);
        }
        if established && !(at_edge && reason != Reason::Established) {
            assert!(is_hairpin || reason == Reason::Established, "{reason:?}");
            let held = known.expect("known");
            assert_eq!((F::name(&held.addr), held.port.get()), Service::address(place), "conntrack wins");
            assert_eq!(held.client_port.get(), seen, "with both ends");
            return self.touched(service, client.0, place, self.has_to_look(&held));
        }
        assert!(is_hairpin || reason.is_selection(), "{reason:?}");
        let middle = of.proto == Proto::TCP && flags & (SYN | ACK) != SYN;
        let hashed = if of.timeout == 0 { *self.hashed.entry((service, client)).or_insert(place) } else { place };
        *self.given.entry((service, place)).or_default() += 1;
        self.selected(service, client.0, place, middle, (!is_hairpin).then_some(reason), hashed);
    }

    /// The answers to what has left as from `from` to the backend at `place` come back to the client.
    fn check_way_back(&self, service: usize, client: End, from: End, place: usize, known: Option<&Conntrack<F>>) {
        let of = &self.world.services[service];
        let pod = Service::address(place);
        let is_hairpin = client.0 == pod.0;
        let way_back = if is_hairpin {
            ConntrackKey::forward(F::addr(pod.0), port(pod.1), F::addr(from.0), port(from.1), of.proto)
        } else {
            of.reverse((client.0, from.1), place)
        };
        let Some(back) = self.world.env.peek_conntrack(&way_back) else {
            return assert!(known.is_some(), "a new connection has a way back");
        };
        let lost = known.is_some()
            && (self.evicted.contains(&way_back) || self.world.env.conntrack_entries().len() == self.lru_size);
        let right = if is_hairpin { (client, of.frontend.1) } else { (of.frontend, client.1) };
        assert!(lost || Self::ends(&back) == right, "the way back leads to {back:?}");
    }

    fn dropped(&self, service: usize, client: End, flags: u8, shape: Shape, reason: Reason) {
        let of = &self.world.services[service];
        match reason {
            Reason::NoBackend | Reason::NoBackendDropped => {
                assert!(of.backends.iter().all(|state| *state != State::Eligible));
                let is_answered = shape == Shape::Whole && flags & RST == 0;
                assert_eq!(
                    reason == Reason::NoBackend,
                    is_answered,
                    "a whole packet is answered, unless it is a reset"
                );
            }
            Reason::ConntrackRefused => assert!(self.faults.conntrack_full),
            Reason::Collision => {
                // Some other frontend's connection holds the way back.
                let held = (0..4).filter_map(|place| self.world.env.peek_conntrack(&of.reverse(client, place)));
                assert!(held.into_iter().any(|held| (F::name(&held.addr), held.port.get()) != of.frontend));
            }
            reason => panic!("dropped: {reason:?}"),
        }
    }
}
