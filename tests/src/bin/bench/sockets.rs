//! What the programs at the cgroup cost, by the kernel's own statistics of them (`BPF_ENABLE_STATS`): a call of a real socket
//! is what runs them. Rows take turns in rounds, in another order each time.

use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::symlink;

use affinity_tests::cgroup::ThreadCgroup;
use affinity_tests::daemon::{Daemon, DaemonOptions, PIN_DIR, SourceDir};
use affinity_tests::objects::{Document, Endpoint, ServiceObject, SliceObject};
use affinity_tests::topology::{Families, Lab, LabOptions};
use anyhow::{Context as _, Result};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::loaded_programs;
use aya::sys::{Stats, enable_stats};
use comfy_table::{CellAlignment, Table, presets};
use indicatif::ProgressBar;
use serde::Serialize;
use tempfile::TempDir;

use crate::figures::{Interval, Samples};

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

    const fn link(self, is_ipv4: bool) -> &'static str {
        match (self, is_ipv4) {
            (Self::Send, true) => "cgroup-sendmsg4",
            (Self::Send, false) => "cgroup-sendmsg6",
            (_, true) => "cgroup-connect4",
            (_, false) => "cgroup-connect6",
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
    /// 4 or 6.
    pub version: u8,
    /// Nanoseconds a run of the program, those of the statistics included.
    pub nanos: Interval,
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

/// Measures every row.
pub fn measure(rounds: u32, calls: u32, bar: &ProgressBar) -> Result<Calls> {
    bar.set_message("setting up a lab for sockets");
    let site = Site::new()?;
    let _counting = enable_stats(Stats::RunTime)?;
    let mut rows = Vec::new();
    for call in Call::ALL {
        for named in Named::ALL {
            for (family, version) in [(0, 4), (1, 6)] {
                let program = site.program(call.link(family == 0))?;
                rows.push((call, named, family, version, program, Samples::default()));
            }
        }
    }
    bar.set_position(0);
    bar.set_length(u64::from(rounds) * rows.len() as u64);
    for round in 1..=rounds {
        bar.set_message(format!("sockets: round {round} of {rounds}"));
        let mut order: Vec<usize> = (0..rows.len()).collect();
        fastrand::shuffle(&mut order);
        for index in order {
            let (call, named, family, _, program, samples) = &mut rows[index];
            samples.push(site.sample(*call, site.address(*named, *family)?, *program, calls)?);
            bar.inc(1);
        }
    }
    let rows: Vec<Row> = rows
        .into_iter()
        .map(|(call, named, _, version, _, samples)| Row { call, named, version, nanos: samples.interval() })
        .collect();
    let median = |call: Call, version: u8| {
        let of = |row: &&Row| row.call == call && row.named == Named::Sticky && row.version == version;
        rows.iter().find(of).map_or(f64::NAN, |row| row.nanos.median)
    };
    let goals = [
        ("connect4, the same socket again, with affinity", median(Call::Reconnect, 4), 180.0),
        ("connect4, a new socket, with affinity", median(Call::Fresh, 4), 850.0),
    ];
    let goals = goals.map(|(name, measured, limit)| Goal { name, limit, measured, met: measured <= limit }).into();
    Ok(Calls { rounds, repeated: calls, rows, goals })
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

    fn address(&self, named: Named, family: usize) -> Result<SocketAddr> {
        Ok(match named {
            Named::Sticky => STICKY[family].parse()?,
            Named::Plain => PLAIN[family].parse()?,
            Named::Pod => SocketAddr::new(self.lab.backends[0].addresses[family], POD_PORT),
        })
    }

    /// The number of the program in a link.
    fn program(&self, link: &str) -> Result<u32> {
        let path = format!("{PIN_DIR}/links/{link}");
        self.lab.node.mounts.enter(move || {
            let link: FdLink = PinnedLink::from_pin(path)?.into();
            Ok(link.info()?.program_id())
        })
    }

    /// Nanoseconds a run of a program while a client's sockets make so many calls.
    fn sample(&self, call: Call, to: SocketAddr, program: u32, calls: u32) -> Result<f64> {
        let before = read(program)?;
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
        let after = read(program)?;
        Ok((after.0 - before.0) / (after.1 - before.1))
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
        let mut table = Table::new();
        table.load_style(presets::ASCII_MARKDOWN);
        table.set_header(["call", "names", "IPv4", "IPv6", "ratio"]);
        for row in self.rows.iter().filter(|row| row.version == 4) {
            let same = |other: &&Row| other.version == 6 && (other.call, other.named) == (row.call, row.named);
            let Some(other) = self.rows.iter().find(same) else { continue };
            let text = |it: &Interval| format!("{:.0} ({:.0}-{:.0})", it.median, it.lower, it.upper);
            let ratio = format!("{:.2}", other.nanos.median / row.nanos.median);
            table.add_row([
                row.call.name().to_owned(),
                row.named.name().to_owned(),
                text(&row.nanos),
                text(&other.nanos),
                ratio,
            ]);
        }
        for column in 2..5 {
            table.column_mut(column).into_iter().for_each(|column| column.set_cell_alignment(CellAlignment::Right));
        }
        println!("{table}\n");
        println!(
            "Nanoseconds a run of the program at the cgroup, by the kernel's statistics, which take some 50 of them: median of {}\n\
             rounds of {} calls of UDP sockets (its confidence interval of 95 %). {CILIUM}.\n",
            self.rounds, self.repeated
        );
        for Goal { name, limit, measured, met } in &self.goals {
            println!("{name}: {measured:.0}, at most {limit:.0}: {}", if *met { "met" } else { "missed" });
        }
        println!();
    }
}
