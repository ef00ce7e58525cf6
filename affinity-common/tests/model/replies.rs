//! What backends answer.

use affinity_common::abi::conntrack::{Conntrack, ConntrackKey, REVERSE};
use affinity_common::dp::parse::{RST, SYN};
use affinity_common::reason::{Program, Reason};
use affinity_common::testing::{Segment, Wire};
use affinity_common::types::Proto;

use crate::model::{Model, SECOND, TICK, port};
use crate::requests::turned;
use crate::step::Shape;
use crate::world::{End, Service};

impl<F: Wire> Model<F> {
    pub fn answer(&mut self, service: usize, client: End, place: usize, flags: u8, shape: Shape) {
        // What a pod sends to itself does not leave it like that.
        if Service::address(place).0 != client.0 {
            let segment = self.world.services[service].answer(client, place, flags);
            self.check_answer(&shape.of(&segment), shape);
        }
    }

    pub fn answer_any(&mut self, nth: usize, flags: u8, shape: Shape) {
        let mut entries = self.world.env.conntrack_entries();
        // A pod that is its own backend answers to the service's address, from the port that it serves.
        let is_own_answer = |from: &[u8; 4], port: u16| (0..4).any(|place| Service::address(place) == (*from, port));
        entries.retain(|(key, held)| {
            let from_pod = is_own_answer(&F::name(&key.client), key.client_port.get());
            key.direction == REVERSE || held.addr == key.client && from_pod
        });
        let Some((key, _)) = entries.get(nth % entries.len().max(1)) else { return };
        let (peer, client) = ((F::name(&key.peer), key.peer_port.get()), (F::name(&key.client), key.client_port.get()));
        let (from, to) = if key.direction == REVERSE { (peer, client) } else { (client, peer) };
        let segment = shape.of(&match key.proto {
            Proto::TCP => Segment::tcp(from, to, flags),
            _ => Segment::udp(from, to),
        });
        if key.direction == REVERSE {
            self.check_answer(&segment, shape);
        } else {
            self.check_own_answer(&segment, shape);
        }
    }

    fn check_answer(&mut self, segment: &Segment, shape: Shape) {
        let (from, to) = (segment.src, segment.dst);
        let key = ConntrackKey::reverse(F::addr(to.0), port(to.1), F::addr(from.0), port(from.1), segment.proto);
        let known = self.world.env.peek_conntrack(&key);
        let (reason, sent) = self.run(Program::Egress, shape.frame::<F>(segment));
        let passes = if matches!(shape, Shape::First(_)) { Reason::Fragment } else { Reason::NotReply };
        let Some(held) = known else {
            assert_eq!(sent, shape.frame::<F>(segment));
            return assert_eq!(reason, passes);
        };
        if segment.proto == Proto::TCP && held.is_unanswered() && segment.flags & (SYN | RST) == 0 {
            return self.check_anothers(segment, shape, &held, &(reason, sent));
        }
        if reason == passes {
            // Its time was up.
            let silent = held.last_seen.age(self.world.env.clock()).0;
            assert!(segment.proto == Proto::UDP && silent >= 30 * SECOND - 2 * TICK);
            return assert_eq!(sent, shape.frame::<F>(segment));
        }
        assert_eq!(reason, Reason::Reply);
        self.note(segment, shape);
        let (peer, client_port) = Self::ends(&held);
        let as_seen = Segment { src: peer, dst: (to.0, client_port), ..segment.clone() };
        assert_eq!(sent, shape.frame::<F>(&as_seen), "the client sees whom it talked to");
        let service = self.world.services.iter().position(|of| of.service_id() == held.service && of.frontend == peer);
        if let Some(service) = service {
            let place = self.place(service, held.backend.id);
            assert_eq!(Service::address(place), from, "the backend that answers is the one that was given");
            self.touched(service, to.0, place, self.has_to_look(&held));
        } else {
            assert_eq!(peer, from, "a connection past services");
        }
    }

    /// What answers no SYN belongs to a connection past services, which has these ports from now on.
    fn check_anothers(&mut self, segment: &Segment, shape: Shape, held: &Conntrack<F>, found: &(Reason, Vec<u8>)) {
        self.note(segment, shape);
        assert_eq!(*found, (Reason::NotReply, shape.frame::<F>(segment)));
        let (from, to) = (segment.src, segment.dst);
        let key = ConntrackKey::reverse(F::addr(to.0), port(to.1), F::addr(from.0), port(from.1), segment.proto);
        let holder = self.world.env.peek_conntrack(&key);
        let holds = holder.is_some_and(|holder| Self::ends(&holder) == (from, to.1));
        assert!(holds || self.faults.conntrack_full, "its place is held by {holder:?}");
        let forward = ConntrackKey::forward(key.client, held.client_port, held.addr, held.port, segment.proto);
        assert_eq!(self.world.env.peek_conntrack(&forward), None, "its SYN comes again as the first of another");
    }

    /// What a pod answers to itself: back by its interface, as from the service.
    fn check_own_answer(&mut self, segment: &Segment, shape: Shape) {
        let (from, to) = (segment.src, segment.dst);
        let key = ConntrackKey::forward(F::addr(from.0), port(from.1), F::addr(to.0), port(to.1), segment.proto);
        let Some(held) = self.world.env.peek_conntrack(&key) else { return };
        self.note(segment, shape);
        let (reason, sent) = self.run(Program::Ingress, shape.frame::<F>(segment));
        if reason != Reason::Hairpin {
            // A SYN opens no connection to the service's other ports, nor does a datagram after its time.
            let silent = held.last_seen.age(self.world.env.clock()).0;
            let is_over = segment.proto == Proto::UDP && silent >= 30 * SECOND - 2 * TICK;
            let refused = [Reason::NoSuchPort, Reason::NoSuchPortDropped].contains(&reason);
            let opens = segment.proto == Proto::TCP;
            assert!(refused && (opens || is_over || self.faults.conntrack_full), "{reason:?}");
            return;
        }
        let (addr, client_port) = Self::ends(&held);
        let as_seen = Segment { src: (to.0, client_port), dst: addr, ..segment.clone() };
        assert_eq!(turned(&sent), shape.frame::<F>(&as_seen), "the pod sees whom it talked to");
    }
}
