//! What the daemon tells Prometheus: [`definitions`] has every metric with its meaning.
//!
//! The daemon's task [publishes](Metrics::publish) what it knows, a copy that costs little; the maps are read by whoever
//! scrapes, on descriptors of their own. So a scrape never holds up the daemon, and nothing of it the datapath.

pub mod definitions;
pub mod exposition;
#[cfg(test)]
mod lint;
mod maps;
mod process;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use affinity_common::abi::LAYOUT;
use jiff::Timestamp;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::loader::attach::Mode;
use crate::model::Kind;
use crate::reconcile::Counts;
use crate::status::StatusFile;
use crate::tables::{TableError, Tables};
use crate::view;
use definitions::{self as of, Definition};
use maps::Numbers;
use process::Usage;

/// How long what was read of the maps' entries is good for: several that scrape cost no more than one.
const KEPT: Duration = Duration::from_secs(5);

/// What has come from the source of a kind of object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceCounts {
    /// Versions and deletions.
    pub events: u64,
    /// Lists that were begun.
    pub lists: u64,
    /// Watches and lists that failed.
    pub failures: u64,
    /// Since when it can't be followed.
    pub stale_since: Option<Timestamp>,
}

/// Triggers of changes that can't be measured by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IgnoredTriggers {
    /// They are no times.
    pub unreadable: u64,
    /// They are in the future, by this node's clock.
    pub future: u64,
}

/// What the daemon's task knows.
#[derive(Clone, Debug)]
pub struct Published {
    /// What `affinity status` is told.
    pub status: StatusFile,
    /// Whether the node's interfaces are known, and were attached to.
    pub seen_interfaces: bool,
    /// What was done to the maps.
    pub counts: Counts,
    /// What has come from the sources.
    pub sources: BTreeMap<Kind, SourceCounts>,
    /// Triggers of changes that could not be used.
    pub ignored: IgnoredTriggers,
}

/// Everything that is told.
pub struct Metrics {
    /// From the receipt of a change to its last map write.
    pub sync: Histogram,
    /// From what a change answers to its last map write.
    pub programming: Histogram,
    /// From an interface's appearance to its attachment.
    pub attach: Histogram,
    published: Mutex<Option<Arc<Published>>>,
    maps: Mutex<Maps>,
}

/// The maps, and what was read of them.
struct Maps {
    tables: Tables,
    read: Option<(Instant, Numbers)>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Metrics {
    /// Those of maps, which nobody else uses by these handles.
    pub fn new(tables: Tables) -> Self {
        Self {
            // 0.25 ms to 8 s; 0.1 ms to 3.2 s.
            sync: Histogram::new(exponential_buckets(0.000_25, 2.0, 16)),
            programming: Histogram::new([
                0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0,
            ]),
            attach: Histogram::new(exponential_buckets(0.000_1, 2.0, 16)),
            published: Mutex::new(None),
            maps: Mutex::new(Maps { tables, read: None }),
        }
    }

    /// Takes what the daemon's task knows, in place of what it knew.
    pub fn publish(&self, published: Published) {
        *lock(&self.published) = Some(Arc::new(published));
    }

    /// What the daemon's task knew last; `None` before it has told anything.
    pub fn published(&self) -> Option<Arc<Published>> {
        lock(&self.published).clone()
    }

    /// The exposition, as `OpenMetrics` text.
    ///
    /// # Errors
    /// Where the maps can't be read.
    pub fn text(self: &Arc<Self>) -> Result<String, TableError> {
        let scrape = Scrape { metrics: self.clone(), seen: self.read()? };
        let mut registry = Registry::default();
        registry.register_collector(Box::new(scrape));
        let mut text = String::new();
        // Writing to a string can't fail.
        let _ = encode(&mut text, &registry);
        Ok(text)
    }

    fn read(&self) -> Result<Seen, TableError> {
        let mut maps = lock(&self.maps);
        let Maps { tables, read } = &mut *maps;
        let numbers = match read {
            Some((at, numbers)) if at.elapsed() < KEPT => numbers.clone(),
            _ => read.insert((Instant::now(), Numbers::read(tables, view::now())?)).1.clone(),
        };
        let counters = maps::counted(tables)?;
        Ok(Seen { numbers, counters, usage: Usage::read().ok(), published: self.published() })
    }
}

/// What is read for one exposition.
#[derive(Debug)]
struct Seen {
    numbers: Numbers,
    counters: Vec<maps::Counted>,
    usage: Option<Usage>,
    published: Option<Arc<Published>>,
}

/// One exposition.
#[derive(Debug)]
struct Scrape {
    metrics: Arc<Metrics>,
    seen: Seen,
}

/// A sample's value.
enum Number {
    Whole(u64),
    Real(f64),
}

impl From<u64> for Number {
    fn from(number: u64) -> Self {
        Self::Whole(number)
    }
}

impl From<usize> for Number {
    fn from(number: usize) -> Self {
        Self::Whole(number as u64)
    }
}

impl From<bool> for Number {
    fn from(is: bool) -> Self {
        Self::Whole(is.into())
    }
}

impl From<f64> for Number {
    fn from(number: f64) -> Self {
        Self::Real(number)
    }
}

/// Writes metrics as they are defined.
struct Writer<'a>(DescriptorEncoder<'a>);

