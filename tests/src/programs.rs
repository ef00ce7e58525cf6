//! The datapath's programs as the kernel has verified them, with maps of their own, run on packets that a test makes.
//!
//! No daemon and no pins: what a daemon would write into the maps, the test writes.

use std::net::SocketAddr;

use affinity_common::abi::addresses::{self, Address, AddressKey};
use affinity_common::abi::affinity::{self, Affinity, AffinityKey};
use affinity_common::abi::backend_stats::BackendStats;
use affinity_common::abi::backends::{self, Backend, BackendKey, ELIGIBLE};
use affinity_common::abi::conntrack::{self, Conntrack, ConntrackKey};
use affinity_common::abi::counters::{self, Counter};
use affinity_common::abi::filter::{self, FilterWord, Place};
use affinity_common::abi::frontends::{self, Frontend, FrontendKey};
use affinity_common::abi::slots::Slot;
use affinity_common::family::{Family, V4, V6};
use affinity_common::reason::{Program, Reason};
use affinity_common::types::{BackendId, Nanos, Port, Proto, Seconds, ServiceId};
use affinity_user::loader::{cgroup, load_stages};
use anyhow::{Context as _, Result, anyhow};
use aya::maps::{Array, HashMap, MapData, MapError, PerCpuArray};
use aya::programs::{SchedClassifier, TestRun as _};
use aya::{Ebpf, EbpfLoader, TestRunOptions};
use bytemuck::Pod;
use nix::time::{ClockId, clock_gettime};

/// A map's key or value for aya.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Plain<T>(pub T);

// SAFETY: a transparent wrapper of a type that is plain memory.
unsafe impl<T: Pod> aya::Pod for Plain<T> {}

/// What a program made of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// What it returned: [`PASS`], [`DROP`] or [`REDIRECT`].
    pub action: i32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
    /// What it counted.
    pub reason: Reason,
}

/// What passes: `TCX_NEXT`, `TC_ACT_UNSPEC`.
pub const PASS: i32 = -1;
/// What is dropped: `TC_ACT_SHOT`.
pub const DROP: i32 = 2;
/// What is sent elsewhere: `TC_ACT_REDIRECT`.
pub const REDIRECT: i32 = 7;

/// A service port to set up.
#[derive(Clone, Debug)]
pub struct Service {
    /// Its id.
    pub id: u32,
    /// Where it is reached.
    pub frontend: SocketAddr,
    /// TCP or UDP.
    pub proto: Proto,
    /// Seconds of affinity, or 0 for none.
    pub timeout: u32,
    /// Its backends: id, address, eligible.
    pub backends: Vec<(u32, SocketAddr, bool)>,
}

/// The loaded programs and their maps. They may be run from several threads at once.
pub struct Programs {
    ebpf: Ebpf,
    next_slot: u32,
}

impl Programs {
    /// Loads both programs with small maps.
    pub fn load() -> Result<Self> {
        Self::load_with(&[])
    }

    /// Loads both programs; `sizes` are maps' names and numbers of elements.
    pub fn load_with(sizes: &[(&str, u32)]) -> Result<Self> {
        let mut options = EbpfLoader::new();
        options.override_global("AYA_LOG_LEVEL", &0u8, true);
        for (name, size) in sizes {
            options.map_max_entries(name, *size);
        }
        let mut ebpf = options.load(affinity_user::object::OBJECT).context("loading the BPF object")?;
        for program in Program::TC {
            let loaded: &mut SchedClassifier =
                ebpf.program_mut(section(program)).context("no such program")?.try_into()?;
            loaded.load().with_context(|| format!("loading {}", section(program)))?;
        }
        load_stages(&mut ebpf, false)?;
        // They are run by real sockets elsewhere; here they must get past the verifier of the kernel that this is.
        cgroup::load(&mut ebpf, true)?;
        let touch: &mut SchedClassifier = ebpf.program_mut("affinity_touch").context("no such program")?.try_into()?;
        touch.load().context("loading affinity_touch")?;
        Ok(Self { ebpf, next_slot: 0 })
    }

    /// Runs a program once on a packet.
    ///
    /// # Errors
    /// Where the kernel refuses to run it: frames under 14 bytes.
    pub fn run(&self, program: Program, packet: &[u8]) -> Result<Run> {
        let before = self.counters(program)?;
        let (action, packet) = self.run_uncounted(program, packet)?;
        let after = self.counters(program)?;
        let mut counted =
            Reason::ALL.iter().zip(before.iter().zip(&after)).filter(|(_, (before, after))| before != after);
        let (reason, _) = counted.next().ok_or_else(|| anyhow!("nothing was counted"))?;
        Ok(Run { action, packet, reason: *reason })
    }

