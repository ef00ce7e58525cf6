//! What the model remembers, in plain maps, and the rules of affinity over it.

use std::collections::{BTreeMap, BTreeSet};

use affinity_common::abi::conntrack::{Conntrack, ConntrackKey};
use affinity_common::abi::netns::{NetnsClient, NetnsKey, TC_ONLY};
use affinity_common::reason::Reason;
use affinity_common::testing::{Faults, Wire};
use affinity_common::types::{Nanos, Port, Proto, TICK_SHIFT};

use crate::sockets::{Asked, Slot};
use crate::step::{Bound, Evict, HOSTS, Namespace, SERVICES, SOCKETS, Step};
use crate::world::{End, Service, State, World};

/// How long a recorded time's unit is.
pub const TICK: u64 = 1 << TICK_SHIFT;
pub const SECOND: u64 = 1_000_000_000;

/// Whom a client is kept on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    pub place: usize,
    /// When it was last used, by the record: the tick's beginning.
    pub used: u64,
}

/// What is known of a datagram in fragments: who from, who to, its identification and its protocol.
pub type Datagram = ([u8; 4], [u8; 4], u32, Proto);

/// What its first fragment has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noted {
    pub src_port: u16,
    pub dst_port: u16,
    pub at: u64,
}

/// The world, and what there ought to be in its maps.
pub struct Model<F: Wire> {
    pub world: World<F>,
    pub faults: Faults,
    /// How many entries an LRU map has room for.
    pub lru_size: usize,
    /// Whom each client of each service is kept on.
    pub clients: BTreeMap<(usize, [u8; 4]), Kept>,
    /// How many connections each backend of each service was given.
    pub given: BTreeMap<(usize, usize), u64>,
    /// What was noted of datagrams.
    pub datagrams: BTreeMap<Datagram, Noted>,
    /// What each socket has asked for, by its cookie and the backend.
    pub asked: BTreeMap<(u64, usize, Proto), Asked>,
    /// When a socket has last asked for it.
    pub called: BTreeMap<(u64, usize, Proto), u64>,
    pub slots: Vec<Option<Slot>>,
    pub cookies: u64,
    pub namespaces: BTreeMap<u8, Namespace>,
    /// The first choices since a service's eligible backends last changed: of clients,
    pub first_choices: BTreeMap<(usize, [u8; 4]), usize>,
    /// of connections,
    pub hashed: BTreeMap<(usize, End), usize>,
    /// and of sockets.
    pub hashed_sockets: BTreeMap<(usize, u64), usize>,
    /// The ways back that were evicted: another connection may have taken them.
    pub evicted: BTreeSet<ConntrackKey<F>>,
}

impl<F: Wire> Model<F> {
    /// Two services of TCP and two of UDP, of the same four pods, and whose namespaces are known.
    pub fn new(lru_size: usize) -> Self {
        let mut services = vec![
            Service::new(1, Proto::TCP, 3),
            Service::new(2, Proto::TCP, 0),
            Service::new(3, Proto::UDP, 1),
            Service::new(4, Proto::UDP, 0),
        ];
        assert_eq!(services.len(), SERVICES);
        // A backend of one service alone: a connection that gets it by another is at the wrong one.
        services[0].backends[3] = State::Gone;
        services[2].backends[0] = State::Gone;
        let mut model = Self {
            world: World::new(lru_size, services),
            faults: Faults::default(),
            lru_size,
            clients: BTreeMap::new(),
            given: BTreeMap::new(),
            datagrams: BTreeMap::new(),
            asked: BTreeMap::new(),
            called: BTreeMap::new(),
            slots: vec![None; SOCKETS],
            cookies: 0,
            namespaces: BTreeMap::new(),
            first_choices: BTreeMap::new(),
            hashed: BTreeMap::new(),
            hashed_sockets: BTreeMap::new(),
            evicted: BTreeSet::new(),
        };
        for host in HOSTS {
            model.know(host, Namespace::Address);
        }
        model
    }

