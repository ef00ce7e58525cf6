//! Every metric, once: its name, what it means, and when to worry. The exposition and `docs/metrics.md` are made of these.

use prometheus_client::metrics::MetricType;

/// A metric.
#[derive(Clone, Copy, Debug)]
pub struct Definition {
    /// The name without its unit and without `_total`.
    pub name: &'static str,
    /// The unit, which the name ends with.
    pub unit: Option<&'static str>,
    /// Counter, gauge or histogram.
    pub kind: MetricType,
    /// The labels' names.
    pub labels: &'static [&'static str],
    /// What it is, without a full stop.
    pub help: &'static str,
    /// When to worry, and what to look at then.
    pub worry: &'static str,
}

impl Definition {
    /// The name as Prometheus knows it.
    pub fn full_name(&self) -> String {
        let unit = self.unit.map(|unit| format!("_{unit}")).unwrap_or_default();
        let total = if matches!(self.kind, MetricType::Counter) { "_total" } else { "" };
        format!("{}{unit}{total}", self.name)
    }

    /// `counter`, `gauge` or `histogram`.
    pub fn kind_name(&self) -> &str {
        self.kind.as_str()
    }
}

macro_rules! definitions {
    ($($constant:ident: $kind:ident $name:literal $(in $unit:literal)? $(by [$($label:literal),+])?, $help:literal, $worry:literal;)+) => {
        $(pub(super) const $constant: Definition = Definition {
            name: $name,
            unit: definitions!(@unit $($unit)?),
            kind: MetricType::$kind,
            labels: &[$($($label),+)?],
            help: $help,
            worry: $worry,
        };)+

        /// Every metric, in the order of the exposition.
        pub const ALL: &[Definition] = &[$($constant),+];
    };
    (@unit) => { None };
    (@unit $unit:literal) => { Some($unit) };
}

