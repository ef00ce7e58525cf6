//! What the programs at the cgroup cost, by the kernel's own statistics of them (`BPF_ENABLE_STATS`): a call of a real socket
//! is what runs them. Rows take turns in rounds, in another order each time. An empty program at the same hook sees the same
//! calls, so that what the statistics themselves take, and the call of a program, is known of each sample.

use std::fs::File;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::symlink;
use std::path::Path;

use affinity_common::abi::MAPS;
use affinity_tests::cgroup::ThreadCgroup;
use affinity_tests::daemon::{Daemon, DaemonOptions, PIN_DIR, SourceDir};
use affinity_tests::objects::{Document, Endpoint, ServiceObject, SliceObject};
use affinity_tests::topology::{Families, Lab, LabOptions};
use anyhow::{Context as _, Result};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{CgroupAttachMode, CgroupSockAddr, loaded_programs};
use aya::sys::{Stats, enable_stats};
use aya::{Ebpf, EbpfLoader};
use indicatif::ProgressBar;
use serde::Serialize;
use tempfile::TempDir;

use crate::figures::{Interval, Samples};
use crate::report::{align, interval, ratio, table};
use crate::version::Version;

/// A service with affinity, in either family.
const STICKY: [&str; 2] = ["10.96.0.10:80", "[fd00:10:96::10]:80"];
/// The same without.
const PLAIN: [&str; 2] = ["10.96.0.20:80", "[fd00:10:96::20]:80"];
const POD_PORT: u16 = 8080;

/// What a socket does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Call {
    /// One socket connects again and again.
    Reconnect,
    /// Each time a new socket connects.
    Fresh,
    /// One socket, not connected, sends again and again.
    Send,
}

impl Call {
    const ALL: [Self; 3] = [Self::Reconnect, Self::Fresh, Self::Send];

    const fn name(self) -> &'static str {
        match self {
            Self::Reconnect => "connect, the same socket again",
            Self::Fresh => "connect, a new socket",
            Self::Send => "sendmsg, not connected",
        }
    }

    const fn hook(self, version: Version) -> &'static str {
        match (self, version) {
            (Self::Send, Version::V4) => "sendmsg4",
            (Self::Send, Version::V6) => "sendmsg6",
            (_, Version::V4) => "connect4",
            (_, Version::V6) => "connect6",
        }
    }
}

/// Whom it names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Named {
    /// A service with affinity.
    Sticky,
    /// A service without.
    Plain,
    /// A pod.
    Pod,
}

impl Named {
    const ALL: [Self; 3] = [Self::Sticky, Self::Plain, Self::Pod];

    const fn name(self) -> &'static str {
        match self {
            Self::Sticky => "with affinity",
            Self::Plain => "without affinity",
            Self::Pod => "not a service",
        }
    }
}

/// A row as it was measured.
#[derive(Debug, Serialize)]
pub struct Row {
    /// What a socket does.
    pub call: Call,
    /// Whom it names.
    pub named: Named,
    /// The address's family.
    pub version: Version,
    /// Nanoseconds a run of the program, those of the statistics included.
    pub nanos: Interval,
    /// Nanoseconds a run of an empty program at the same hook, in the same calls.
    pub empty: Interval,
    /// The one less the other, call by call.
    pub over_empty: Interval,
    /// Of an IPv6 row: how many times that of IPv4's, both over the empty program, round by round.
    pub to_ipv4: Option<Interval>,
}

/// A goal and what became of it.
#[derive(Debug, Serialize)]
pub struct Goal {
    /// Whose.
    pub name: &'static str,
    /// At most so many nanoseconds.
    pub limit: f64,
    /// What was measured.
    pub measured: f64,
    /// Whether it was met.
    pub met: bool,
}

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub struct Calls {
    /// How often each row was.
    pub rounds: u32,
    /// How often the call was made each time.
    pub repeated: u32,
    /// The rows.
    pub rows: Vec<Row>,
    /// What was wanted.
    pub goals: Vec<Goal>,
}

/// Cilium 1.20-dev's `connect4` by the same method, on another virtual machine of the kind.
const CILIUM: &str =
    "Cilium's connect4, by the same method on another machine: 315 again, 1764 new (with its affinity)";

/// How many rows there are.
pub const ROWS: usize = Call::ALL.len() * Named::ALL.len() * Version::ALL.len();

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Samples of each row.
    pub rounds: u32,
    /// Calls of a sample.
    pub calls: u32,
}

/// A row while it is measured.
struct Measured {
    call: Call,
    named: Named,
    version: Version,
    /// The number of Affinity's program.
    program: u32,
    /// That of the empty one.
    empty_program: u32,
    samples: Samples,
    empty: Samples,
}