    /// Runs a program once on a packet, when others run at the same time: what was counted is not known then.
    ///
    /// # Errors
    /// Where the kernel refuses to run it.
    pub fn run_uncounted(&self, program: Program, packet: &[u8]) -> Result<(i32, Vec<u8>)> {
        let loaded: &SchedClassifier = self.ebpf.program(section(program)).context("no such program")?.try_into()?;
        let mut out = vec![0; packet.len() + 64];
        let options = TestRunOptions { data_in: Some(packet), data_out: Some(&mut out), ..TestRunOptions::default() };
        let result = loaded.test_run(options)?;
        out.truncate(result.data_size_out as usize);
        Ok((result.return_value.cast_signed(), out))
    }

    /// Packets by reason, summed over CPUs.
    pub fn counters(&self, program: Program) -> Result<Vec<u64>> {
        let map: PerCpuArray<&MapData, Plain<Counter>> = PerCpuArray::try_from(self.map(counters::SPEC.name)?)?;
        Reason::ALL
            .iter()
            .map(|reason| {
                let values = map.get(&counters::index(program, *reason), 0)?;
                Ok(values.iter().map(|Plain(counter)| counter.packets).sum())
            })
            .collect()
    }

    /// Writes a service: its backends, slots (each eligible backend once), address and frontend.
    pub fn set_service(&mut self, service: &Service) -> Result<()> {
        match service.frontend {
            SocketAddr::V4(_) => self.set_service_of::<V4>(service),
            SocketAddr::V6(_) => self.set_service_of::<V6>(service),
        }
    }

    fn set_service_of<F: Family>(&mut self, service: &Service) -> Result<()> {
        let id = ServiceId { id: service.id };
        for (backend, address, eligible) in &service.backends {
            self.set_backend(service.id, *backend, *address, *eligible)?;
        }
        let first_slot = self.next_slot;
        let eligible: Vec<u32> =
            service.backends.iter().filter(|(_, _, eligible)| *eligible).map(|(id, _, _)| *id).collect();
        let mut slots: Array<&mut MapData, Plain<Slot>> = Array::try_from(self.map_mut("slots")?)?;
        for (index, backend) in (first_slot..).zip(&eligible) {
            slots.set(index, Plain(Slot { backend: BackendId { id: *backend } }), 0)?;
        }
        let slot_count = u32::try_from(eligible.len())?;
        self.next_slot += slot_count;
        let value = Frontend {
            service: id,
            affinity: id,
            seed: service.id.wrapping_mul(0x9e37_79b9),
            first_slot,
            slot_count,
            timeout: Seconds::new(service.timeout),
            scope: frontends::CLUSTER,
            flags: 0,
        };
        let (addr, port) = (octets::<F>(service.frontend)?, Port::new(service.frontend.port()));
        let place = Place::of::<F>(&addr);
        let mut filter: Array<&mut MapData, Plain<FilterWord>> = Array::try_from(self.map_mut(filter::SERVICES.name)?)?;
        let Plain(word) = filter.get(&place.word, 0)?;
        filter.set(place.word, Plain(FilterWord { bits: word.bits | place.bit }), 0)?;
        self.insert(addresses::spec::<F>().name, AddressKey::<F> { addr }, Address::default())?;
        self.insert(frontends::spec::<F>().name, FrontendKey::<F>::new(addr, port, service.proto), value)
    }

    /// Writes a backend.
    pub fn set_backend(&mut self, service: u32, backend: u32, address: SocketAddr, eligible: bool) -> Result<()> {
        match address {
            SocketAddr::V4(_) => self.set_backend_of::<V4>(service, backend, address, eligible),
            SocketAddr::V6(_) => self.set_backend_of::<V6>(service, backend, address, eligible),
        }
    }

    fn set_backend_of<F: Family>(&mut self, service: u32, id: u32, address: SocketAddr, eligible: bool) -> Result<()> {
        let key = BackendKey { service: ServiceId { id: service }, backend: BackendId { id } };
        let flags = if eligible { ELIGIBLE } else { 0 };
        let value = Backend::<F> { addr: octets::<F>(address)?, port: Port::new(address.port()), flags, zero: 0 };
        self.insert(backends::spec::<F>().name, key, value)?;
        self.insert("backend_stats", key, BackendStats::default())
    }

