//! What a client sends past services, or to a service's address and none of its ports.

use affinity_common::abi::conntrack::ConntrackKey;
use affinity_common::dp::parse::{ACK, RST, SYN};
use affinity_common::reason::{Program, Reason};
use affinity_common::testing::{IcmpError, Segment, Trouble, Wire, source};
use affinity_common::types::Proto;

use crate::model::{Model, port};
use crate::requests::turned;
use crate::world::{End, Service};

impl<F: Wire> Model<F> {
    /// Past services a packet keeps its addresses; its port only where its answers can be told from a reply.
    pub fn direct(&mut self, client: End, place: usize, proto: Proto, flags: u8) {
        let to = Service::address(place);
        if to.0 == client.0 {
            return;
        }
        let flags = if proto == Proto::TCP { flags } else { 0 };
        let segment = match proto {
            Proto::TCP => Segment::tcp(client, to, flags),
            _ => Segment::udp(client, to),
        };
        let key = ConntrackKey::reverse(F::addr(client.0), port(client.1), F::addr(to.0), port(to.1), proto);
        let forward = ConntrackKey::forward(F::addr(client.0), port(client.1), F::addr(to.0), port(to.1), proto);
        let known = self.world.env.peek_conntrack(&forward);
        let (reason, sent) = self.run(Program::Ingress, segment.build::<F>());
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
                let back = ConntrackKey::reverse(F::addr(client.0), port(seen), F::addr(to.0), port(to.1), proto);
                if let Some(back) = self.world.env.peek_conntrack(&back) {
                    assert_eq!(Self::ends(&back), (to, client.1), "{seen}");
                }
            }
            Reason::ConntrackRefused => assert!(self.faults.conntrack_full),
            reason => panic!("{reason:?}"),
        }
    }

    pub fn no_port(&mut self, service: usize, client: End, flags: u8) {
        let of = self.world.services[service].clone();
        let entries = self.world.env.conntrack_entries();
        let flags = if of.proto == Proto::TCP { flags } else { 0 };
        let segment = Segment { dst: (of.frontend.0, 81), ..of.segment(client, flags) };
        let (reason, sent) = self.run(Program::Ingress, segment.build::<F>());
        if flags & RST != 0 {
            assert_eq!((reason, sent), (Reason::NoSuchPortDropped, segment.build::<F>()));
        } else {
            assert_eq!(reason, Reason::NoSuchPort);
            assert_eq!(turned(&sent)[..12], segment.build::<F>()[..12]);
            assert_is_answer::<F>(&sent, &segment);
        }
        assert_eq!(self.world.env.conntrack_entries(), entries);
    }
}

/// A refusal is from who was asked, to who has asked.
fn assert_is_answer<F: Wire>(sent: &[u8], asked: &Segment) {
    if asked.proto == Proto::TCP {
        return assert_eq!(source::<F>(sent), Some(asked.dst));
    }
    let quote = asked.build::<F>()[14..].to_vec();
    let quote = quote[..if F::VERSION == 4 { 28 } else { 48 }].to_vec();
    let error = IcmpError { src: asked.dst.0, dst: asked.src.0, trouble: Trouble::PortUnreachable, quote };
    let expected = error.build::<F>();
    // Their headers differ in what says nothing of the trouble.
    let (l3, quote) = if F::VERSION == 4 { (26, 34) } else { (22, 54) };
    assert_eq!(sent.len(), expected.len());
    assert_eq!(sent[l3..quote], expected[l3..quote], "from whom to whom");
    assert_eq!(sent[quote..], expected[quote..]);
}