/// Measures every row.
pub fn measure(object: &Path, setting: Setting, bar: &ProgressBar) -> Result<Calls> {
    let Setting { rounds, calls } = setting;
    bar.set_message("sockets: setting up a lab");
    let site = Site::new()?;
    let empty = Empty::attach(object, &site.cgroup)?;
    let _counting = enable_stats(Stats::RunTime)?;
    let mut rows = Vec::new();
    for call in Call::ALL {
        for named in Named::ALL {
            for version in Version::ALL {
                let hook = call.hook(version);
                let (program, empty_program) = (site.program(hook)?, empty.program(hook)?);
                let (samples, empty) = <(Samples, Samples)>::default();
                rows.push(Measured { call, named, version, program, empty_program, samples, empty });
            }
        }
    }
    bar.reset();
    bar.set_length(u64::from(rounds) * rows.len() as u64);
    for round in 1..=rounds {
        bar.set_message(format!("sockets: round {round} of {rounds}"));
        let mut order: Vec<usize> = (0..rows.len()).collect();
        fastrand::shuffle(&mut order);
        for index in order {
            let row = &mut rows[index];
            let to = site.address(row.named, row.version)?;
            let [own, empty] = site.sample(row.call, to, [row.program, row.empty_program], calls)?;
            row.samples.push(own);
            row.empty.push(empty);
            bar.inc(1);
        }
    }
    let over_empty = |row: &Measured| row.samples.over(&row.empty);
    let peer = |row: &Measured| {
        let is_peer = |other: &&Measured| other.version == Version::V4 && row.version == Version::V6;
        rows.iter().filter(is_peer).find(|other| (other.call, other.named) == (row.call, row.named))
    };
    let rows: Vec<Row> = rows
        .iter()
        .map(|row| Row {
            call: row.call,
            named: row.named,
            version: row.version,
            nanos: row.samples.interval(),
            empty: row.empty.interval(),
            over_empty: over_empty(row).interval(),
            to_ipv4: peer(row).map(|peer| over_empty(row).ratio_to(&over_empty(peer)).interval()),
        })
        .collect();
    let median = |call: Call| find(&rows, call, Named::Sticky, Version::V4).map_or(f64::NAN, |row| row.nanos.median);
    let goals = [
        ("connect4, the same socket again, with affinity", median(Call::Reconnect), 180.0),
        ("connect4, a new socket, with affinity", median(Call::Fresh), 850.0),
    ];
    let goals = goals.map(|(name, measured, limit)| Goal { name, limit, measured, met: measured <= limit }).into();
    Ok(Calls { rounds, repeated: calls, rows, goals })
}

/// The row of a setting.
pub fn find(rows: &[Row], call: Call, named: Named, version: Version) -> Option<&Row> {
    rows.iter().find(|row| (row.call, row.named, row.version) == (call, named, version))
}

/// Empty programs at the hooks that are measured.
struct Empty(Ebpf);

impl Empty {
    /// Attaches them beside the daemon's.
    fn attach(object: &Path, cgroup: &ThreadCgroup) -> Result<Self> {
        let bytes = std::fs::read(object).with_context(|| object.display().to_string())?;
        let mut loader = EbpfLoader::new();
        for spec in MAPS.iter().filter(|spec| spec.resizable) {
            // Theirs are not used.
            loader.map_max_entries(spec.name, 1024);
        }
        let mut ebpf = loader.load(&bytes).with_context(|| format!("loading {}", object.display()))?;
        let directory = File::open(cgroup.path()).with_context(|| cgroup.path().display().to_string())?;
        for call in [Call::Fresh, Call::Send] {
            for version in Version::ALL {
                let name = format!("bench_{}", call.hook(version));
                let program = ebpf.program_mut(&name).with_context(|| format!("no program {name}"))?;
                let program: &mut CgroupSockAddr = program.try_into()?;
                program.load().with_context(|| format!("loading {name}"))?;
                program.attach(&directory, CgroupAttachMode::Single).with_context(|| format!("attaching {name}"))?;
            }
        }
        Ok(Self(ebpf))
    }

    /// The number of a hook's.
    fn program(&self, hook: &str) -> Result<u32> {
        let program: &CgroupSockAddr =
            self.0.program(&format!("bench_{hook}")).context("no such program")?.try_into()?;
        Ok(program.info()?.id())
    }
}

/// A client, a node and pods, and a daemon that serves this thread's sockets.
struct Site {
    // In the order in which they are dropped.
    _daemon: Daemon,
    lab: Lab,
    _source: SourceDir,
    _namespaces: TempDir,
    cgroup: ThreadCgroup,
}