    /// Takes a step, and holds the maps against what there ought to be.
    pub fn step(&mut self, step: &Step) {
        match step {
            Step::Send { service, client, flags, shape } => self.send(*service, *client, *flags, *shape),
            Step::Answer { service, client, place, flags, shape } => {
                self.answer(*service, *client, *place, *flags, *shape);
            }
            Step::AnswerAny { nth, flags, shape } => self.answer_any(*nth, *flags, *shape),
            Step::Direct { client, place, proto, flags } => self.direct(*client, *place, *proto, *flags),
            Step::NoPort { service, client, flags } => self.no_port(*service, *client, *flags),
            Step::Fragment(fragment) => self.fragment(fragment),
            Step::NeverEnding { service, client, datagrams } => self.never_ending(*service, *client, *datagrams),
            Step::Error(error) => self.error(error),
            Step::Socket(call) => self.socket(call),
            Step::Namespace { host, knows } => self.know(*host, *knows),
            Step::Sleep(span) => self.world.env.sleep(*span),
            Step::SleepTo { service, client, bound, nanos } => self.sleep_to(*service, *client, *bound, *nanos),
            Step::Backend { service, place, state } => {
                self.world.services[*service].backends[*place] = *state;
                self.changed(*service);
            }
            Step::Timeout { service, seconds } => {
                self.world.services[*service].timeout = *seconds;
                self.changed(*service);
            }
            Step::Evict(evict) => self.evict(evict),
            Step::Faults(faults) => {
                self.faults = *faults;
                self.world.env.set_faults(*faults);
            }
        }
        self.settle();
    }

    /// Writes a service that has changed to the maps.
    pub fn changed(&mut self, service: usize) {
        self.world.program(service);
        self.first_choices.retain(|(of, _), _| *of != service);
        self.hashed.retain(|(of, _), _| *of != service);
        self.hashed_sockets.retain(|(of, _), _| *of != service);
    }

    fn know(&mut self, host: u8, knows: Namespace) {
        let key = netns(host);
        let flags = if knows == Namespace::TcOnly { TC_ONLY } else { 0 };
        match knows {
            Namespace::Nothing => self.world.env.remove_netns(&key),
            _ => self.world.env.set_netns(key, NetnsClient { addr: F::addr([10, 244, 0, host]), flags }),
        }
        self.namespaces.insert(host, knows);
    }

    fn sleep_to(&mut self, service: usize, client: End, bound: Bound, nanos: i8) {
        let Some(kept) = self.clients.get(&(service, client.0)) else { return };
        let span = match bound {
            Bound::Timeout => self.timeout(service),
            Bound::Refresh => self.refresh_bound(service),
        };
        let to = (kept.used + span).saturating_add_signed(nanos.into());
        self.world.env.set_now(Nanos(to.max(self.now())));
    }

    fn evict(&mut self, evict: &Evict) {
        let env = &self.world.env;
        let nth_of = |nth: usize, len: usize| (len > 0).then(|| nth % len);
        match evict {
            Evict::Client { service, client } => {
                env.evict_affinity(&self.world.services[*service].affinity_key(client.0));
                self.clients.remove(&(*service, client.0));
            }
            Evict::Flow { service, client, place } => {
                let service = &self.world.services[*service];
                let key = place.map_or_else(|| service.forward(*client), |place| service.reverse(*client, place));
                env.evict_conntrack(&key);
                self.evicted.insert(key);
            }
            Evict::AnyFlow { nth } => {
                let entries = env.conntrack_entries();
                if let Some(nth) = nth_of(*nth, entries.len()) {
                    env.evict_conntrack(&entries[nth].0);
                    self.evicted.insert(entries[nth].0);
                }
            }
            Evict::Datagram { nth } => {
                let entries = env.fragments_entries();
                if let Some(nth) = nth_of(*nth, entries.len()) {
                    env.evict_fragments(&entries[nth].0);
                    self.datagrams.remove(&datagram::<F>(&entries[nth].0));
                }
            }
            Evict::Socket { nth } => {
                let entries = env.socket_entries();
                if let Some(nth) = nth_of(*nth, entries.len()) {
                    env.evict_socket(&entries[nth].0);
                    self.asked.remove(&crate::sockets::asked_key::<F>(&entries[nth].0));
                }
            }
        }
    }