definitions! {
    BUILD_INFO: Gauge "affinity_build_info" by ["version", "layout", "kernel"],
        "Always 1; the version, the layout of its maps and the kernel that it runs on",
        "Nodes differ for longer than an upgrade takes.";
    SYNCED: Gauge "affinity_synced",
        "Whether every source was heard out and programmed (1) or not yet (0)",
        "0 for over a minute: `affinity status`, and `affinity_source_stale_seconds`.";
    READY: Gauge "affinity_ready",
        "Whether the daemon is ready, as /readyz has it (1) or not (0)",
        "0 for over a minute: the body of /readyz says what is missing.";

    SERVICE_PORTS: Gauge "affinity_service_ports",
        "Service ports that are programmed",
        "0 on a node of a cluster that has services.";
    FRONTENDS: Gauge "affinity_frontends" by ["family"],
        "Addresses and ports that services are reached by",
        "It falls without services having been deleted.";
    BACKENDS: Gauge "affinity_backends" by ["family", "state"],
        "Backends of service ports: eligible ones take new sessions, others keep those that they have",
        "Eligible ones fall to 0.";
    SESSIONS: Gauge "affinity_sessions" by ["family", "state"],
        "Clients of service ports that are remembered: live, or expired and not yet overwritten",
        "Live ones near the size of the map `affinity_*`: raise --map-size affinity=N.";

    SOURCE_STALE: Gauge "affinity_source_stale" in "seconds" by ["kind"],
        "Seconds since objects of a kind could be followed for the last time; 0 while they are",
        "Over 60: changes are not seen; the API server, its address, RBAC, in `affinity status`.";
    SOURCE_EVENTS: Counter "affinity_source_events" by ["kind"],
        "Versions and deletions of objects that the source has told",
        "Its rate is far above what the cluster's changes explain.";
    SOURCE_LISTS: Counter "affinity_source_lists" by ["kind"],
        "Lists of all objects of a kind that were begun, the first one included",
        "Several in an hour: watches do not last; proxies' timeouts, the API server's load.";
    SOURCE_FAILURES: Counter "affinity_source_failures" by ["kind"],
        "Watches and lists that failed and had to be restarted",
        "It keeps growing: `affinity status` has the last error.";
    REJECTED: Gauge "affinity_rejected_objects",
        "Problems of objects and files that are not programmed as they are",
        "Over 0: `affinity status` names object, field and fault.";
    PROBLEMS: Gauge "affinity_programming_problems",
        "What could not be programmed or attached to though no object is wrong, and what services share with the node",
        "Over 0 for more than a minute: `affinity status` says what to do.";

    GIVES_ADDRESSES: Gauge "affinity_address_leader",
        "Whether this node gives load balancer addresses (1): it holds the Lease affinity-ipam; or not (0)",
        "The sum over all nodes is not 1 for over a minute, in a cluster that has pools.";
    POOL_ADDRESSES: Gauge "affinity_pool_addresses" by ["pool", "family", "state"],
        "Addresses of pools, used or available; told by the node that gives them",
        "Available ones near 0: give the pool another block.";
    UNMET: Gauge "affinity_unmet_services" by ["reason"],
        "Services that have not all the load balancer addresses that they ask for, by the reason of their condition; told by \
         the node that gives them",
        "Over 0: the service's condition and `affinity pool list` say what to do.";
    ANNOUNCED: Gauge "affinity_announced_addresses" by ["family"],
        "Addresses that this node answers for by ARP or neighbour discovery",
        "The sum over all nodes falls: `affinity announce list` shows which address no node answers for.";

    SYNC_DURATION: Histogram "affinity_sync_duration" in "seconds",
        "From the receipt of the oldest of some changes to the last map write for them, by the daemon's own clock",
        "The 99th percentile is over 1 s after the start.";
    PROGRAMMING_DURATION: Histogram "affinity_network_programming_duration" in "seconds",
        "From the change of a pod or service (endpoints.kubernetes.io/last-change-trigger-time) to the map write for it, \
         one for each service and write, of coalesced changes by the oldest",
        "The 99th percentile is over 5 s: without a high `affinity_sync_duration_seconds` the time goes to the control plane.";
    PROGRAMMING_IGNORED: Counter "affinity_network_programming_ignored" by ["why"],
        "Trigger times that could not be used: no time, or in the future of this node's clock",
        "Future ones grow: clocks of the node and of the control plane differ.";
    MAP_WRITES: Counter "affinity_map_writes" by ["operation"],
        "Map entries that were written or removed by the daemon",
        "It grows with nothing changing.";
    FAILURES: Counter "affinity_programming_failures",
        "Attempts to program a service port that failed",
        "It keeps growing: a map is full, or the kernel refuses; `affinity status`.";
    RETRIES: Counter "affinity_programming_retries",
        "Further attempts at service ports that had failed",
        "It keeps growing, as above.";
    REPAIRS: Counter "affinity_self_audit_repairs",
        "Map entries that were not as they were written, found by comparison and repaired",
        "Over 0: something else writes to the maps, or a bug; the log names the maps.";
    SWEPT: Counter "affinity_swept_sessions",
        "Affinity entries that were removed since their service has no affinity any more",
        "Never by itself.";

    MAP_ENTRIES: Gauge "affinity_map_entries" by ["map"],
        "Entries of a map",
        "See the pressure.";
    MAP_CAPACITY: Gauge "affinity_map_capacity_entries" by ["map"],
        "Entries that a map has room for",
        "Never by itself.";
    MAP_PRESSURE: Gauge "affinity_map_pressure" in "ratio" by ["map"],
        "Entries of a map by its capacity, from 0 to 1",
        "Over 0.8 in frontends, backends, addresses, slots, services, netns: raise --map-size. Those of sessions, \
         connections and sockets are LRUs: full, they evict.";

    PACKETS: Counter "affinity_datapath_packets" by ["program", "reason", "verdict"],
        "Packets, and calls of sockets, by what became of them; reasons that never occurred are left out",
        "Verdict drop grows; collision, conntrack-refused, affinity-refused, rewrite-failed at all.";
    BYTES: Counter "affinity_datapath" in "bytes" by ["program", "reason", "verdict"],
        "Bytes of those packets, link-layer headers included",
        "Never by itself.";
    SELECTIONS: Counter "affinity_selections" by ["reason"],
        "Backends that were chosen for new connections, over all programs, and why",
        "affinity-failover grows with nothing having changed; rebuilt grows: the map conntrack is too small.";

    ATTACHMENTS: Gauge "affinity_attached_interfaces" by ["mode"],
        "Interfaces that the programs are attached to",
        "Fewer than the node's pods with an interface of their own.";
    ATTACH_DURATION: Histogram "affinity_attach_duration" in "seconds",
        "From the kernel's word that an interface has come to both programs being attached to it",
        "The 99th percentile is over 0.1 s: a pod's first packets may pass untranslated.";
    SOCKET_NAMESPACES: Gauge "affinity_socket_namespaces" by ["served"],
        "Network namespaces with a known address, by whether their sockets are served where they are, or left to TC",
        "More left to TC than have several addresses or are excluded.";
    SOCKETS_REFRESHED: Gauge "affinity_sockets_refreshed",
        "Open sockets whose clients' affinity was refreshed by the last sweep",
        "Never by itself.";
    SOCKETS_DESTROYED: Counter "affinity_sockets_destroyed",
        "Datagram sockets that were ended since their backend was gone",
        "Never by itself.";
    COLLECTED: Counter "affinity_collected_connections",
        "Entries of connections and fragments that were over and were taken out",
        "It stands still while `affinity_map_pressure_ratio` of conntrack is 1.";
    COLLECTOR_BUSY: Gauge "affinity_collector_busy" in "seconds",
        "Time that the last walk through the connections has worked for, its rests not included",
        "Over 10.";

    CPU: Counter "process_cpu" in "seconds",
        "User and system CPU time of the daemon",
        "A rate over 0.5 with few changes.";
    RESIDENT: Gauge "process_resident_memory" in "bytes",
        "Resident memory of the daemon, its maps not included",
        "It keeps growing. A container's limit counts the maps, too.";
    VIRTUAL: Gauge "process_virtual_memory" in "bytes",
        "Virtual memory of the daemon",
        "Never by itself.";
    START_TIME: Gauge "process_start_time" in "seconds",
        "When the daemon was started, in seconds since 1970",
        "It changes often: restarts.";
    OPEN_FDS: Gauge "process_open_fds",
        "Open file descriptors of the daemon",
        "Near `process_max_fds`.";
    MAX_FDS: Gauge "process_max_fds",
        "How many file descriptors the daemon may have open",
        "Never by itself.";
    THREADS: Gauge "process_threads",
        "Threads of the daemon",
        "It keeps growing.";
}

/// The table of `docs/metrics.md`.
pub fn table() -> String {
    let mut text = String::from("| metric | kind | labels | what it is | when to worry |\n|---|---|---|---|---|\n");
    for it in ALL {
        let labels: Vec<_> = it.labels.iter().map(|label| format!("`{label}`")).collect();
        let row = [&format!("`{}`", it.full_name()), it.kind_name(), &labels.join(", "), it.help, it.worry];
        text.extend(["| ", &row.join(" | "), " |\n"]);
    }
    text
}
