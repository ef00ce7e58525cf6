//! A pod's first packets: how long it takes from a veth's appearance until the programs are attached to it.
//!
//! The daemon itself runs in a node, with everything that it does when an interface comes. It is timed by its own clock, from the
//! kernel's word of the interface until both programs are attached, and from outside: from before the veth is asked for
//! until the second program's link is pinned. Beside them, what the kernel waits for at each of the two attachments, where it is not
//! told to hurry: that no packet runs the programs that were there before (`synchronize_rcu`).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use affinity_tests::cgroup::ThreadCgroup;
use affinity_tests::daemon::{Daemon, DaemonOptions, PIN_DIR, SourceDir};
use affinity_tests::topology::{ETH0, Lab, LabOptions};
use affinity_tests::{grace_period, mountns, netlink, wait};
use affinity_user::status::AttachingStatus;
use anyhow::{Context as _, Result};
use indicatif::ProgressBar;
use rtnetlink::LinkVeth;
use serde::Serialize;

use crate::report::{align, table};

/// How often the pins are looked at.
const LOOK: Duration = Duration::from_micros(100);
/// How long an interface may take.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long 99 of 100 interfaces may take at most, in milliseconds.
const GOAL: f64 = 5.0;

/// How interfaces come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Coming {
    /// Each when the one before is attached.
    OneByOne,
    /// As fast as they can be made.
    Burst,
}

/// Times in milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
struct Times {
    median: f64,
    p99: f64,
    most: f64,
}

/// How programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum By {
    /// TCX, with short grace periods, which is the default.
    Tcx,
    /// TCX, with grace periods as the machine is set to.
    TcxAsSet,
    /// Filters of the clsact qdisc.
    Clsact,
}

/// What was measured of one way of coming.
#[derive(Serialize)]
struct Row {
    coming: Coming,
    by: By,
    interfaces: usize,
    /// What making a veth took.
    made: Times,
    /// From before it was made until both links were pinned; none where nothing is pinned.
    outside: Option<Times>,
    /// By the daemon's own clock.
    daemon: Times,
    /// Of how many.
    timed: u64,
}

/// Everything that was measured.
#[derive(Serialize)]
pub struct Report {
    /// What one `synchronize_rcu` takes when nothing else is done, by `membarrier(2)`.
    grace_period: Times,
    rows: Vec<Row>,
    goal: Goal,
}

/// What we want: of interfaces that come one by one, by the daemon's clock.
#[derive(Serialize)]
struct Goal {
    at_most: f64,
    measured: f64,
    met: bool,
}

/// Measures so many interfaces of each way of coming.
pub fn measure(interfaces: usize, bar: &ProgressBar) -> Result<Report> {
    let mut rows = Vec::new();
    bar.set_message("grace periods");
    let idle = grace_periods(interfaces)?;
    for by in [By::Tcx, By::TcxAsSet, By::Clsact] {
        for coming in [Coming::OneByOne, Coming::Burst] {
            bar.set_message(format!("{}: {}", by.name(), coming.name()));
            rows.push(row(coming, by, interfaces)?);
        }
    }
    let measured = rows.first().map_or(f64::NAN, |row| row.daemon.p99);
    Ok(Report { grace_period: idle, rows, goal: Goal { at_most: GOAL, measured, met: measured <= GOAL } })
}

fn grace_periods(count: usize) -> Result<Times> {
    let times = (0..count).map(|_| {
        let started = Instant::now();
        grace_period().context("membarrier")?;
        Ok(started.elapsed())
    });
    Ok(Times::of(times.collect::<Result<_>>()?))
}

fn row(coming: Coming, by: By, interfaces: usize) -> Result<Row> {
    let cgroup = ThreadCgroup::enter()?;
    let lab = Lab::new(LabOptions { clients: 0, backends: 0, ..LabOptions::default() })?;
    let source = SourceDir::new()?;
    let mut options = DaemonOptions::new(source.source()).arguments(by.arguments().iter().copied());
    options.cgroup = Some(cgroup.path().to_owned());
    let daemon = Daemon::start(&lab.node, options)?;
    let is_pinned = by != By::Clsact;
    let pinned: Mutex<BTreeMap<u32, Instant>> = Mutex::default();
    let ended = AtomicBool::new(false);
    let made = thread::scope(|scope| {
        let watcher = scope.spawn(|| lab.node.mounts.enter(|| watch(&pinned, &ended)));
        let made = make(&lab, interfaces, |index, count| match coming {
            Coming::OneByOne if is_pinned => {
                wait::until_true("a link's pin", PATIENCE, || Ok(lock(&pinned).contains_key(&index)))
            }
            Coming::OneByOne => attached(&daemon, count).map(drop),
            Coming::Burst => Ok(()),
        });
        // All, however they came.
        let all = attached(&daemon, interfaces);
        ended.store(true, Ordering::Relaxed);
        watcher.join().map_err(|_| anyhow::anyhow!("the watcher has panicked"))??;
        all.and(made)
    })?;
    let told = attached(&daemon, interfaces)?;
    let pinned = lock(&pinned);
    let outside = made.iter().map(|one| pinned.get(&one.index).map(|at| at.duration_since(one.asked)));
    let outside: Option<Vec<Duration>> = outside.collect();
    Ok(Row {
        coming,
        by,
        interfaces,
        made: Times::of(made.iter().map(|one| one.took).collect()),
        outside: outside.filter(|_| is_pinned).map(Times::of),
        timed: told.interfaces,
        daemon: Times {
            median: told.p50_seconds * 1000.0,
            p99: told.p99_seconds * 1000.0,
            most: told.longest_seconds * 1000.0,
        },
    })
}

