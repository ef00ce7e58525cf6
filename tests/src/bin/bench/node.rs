//! A node: the benchmark's programs, loaded with maps of their own, and so many services in these.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use affinity_common::abi::MAPS;
use affinity_common::abi::addresses::{self, Address, AddressKey};
use affinity_common::abi::affinity::{self, Affinity, AffinityKey};
use affinity_common::abi::backend_stats::{self, BackendStats};
use affinity_common::abi::backends::{self, Backend, BackendKey, ELIGIBLE};
use affinity_common::abi::conntrack::{self, Conntrack, ConntrackKey};
use affinity_common::abi::counters::{self, Counter};
use affinity_common::abi::filter::{self, FilterWord, Place};
use affinity_common::abi::frontends::{self, Frontend, FrontendKey};
use affinity_common::abi::slots::{self, Slot};
use affinity_common::abi::tail_calls::{self, Stage};
use affinity_common::abi::uplinks::{self, Uplink};
use affinity_common::family::{Family, V4, V6};
use affinity_common::reason::{Program, Reason};
use affinity_common::types::{BackendId, Port, Proto, Seconds, ServiceId};
use affinity_tests::programs::{PASS, Plain};
use affinity_user::loader::load_stages;
use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, HashMap, MapData, PerCpuArray, ProgramArray};
use aya::programs::{SchedClassifier, TestRun as _};
use aya::{Ebpf, EbpfLoader, TestRunOptions};
use bytemuck::Pod;
use serde::Serialize;

use crate::frame;
use crate::version::Version;

/// A program that is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// Returns at once.
    Empty,
    /// Reads the headers.
    Parse,
    /// The wrapper alone.
    Wrapper,
    /// The wrapper and the ingress pipeline.
    Ingress,
    /// The wrapper and the egress pipeline.
    Egress,
}

impl Run {
    const ALL: [Self; 5] = [Self::Empty, Self::Parse, Self::Wrapper, Self::Ingress, Self::Egress];

    /// The program in the object.
    fn program(self, version: Version) -> &'static str {
        match self {
            Self::Empty => "bench_empty",
            Self::Parse => version.of("bench_parse4", "bench_parse6"),
            Self::Wrapper => version.of("bench_wrapper4", "bench_wrapper6"),
            Self::Ingress => version.of("bench_ingress4", "bench_ingress6"),
            Self::Egress => version.of("bench_egress4", "bench_egress6"),
        }
    }
}

/// How many backends each service has.
const BACKENDS: u32 = 5;
/// Size of a service's table of slots where it has affinity: what the daemon makes for so few backends.
const TABLE: u32 = 251;
/// The port of every service.
const PORT: u16 = 80;
/// The one that has it of the node's own address, too.
const NODE_PORT: u16 = 30_080;
/// The interface that packets come by and leave by: the loopback one, in every namespace.
const INTERFACE: u32 = 1;
/// In the place of the program that gives packets the node's address: the same, that stops the watch.
const SNAT: &str = "bench_snat";

/// What a service is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// TCP, `sessionAffinity: ClientIP`.
    Sticky,
    /// TCP, `sessionAffinity: None`.
    Plain,
    /// UDP, `sessionAffinity: ClientIP`.
    StickyUdp,
    /// TCP, `sessionAffinity: ClientIP`, by a port of the node, from outside.
    NodePort,
}

impl Kind {
    /// The services that packets are sent to, in the order of their ids; the others are there to be in the way.
    const MEASURED: [Self; 4] = [Self::Sticky, Self::Plain, Self::StickyUdp, Self::NodePort];

    /// TCP or UDP.
    pub fn proto(self) -> Proto {
        if self == Self::StickyUdp { Proto::UDP } else { Proto::TCP }
    }

    fn timeout(self) -> Seconds {
        Seconds::new(if self == Self::Plain { 0 } else { 10_800 })
    }

    /// The number of the service.
    pub fn service(self) -> ServiceId {
        service(self as u32)
    }

