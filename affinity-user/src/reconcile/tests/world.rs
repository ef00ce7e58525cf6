//! Maps, a clock, a reconciler, and someone who looks at the maps after every write, as a packet could.

use std::{
    any::Any,
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use affinity_common::{
    abi::{
        addresses::AddressKey,
        backends::BackendKey,
        filter::Place,
        frontends::{FrontendKey, OUTSIDERS},
    },
    family::{Family, V4, V6},
    types::{Port, Proto, Seconds, ServiceId},
};

use crate::{
    model::{FrontendKind, ServiceName, ServicePortName},
    plan::{BackendPlan, FamilyPlan, FrontendPlan, Origin, PortPlan, RangePlan, Scope, Scopes, ServicePlan},
    reconcile::{Change, Reconciler, Report, runs::REST},
    tables::{
        Operation, Table,
        faulty::Faults,
        memory::{MemoryFamily, MemoryTables, Sizes},
        names,
    },
};

/// Room enough, and not so much that looking at all of it takes time.
pub const SIZES: Sizes =
    Sizes { frontends: 64, backends: 256, affinity: 256, conntrack: 256, slots: 8192, services: 64 };

pub struct World {
    pub memory: MemoryTables,
    pub faults: Faults,
    pub reconciler: Reconciler,
    /// The maps that were written, in order; slots once in a row.
    pub log: Arc<Mutex<Vec<String>>>,
    clock: Arc<Mutex<Instant>>,
}

impl World {
    /// A first daemon on empty maps.
    pub fn new(sizes: &Sizes) -> Self {
        Self::on(MemoryTables::new(sizes), Faults::default())
    }

    fn on(memory: MemoryTables, faults: Faults) -> Self {
        let (clock, log) = (Arc::new(Mutex::new(Instant::now())), Arc::default());
        watch(&memory, &faults, &clock, &log);
        let reconciler = open(&memory, &faults, &clock);
        Self { memory, faults, reconciler, log, clock }
    }

    /// The same, which nobody watches.
    pub fn unwatched(sizes: &Sizes) -> Self {
        let (memory, faults) = (MemoryTables::new(sizes), Faults::default());
        let clock = Arc::new(Mutex::new(Instant::now()));
        let reconciler = open(&memory, &faults, &clock);
        Self { memory, faults, reconciler, log: Arc::default(), clock }
    }

    /// The daemon dies; another one takes over. That takes its time.
    pub fn restart(&mut self) {
        self.advance(REST);
        self.reconciler = open(&self.memory, &self.faults, &self.clock);
    }

    pub fn advance(&self, by: Duration) {
        *self.clock.lock().unwrap() += by;
    }

    pub fn now(&self) -> Instant {
        *self.clock.lock().unwrap()
    }

    pub fn apply(&mut self, services: impl IntoIterator<Item = Service>) -> Report {
        self.reconciler.reconcile(services.into_iter().map(|service| Change::Apply(service.plan())))
    }

    pub fn delete(&mut self, name: &str) -> Report {
        self.reconciler.reconcile([Change::Delete(ServiceName::new("default", name))])
    }

    /// Waits for each retry until there is no problem left.
    pub fn retry_until_well(&mut self) {
        for _ in 0..20 {
            let Some(due) = self.reconciler.next_retry() else { return };
            *self.clock.lock().unwrap() = due.max(self.now());
            self.reconciler.retry();
        }
        panic!("{:?}", self.problems());
    }

    /// Sweeps all that there is to sweep.
    pub fn sweep(&mut self) {
        while let Some(due) = self.reconciler.next_sweep() {
            *self.clock.lock().unwrap() = due.max(self.now());
            self.reconciler.sweep_affinity(2).unwrap();
        }
    }

    pub fn problems(&self) -> Vec<String> {
        self.reconciler.problems().map(ToString::to_string).collect()
    }

    /// The maps that were written since the last call.
    pub fn written(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    /// The id of each service port.
    pub fn service_ids(&self) -> BTreeMap<String, ServiceId> {
        let rows = self.memory.services.entries().unwrap();
        rows.iter().map(|(id, row)| (names::decode_service(row).unwrap().to_string(), *id)).collect()
    }

    pub fn service_id(&self, name: &str) -> ServiceId {
        self.service_ids()[&format!("default/{name}//TCP")]
    }

    /// Everything but the ids: what people and packets can tell apart.
    pub fn meaning(&self) -> Vec<String> {
        let names: BTreeMap<_, _> = self.service_ids().into_iter().map(|(name, id)| (id, name)).collect();
        let mut lines: Vec<_> = names.values().map(|name| format!("service {name}")).collect();
        meaning_of(&self.memory, &self.memory.v4, &names, &mut lines);
        meaning_of(&self.memory, &self.memory.v6, &names, &mut lines);
        let count = |what: &str, count: usize| format!("{what} {count}");
        let words = self.memory.service_filter.entries().unwrap();
        let bits = words.iter().map(|(_, word)| word.bits.count_ones() as usize).sum();
        lines.push(count("filter", bits));
        lines.push(count("names", self.memory.backend_names.len().unwrap()));
        lines.push(count("counters", self.memory.backend_stats.len().unwrap()));
        lines.sort();
        lines
    }
}

fn open(memory: &MemoryTables, faults: &Faults, clock: &Arc<Mutex<Instant>>) -> Reconciler {
    let clock = clock.clone();
    Reconciler::open(memory.wrapped(faults), Box::new(move || *clock.lock().unwrap())).unwrap()
}

fn meaning_of<F: Family>(
    memory: &MemoryTables,
    family: &MemoryFamily<F>,
    names: &BTreeMap<ServiceId, String>,
    lines: &mut Vec<String>,
) {
    let at = |key: BackendKey| {
        let row = family.backends.get(&key).unwrap().expect("a slot names a backend that is there");
        SocketAddr::new(F::to_ip(&row.addr), row.port.get())
    };
    for (key, value) in family.frontends.entries().unwrap() {
        let backends: Vec<_> = (value.first_slot..value.first_slot + value.slot_count)
            .map(|slot| memory.slots.get(&slot).unwrap().unwrap().backend)
            .map(|backend| at(BackendKey { service: value.service, backend }).to_string())
            .collect();
        lines.push(format!(
            "frontend {}:{}/{}{} {} seed={} timeout={},scope={},flags={:x} {}",
            F::to_ip(&key.addr),
            key.port,
            key.proto,
            if key.origin == OUTSIDERS { "/outside" } else { "" },
            names[&value.service],
            value.seed,
            value.timeout.secs,
            value.scope,
            value.flags,
            backends.join(" ")
        ));
    }
    for key in family.ranges.keys().unwrap() {
        lines.push(format!("range {} {}/{}", names[&key.service], F::to_ip(&key.addr), key.bits()));
    }
    for key in family.addresses.keys().unwrap() {
        lines.push(format!("address {}", F::to_ip(&key.addr)));
    }
    for (key, row) in family.backends.entries().unwrap() {
        let pod = memory.backend_names.get(&key).unwrap();
        let counted = memory.backend_stats.get(&key).unwrap().is_some();
        lines.push(format!(
            "backend {} {} eligible={} pod={:?} counted={counted}",
            names[&key.service],
            at(key),
            row.flags,
            pod.as_ref().and_then(names::decode_backend),
        ));
    }
}

/// Watches every write: each frontend's address is known, and has its bit in the filter; no frontend ever points at a slot
/// that names no backend that takes new sessions in its scope, nor sends outsiders where there is nothing for them; and no
/// slot is written that a frontend points at, or has pointed at within the last second.
fn watch(memory: &MemoryTables, faults: &Faults, clock: &Arc<Mutex<Instant>>, log: &Arc<Mutex<Vec<String>>>) {
    let (memory, clock, log) = (memory.clone(), clock.clone(), log.clone());
    let last_pointed_at: Mutex<BTreeMap<(u32, u32), Instant>> = Mutex::default();
    let check = move |map: &str, op: Operation, key: &dyn Any| {
        let entry = format!("{}{map}", if op == Operation::Remove { "-" } else { "" });
        {
            let mut log = log.lock().unwrap();
            if map != "slots" || log.last() != Some(&entry) {
                log.push(entry);
            }
        }
        let (now, mut pointed_at) = (*clock.lock().unwrap(), last_pointed_at.lock().unwrap());
        if map == "slots" {
            let slot = *key.downcast_ref::<u32>().unwrap();
            let used = pointed_at.iter().find(|((first, end), at)| (*first..*end).contains(&slot) && **at + REST > now);
            assert_eq!(used, None, "slot {slot} is written while a packet may be led there");
        } else {
            check_family(&memory, &memory.v4, now, &mut pointed_at);
            check_family(&memory, &memory.v6, now, &mut pointed_at);
        }
    };
    faults.watch(check);
}

fn check_family<F: Family>(
    memory: &MemoryTables,
    family: &MemoryFamily<F>,
    now: Instant,
    pointed_at: &mut BTreeMap<(u32, u32), Instant>,
) {
    for key in family.addresses.keys().unwrap() {
        let place = Place::of::<F>(&key.addr);
        assert!(place.is_in(memory.service_filter.get(&place.word).unwrap().unwrap()), "{key:?} has no bit");
    }
    let rows = family.backends.entries().unwrap();
    let rows: BTreeMap<_, _> = rows.into_iter().collect();
    for (key, value) in family.frontends.entries().unwrap() {
        let (address, place) = (AddressKey { addr: key.addr }, Place::of::<F>(&key.addr));
        assert!(place.is_in(memory.service_filter.get(&place.word).unwrap().unwrap()), "{key:?} has no bit");
        let is_known = value.is_port_alone() || family.addresses.get(&address).unwrap().is_some();
        assert!(is_known, "{key:?} has an address that is not known");
        let has_outsiders = || family.frontends.get(&key.for_outsiders()).unwrap().is_some();
        assert!(!value.parts_outsiders() || has_outsiders(), "{key:?} sends outsiders to nowhere");
        let run = (value.first_slot, value.first_slot + value.slot_count);
        if value.slot_count > 0 {
            pointed_at.insert(run, now);
        }
        let named: BTreeSet<_> = (run.0..run.1).map(|slot| memory.slots.get(&slot).unwrap().unwrap().backend).collect();
        for backend in named {
            let backend = BackendKey { service: value.service, backend };
            let is_eligible = rows.get(&backend).is_some_and(|row| row.is_eligible(value.scope));
            assert!(is_eligible, "{key:?} leads to {backend:?}, which is not there or not eligible");
        }
    }
}

/// A service with one port, to be planned.
#[derive(Clone, Debug)]
pub struct Service {
    pub name: String,
    pub port: &'static str,
    pub affinity: Option<u32>,
    pub frontends: Vec<SocketAddr>,
    /// Address, and whether it takes new sessions.
    pub backends: Vec<(SocketAddr, bool)>,
    /// Frontends for people outside.
    pub outside: Vec<(SocketAddr, FrontendKind)>,
    /// The last octets of the backends that those people are kept to, if they are.
    pub local: Option<Vec<u8>>,
    /// Who of them is let in at load balancers' addresses, if not all are.
    pub ranges: Option<Vec<([u8; 4], u8)>>,
}

/// A service with a frontend and backends `10.0.<n>.<i>:8080`.
pub fn service(n: u8, backends: impl IntoIterator<Item = u8>) -> Service {
    Service {
        name: format!("s{n}"),
        port: "",
        affinity: None,
        frontends: vec![SocketAddr::from(([10, 96, 0, n], 80))],
        backends: backends.into_iter().map(|i| (SocketAddr::from(([10, 0, n, i], 8080)), true)).collect(),
        outside: Vec::new(),
        local: None,
        ranges: None,
    }
}

impl Service {
    pub fn sticky(mut self, timeout: u32) -> Self {
        self.affinity = Some(timeout);
        self
    }

    pub fn port(mut self, port: &'static str) -> Self {
        self.port = port;
        self
    }

    /// It has a node port at `192.168.0.<n>`.
    pub fn node_port(mut self, n: u8, port: u16) -> Self {
        self.outside.push((SocketAddr::from(([192, 168, 0, n], port)), FrontendKind::NodePort));
        self
    }

    /// It has a load balancer's address, `203.0.113.<n>`.
    pub fn balanced(mut self, n: u8) -> Self {
        self.outside.push((SocketAddr::from(([203, 0, 113, n], 80)), FrontendKind::LoadBalancer));
        self
    }

    /// People outside are kept to these backends.
    pub fn local(mut self, backends: impl IntoIterator<Item = u8>) -> Self {
        self.local = Some(backends.into_iter().collect());
        self
    }

    /// Some people are let in alone.
    pub fn ranges(mut self, ranges: impl IntoIterator<Item = ([u8; 4], u8)>) -> Self {
        self.ranges = Some(ranges.into_iter().collect());
        self
    }

    /// One of its backends takes no new sessions.
    pub fn draining(mut self, i: u8) -> Self {
        for (addr, eligible) in &mut self.backends {
            *eligible &= !addr.ip().to_string().ends_with(&format!(".{i}"));
        }
        self
    }

    /// The same over IPv6 too.
    pub fn dual(mut self) -> Self {
        let v6 = |addr: &SocketAddr| match addr.ip() {
            std::net::IpAddr::V4(ip) => SocketAddr::from((ip.to_ipv6_compatible(), addr.port())),
            std::net::IpAddr::V6(_) => *addr,
        };
        let frontends: Vec<_> = self.frontends.iter().map(v6).collect();
        let backends: Vec<_> = self.backends.iter().map(|(addr, eligible)| (v6(addr), *eligible)).collect();
        let outside: Vec<_> = self.outside.iter().map(|(addr, kind)| (v6(addr), *kind)).collect();
        self.frontends.extend(frontends);
        self.outside.extend(outside);
        self.backends.extend(backends);
        self
    }

    pub fn plan(&self) -> ServicePlan {
        let service = ServiceName::new("default", self.name.as_str());
        let name = ServicePortName { service: service.clone(), port: self.port.into(), proto: Proto::TCP };
        let port = PortPlan {
            seed: 7,
            affinity: self.affinity.map(Seconds::new),
            shares_affinity: false,
            v4: self.family::<V4>(),
            v6: self.family::<V6>(),
            name,
        };
        ServicePlan { name: service, ports: vec![port], health: None }
    }

    fn frontends<F: Family>(&self) -> Vec<FrontendPlan<F>> {
        let inside = self.frontends.iter().map(|at| (at, FrontendKind::ClusterIp));
        let outside = self.outside.iter().map(|(at, kind)| (at, *kind));
        let mut frontends = Vec::new();
        for (at, kind) in inside.chain(outside) {
            let Some(addr) = F::from_ip(at.ip()) else { continue };
            let parts_outsiders = kind != FrontendKind::ClusterIp && self.local.is_some();
            let anybodys = FrontendPlan {
                addr,
                port: Port::new(at.port()),
                proto: Proto::TCP,
                origin: Origin::Anybody,
                kind,
                scope: Scope::Cluster,
                parts_outsiders,
                has_ranges: kind == FrontendKind::LoadBalancer && self.ranges.is_some(),
                port_alone: kind == FrontendKind::NodePort,
            };
            frontends.push(anybodys);
            if parts_outsiders {
                let (origin, scope) = (Origin::Outsiders, Scope::Local);
                frontends.push(FrontendPlan { origin, scope, parts_outsiders: false, ..anybodys });
            }
        }
        frontends.sort();
        frontends
    }

    fn family<F: Family>(&self) -> FamilyPlan<F> {
        let frontends = self.frontends();
        if frontends.is_empty() {
            return FamilyPlan::default();
        }
        let is_parted = frontends.iter().any(|frontend| frontend.parts_outsiders);
        let is_local = |at: &SocketAddr| {
            let octets = match at.ip() {
                std::net::IpAddr::V4(ip) => ip.octets()[3],
                std::net::IpAddr::V6(ip) => ip.octets()[15],
            };
            is_parted && self.local.as_ref().is_some_and(|local| local.contains(&octets))
        };
        let mut backends: Vec<_> = self
            .backends
            .iter()
            .filter_map(|(at, eligible)| {
                Some(BackendPlan {
                    addr: F::from_ip(at.ip())?,
                    port: Port::new(at.port()),
                    eligible: Scopes { cluster: *eligible, local: *eligible && is_local(at) },
                    target: Some(format!("pod-{at}").into()),
                })
            })
            .collect();
        backends.sort_by_key(|b| (b.addr, b.port));
        let has_ranges = frontends.iter().any(|frontend| frontend.has_ranges);
        let ranges = self.ranges.iter().flatten().filter(|_| has_ranges);
        let range = |&(addr, bits): &([u8; 4], u8)| Some(RangePlan { addr: F::from_ip(addr.into())?, bits });
        let ranges = ranges.filter_map(range).collect::<BTreeSet<_>>().into_iter().collect();
        FamilyPlan { frontends, backends, others: Scopes::default(), ranges }
    }
}

/// The key of the frontend of `service(n, …)`.
pub fn frontend(n: u8) -> FrontendKey<V4> {
    FrontendKey::new([10, 96, 0, n], Port::new(80), Proto::TCP)
}

/// The key of the frontend of `service(…).node_port(n, 30_080)`.
pub fn node_port(n: u8) -> FrontendKey<V4> {
    FrontendKey::new([192, 168, 0, n], Port::new(30_080), Proto::TCP)
}
