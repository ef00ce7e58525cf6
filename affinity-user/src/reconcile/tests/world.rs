//! Maps, a clock, a reconciler, and someone who looks at the maps after every write, as a packet could.

use std::{
    any::Any,
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use affinity_common::{
    abi::{addresses::AddressKey, backends::BackendKey, filter::Place, frontends::FrontendKey},
    family::{Family, V4, V6},
    types::{Port, Proto, Seconds, ServiceId},
};

use crate::{
    model::{ServiceName, ServicePortName},
    plan::{BackendPlan, FamilyPlan, FrontendPlan, PortPlan, Scope, ServicePlan},
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
            "frontend {}:{}/{} {} seed={} timeout={} {}",
            F::to_ip(&key.addr),
            key.port,
            key.proto,
            names[&value.service],
            value.seed,
            value.timeout.secs,
            backends.join(" ")
        ));
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
            row.is_eligible_anywhere(),
            pod.as_ref().and_then(names::decode_backend),
        ));
    }
}

/// Watches every write: each frontend's address is known, and has its bit in the filter; no frontend ever points at a slot that names no backend that takes new sessions, and no slot is written that a frontend
/// points at, or has pointed at within the last second.
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
    let eligible: BTreeSet<_> =
        rows.into_iter().filter(|(_, row)| row.is_eligible_anywhere()).map(|(key, _)| key).collect();
    for (key, value) in family.frontends.entries().unwrap() {
        let address = AddressKey { addr: key.addr };
        assert!(family.addresses.get(&address).unwrap().is_some(), "{key:?} has an address that is not known");
        let run = (value.first_slot, value.first_slot + value.slot_count);
        if value.slot_count > 0 {
            pointed_at.insert(run, now);
        }
        let named: BTreeSet<_> = (run.0..run.1).map(|slot| memory.slots.get(&slot).unwrap().unwrap().backend).collect();
        for backend in named {
            let backend = BackendKey { service: value.service, backend };
            assert!(eligible.contains(&backend), "{key:?} leads to {backend:?}, which is not there or not eligible");
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
}

/// A service with a frontend and backends `10.0.<n>.<i>:8080`.
pub fn service(n: u8, backends: impl IntoIterator<Item = u8>) -> Service {
    Service {
        name: format!("s{n}"),
        port: "",
        affinity: None,
        frontends: vec![SocketAddr::from(([10, 96, 0, n], 80))],
        backends: backends.into_iter().map(|i| (SocketAddr::from(([10, 0, n, i], 8080)), true)).collect(),
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
        self.frontends.extend(frontends);
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
            scope: Scope::Cluster,
            v4: self.family::<V4>(),
            v6: self.family::<V6>(),
            name,
        };
        ServicePlan { name: service, ports: vec![port] }
    }

    fn family<F: Family>(&self) -> FamilyPlan<F> {
        let mut frontends: Vec<_> = self
            .frontends
            .iter()
            .filter_map(|at| {
                Some(FrontendPlan { addr: F::from_ip(at.ip())?, port: Port::new(at.port()), proto: Proto::TCP })
            })
            .collect();
        frontends.sort();
        let mut backends: Vec<_> = self
            .backends
            .iter()
            .filter_map(|(at, eligible)| {
                let target = Some(format!("pod-{at}").into());
                Some(BackendPlan {
                    addr: F::from_ip(at.ip())?,
                    port: Port::new(at.port()),
                    eligible: *eligible,
                    target,
                })
            })
            .collect();
        backends.sort_by_key(|b| (b.addr, b.port));
        if frontends.is_empty() { FamilyPlan::default() } else { FamilyPlan { frontends, backends, others: false } }
    }
}

/// The key of the frontend of `service(n, …)`.
pub fn frontend(n: u8) -> FrontendKey<V4> {
    FrontendKey::new([10, 96, 0, n], Port::new(80), Proto::TCP)
}
