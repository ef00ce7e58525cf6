//! The maps. User space resizes those whose size is a setting, before it loads the programs.

use affinity_common::{
    abi::{
        addresses::{self, Address, AddressKey},
        affinity::{self, Affinity, AffinityKey},
        announced::{self, Announced, AnnouncedKey},
        backend_names::{self, BackendName},
        backend_stats::{self, BackendStats},
        backends::{self, Backend, BackendKey},
        config::Config,
        conntrack::{self, Conntrack, ConntrackKey},
        counters::{self, Counter},
        events,
        filter::{self, FilterWord},
        fragments::{self, Fragments, FragmentsKey},
        frontends::{self, Frontend, FrontendKey},
        ids::NextIds,
        lifetimes::Lifetimes,
        netns::{self, NetnsClient, NetnsKey},
        services::{self, ServicePortName},
        slots::{self, Slot},
        sockets::{self, Socket, SocketKey},
        source_ranges::{self, Range, RangeKey},
        tail_calls, unknown_netns,
        uplinks::{self, Uplink},
        work::Work,
    },
    family::{Family, V4, V6},
    types::ServiceId,
};
use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::lpm_trie::Key,
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, ProgramArray, RingBuf},
    macros::btf_map,
};

/// The maps of a family.
pub trait Maps: Family {
    /// Its frontends.
    fn frontends() -> &'static HashMap<FrontendKey<Self>, Frontend, { frontends::DEFAULT_SIZE }>;
    /// The addresses of its services.
    fn addresses() -> &'static HashMap<AddressKey<Self>, Address, { addresses::DEFAULT_SIZE }>;
    /// Its backends.
    fn backends() -> &'static HashMap<BackendKey, Backend<Self>, { backends::DEFAULT_SIZE }>;
    /// Its connections.
    fn conntrack() -> &'static LruHashMap<ConntrackKey<Self>, Conntrack<Self>, { conntrack::DEFAULT_SIZE }>;
    /// Its datagrams that come in fragments.
    fn fragments() -> &'static LruHashMap<FragmentsKey<Self>, Fragments, { fragments::DEFAULT_SIZE }>;
    /// What a CPU has in hand.
    fn work() -> &'static PerCpuArray<Work<Self>, 1>;
    /// Its network namespaces.
    fn netns() -> &'static LruHashMap<NetnsKey, NetnsClient<Self>, { netns::DEFAULT_SIZE }>;
    /// Its sockets.
    fn sockets() -> &'static LruHashMap<SocketKey<Self>, Socket<Self>, { sockets::DEFAULT_SIZE }>;
    /// The node's uplinks.
    fn uplinks() -> &'static HashMap<u32, Uplink<Self>, { uplinks::SIZE }>;
    /// Which clients services let in.
    fn ranges() -> &'static LpmTrie<Prefixed<Self>, Range, { source_ranges::DEFAULT_SIZE }>;
    /// The addresses that the node answers for.
    fn announced() -> &'static HashMap<AnnouncedKey<Self>, Announced, { announced::DEFAULT_SIZE }>;
    /// Its clients.
    fn affinity() -> &'static LruHashMap<AffinityKey<Self>, Affinity, { affinity::DEFAULT_SIZE }>;
}

/// A [`RangeKey`] without the length of its prefix.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Prefixed<F: Family> {
    service: ServiceId,
    addr: F::Addr,
}

/// A [`RangeKey`] as the trie takes it.
#[inline(always)]
pub fn range_key<F: Family>(key: &RangeKey<F>) -> Key<Prefixed<F>> {
    Key::new(key.prefix_len, Prefixed { service: key.service, addr: key.addr })
}