/// A veth that was made.
struct Made {
    index: u32,
    asked: Instant,
    took: Duration,
}

/// Makes veths in the node, both ends, and calls `next` after each with its index and how many there are.
fn make(lab: &Lab, count: usize, next: impl Fn(u32, usize) -> Result<()> + Sync) -> Result<Vec<Made>> {
    lab.node.netns.netlink(async |handle| {
        let mut made = Vec::new();
        for number in 0..count {
            let (name, peer) = (format!("cli{number}"), format!("pod{number}"));
            let asked = Instant::now();
            handle.link().add(LinkVeth::new(&name, &peer).build()).execute().await.context("a veth")?;
            let took = asked.elapsed();
            let index = netlink::link(&handle, &name).await?.index;
            made.push(Made { index, asked, took });
            next(index, made.len())?;
        }
        Ok(made)
    })
}

/// Notes when links of the second program come to be pinned, until it has ended.
fn watch(pinned: &Mutex<BTreeMap<u32, Instant>>, ended: &AtomicBool) -> Result<()> {
    let links = PathBuf::from(PIN_DIR).join("links");
    while !ended.load(Ordering::Relaxed) {
        let names = mountns::list(&links)?;
        let now = Instant::now();
        let mut pinned = lock(pinned);
        for index in names.iter().filter_map(|name| name.strip_suffix("-egress")?.parse().ok()) {
            pinned.entry(index).or_insert(now);
        }
        drop(pinned);
        thread::sleep(LOOK);
    }
    Ok(())
}

/// Waits until a daemon has attached to so many clients' interfaces; what it says of those that it has timed: not those that it has found
/// in a list, for the kernel's word of them was lost (there was no room for it).
fn attached(daemon: &Daemon, count: usize) -> Result<AttachingStatus> {
    let mut last = 0;
    let told = wait::until("attached interfaces", PATIENCE, || {
        let status = daemon.cli().json(&["status"])?;
        // But for the uplink's, which has been there before.
        let those = status["attachments"].as_array().into_iter().flatten();
        last = those.filter(|attachment| attachment["interface"] != ETH0).count();
        let told: AttachingStatus = serde_json::from_value(status["attaching"].clone())?;
        Ok((last >= count).then_some(told))
    });
    told.with_context(|| format!("{last} of {count} are; {}", daemon.log().lines().last().unwrap_or_default()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Coming {
    const fn name(self) -> &'static str {
        match self {
            Self::OneByOne => "one by one",
            Self::Burst => "in a burst",
        }
    }
}

impl By {
    const fn name(self) -> &'static str {
        match self {
            Self::Tcx => "TCX",
            Self::TcxAsSet => "TCX, grace periods as set",
            Self::Clsact => "clsact",
        }
    }

    const fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Tcx => &["--attach", "tcx"],
            Self::TcxAsSet => &["--attach", "tcx", "--grace-periods", "as-set"],
            Self::Clsact => &["--attach", "clsact"],
        }
    }
}

impl Times {
    fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        // The smallest that so many of a hundred do not exceed.
        let at = |percent: usize| {
            let rank = (times.len() * percent).div_ceil(100).saturating_sub(1);
            times.get(rank).map_or(0.0, |time| time.as_secs_f64() * 1000.0)
        };
        Self { median: at(50), p99: at(99), most: at(100) }
    }

    fn cells(self) -> [String; 3] {
        [self.median, self.p99, self.most].map(|ms| format!("{ms:.2}"))
    }
}

impl Report {
    /// The table that people read.
    pub fn print(&self) {
        let mut rows = table(&["veths, milliseconds", "by", "number", "from", "median", "p99", "most"]);
        for Row { coming, by, interfaces, made, outside, daemon, timed } in &self.rows {
            let mut add = |from: &str, number: u64, times: &Times| {
                let mut cells =
                    vec![coming.name().to_owned(), by.name().to_owned(), number.to_string(), from.to_owned()];
                cells.extend(times.cells());
                rows.add_row(cells);
            };
            let all = *interfaces as u64;
            add("asked for to made", all, made);
            if let Some(outside) = outside {
                add("asked for to attached", all, outside);
            }
            add("told of to attached (daemon's clock)", *timed, daemon);
        }
        println!("{}\n", align(&mut rows));
        let [median, p99, most] = self.grace_period.cells();
        println!(
            "A grace period of RCU, as this machine is set to, takes {median} ms, 99 of 100 no more than {p99}, none more than\n\
             {most}: the kernel waits for one at each of the two TCX attachments, and lets nobody change any interface\n\
             meanwhile. The default is to have it hurry for that moment.\n"
        );
        let Goal { at_most, measured, met } = self.goal;
        let met = if met { "met" } else { "missed" };
        println!("goal, one by one, daemon's clock: p99 at most {at_most:.1} ms, measured {measured:.2}: {met}");
    }
}