    /// Where the service is reached.
    pub fn frontend(self, version: Version) -> SocketAddr {
        match self {
            Self::NodePort => SocketAddr::new(node_address(version), NODE_PORT),
            _ => frontend(version, self as u32),
        }
    }
}

fn service(number: u32) -> ServiceId {
    ServiceId { id: number + 1 }
}

fn frontend(version: Version, service: u32) -> SocketAddr {
    let (v4, v6) = (Ipv4Addr::new(10, 96, 0, 1), Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 1));
    SocketAddr::new(version.address(v4, v6, service), PORT)
}

/// The node's own address, by which packets leave it.
fn node_address(version: Version) -> IpAddr {
    let (v4, v6) = (Ipv4Addr::new(198, 51, 100, 0), Ipv6Addr::new(0xfd00, 0xc5, 0, 0, 0, 0, 0, 0));
    version.address(v4, v6, 11)
}

fn backend(version: Version, id: BackendId) -> IpAddr {
    let (v4, v6) = (Ipv4Addr::new(10, 200, 0, 0), Ipv6Addr::new(0xfd00, 0x10, 0x200, 0, 0, 0, 0, 0));
    version.address(v4, v6, id.id)
}

fn octets<F: Family>(address: IpAddr) -> Result<F::Addr> {
    F::from_ip(address).with_context(|| format!("{address} is not of {}", F::NAME))
}

/// A program as the kernel holds it.
#[derive(Clone, Debug, Serialize)]
pub struct ProgramSize {
    /// Its name.
    pub name: &'static str,
    /// Bytes of BPF after the verifier's rewriting (8 an instruction).
    pub translated_bytes: u32,
    /// Bytes of machine code.
    pub machine_bytes: u32,
    /// Instructions that the verifier went through, every path counted.
    pub verified_instructions: u32,
}

/// What a series of runs came to.
pub struct Done {
    /// Nanoseconds a run: the kernel's measurement.
    pub nanos: f64,
    /// Nanoseconds a run: the wrapper's own measurement.
    pub watch: f64,
    /// Packets counted by reason, as far as any were.
    pub counted: Vec<(Reason, u64)>,
}

/// The loaded programs and their maps.
pub struct Node {
    ebpf: Ebpf,
    /// The family of its services.
    pub version: Version,
    /// How many services are there beside the measured ones.
    pub others: u32,
}

impl Node {
    /// Loads the object's programs, with maps of default size but for the slots where these don't suffice.
    pub fn load(object: &Path, version: Version, others: u32) -> Result<Self> {
        let bytes = std::fs::read(object).with_context(|| object.display().to_string())?;
        let services = others + u32::try_from(Kind::MEASURED.len())?;
        let slots = (services * TABLE).max(u32::try_from(slots::DEFAULT_SIZE)?);
        let mut loader = EbpfLoader::new();
        loader.override_global("AYA_LOG_LEVEL", &0u8, true);
        // Several nodes stand side by side: what is not measured takes no memory.
        let other = version.of(V6::NAME, V4::NAME);
        for spec in MAPS.iter().filter(|spec| spec.resizable) {
            if spec.name.ends_with(other) || spec.name.starts_with("sockets") {
                loader.map_max_entries(spec.name, 1024);
            }
        }
        let mut ebpf = loader
            .map_max_entries(slots::SPEC.name, slots)
            .load(&bytes)
            .with_context(|| format!("loading {}", object.display()))?;
        for run in Run::ALL {
            let name = run.program(version);
            let program: &mut SchedClassifier = ebpf.program_mut(name).context(name)?.try_into()?;
            program.load().with_context(|| format!("loading {name}"))?;
        }
        load_stages(&mut ebpf, false)?;
        time_snat(&mut ebpf)?;
        let mut node = Self { ebpf, version, others };
        for id in 0..services {
            let kind = Kind::MEASURED.get(id as usize);
            let kind = *kind.unwrap_or(if id % 2 == 0 { &Kind::Sticky } else { &Kind::Plain });
            match version {
                Version::V4 => node.add_service::<V4>(id, kind)?,
                Version::V6 => node.add_service::<V6>(id, kind)?,
            }
        }
        Ok(node)
    }