macro_rules! family_maps {
    ($family:ident: $frontends:literal, $addresses:literal, $backends:literal, $conntrack:literal, $fragments:literal,
     $affinity:literal, $work:literal, $netns:literal, $sockets:literal, $uplinks:literal, $ranges:literal, $announced:literal) => {
        const _: () = {
            #[btf_map(name = $addresses)]
            static ADDRESSES: HashMap<AddressKey<$family>, Address, { addresses::DEFAULT_SIZE }> = HashMap::new();
            #[btf_map(name = $fragments)]
            static FRAGMENTS: LruHashMap<FragmentsKey<$family>, Fragments, { fragments::DEFAULT_SIZE }> =
                LruHashMap::new();
            #[btf_map(name = $work)]
            static WORK: PerCpuArray<Work<$family>, 1> = PerCpuArray::new();
            #[btf_map(name = $netns)]
            static NETNS: LruHashMap<NetnsKey, NetnsClient<$family>, { netns::DEFAULT_SIZE }> = LruHashMap::new();
            #[btf_map(name = $sockets)]
            static SOCKETS: LruHashMap<SocketKey<$family>, Socket<$family>, { sockets::DEFAULT_SIZE }> =
                LruHashMap::new();
            #[btf_map(name = $uplinks)]
            static UPLINKS: HashMap<u32, Uplink<$family>, { uplinks::SIZE }> = HashMap::new();
            #[btf_map(name = $ranges)]
            static RANGES: LpmTrie<Prefixed<$family>, Range, { source_ranges::DEFAULT_SIZE }> = LpmTrie::new();
            #[btf_map(name = $announced)]
            static ANNOUNCED: HashMap<AnnouncedKey<$family>, Announced, { announced::DEFAULT_SIZE }> = HashMap::new();
            #[btf_map(name = $frontends)]
            static FRONTENDS: HashMap<FrontendKey<$family>, Frontend, { frontends::DEFAULT_SIZE }> = HashMap::new();
            #[btf_map(name = $backends)]
            static BACKENDS: HashMap<BackendKey, Backend<$family>, { backends::DEFAULT_SIZE }> = HashMap::new();
            #[btf_map(name = $conntrack)]
            static CONNTRACK: LruHashMap<ConntrackKey<$family>, Conntrack<$family>, { conntrack::DEFAULT_SIZE }> =
                LruHashMap::new();
            #[btf_map(name = $affinity)]
            static AFFINITY: LruHashMap<AffinityKey<$family>, Affinity, { affinity::DEFAULT_SIZE }> = LruHashMap::new();

            impl Maps for $family {
                #[inline(always)]
                fn frontends() -> &'static HashMap<FrontendKey<Self>, Frontend, { frontends::DEFAULT_SIZE }> {
                    &FRONTENDS
                }
                #[inline(always)]
                fn addresses() -> &'static HashMap<AddressKey<Self>, Address, { addresses::DEFAULT_SIZE }> {
                    &ADDRESSES
                }
                #[inline(always)]
                fn fragments() -> &'static LruHashMap<FragmentsKey<Self>, Fragments, { fragments::DEFAULT_SIZE }> {
                    &FRAGMENTS
                }
                #[inline(always)]
                fn work() -> &'static PerCpuArray<Work<Self>, 1> {
                    &WORK
                }
                #[inline(always)]
                fn netns() -> &'static LruHashMap<NetnsKey, NetnsClient<Self>, { netns::DEFAULT_SIZE }> {
                    &NETNS
                }
                #[inline(always)]
                fn sockets() -> &'static LruHashMap<SocketKey<Self>, Socket<Self>, { sockets::DEFAULT_SIZE }> {
                    &SOCKETS
                }
                #[inline(always)]
                fn uplinks() -> &'static HashMap<u32, Uplink<Self>, { uplinks::SIZE }> {
                    &UPLINKS
                }
                #[inline(always)]
                fn ranges() -> &'static LpmTrie<Prefixed<Self>, Range, { source_ranges::DEFAULT_SIZE }> {
                    &RANGES
                }
                #[inline(always)]
                fn announced() -> &'static HashMap<AnnouncedKey<Self>, Announced, { announced::DEFAULT_SIZE }> {
                    &ANNOUNCED
                }
                #[inline(always)]
                fn backends() -> &'static HashMap<BackendKey, Backend<Self>, { backends::DEFAULT_SIZE }> {
                    &BACKENDS
                }
                #[inline(always)]
                fn conntrack() -> &'static LruHashMap<ConntrackKey<Self>, Conntrack<Self>, { conntrack::DEFAULT_SIZE }>
                {
                    &CONNTRACK
                }
                #[inline(always)]
                fn affinity() -> &'static LruHashMap<AffinityKey<Self>, Affinity, { affinity::DEFAULT_SIZE }> {
                    &AFFINITY
                }
            }
        };
    };
}