impl Site {
    fn new() -> Result<Self> {
        let cgroup = ThreadCgroup::enter()?;
        let lab = Lab::new(LabOptions { clients: 1, backends: 2, families: Families::Dual, ..LabOptions::default() })?;
        let source = SourceDir::new()?;
        for (name, frontends, sticky) in [("sticky", STICKY, true), ("plain", PLAIN, false)] {
            let [v4, v6] = frontends.map(|text| text.parse::<SocketAddr>().map(|address| address.ip()));
            let service = ServiceObject::new(name).udp("udp", 80, POD_PORT).cluster_ips(v4?, v6?);
            let service = if sticky { service.affinity(10_800) } else { service.no_affinity() }.build();
            let slices = [0, 1].map(|family| {
                let slice = SliceObject::of(name, &family.to_string()).udp("udp", POD_PORT);
                let add = |slice: SliceObject, address| slice.endpoint(address, Endpoint::Ready);
                lab.backends.iter().map(|host| host.addresses[family]).fold(slice, add).build()
            });
            source.write(name, &[&service as &dyn Document, &slices[0], &slices[1]])?;
        }
        let namespaces = tempfile::Builder::new().prefix("affinity-netns-").tempdir()?;
        symlink(lab.clients[0].netns.path(), namespaces.path().join("client"))?;
        let directory = namespaces.path().display().to_string();
        let mut options = DaemonOptions::new(source.source()).arguments(["--netns-dir", &directory]);
        options.cgroup = Some(cgroup.path().to_owned());
        let daemon = Daemon::start(&lab.node, options)?;
        Ok(Self { _daemon: daemon, lab, _source: source, _namespaces: namespaces, cgroup })
    }

    fn address(&self, named: Named, version: Version) -> Result<SocketAddr> {
        let family = version.of(0, 1);
        Ok(match named {
            Named::Sticky => STICKY[family].parse()?,
            Named::Plain => PLAIN[family].parse()?,
            Named::Pod => SocketAddr::new(self.lab.backends[0].addresses[family], POD_PORT),
        })
    }

    /// The number of the program at a hook.
    fn program(&self, hook: &str) -> Result<u32> {
        let path = format!("{PIN_DIR}/links/cgroup-{hook}");
        self.lab.node.mounts.enter(move || {
            let link: FdLink = PinnedLink::from_pin(path)?.into();
            Ok(link.info()?.program_id())
        })
    }

    /// Nanoseconds a run of each program while a client's sockets make so many calls.
    fn sample(&self, call: Call, to: SocketAddr, programs: [u32; 2], calls: u32) -> Result<[f64; 2]> {
        let before = programs.map(read);
        self.lab.clients[0].netns.enter(|| {
            self.cgroup.join()?;
            let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse()?;
            let one = UdpSocket::bind(any)?;
            for _ in 0..calls {
                match call {
                    Call::Reconnect => one.connect(to)?,
                    Call::Fresh => UdpSocket::bind(any)?.connect(to)?,
                    // Nobody serves there: a later one may hear of that.
                    Call::Send => drop(one.send_to(b"x", to)),
                }
            }
            Ok(())
        })?;
        let mut nanos = [0.0; 2];
        for ((nanos, before), program) in nanos.iter_mut().zip(before).zip(programs) {
            let (before, after) = (before?, read(program)?);
            *nanos = (after.0 - before.0) / (after.1 - before.1);
        }
        Ok(nanos)
    }
}

/// Nanoseconds and runs of a program since the statistics are counted.
#[expect(clippy::cast_precision_loss, reason = "runs are under 2^52")]
fn read(program: u32) -> Result<(f64, f64)> {
    let info = loaded_programs().filter_map(Result::ok).find(|info| info.id() == program);
    let info = info.context("the program is gone")?;
    Ok((info.run_time().as_secs_f64() * 1e9, info.run_count() as f64))
}

impl Calls {
    /// The tables that people read.
    pub fn print(&self) {
        let mut rows = table(&["call", "names", "IPv4", "over empty", "IPv6", "over empty", "IPv6 to IPv4"]);
        for row in self.rows.iter().filter(|row| row.version == Version::V4) {
            let Some(other) = find(&self.rows, row.call, row.named, Version::V6) else { continue };
            rows.add_row([
                row.call.name().to_owned(),
                row.named.name().to_owned(),
                interval(&row.nanos),
                interval(&row.over_empty),
                interval(&other.nanos),
                interval(&other.over_empty),
                other.to_ipv4.as_ref().map(ratio).unwrap_or_default(),
            ]);
        }
        println!("{}\n", align(&mut rows));
        let empty = self.rows.iter().map(|row| row.empty.median);
        let (least, most) = empty.fold((f64::INFINITY, 0.0), |(least, most), it| (it.min(least), it.max(most)));
        println!(
            "Nanoseconds a run of the program at the cgroup, by the kernel's statistics, and over an empty program that sees the\n\
             same calls ({least:.0} to {most:.0}, nearly all of it the statistics' own): median of {} rounds of {} calls of UDP\n\
             sockets (its confidence interval of 95 %); IPv6's ratio to IPv4 over the empty program, round by round.\n{CILIUM}.\n",
            self.rounds, self.repeated
        );
        let mut goals = table(&["goal", "at most", "measured", ""]);
        for Goal { name, limit, measured, met } in &self.goals {
            let met = if *met { "met" } else { "missed" };
            goals.add_row([(*name).to_owned(), format!("{limit:.0}"), format!("{measured:.0}"), met.to_owned()]);
        }
        println!("{}\n", align(&mut goals));
    }
}