impl Writer<'_> {
    fn describe<R>(
        &mut self,
        of: &Definition,
        write: impl FnOnce(MetricEncoder<'_>) -> Result<R, fmt::Error>,
    ) -> Result<R, fmt::Error> {
        let unit = of.unit.map(|unit| Unit::Other(unit.to_owned()));
        write(self.0.encode_descriptor(of.name, of.help, unit.as_ref(), of.kind)?)
    }

    fn one(&mut self, of: &Definition, number: impl Into<Number>) -> fmt::Result {
        self.each(of, [([], number)])
    }

    /// Samples, each with its labels' values in the order of the definition.
    fn each<'a, const N: usize>(
        &mut self,
        of: &Definition,
        samples: impl IntoIterator<Item = ([&'a str; N], impl Into<Number>)>,
    ) -> fmt::Result {
        self.describe(of, |mut encoder| {
            samples.into_iter().try_for_each(|(values, number)| {
                let labels: Vec<(&str, &str)> = of.labels.iter().copied().zip(values).collect();
                let mut encoder = encoder.encode_family(&labels)?;
                match (of.kind, number.into()) {
                    (MetricType::Counter, Number::Whole(number)) => {
                        encoder.encode_counter::<Labels, _, f64>(&number, None)
                    }
                    (MetricType::Counter, Number::Real(number)) => {
                        encoder.encode_counter::<Labels, _, f64>(&number, None)
                    }
                    (_, Number::Whole(number)) => encoder.encode_gauge(&number),
                    (_, Number::Real(number)) => encoder.encode_gauge(&number),
                }
            })
        })
    }

    fn histogram(&mut self, of: &Definition, histogram: &Histogram) -> fmt::Result {
        self.describe(of, |encoder| histogram.encode(encoder))
    }
}

type Labels = Vec<(&'static str, &'static str)>;

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = Writer(encoder);
        self.about(&mut out)?;
        self.services(&mut out)?;
        self.sources(&mut out)?;
        self.duties(&mut out)?;
        self.programming(&mut out)?;
        self.maps(&mut out)?;
        self.datapath(&mut out)?;
        self.clients(&mut out)?;
        self.process(&mut out)
    }
}

impl Scrape {
    fn status(&self) -> Option<&StatusFile> {
        self.seen.published.as_ref().map(|published| &published.status)
    }