    /// The maps hold what the model does, but for what an LRU map that is full has let go.
    fn settle(&mut self) {
        let clients: BTreeMap<_, _> = self
            .world
            .env
            .affinity_entries()
            .into_iter()
            .map(|(key, entry)| {
                let service = self.service_of(key.service.id);
                assert_eq!(key.scope, 0);
                let place = self.place(service, entry.backend.id);
                ((service, F::name(&key.client)), Kept { place, used: u64::from(entry.last_used.at) << TICK_SHIFT })
            })
            .collect();
        let datagrams = self
            .world
            .env
            .fragments_entries()
            .into_iter()
            .map(|(key, held)| {
                let at = u64::from(held.at.at) << TICK_SHIFT;
                (datagram::<F>(&key), Noted { src_port: held.src_port.get(), dst_port: held.dst_port.get(), at })
            })
            .collect();
        let asked = self
            .world
            .env
            .socket_entries()
            .into_iter()
            .map(|(key, held)| {
                let service = self.service_of(held.service.id);
                let of = &self.world.services[service];
                assert_eq!((F::name(&held.addr), held.port.get()), of.frontend);
                let key = crate::sockets::asked_key::<F>(&key);
                assert_eq!(held.backend, of.backend_id(key.1), "the backend's id is the service's");
                (key, Asked { service, client: F::name(&held.client) })
            })
            .collect();
        agree(&mut self.clients, &clients, self.lru_size, "affinity");
        agree(&mut self.datagrams, &datagrams, self.lru_size, "fragments");
        agree(&mut self.asked, &asked, self.lru_size, "sockets");
        for (service, of) in self.world.services.iter().enumerate() {
            for place in 0..4 {
                let given = self.given.get(&(service, place)).copied().unwrap_or_default();
                assert_eq!(self.world.env.connections(&of.backend_key(place)), given, "connections are counted once");
            }
        }
    }

    fn service_of(&self, id: u32) -> usize {
        self.world.services.iter().position(|service| service.id == id).expect("a service")
    }

    /// The place of a backend id of a service.
    pub fn place(&self, service: usize, id: u32) -> usize {
        let service = &self.world.services[service];
        (0..4).find(|&place| service.backend_id(place).id == id).expect("a backend of the service")
    }

    pub fn state(&self, service: usize, place: usize) -> State {
        self.world.services[service].backends[place]
    }

    pub fn now(&self) -> u64 {
        self.world.env.clock().0
    }

    /// The beginning of the tick that it is, which is what is recorded.
    pub fn tick(&self) -> u64 {
        self.now() & !(TICK - 1)
    }

    fn timeout(&self, service: usize) -> u64 {
        u64::from(self.world.services[service].timeout) * SECOND
    }

    /// How old a recorded use may be before it is recorded anew.
    pub fn refresh_bound(&self, service: usize) -> u64 {
        (self.timeout(service) / 16).min(SECOND)
    }

    /// Whom the client is kept on in fact.
    pub fn observed(&self, service: usize, client: [u8; 4]) -> Option<Kept> {
        let of = &self.world.services[service];
        let entry = self.world.env.peek_affinity(&of.affinity_key(client))?;
        Some(Kept { place: self.place(service, entry.backend.id), used: u64::from(entry.last_used.at) << TICK_SHIFT })
    }

    /// Takes over what the maps hold of a client: for the few cases that the outside does not tell apart.
    pub fn adopt(&mut self, service: usize, client: [u8; 4]) {
        match self.observed(service, client) {
            Some(kept) => self.clients.insert((service, client), kept),
            None => self.clients.remove(&(service, client)),
        };
        for place in 0..4 {
            let given = self.world.env.connections(&self.world.services[service].backend_key(place));
            self.given.insert((service, place), given);
        }
    }

    /// Something of an established flow or socket to `place`: the client's record is written anew where it names the same,
    /// eligible backend and is older than its bound; else untouched. `must`: it has not looked for so long that it has to.
    pub fn touched(&mut self, service: usize, client: [u8; 4], place: usize, must: bool) {
        let after = self.observed(service, client);
        let Some(kept) = self.clients.get(&(service, client)).copied() else {
            return assert_eq!(after, None, "no entry out of nothing");
        };
        let own = kept.place == place && self.state(service, place) == State::Eligible;
        let stale = self.timeout(service) > 0 && self.now() - kept.used > self.refresh_bound(service);
        let fresh = Kept { used: self.tick(), ..kept };
        match (own && stale, must) {
            (true, true) => assert_eq!(after, Some(fresh), "a use that is not recorded"),
            (true, false) => assert!(after == Some(fresh) || after == Some(kept), "{after:?}, not {kept:?}"),
            (false, _) => assert_eq!(after, Some(kept), "a flow moves nobody, and refreshes what is its own"),
        }
        self.clients.extend(after.map(|after| ((service, client), after)));
    }