    fn add_service<F: Family>(&mut self, id: u32, kind: Kind) -> Result<()> {
        let service = service(id);
        let ids: Vec<BackendId> = (1..=BACKENDS).map(|n| BackendId { id: id * BACKENDS + n }).collect();
        for id in &ids {
            let key = BackendKey { service, backend: *id };
            let addr = octets::<F>(backend(self.version, *id))?;
            let value = Backend::<F> { addr, port: Port::new(8080), flags: ELIGIBLE, zero: 0 };
            self.hash::<_, Backend<F>>(backends::spec::<F>().name)?.insert(Plain(key), Plain(value), 0)?;
            let stats = BackendStats::default();
            self.hash::<_, BackendStats>(backend_stats::SPEC.name)?.insert(Plain(key), Plain(stats), 0)?;
        }
        let slot_count = if kind.timeout().secs == 0 { BACKENDS } else { TABLE };
        let first_slot = id * TABLE;
        let mut slots: Array<_, Plain<Slot>> =
            Array::try_from(self.ebpf.map_mut(slots::SPEC.name).context("no slots")?)?;
        // Where they are in the table makes no difference to the time.
        for (slot, backend) in (first_slot..first_slot + slot_count).zip(ids.iter().cycle()) {
            slots.set(slot, Plain(Slot { backend: *backend }), 0)?;
        }
        let to = if kind == Kind::NodePort { kind.frontend(self.version) } else { frontend(self.version, id) };
        let addr = octets::<F>(to.ip())?;
        let place = Place::of::<F>(&addr);
        let mut words: Array<_, Plain<FilterWord>> =
            Array::try_from(self.ebpf.map_mut(filter::SERVICES.name).context("no filter")?)?;
        let Plain(word) = words.get(&place.word, 0)?;
        words.set(place.word, Plain(FilterWord { bits: word.bits | place.bit }), 0)?;
        if kind != Kind::NodePort {
            // Other ports of the node's address are the node's own.
            let address = AddressKey::<F> { addr };
            self.hash::<_, Address>(addresses::spec::<F>().name)?.insert(
                Plain(address),
                Plain(Address::default()),
                0,
            )?;
        }
        let key = FrontendKey::<F>::new(addr, Port::new(to.port()), kind.proto());
        let seed = id.wrapping_mul(0x9e37_79b9);
        let value = Frontend {
            service,
            affinity: service,
            seed,
            first_slot,
            slot_count,
            timeout: kind.timeout(),
            scope: 0,
            flags: 0,
        };
        self.hash::<_, Frontend>(frontends::spec::<F>().name)?.insert(Plain(key), Plain(value), 0)?;
        Ok(())
    }

    /// Has the interface lead outside, or to a pod again.
    pub fn lead_outside(&mut self, outside: bool) -> Result<()> {
        match self.version {
            Version::V4 => self.set_uplink::<V4>(outside),
            Version::V6 => self.set_uplink::<V6>(outside),
        }
    }

    fn set_uplink<F: Family>(&mut self, outside: bool) -> Result<()> {
        let addr = octets::<F>(node_address(self.version))?;
        let mut map = self.hash::<u32, Uplink<F>>(uplinks::spec::<F>().name)?;
        if outside {
            map.insert(Plain(INTERFACE), Plain(Uplink { addr, ..Uplink::default() }), 0)?;
        } else {
            map.remove(&Plain(INTERFACE))?;
        }
        Ok(())
    }

