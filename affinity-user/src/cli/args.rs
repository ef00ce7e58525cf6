//! What can be typed.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};

use crate::lease::Timing;
use crate::loader::{PIN_DIR, Sizes};
use crate::model::NodePortAddresses;
use crate::sources::kubernetes::Access;
use crate::sources::kubernetes::access::{KUBELET_KUBECONFIG, Places};
use crate::status::STATE_DIR;
use affinity_common::abi::lifetimes::Lifetimes;
use affinity_common::types::Seconds;

/// Sticky Kubernetes Services in eBPF: a client that reached a pod reaches it again.
#[derive(Debug, Parser)]
#[command(
    name = "affinity",
    version,
    after_help = "Examples:\n  affinity run --source-dir ./services   serve the services of a directory of YAML\n  \
                  affinity session list                  which client is kept on which pod\n  affinity status -o json"
)]
pub struct Cli {
    #[command(subcommand)]
    pub(super) verb: Verb,
    #[command(flatten)]
    pub(super) common: Common,
}

/// What every verb takes.
#[derive(Debug, Args)]
pub(super) struct Common {
    /// How to print: a table for people, a wide one, or JSON for programs
    #[arg(short, long, global = true, value_enum, default_value_t)]
    pub output: Output,
    /// Where maps and links are pinned
    #[arg(long, global = true, value_name = "DIR", default_value = PIN_DIR, env = "AFFINITY_PIN_DIR")]
    pub pin_dir: PathBuf,
    /// Where the daemon tells its status
    #[arg(long, global = true, value_name = "DIR", default_value = STATE_DIR, env = "AFFINITY_STATE_DIR")]
    pub state_dir: PathBuf,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    /// A table
    #[default]
    Table,
    /// A table with all columns
    Wide,
    /// JSON
    Json,
}