    fn about(&self, out: &mut Writer<'_>) -> fmt::Result {
        let kernel = nix::sys::utsname::uname();
        let kernel = kernel.as_ref().map(|name| name.release().to_string_lossy()).unwrap_or_default();
        out.each(&of::BUILD_INFO, [([env!("CARGO_PKG_VERSION"), &LAYOUT.to_string(), &kernel], 1_u64)])?;
        out.one(&of::SYNCED, self.status().is_some_and(|status| status.synced))?;
        out.one(&of::READY, self.status().is_some_and(|status| status.ready))
    }

    fn services(&self, out: &mut Writer<'_>) -> fmt::Result {
        let Numbers { families, service_ports, .. } = &self.seen.numbers;
        out.one(&of::SERVICE_PORTS, *service_ports)?;
        out.each(&of::FRONTENDS, families.iter().map(|it| ([it.name], it.frontends)))?;
        let backends = families
            .iter()
            .flat_map(|it| [([it.name, "eligible"], it.eligible), ([it.name, "not-eligible"], it.not_eligible)]);
        out.each(&of::BACKENDS, backends)?;
        let sessions =
            families.iter().flat_map(|it| [([it.name, "live"], it.live), ([it.name, "expired"], it.expired)]);
        out.each(&of::SESSIONS, sessions)
    }

    fn sources(&self, out: &mut Writer<'_>) -> fmt::Result {
        let now = Timestamp::now();
        let sources: Vec<(String, SourceCounts)> = self
            .seen
            .published
            .iter()
            .flat_map(|published| &published.sources)
            .map(|(kind, counts)| (kind.to_string(), counts.clone()))
            .collect();
        let stale = |counts: &SourceCounts| {
            counts.stale_since.map_or(0.0, |since| now.duration_since(since).as_secs_f64().max(0.0))
        };
        out.each(&of::SOURCE_STALE, sources.iter().map(|(kind, counts)| ([kind.as_str()], stale(counts))))?;
        out.each(&of::SOURCE_EVENTS, sources.iter().map(|(kind, counts)| ([kind.as_str()], counts.events)))?;
        out.each(&of::SOURCE_LISTS, sources.iter().map(|(kind, counts)| ([kind.as_str()], counts.lists)))?;
        out.each(&of::SOURCE_FAILURES, sources.iter().map(|(kind, counts)| ([kind.as_str()], counts.failures)))?;
        out.one(&of::REJECTED, self.status().map_or(0, |status| status.rejected.len()))?;
        out.one(&of::PROBLEMS, self.status().map_or(0, |status| status.problems.len()))
    }

    fn duties(&self, out: &mut Writer<'_>) -> fmt::Result {
        let duties = self.status().and_then(|status| status.duties.clone()).unwrap_or_default();
        out.one(&of::GIVES_ADDRESSES, duties.gives_addresses)?;
        let addresses = duties.pools.iter().flat_map(|(name, pool)| {
            [("ipv4", pool.ipv4), ("ipv6", pool.ipv6)].into_iter().filter(|(_, usage)| usage.total > 0).flat_map(
                |(family, usage)| {
                    [("used", usage.used), ("available", usage.available)]
                        .map(|(state, count)| ([name.as_str(), family, state], count.cast_unsigned()))
                },
            )
        });
        out.each(&of::POOL_ADDRESSES, addresses)?;
        out.each(&of::UNMET, duties.unmet.iter().map(|(reason, count)| ([reason.as_str()], *count)))?;
        let announced = |is_v4| duties.announced.iter().filter(|addr| addr.is_ipv4() == is_v4).count();
        out.each(&of::ANNOUNCED, [(["ipv4"], announced(true)), (["ipv6"], announced(false))])
    }