    /// Removes a backend of a family.
    pub fn remove_backend<F: Family>(&mut self, service: u32, backend: u32) -> Result<()> {
        let key = BackendKey { service: ServiceId { id: service }, backend: BackendId { id: backend } };
        self.remove::<_, Backend<F>>(backends::spec::<F>().name, key)
    }

    /// How many connections were sent to a backend.
    pub fn connections(&self, service: u32, backend: u32) -> Result<u64> {
        let key = BackendKey { service: ServiceId { id: service }, backend: BackendId { id: backend } };
        Ok(self.get::<_, BackendStats>("backend_stats", key)?.context("no such backend")?.connections)
    }

    /// A client's affinity entry.
    pub fn affinity<F: Family>(&self, client: SocketAddr, service: u32) -> Result<Option<Affinity>> {
        self.get(affinity::spec::<F>().name, client_key::<F>(client, service)?)
    }

    /// Writes a client's affinity entry.
    pub fn set_affinity<F: Family>(&mut self, client: SocketAddr, service: u32, value: Affinity) -> Result<()> {
        self.insert(affinity::spec::<F>().name, client_key::<F>(client, service)?, value)
    }

    /// Removes a client's affinity entry.
    pub fn remove_affinity<F: Family>(&mut self, client: SocketAddr, service: u32) -> Result<()> {
        self.remove::<_, Affinity>(affinity::spec::<F>().name, client_key::<F>(client, service)?)
    }

    /// Every conntrack entry of a family.
    pub fn conntrack<F: Family>(&self) -> Result<Vec<(ConntrackKey<F>, Conntrack<F>)>> {
        let map: HashMap<&MapData, Plain<ConntrackKey<F>>, Plain<Conntrack<F>>> =
            HashMap::try_from(self.map(conntrack::spec::<F>().name)?)?;
        map.iter().map(|entry| entry.map(|(Plain(key), Plain(value))| (key, value)).map_err(Into::into)).collect()
    }

    /// Writes a conntrack entry.
    pub fn set_conntrack<F: Family>(&mut self, key: ConntrackKey<F>, value: Conntrack<F>) -> Result<()> {
        self.insert(conntrack::spec::<F>().name, key, value)
    }

    /// Removes a conntrack entry.
    pub fn remove_conntrack<F: Family>(&mut self, key: ConntrackKey<F>) -> Result<()> {
        self.remove::<_, Conntrack<F>>(conntrack::spec::<F>().name, key)
    }

    fn map(&self, name: &str) -> Result<&aya::maps::Map> {
        self.ebpf.map(name).with_context(|| format!("no map {name}"))
    }

    fn map_mut(&mut self, name: &str) -> Result<&mut aya::maps::Map> {
        self.ebpf.map_mut(name).with_context(|| format!("no map {name}"))
    }

    fn insert<K: Pod, V: Pod>(&mut self, name: &str, key: K, value: V) -> Result<()> {
        let mut map: HashMap<&mut MapData, Plain<K>, Plain<V>> = HashMap::try_from(self.map_mut(name)?)?;
        map.insert(Plain(key), Plain(value), 0).with_context(|| format!("writing {name}"))
    }

    fn remove<K: Pod, V: Pod>(&mut self, name: &str, key: K) -> Result<()> {
        let mut map: HashMap<&mut MapData, Plain<K>, Plain<V>> = HashMap::try_from(self.map_mut(name)?)?;
        map.remove(&Plain(key)).with_context(|| format!("removing from {name}"))
    }

    fn get<K: Pod, V: Pod>(&self, name: &str, key: K) -> Result<Option<V>> {
        let map: HashMap<&MapData, Plain<K>, Plain<V>> = HashMap::try_from(self.map(name)?)?;
        match map.get(&Plain(key), 0) {
            Ok(Plain(value)) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("reading {name}")),
        }
    }
}

/// The clock that entries are stamped by.
pub fn now() -> Result<Nanos> {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE)?;
    Ok(Nanos(u64::try_from(time.tv_sec())? * 1_000_000_000 + u64::try_from(time.tv_nsec())?))
}

fn section(program: Program) -> &'static str {
    match program {
        Program::Ingress => "affinity_ingress",
        Program::Egress => "affinity_egress",
        other => panic!("{} sees no packets", other.name()),
    }
}

fn octets<F: Family>(address: SocketAddr) -> Result<F::Addr> {
    F::from_ip(address.ip()).with_context(|| format!("{address} is not of {}", F::NAME))
}

fn client_key<F: Family>(client: SocketAddr, service: u32) -> Result<AffinityKey<F>> {
    Ok(AffinityKey::new(octets::<F>(client)?, ServiceId { id: service }, 0))
}