#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Run the node daemon: follow services and their endpoints, and serve them on the clients' interfaces
    Run(Box<RunArgs>),
    /// Services: their frontends, affinity and backends
    #[command(subcommand)]
    Service(ServiceVerb),
    /// Backends: which pods receive traffic
    #[command(subcommand)]
    Backend(BackendVerb),
    /// Sessions: which client is kept on which pod, and for how long yet
    #[command(subcommand)]
    Session(SessionVerb),
    /// Connections that are translated
    #[command(subcommand)]
    Conntrack(ConntrackVerb),
    /// Sockets that were connected to a backend at once
    #[command(subcommand)]
    Socket(SocketVerb),
    /// Pools of load balancer addresses
    #[command(subcommand)]
    Pool(PoolVerb),
    /// Services' addresses on links: which node answers for them
    #[command(subcommand)]
    Announce(AnnounceVerb),
    /// Watch each choice of a backend, each failover and expiry as it happens
    #[command(
        after_help = "Examples:\n  affinity monitor\n  affinity monitor -o json | jq 'select(.event == \"failover\")'"
    )]
    Monitor,
    /// What is attached where, how full the maps are, what was rejected, packets by reason
    #[command(
        after_help = "Examples:\n  affinity status\n  affinity status -o wide    reasons that never occurred, too\n  \
                            affinity status -o json | jq .rejected\n  \
                            affinity status --pods     whether each pod is served by its sockets, by TC, by both or by none\n  \
                            affinity status --pods -o json | jq '.pods[] | select(.served_by == \"none\")'"
    )]
    Status {
        /// Say for each pod of the node whether it is served by its sockets, by its packets (TC), by both or by none, and why
        ///
        /// It looks into the node's network namespaces, as the daemon does: in a cluster, ask it in the daemon's pod. Pods that
        /// have finished are left out; network namespaces that are no known pod's are shown by their paths.
        #[arg(long)]
        pods: bool,
    },
    /// Print the definitions of the custom resources, as they are installed by `kubectl apply -f`
    #[command(after_help = "Examples:\n  affinity crds | kubectl apply -f -")]
    Crds,
    /// Mount the BPF file system where the node has none, so that what is pinned there outlives a pod
    #[command(
        after_help = "`run` does so, too; in a pod that mount would end with it, unless it is made where mounts are \
                            propagated.\n\nExamples:\n  affinity mount"
    )]
    Mount,
    /// Load every program, attach none, and show what this node's kernel makes of them
    #[command(
        after_help = "Whether they load on a node before anything depends on it; works beside a running daemon.\n\n\
                            Examples:\n  affinity programs\n  affinity programs --verifier-log   the whole log of what is refused"
    )]
    Programs {
        /// Print the verifier's whole log where it refuses a program
        #[arg(long)]
        verifier_log: bool,
    },
    /// Detach everything and remove every trace from the node
    #[command(after_help = "Established connections to services break, and clients are given new pods when a daemon \
                            starts again.\nEnd the daemon first.\n\nExamples:\n  affinity cleanup\n  \
                            kubectl apply -k kind/cleanup   # on every node of a cluster")]
    Cleanup {
        /// Go on until ended, with nothing to do, as containers of a `DaemonSet` have to
        #[arg(long)]
        stay: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum ServiceVerb {
    /// List all service ports
    #[command(after_help = "Examples:\n  affinity service list\n  affinity service list -o json | jq '.[].service'")]
    List,
    /// Show one service with its backends, and the nodes that answer for its addresses where an API server can be asked
    #[command(after_help = "Examples:\n  affinity service get default/web\n  \
                      affinity service get default/web --kubeconfig ~/.kube/config   who answers for its addresses, too")]
    Get {
        /// `NAMESPACE/NAME`; `NAME` is of the namespace `default`
        name: String,
        #[command(flatten)]
        cluster: ClusterArgs,
        /// The namespace of the daemons' Leases; all of them by default
        #[arg(long, value_name = "NAMESPACE", env = "POD_NAMESPACE")]
        lease_namespace: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum BackendVerb {
    /// List all backends
    #[command(after_help = "Examples:\n  affinity backend list --service default/web")]
    List {
        /// Of one service: `NAMESPACE/NAME`
        #[arg(long, value_name = "NAME")]
        service: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum SessionVerb {
    /// List all sessions
    #[command(after_help = "Examples:\n  affinity session list --live\n  affinity session list --client 10.244.0.11")]
    List {
        /// Of one service: `NAMESPACE/NAME`
        #[arg(long, value_name = "NAME")]
        service: Option<String>,
        /// Of one client
        #[arg(long, value_name = "IP")]
        client: Option<IpAddr>,
        /// Not those that have expired
        #[arg(long)]
        live: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum ConntrackVerb {
    /// List all connections, an entry a direction
    #[command(after_help = "Examples:\n  affinity conntrack list --client 10.244.0.11")]
    List {
        /// Of one client
        #[arg(long, value_name = "IP")]
        client: Option<IpAddr>,
    },
    /// Forget connections: what goes on of them is noted anew, on the same pod where affinity or the hash still say so
    #[command(
        group(ArgGroup::new("which").required(true).multiple(true)),
        after_help = "Examples:\n  affinity conntrack flush --client 10.244.0.11\n  \
                      affinity conntrack flush --service shop/web\n  affinity conntrack flush --all"
    )]
    Flush {
        /// Of one client
        #[arg(long, value_name = "IP", group = "which")]
        client: Option<IpAddr>,
        /// Of one service: NAMESPACE/NAME, or NAME in the namespace default
        #[arg(long, value_name = "NAME", group = "which")]
        service: Option<String>,
        /// All of them
        #[arg(long, group = "which", conflicts_with_all = ["client", "service"])]
        all: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum SocketVerb {
    /// List all sockets, of pods and of the node's own processes, by the client that each counts as
    #[command(
        after_help = "The cookie is what `ss -e` calls sk: by it, in the client's network namespace, a socket's process \
                            is found.\n\nExamples:\n  affinity socket list --client 10.244.0.11\n  \
                            affinity socket list --service shop/web\n  \
                            affinity socket list -o json | jq -r '.[] | select(.pod == \"web-0\") | .client'"
    )]
    List {
        /// Of one service: `NAMESPACE/NAME`
        #[arg(long, value_name = "NAME")]
        service: Option<String>,
        /// Of one client
        #[arg(long, value_name = "IP")]
        client: Option<IpAddr>,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum PoolVerb {
    /// List all pools, with what is free in them
    #[command(after_help = "Examples:\n  affinity pool list --kubeconfig ~/.kube/config\n  \
                            affinity pool list -o json | jq '.[] | select(.ipv4.available == 0) | .pool'")]
    List {
        #[command(flatten)]
        cluster: ClusterArgs,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum AnnounceVerb {
    /// List the addresses that nodes answer for by ARP and neighbour discovery, and which node does
    #[command(after_help = "Examples:\n  affinity announce list --kubeconfig ~/.kube/config\n  \
                            affinity announce list -o json | jq -r '.[] | select(.node == null) | .address'")]
    List {
        #[command(flatten)]
        cluster: ClusterArgs,
        /// The namespace of the daemons' Leases; all of them by default
        #[arg(long, value_name = "NAMESPACE", env = "POD_NAMESPACE")]
        lease_namespace: Option<String>,
    },
}

/// Where the API server is.
#[derive(Clone, Debug, Args)]
pub(super) struct ClusterArgs {
    /// The API server of this kubeconfig's current context
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Where the API server is, in a pod, whose `kubernetes` service nobody serves yet; by default the
    /// `KUBERNETES_SERVICE_HOST` of its manifest, or else where the node's kubelet finds it
    #[arg(long, value_name = "URL", conflicts_with = "kubeconfig")]
    pub api_server: Option<http::Uri>,
    /// The kubelet's kubeconfig, for the address in it
    #[arg(long, value_name = "FILE", default_value = KUBELET_KUBECONFIG)]
    pub kubelet_kubeconfig: PathBuf,
}

impl ClusterArgs {
    /// Whether somebody has named an API server, rather than leaving it to be found.
    pub(super) const fn is_named(&self) -> bool {
        self.kubeconfig.is_some() || self.api_server.is_some()
    }

    pub(super) fn access(self) -> Access {
        match self.kubeconfig {
            Some(file) => Access::Kubeconfig(file),
            None => Access::Infer(Places { api_server: self.api_server, kubelet: self.kubelet_kubeconfig }),
        }
    }
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  affinity run                                        in a cluster, by the pod's service account\n  \
                  affinity run --kubeconfig ~/.kube/config\n  affinity run --source-dir ./services --interface 'cli*'\n  \
                  affinity run --map-size affinity=200000 --map-size conntrack=1000000"
)]
pub(super) struct RunArgs {
    #[command(flatten)]
    pub cluster: ClusterArgs,
    /// Follow the objects in the YAML files of a directory instead
    #[arg(long, value_name = "DIR", conflicts_with_all = ["kubeconfig", "api_server"])]
    pub source_dir: Option<PathBuf>,
    /// This node's name in the cluster; by default its host name
    #[arg(long, value_name = "NAME", env = "NODE_NAME", value_parser = node_name)]
    pub node_name: Option<String>,
    /// At which of the node's addresses node ports are, repeatable: `primary`, the first internal one of each family by its
    /// Node; `all`; or a CIDR, for those that are in it
    #[arg(long = "nodeport-addresses", value_name = "VALUE", default_value = "primary")]
    pub nodeport_addresses: Vec<NodePortAddresses>,
    /// Interfaces of clients: `*` and `?` stand for text, `!PATTERN` leaves out; by default pods' host ends
    #[arg(long = "interface", value_name = "PATTERN")]
    pub interfaces: Vec<String>,
    /// Interfaces that lead outside, and to other nodes, whose clients reach node ports and load balancers' addresses; written
    /// as for --interface, whose interfaces they are not. By default the usual names of network cards, and of CNI plugins' overlay devices
    #[arg(long = "uplink", value_name = "PATTERN")]
    pub uplinks: Vec<String>,
    /// How programs are attached
    #[arg(long, value_enum, default_value_t)]
    pub attach: Attach,
    /// How the kernel waits, twice for each new interface, while programs are attached by TCX
    #[arg(long, value_enum, default_value_t)]
    pub grace_periods: Grace,
    /// Whether sockets are connected to backends at once, where they are, or all is left to packets
    #[arg(long, value_enum, default_value_t)]
    pub socket_lb: SocketLb,
    /// The cgroup whose processes' sockets are; by default the root of the cgroup2 file system
    #[arg(long, value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
    /// Whether the sockets of pods are served too, or those of the node's own processes alone (pods whose packets a mesh or
    /// a virtual machine's host is to see with the service's address); a pod's annotation `affinity.dev/socket-lb`, on or off,
    /// goes before this
    #[arg(long, value_enum, default_value_t)]
    pub socket_lb_pods: SocketLb,
    /// A directory of files that hold pods' network namespaces, repeatable; those of processes and mounts are found anyway
    #[arg(long = "netns-dir", value_name = "DIR", default_value = crate::sockets::discovery::DIRECTORY)]
    pub netns_dirs: Vec<PathBuf>,
    /// How often network namespaces are looked for, beside when an interface comes or goes, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = crate::sockets::keeper::LOOK.as_secs(), hide = true,
          value_parser = clap::value_parser!(u64).range(1..))]
    pub netns_interval: u64,
    /// How often the clients of open sockets are refreshed, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = crate::sockets::keeper::SWEEP.as_secs(), hide = true,
          value_parser = clap::value_parser!(u64).range(1..))]
    pub socket_sweep_interval: u64,
    /// Number of elements of a map, repeatable: frontends, backends, conntrack, affinity, slots, … The defaults are for
    /// 10,000 services with affinity; a map that is nearly full is warned of
    #[arg(long = "map-size", value_name = "NAME=N", value_parser = map_size)]
    pub map_sizes: Vec<(String, u32)>,
    /// How long a connection may be silent before it counts as gone, in seconds, repeatable: tcp-syn-sent=120,
    /// tcp-established=21600, tcp-fin-wait=120, tcp-close=10, udp=30, udp-stream=120 (the defaults)
    #[arg(long = "conntrack-timeout", value_name = "STATE=SECONDS", value_parser = lifetime)]
    pub conntrack_timeouts: Vec<(String, u32)>,
    /// How often everything is compared with the maps, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..))]
    pub audit_interval: u64,
    /// Where metrics and health are asked for by HTTP: /metrics, /healthz, /livez, /readyz; or `off`
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:10249", value_parser = listen)]
    pub metrics_address: Listen,
    /// Where health alone is: /healthz, /livez, /readyz; or `off`. `[::]` is every address of the node, of either family
    #[arg(long, value_name = "ADDRESS", default_value = "[::]:10256", value_parser = listen)]
    pub health_address: Listen,
    /// The namespace of the Leases by which the daemons agree who gives load balancer addresses, and who answers for each; by
    /// default the pod's own
    #[arg(long, value_name = "NAMESPACE", env = "POD_NAMESPACE")]
    pub lease_namespace: Option<String>,
    /// How long after its last sign of life another daemon takes over what a daemon held, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = Timing::default().duration.as_secs(),
          value_parser = clap::value_parser!(u64).range(3..=3600))]
    pub lease_duration: u64,
    /// How often it gives one, in seconds: less than half of that
    #[arg(long, value_name = "SECONDS", default_value_t = Timing::default().renew.as_secs(),
          value_parser = clap::value_parser!(u64).range(1..=1800))]
    pub lease_renew_interval: u64,
    /// What is logged: a level, or a filter such as `info,affinity_user::sources=debug`
    #[arg(long, value_name = "FILTER", default_value = "info", env = "AFFINITY_LOG")]
    pub log_level: String,
    /// How the log is written
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// The datapath's own log, a line a packet; compiled out of the programs unless it is asked for
    #[arg(long, value_enum, default_value_t)]
    pub datapath_log: DatapathLog,
    /// Print the verifier's whole log where it refuses a program
    #[arg(long)]
    pub verifier_log: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Attach {
    /// By TCX where the kernel has it, else by clsact
    #[default]
    Auto,
    /// By TCX alone (Linux 6.6)
    Tcx,
    /// By clsact alone
    Clsact,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Grace {
    /// For 0.1 ms, by setting `/sys/kernel/rcu_expedited` for that moment, where it can be written
    #[default]
    Expedited,
    /// As the machine is set to, by default for some 10 ms
    AsSet,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum SocketLb {
    /// At sockets
    #[default]
    On,
    /// By packets alone
    Off,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    /// For people
    #[default]
    Text,
    /// A JSON object a line
    Json,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum DatapathLog {
    /// None: it costs nothing
    #[default]
    Off,
    /// Every packet and its reason
    Debug,
}

/// A name that a Node can have (a DNS subdomain, RFC 1123).
pub(super) fn node_name(text: &str) -> Result<String, String> {
    let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.';
    if text.bytes().all(legal) && (1..=253).contains(&text.len()) {
        return Ok(text.to_owned());
    }
    Err("no name of a node: 1 to 253 lower-case letters, digits, '-' and '.'".to_owned())
}

/// An address to listen on, or `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Listen(pub Option<SocketAddr>);

fn listen(text: &str) -> Result<Listen, String> {
    if text == "off" {
        return Ok(Listen(None));
    }
    let address = text.parse().map_err(|_| format!("{text:?} is no ADDRESS:PORT, [ADDRESS]:PORT or off"))?;
    Ok(Listen(Some(address)))
}

fn map_size(text: &str) -> Result<(String, u32), String> {
    let (name, size) = text.split_once('=').ok_or("write NAME=N")?;
    let size = size.parse().map_err(|error| format!("{size:?} is no number of elements: {error}"))?;
    Sizes::default().set(name, size)?;
    Ok((name.to_owned(), size))
}

fn lifetime(text: &str) -> Result<(String, u32), String> {
    /// A year: the clock of entries is right for over two.
    const MOST: u32 = 365 * 86_400;
    let (state, seconds) = text.split_once('=').ok_or("write STATE=SECONDS")?;
    let seconds = seconds.parse().map_err(|error| format!("{seconds:?} is no number of seconds: {error}"))?;
    if !(1..=MOST).contains(&seconds) {
        return Err(format!("{seconds} is not in 1..={MOST}"));
    }
    set_lifetime(&mut Lifetimes::default(), state, seconds)?;
    Ok((state.to_owned(), seconds))
}

/// Sets the lifetime of a state that people name.
pub(super) fn set_lifetime(lifetimes: &mut Lifetimes, state: &str, seconds: u32) -> Result<(), String> {
    let lifetime = match state {
        "tcp-syn-sent" => &mut lifetimes.tcp_syn_sent,
        "tcp-established" => &mut lifetimes.tcp_established,
        "tcp-fin-wait" => &mut lifetimes.tcp_fin_wait,
        "tcp-close" => &mut lifetimes.tcp_close,
        "udp" => &mut lifetimes.udp,
        "udp-stream" => &mut lifetimes.udp_stream,
        _ => {
            let known = "tcp-syn-sent, tcp-established, tcp-fin-wait, tcp-close, udp, udp-stream";
            return Err(format!("no state {state:?}; these have a lifetime: {known}"));
        }
    };
    *lifetime = Seconds::new(seconds);
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn common_options_may_follow_the_verb() {
        let cli = Cli::try_parse_from(["affinity", "session", "list", "-o", "json", "--pin-dir", "/p"]).expect("sound");
        assert_eq!((cli.common.output, cli.common.pin_dir), (Output::Json, "/p".into()));
    }

    #[test]
    fn map_sizes_name_a_map() {
        assert_eq!(map_size("frontends=6"), Ok(("frontends".to_owned(), 6)));
        for wrong in ["frontends", "frontends=x", "nothing=1", "slots=0"] {
            assert!(map_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_node_has_a_name_in_lower_case() {
        assert_eq!(node_name("node-1.example.com"), Ok("node-1.example.com".to_owned()));
        for wrong in ["", "Node", "a b", "a,b=c", &"x".repeat(254)] {
            assert!(node_name(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn lifetimes_name_a_state_and_have_bounds() {
        assert_eq!(lifetime("udp=1"), Ok(("udp".to_owned(), 1)));
        for wrong in ["udp", "udp=0", "udp=x", "icmp=1", "tcp-close=31536001"] {
            assert!(lifetime(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn addresses_have_a_port_or_are_off() {
        assert_eq!(listen("off"), Ok(Listen(None)));
        assert_eq!(listen("[::]:10249"), Ok(Listen(Some(([0_u16; 8], 10249).into()))));
        for wrong in ["", "10249", "127.0.0.1", "on"] {
            assert!(listen(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn one_source_at_a_time() {
        assert!(Cli::try_parse_from(["affinity", "run", "--kubeconfig", "a", "--source-dir", "b"]).is_err());
    }
}