    fn programming(&self, out: &mut Writer<'_>) -> fmt::Result {
        let counts = self.seen.published.as_ref().map(|published| published.counts).unwrap_or_default();
        out.histogram(&of::SYNC_DURATION, &self.metrics.sync)?;
        out.histogram(&of::PROGRAMMING_DURATION, &self.metrics.programming)?;
        let ignored = self.seen.published.as_ref().map(|published| published.ignored).unwrap_or_default();
        let ignored = [(["unreadable"], ignored.unreadable), (["future"], ignored.future)];
        out.each(&of::PROGRAMMING_IGNORED, ignored)?;
        out.each(&of::MAP_WRITES, [(["write"], counts.written), (["remove"], counts.removed)])?;
        out.one(&of::FAILURES, counts.failures)?;
        out.one(&of::RETRIES, counts.retries)?;
        out.one(&of::REPAIRS, counts.differences)?;
        out.one(&of::SWEPT, counts.swept)
    }

    fn maps(&self, out: &mut Writer<'_>) -> fmt::Result {
        let fills = &self.seen.numbers.fills;
        out.each(&of::MAP_ENTRIES, fills.iter().map(|it| ([it.map], it.entries)))?;
        out.each(&of::MAP_CAPACITY, fills.iter().map(|it| ([it.map], it.capacity)))?;
        out.each(&of::MAP_PRESSURE, fills.iter().map(|it| ([it.map], it.pressure())))
    }

    fn datapath(&self, out: &mut Writer<'_>) -> fmt::Result {
        let seen = || self.seen.counters.iter().filter(|it| it.counter.packets > 0);
        let labels = |it: &maps::Counted| [it.program.name(), it.reason.name(), it.reason.verdict().name()];
        out.each(&of::PACKETS, seen().map(|it| (labels(it), it.counter.packets)))?;
        // Calls of sockets have none.
        let with_bytes = seen().filter(|it| it.counter.bytes > 0);
        out.each(&of::BYTES, with_bytes.map(|it| (labels(it), it.counter.bytes)))?;
        out.each(&of::SELECTIONS, maps::selections(&self.seen.counters).iter().map(|(reason, n)| ([reason.name()], *n)))
    }

    fn clients(&self, out: &mut Writer<'_>) -> fmt::Result {
        let by = |mode| {
            let attachments = self.status().map(|status| status.attachments.as_slice()).unwrap_or_default();
            attachments.iter().filter(|it| it.mode == mode).count()
        };
        let attached = [Mode::Tcx, Mode::Clsact].map(|mode| ([mode.name()], by(mode)));
        out.each(&of::ATTACHMENTS, attached)?;
        out.histogram(&of::ATTACH_DURATION, &self.metrics.attach)?;
        let sockets = self.status().and_then(|status| status.sockets.clone()).unwrap_or_default();
        let served = sockets.namespaces.saturating_sub(sockets.left_to_tc);
        out.each(&of::SOCKET_NAMESPACES, [(["by-socket"], served), (["by-tc"], sockets.left_to_tc)])?;
        out.one(&of::SOCKETS_REFRESHED, sockets.refreshed)?;
        out.one(&of::SOCKETS_DESTROYED, sockets.destroyed)?;
        let collector = self.status().and_then(|status| status.collector.clone()).unwrap_or_default();
        out.one(&of::COLLECTED, collector.removed_in_all)?;
        out.one(&of::COLLECTOR_BUSY, collector.busy_seconds)
    }

    fn process(&self, out: &mut Writer<'_>) -> fmt::Result {
        let Some(usage) = &self.seen.usage else { return Ok(()) };
        out.one(&of::CPU, usage.cpu_seconds)?;
        out.one(&of::RESIDENT, usage.resident_bytes)?;
        out.one(&of::VIRTUAL, usage.virtual_bytes)?;
        let started = self.status().map_or(0, |status| status.started.cast_unsigned());
        out.one(&of::START_TIME, started)?;
        out.one(&of::OPEN_FDS, usage.open_fds)?;
        out.one(&of::MAX_FDS, usage.max_fds)?;
        out.one(&of::THREADS, usage.threads)
    }
}