    /// A choice for a client. `middle`: of a connection that was open before, whose entry is gone. `told`: the reason, where
    /// the outside tells. `hashed`: the first choice of the same connection, of a service without affinity.
    pub fn selected(
        &mut self,
        service: usize,
        client: [u8; 4],
        place: usize,
        middle: bool,
        told: Option<Reason>,
        hashed: usize,
    ) {
        let key = (service, client);
        let (before, after) = (self.clients.get(&key).copied(), self.observed(service, client));
        if self.timeout(service) == 0 {
            let expected = if middle { Reason::Rebuilt } else { Reason::Hashed };
            assert_eq!(told.unwrap_or(expected), expected);
            assert_eq!(after, before, "without affinity no entry is touched");
            assert_eq!(self.state(service, place), State::Eligible);
            return assert_eq!(place, hashed, "the same connection has the same backend");
        }
        if middle && let Some(kept) = before.filter(|kept| self.state(service, kept.place) != State::Gone) {
            assert_eq!((told.unwrap_or(Reason::Rebuilt), place), (Reason::Rebuilt, kept.place), "where the entry says");
            return assert_eq!(after, before);
        }
        assert_eq!(self.state(service, place), State::Eligible, "no new session on a backend that is not eligible");
        let live = before.is_some_and(|kept| self.now() - kept.used < self.timeout(service));
        let stays = before.filter(|kept| live && self.state(service, kept.place) == State::Eligible);
        let expected = match (before, live) {
            _ if stays.is_some() => Reason::AffinityHit,
            (None, _) if self.faults.affinity_full => Reason::AffinityRefused,
            (None, _) => Reason::AffinityNew,
            (Some(_), true) => Reason::AffinityFailover,
            (Some(_), false) => Reason::AffinityExpired,
        };
        let expected_told = if middle { Reason::Rebuilt } else { expected };
        assert_eq!(told.unwrap_or(expected_told), expected_told);
        if matches!(expected, Reason::AffinityNew | Reason::AffinityRefused | Reason::AffinityFailover) {
            let first = *self.first_choices.entry(key).or_insert(place);
            assert_eq!(place, first, "a first choice is always the same");
        }
        let wanted = match stays {
            _ if expected == Reason::AffinityRefused => None,
            Some(kept) if self.now() - kept.used <= self.refresh_bound(service) => {
                assert_eq!(Some(kept), after, "a fresh record is not written");
                Some(kept)
            }
            Some(kept) => Some(Kept { used: self.tick(), ..kept }),
            None => Some(Kept { place, used: self.tick() }),
        };
        assert!(stays.is_none_or(|kept| kept.place == place), "a live entry is followed");
        assert_eq!(after, wanted);
        self.clients.extend(wanted.map(|kept| (key, kept)));
    }

    /// What a pod's packet to a service has come to: the two ends that the entry translates it to.
    pub fn ends(held: &Conntrack<F>) -> (End, u16) {
        ((F::name(&held.addr), held.port.get()), held.client_port.get())
    }
}

/// The namespace of a host.
pub fn netns(host: u8) -> NetnsKey {
    NetnsKey { cookie: 4_000 + u64::from(host) }
}

/// A port as a key has it.
pub fn port(number: u16) -> Port {
    Port::new(number)
}

fn datagram<F: Wire>(key: &affinity_common::abi::fragments::FragmentsKey<F>) -> Datagram {
    let [a, b, c, d] = key.id;
    let id = if F::VERSION == 4 { u32::from(u16::from_be_bytes([a, b])) } else { u32::from_be_bytes([a, b, c, d]) };
    (F::name(&key.src), F::name(&key.dst), id, key.proto)
}

/// Holds a map of the model's against the real one. What a full one has let go, the model does too.
fn agree<K: Ord + Copy + std::fmt::Debug, V: PartialEq + Copy + std::fmt::Debug>(
    model: &mut BTreeMap<K, V>,
    real: &BTreeMap<K, V>,
    size: usize,
    name: &str,
) {
    for (key, held) in real {
        assert_eq!(model.get(key), Some(held), "{name}: {key:?}");
    }
    if real.len() == size {
        model.retain(|key, _| real.contains_key(key));
    }
    for key in model.keys() {
        assert!(real.contains_key(key), "{name}: {key:?} is gone");
    }
}