    /// Runs a program so many times on a frame.
    pub fn run(&self, program: Run, frame: &[u8], repeat: u32) -> Result<Done> {
        let before = self.counters()?;
        let mut out = vec![0; frame.len()];
        let options =
            TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), repeat, ..TestRunOptions::default() };
        let result = self.program(program)?.test_run(options)?;
        let after = self.counters()?;
        let counted = Reason::ALL.into_iter().zip(before.into_iter().zip(after));
        let counted =
            counted.map(|(reason, (before, after))| (reason, after - before)).filter(|(_, n)| *n > 0).collect();
        let nanos = f64::from(u32::try_from(result.duration.as_nanos())?);
        let watch = frame::watch(&out).context("a frame without a stop watch")?;
        Ok(Done { nanos, watch: f64::from(u32::try_from(watch)?) / f64::from(repeat), counted })
    }

    /// Runs a program once on a frame and returns the frame that comes out of it.
    pub fn pass(&self, program: Run, frame: &[u8]) -> Result<Vec<u8>> {
        let mut out = vec![0; frame.len()];
        let options = TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..TestRunOptions::default() };
        let result = self.program(program)?.test_run(options)?;
        ensure!(result.return_value.cast_signed() == PASS, "{program:?} returned {}", result.return_value);
        Ok(out)
    }

    /// Forgets every connection and every client.
    pub fn forget(&mut self) -> Result<()> {
        match self.version {
            Version::V4 => self.forget_all::<V4>(),
            Version::V6 => self.forget_all::<V6>(),
        }
    }

    fn forget_all<F: Family>(&mut self) -> Result<()> {
        self.clear::<ConntrackKey<F>, Conntrack<F>>(conntrack::spec::<F>().name)?;
        self.clear::<AffinityKey<F>, Affinity>(affinity::spec::<F>().name)
    }

    /// What the kernel made of the programs.
    pub fn sizes(&self) -> Result<Vec<ProgramSize>> {
        Run::ALL
            .into_iter()
            .map(|run| {
                let info = self.program(run)?.info()?;
                Ok(ProgramSize {
                    name: run.program(self.version),
                    translated_bytes: info.size_translated().unwrap_or_default(),
                    machine_bytes: info.size_jitted(),
                    verified_instructions: info.verified_instruction_count().unwrap_or_default(),
                })
            })
            .collect()
    }

    fn program(&self, run: Run) -> Result<&SchedClassifier> {
        let name = run.program(self.version);
        Ok(self.ebpf.program(name).with_context(|| format!("no program {name}"))?.try_into()?)
    }

    /// Packets by reason, over programs and CPUs.
    fn counters(&self) -> Result<Vec<u64>> {
        let map: PerCpuArray<&MapData, Plain<Counter>> =
            PerCpuArray::try_from(self.ebpf.map(counters::SPEC.name).context("no counters")?)?;
        let count = |program, reason| -> Result<u64> {
            let values = map.get(&counters::index(program, reason), 0)?;
            Ok(values.iter().map(|Plain(counter)| counter.packets).sum())
        };
        Reason::ALL
            .into_iter()
            .map(|reason| Program::ALL.into_iter().map(|program| count(program, reason)).sum())
            .collect()
    }

    fn clear<K: Pod, V: Pod>(&mut self, name: &str) -> Result<()> {
        let mut map = self.hash::<K, V>(name)?;
        let keys = map.keys().collect::<Result<Vec<_>, _>>()?;
        keys.iter().try_for_each(|key| map.remove(key)).with_context(|| format!("clearing {name}"))
    }

    fn hash<K: Pod, V: Pod>(&mut self, name: &str) -> Result<HashMap<&mut MapData, Plain<K>, Plain<V>>> {
        let map = self.ebpf.map_mut(name).with_context(|| format!("no map {name}"))?;
        Ok(HashMap::try_from(map)?)
    }
}

/// Puts the program that stops the watch in the place of the one that does the same.
fn time_snat(ebpf: &mut Ebpf) -> Result<()> {
    let program: &mut SchedClassifier = ebpf.program_mut(SNAT).context(SNAT)?.try_into()?;
    program.load().with_context(|| format!("loading {SNAT}"))?;
    let fd = program.fd()?.try_clone()?;
    let map = ebpf.map_mut(tail_calls::SPEC.name).context("no programs to hand over to")?;
    ProgramArray::try_from(map)?.set(Stage::Snat as u32, &fd, 0)?;
    Ok(())
}