family_maps!(V4: "frontends_v4", "addresses_v4", "backends_v4", "conntrack_v4", "fragments_v4", "affinity_v4", "work_v4",
    "netns_v4", "sockets_v4", "uplinks_v4", "ranges_v4", "announced_v4");
family_maps!(V6: "frontends_v6", "addresses_v6", "backends_v6", "conntrack_v6", "fragments_v6", "affinity_v6", "work_v6",
    "netns_v6", "sockets_v6", "uplinks_v6", "ranges_v6", "announced_v6");

/// What addresses look like those of services.
#[btf_map(name = "service_filter")]
pub static SERVICE_FILTER: Array<FilterWord, { filter::SIZE }> = Array::new();

/// What addresses look like those that are talked to directly beside a translated connection.
#[btf_map(name = "direct_filter")]
pub static DIRECT_FILTER: Array<FilterWord, { filter::SIZE }> = Array::new();

/// What addresses look like those of backends that clients from outside were led to.
#[btf_map(name = "snat_filter")]
pub static SNAT_FILTER: Array<FilterWord, { filter::SIZE }> = Array::new();

/// Where choices are made. User space writes whole runs of them by its own memory.
#[btf_map(name = "slots")]
pub static SLOTS: Array<Slot, { slots::DEFAULT_SIZE }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// How often each backend was chosen.
#[btf_map(name = "backend_stats")]
pub static BACKEND_STATS: HashMap<
    BackendKey,
    BackendStats,
    { backend_stats::DEFAULT_SIZE },
    { BPF_F_NO_PREALLOC as usize },
> = HashMap::new();

/// Packets and bytes by program and reason.
#[btf_map(name = "counters")]
pub static COUNTERS: PerCpuArray<Counter, { counters::SIZE }> = PerCpuArray::new();

/// What user space tells us.
#[btf_map(name = "config")]
pub static CONFIG: Array<Config, 1> = Array::new();

/// How long connections may be silent.
#[btf_map(name = "lifetimes")]
pub static LIFETIMES: Array<Lifetimes, 1> = Array::new();

/// What we tell user space.
#[btf_map(name = "events")]
pub static EVENTS: RingBuf<(), { events::SIZE }> = RingBuf::new();

/// The namespace that we do not know.
#[btf_map(name = "unknown_netns")]
pub static UNKNOWN_NETNS: RingBuf<(), { unknown_netns::SIZE }> = RingBuf::new();

/// The programs that another one hands over to.
#[btf_map(name = "tail_calls")]
pub static TAIL_CALLS: ProgramArray<{ tail_calls::SIZE }> = ProgramArray::new();

// Of user space alone; they are here so that all maps are made, sized and pinned in one way.

#[btf_map(name = "ids")]
static IDS: Array<NextIds, 1> = Array::new();

#[btf_map(name = "services")]
static SERVICES: HashMap<ServiceId, ServicePortName, { services::DEFAULT_SIZE }, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

#[btf_map(name = "backend_names")]
static BACKEND_NAMES: HashMap<
    BackendKey,
    BackendName,
    { backend_names::DEFAULT_SIZE },
    { BPF_F_NO_PREALLOC as usize },
> = HashMap::new();
