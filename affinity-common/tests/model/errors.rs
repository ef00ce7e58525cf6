//! ICMP errors: what is quoted is what its receiver has sent, and nothing is noted.

use affinity_common::abi::conntrack::{Conntrack, ConntrackKey, REVERSE};
use affinity_common::reason::{Program, Reason};
use affinity_common::testing::{FakePacket, IcmpError, Segment, Wire, run};
use affinity_common::types::Proto;

use crate::model::Model;
use crate::requests::turned;
use crate::step::{Error, Forgery};
use crate::world::checksums::{verify, verify_error};

/// A host on the way, which is nobody's client or backend.
const HOP: [u8; 4] = [10, 244, 9, 9];

/// Length of an IP header without options.
const fn header_len<F: Wire>() -> usize {
    if F::VERSION == 4 { 20 } else { 40 }
}

impl<F: Wire> Model<F> {
    pub fn error(&mut self, error: &Error) {
        let mut entries = self.world.env.conntrack_entries();
        entries.retain(|(key, _)| (key.direction == REVERSE) == error.to_client);
        let Some((key, held)) = entries.get(error.nth % entries.len().max(1)) else { return };
        if error.to_client { self.error_to_client(error, key, held) } else { self.error_from_client(error, key, held) }
    }

    /// About what a client has sent, as the backend saw it.
    fn error_to_client(&self, error: &Error, key: &ConntrackKey<F>, held: &Conntrack<F>) {
        let client = (F::name(&key.client), key.client_port.get());
        let peer = (F::name(&key.peer), key.peer_port.get());
        let about = segment(key.proto, error.flags, client, peer);
        let (asked, own_port) = Self::ends(held);
        let sent = Segment { src: (client.0, own_port), dst: asked, ..about.clone() };
        let src = if error.on_the_way { HOP } else { peer.0 };
        let comes = of::<F>(error, src, client.0, &about, &about);
        let expected = of::<F>(error, if error.on_the_way { HOP } else { asked.0 }, client.0, &sent, &about);
        self.check_error(Program::Egress, error, &comes, &expected.build::<F>(), Reason::IcmpError);
    }

    /// About what a client was sent, as from the service.
    fn error_from_client(&self, error: &Error, key: &ConntrackKey<F>, held: &Conntrack<F>) {
        let client = (F::name(&key.client), key.client_port.get());
        let peer = (F::name(&key.peer), key.peer_port.get());
        let about = segment(key.proto, error.flags, peer, client);
        let (backend, seen) = Self::ends(held);
        let is_hairpin = backend.0 == client.0;
        // A pod has sent it to the service's address if it is its own backend, and to the client otherwise.
        let sent_to = if is_hairpin { peer.0 } else { client.0 };
        let sent = Segment { src: backend, dst: (sent_to, seen), ..about.clone() };
        let src = if error.on_the_way { HOP } else { client.0 };
        let comes = of::<F>(error, src, peer.0, &about, &about);
        let expected = of::<F>(error, if is_hairpin { peer.0 } else { src }, backend.0, &sent, &about).build::<F>();
        if is_hairpin {
            self.check_error(Program::Ingress, error, &comes, &turned(&expected), Reason::Hairpin);
        } else {
            self.check_error(Program::Ingress, error, &comes, &expected, Reason::IcmpError);
        }
    }

    /// An error comes out as expected, if nothing is wrong with it, and leaves no trace.
    fn check_error(&self, program: Program, error: &Error, comes: &IcmpError, expected: &[u8], reason: Reason) {
        let entries = self.world.env.conntrack_entries();
        let writes = self.world.env.writes();
        let frame = comes.build::<F>();
        let wanted = if error.forged.is_some() { (Reason::OtherProtocol, &*frame) } else { (reason, expected) };
        for mut packet in [FakePacket::raw(frame.clone()), FakePacket::summed(frame.clone())] {
            let got = run(&self.world.env, program, &mut packet);
            assert_eq!((got, &*packet.sent()), wanted);
            if error.forged.is_none() {
                verify_error(&packet.bytes, comes.quote.len());
            } else {
                verify(&packet.bytes);
            }
        }
        assert_eq!(self.world.env.conntrack_entries(), entries, "an error keeps no connection");
        assert_eq!(self.world.env.writes(), writes, "no entry appears");
    }
}

fn segment(proto: Proto, flags: u8, src: ([u8; 4], u16), dst: ([u8; 4], u16)) -> Segment {
    let segment = match proto {
        Proto::TCP => Segment::tcp(src, dst, flags),
        _ => Segment::udp(src, dst),
    };
    Segment { payload: b"what is carried".to_vec(), ..segment }
}

/// The error that quotes `about`, which was `comes` where the error is made.
fn of<F: Wire>(error: &Error, src: [u8; 4], dst: [u8; 4], about: &Segment, comes: &Segment) -> IcmpError {
    /// Where TCP has its checksum, of which a half is quoted by an error that ends behind it, and is left alone.
    const HALF: usize = 16;
    let packet = |segment: &Segment| segment.build::<F>().split_off(14);
    let header = header_len::<F>();
    let mut quote = packet(about);
    quote.truncate(header + error.quoted);
    if about.proto == Proto::TCP && error.quoted == HALF + 1 {
        quote[header + HALF] = packet(comes)[header + HALF];
    }
    forge::<F>(&mut quote, error.forged);
    IcmpError { src, dst, trouble: error.trouble, quote }
}

fn forge<F: Wire>(quote: &mut Vec<u8>, forgery: Option<Forgery>) {
    const NOBODYS: [u8; 2] = 50_001u16.to_be_bytes();
    let header = header_len::<F>();
    match forgery {
        None => {}
        Some(Forgery::Stranger) => quote[header..header + 4].copy_from_slice(&[NOBODYS, NOBODYS].concat()),
        Some(Forgery::Truncated(len)) => quote.truncate(len % (header + 4)),
        Some(Forgery::Version) => quote[0] ^= 0x20,
        Some(Forgery::Protocol(number)) => quote[if F::VERSION == 4 { 9 } else { 6 }] = number,
        Some(Forgery::LaterFragment) if F::VERSION == 4 => quote[7] |= 5,
        Some(Forgery::LaterFragment) => quote[6] = 44,
    }
}
