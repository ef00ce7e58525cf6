//! Fragments that are not their datagram's first: they follow that one.

use affinity_common::abi::conntrack::{Conntrack, ConntrackKey};
use affinity_common::dp::parse::ACK;
use affinity_common::reason::{Program, Reason};
use affinity_common::testing::{Part, Segment, Wire};
use affinity_common::types::Proto;

use crate::model::{Datagram, Model, Noted, SECOND, TICK, port};
use crate::requests::{in_fragments, turned};
use crate::step::{Fragment, Sender, Shape};
use crate::world::{End, Service};

/// How long a datagram's first fragment is remembered.
const LIFETIME: u64 = 60 * SECOND;

impl<F: Wire> Model<F> {
    pub fn fragment(&mut self, fragment: &Fragment) {
        let entries = self.world.env.conntrack_entries();
        let followed = match fragment.from {
            Sender::Client { service, client } => self.fragment_of_client(fragment, service, client),
            Sender::PastServices { client, place, proto } => {
                self.fragment_past_services(fragment, client, place, proto);
                return;
            }
            Sender::Backend { service, client, place } => {
                self.fragment_of_backend(fragment, service, client, place);
                None
            }
        };
        // It counts for its own connection, and opens none.
        let now = self.world.env.clock().ticks();
        let expected = entries.into_iter().map(|(key, held)| match &followed {
            Some(followed) if *followed == key => {
                (key, Conntrack { packets: held.packets + 1, last_seen: now, ..held })
            }
            _ => (key, held),
        });
        assert_eq!(self.world.env.conntrack_entries(), expected.collect::<Vec<_>>());
    }

    /// Goes where its first one did; if that is not known, it is dropped. Returns the connection that it is of.
    fn fragment_of_client(&mut self, fragment: &Fragment, service: usize, client: End) -> Option<ConntrackKey<F>> {
        let of = &self.world.services[service];
        let (frontend, proto) = (of.frontend, of.proto);
        let segment = in_fragments(&of.segment(client, ACK));
        let (noted, at_edge) = self.noted((client.0, frontend.0, fragment.id, proto));
        let key = noted.map(|noted| {
            let (from, to) = (port(noted.src_port), port(noted.dst_port));
            ConntrackKey::forward(F::addr(client.0), from, F::addr(frontend.0), to, proto)
        });
        let held = key.and_then(|key| self.world.env.peek_conntrack(&key));
        let frame = part::<F>(fragment, &segment, &segment);
        let (reason, sent) = self.run(Program::Ingress, frame.clone());
        let (Some(held), false) = (held, at_edge && reason == Reason::FragmentAlone) else {
            assert_eq!((reason, sent), (Reason::FragmentAlone, frame), "it came before its first, or too late");
            return None;
        };
        let (to, _) = Self::ends(&held);
        if to.0 == client.0 {
            let as_seen = Segment { src: (frontend.0, 0), dst: to, ..segment.clone() };
            assert_eq!((reason, turned(&sent)), (Reason::Hairpin, part::<F>(fragment, &as_seen, &segment)));
        } else {
            let as_seen = Segment { dst: to, ..segment.clone() };
            assert_eq!((reason, sent), (Reason::Established, part::<F>(fragment, &as_seen, &segment)));
        }
        key
    }

    /// What is for no service passes as it came.
    fn fragment_past_services(&self, fragment: &Fragment, client: End, place: usize, proto: Proto) {
        let to = Service::address(place);
        if to.0 == client.0 {
            return;
        }
        let segment = in_fragments(&match proto {
            Proto::TCP => Segment::tcp(client, to, ACK),
            _ => Segment::udp(client, to),
        });
        let frame = part::<F>(fragment, &segment, &segment);
        let (reason, sent) = self.run(Program::Ingress, frame.clone());
        assert!(matches!(reason, Reason::Fragment | Reason::Established), "{reason:?}");
        assert_eq!(sent, frame);
    }

    /// Comes from whom its first one did; if that is not known, it passes as it came.
    fn fragment_of_backend(&mut self, fragment: &Fragment, service: usize, client: End, place: usize) {
        let of = &self.world.services[service];
        let (pod, proto) = (Service::address(place), of.proto);
        if pod.0 == client.0 {
            return;
        }
        let segment = in_fragments(&of.answer(client, place, ACK));
        let (noted, at_edge) = self.noted((pod.0, client.0, fragment.id, proto));
        let held = noted.and_then(|noted| {
            let (client_port, pod_port) = (port(noted.dst_port), port(noted.src_port));
            let key = ConntrackKey::reverse(F::addr(client.0), client_port, F::addr(pod.0), pod_port, proto);
            self.world.env.peek_conntrack(&key)
        });
        let frame = part::<F>(fragment, &segment, &segment);
        let (reason, sent) = self.run(Program::Egress, frame.clone());
        let silent = held.map_or(0, |held| held.last_seen.age(self.world.env.clock()).0);
        // A flow whose time is up has no replies any more: after 30 s without one, after 120 s at most.
        let may_be_over = proto == Proto::UDP && silent >= 30 * SECOND - 2 * TICK;
        let is_over = proto == Proto::UDP && silent >= 120 * SECOND + 2 * TICK;
        match held {
            Some(held) if !is_over && !((at_edge || may_be_over) && reason == Reason::Fragment) => {
                let as_seen = Segment { src: Self::ends(&held).0, ..segment.clone() };
                assert_eq!((reason, sent), (Reason::Reply, part::<F>(fragment, &as_seen, &segment)));
            }
            _ => assert_eq!((reason, sent), (Reason::Fragment, frame)),
        }
    }

    /// What is known of a datagram, and whether its time is up within two ticks: either is right.
    fn noted(&self, datagram: Datagram) -> (Option<Noted>, bool) {
        let noted = self.datagrams.get(&datagram).copied();
        let age = noted.map_or(0, |noted| self.now() - noted.at);
        let at_edge = age.abs_diff(LIFETIME) <= 2 * TICK;
        (noted.filter(|_| age < LIFETIME + 2 * TICK), at_edge)
    }

    /// However many there are, they take no more room than there is.
    pub fn never_ending(&mut self, service: usize, client: End, datagrams: u32) {
        for id in 0..datagrams {
            self.send(service, client, ACK, Shape::First(1_000 + id));
        }
        assert!(self.world.env.fragments_entries().len() <= self.lru_size);
    }
}

/// A fragment of a segment, with the header of what it is translated to.
fn part<F: Wire>(fragment: &Fragment, header: &Segment, segment: &Segment) -> Vec<u8> {
    /// How long one is, unless the datagram ends before.
    const LEN: usize = 24;
    let upper = segment.upper::<F>();
    let start = usize::from(fragment.eights) * 8;
    let end = upper.len().min(start + LEN);
    let part = Part { id: fragment.id, eights: fragment.eights, more: fragment.more };
    header.carry::<F>(Some(part), &upper[start..end])
}
