//! The same before a real kube-apiserver: its list, its watch and the decoding of what it sends included; and kube-proxy
//! before the same one.

use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant};

use affinity_common::abi::frontends::Frontend;
use affinity_tests::apiserver::{ASSETS, ApiOptions, ApiServer};
use anyhow::{Context as _, Result};
use comfy_table::Table;
use futures::StreamExt as _;
use indicatif::ProgressBar;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::{ListParams, PostParams};
use serde::Serialize;

use super::cluster::Cluster;
use super::kube_proxy::{self, KubeProxy};
use super::site::{self, Site};
use super::{Latency, mib, next};
use crate::report::table;

/// The name of the node that service proxies run as.
pub const NODE: &str = "bench";
/// How many objects are created at a time.
const AT_A_TIME: usize = 24;
/// How long after one change the next one comes, at least: kube-proxy lets a second (its `minSyncPeriod`, by default) pass
/// between two syncs, which is not to be held against it here.
const PACE: Duration = Duration::from_millis(1_100);
/// When memory is looked at, after a sync.
const SETTLED: Duration = Duration::from_secs(3);

/// What a real API server adds.
#[derive(Serialize)]
pub struct Real {
    services: u32,
    /// Whether the services have `sessionAffinity: ClientIP`.
    sticky: bool,
    /// Seconds that another client takes to list all slices in one answer and to decode them: what no daemon is quicker than.
    listed: f64,
    daemon: Proxy,
    /// `None` where there is no such program.
    kube_proxy: Option<Proxy>,
}

/// A service proxy's figures.
#[derive(Serialize)]
struct Proxy {
    /// Seconds from its start until it was ready to be told of services, where that can be seen.
    loaded: Option<f64>,
    /// Seconds from its start until everything was programmed.
    synced: f64,
    /// Seconds of a CPU that it and the programs that it ran used for it.
    cpu: f64,
    /// Resident memory, in bytes.
    resident: u64,
    /// From the request that changes a slice to its answer.
    written: Latency,
    /// From the request until the change was in force.
    seen: Latency,
    /// Milliseconds of a CPU that it used for each change, what it does meanwhile included.
    cpu_of_change: f64,
}

/// What programs services, and how a change is seen to be in force.
pub trait Programmer {
    /// Looks at what is in force before a change of a service.
    fn look(&mut self, service: u32) -> Result<()>;
    /// Waits until a change is in force by which the first pod of a service has another address; returns when it was seen.
    fn wait(&mut self, service: u32, first: Ipv4Addr) -> Result<Instant>;
    /// How much time of a CPU it has used so far.
    fn cpu_time(&mut self) -> Result<Duration>;
    /// Its resident memory, in bytes.
    fn resident(&mut self) -> Result<u64>;
}

/// The daemon, and what its map said before a change.
struct Daemon<'a> {
    site: Site<'a>,
    before: Option<Frontend>,
}

impl Programmer for Daemon<'_> {
    fn look(&mut self, service: u32) -> Result<()> {
        self.before = self.site.frontend(service)?;
        Ok(())
    }

    fn wait(&mut self, service: u32, _: Ipv4Addr) -> Result<Instant> {
        Ok(self.site.wait_change(service, self.before)?.1)
    }

    fn cpu_time(&mut self) -> Result<Duration> {
        self.site.cpu_time()
    }

    fn resident(&mut self) -> Result<u64> {
        Ok(self.site.memory()?.resident)
    }
}

/// Whether there is an API server.
pub fn is_there() -> bool {
    std::env::var_os(ASSETS).is_some()
}

/// Measures it before an API server of its own.
pub fn measure(cluster: Cluster, changes: u32, bar: &ProgressBar) -> Result<Real> {
    let Cluster { services, sticky, .. } = cluster;
    let api = ApiServer::start(ApiOptions::default())?;
    create(&api, cluster, bar)?;
    bar.set_length(0);
    let slices: Api<EndpointSlice> = Api::all(api.client());
    let started = Instant::now();
    api.block_on(slices.list(&ListParams::default()))?;
    let listed = started.elapsed();
    let mut writer = Writer { api: &api, cluster, changes, versions: vec![0; services as usize] };
    bar.set_message(format!("the daemon before a kube-apiserver with {services} services"));
    let daemon = daemon(&mut writer)?;
    let kube_proxy = if kube_proxy::is_there() {
        bar.set_message(format!("kube-proxy before a kube-apiserver with {services} services"));
        Some(beside(&mut writer)?)
    } else {
        None
    };
    Ok(Real { services, sticky, listed: listed.as_secs_f64(), daemon, kube_proxy })
}

fn daemon(writer: &mut Writer<'_>) -> Result<Proxy> {
    let lab = site::node()?;
    let (_door, kubeconfig) = writer.api.proxy(Some(&lab.node.netns))?;
    let mut site = Site::start(&lab, &kubeconfig, writer.cluster)?;
    let loaded = site.wait_loaded()?;
    let (_, synced) = site.wait_synced()?;
    writer.measure(&mut Daemon { site, before: None }, Some(loaded), synced)
}

fn beside(writer: &mut Writer<'_>) -> Result<Proxy> {
    let lab = site::node()?;
    kube_proxy::register(writer.api, &lab.node)?;
    let (_door, kubeconfig) = writer.api.proxy(Some(&lab.node.netns))?;
    let mut proxy = KubeProxy::start(&lab.node, &kubeconfig)?;
    let synced = proxy.wait_synced(writer.cluster.services)?;
    writer.measure(&mut proxy, None, synced)
}

/// Who changes slices.
struct Writer<'a> {
    api: &'a ApiServer,
    cluster: Cluster,
    /// How many changes are timed.
    changes: u32,
    /// The version of each service's slice.
    versions: Vec<u32>,
}

impl Writer<'_> {
    /// The figures of a service proxy that took so long to be ready, and then to have programmed everything.
    fn measure(
        &mut self,
        programmer: &mut impl Programmer,
        loaded: Option<Duration>,
        synced: Duration,
    ) -> Result<Proxy> {
        let cpu = programmer.cpu_time()?;
        thread::sleep(SETTLED);
        let resident = programmer.resident()?;
        let (written, seen, cpu_of_change) = self.change(programmer)?;
        Ok(Proxy {
            loaded: loaded.map(|loaded| loaded.as_secs_f64()),
            synced: synced.as_secs_f64(),
            cpu: cpu.as_secs_f64(),
            resident,
            written,
            seen,
            cpu_of_change,
        })
    }

    /// Changes slices one at a time, and waits for each to be in force. Returns how long the requests took, how long it took
    /// until changes were in force, and the CPU's milliseconds for each.
    fn change(&mut self, programmer: &mut impl Programmer) -> Result<(Latency, Latency, f64)> {
        let slices: Api<EndpointSlice> = Api::namespaced(self.api.client(), "default");
        let (mut written, mut seen) = (Vec::new(), Vec::new());
        let used = programmer.cpu_time()?;
        for _ in 0..self.changes {
            let service = fastrand::u32(..self.cluster.services);
            let version = next(&mut self.versions, service);
            let slice = slice(self.cluster, service, version)?;
            let name = slice.metadata.name.clone().context("a name")?;
            thread::sleep(PACE);
            programmer.look(service)?;
            let request = Instant::now();
            let answered = thread::scope(|scope| {
                let answer = scope.spawn(|| {
                    let done = self.api.block_on(slices.replace(&name, &PostParams::default(), &slice));
                    done.map(|_| request.elapsed())
                });
                let waited = programmer.wait(service, Cluster::pod(service, 0, version));
                // What was refused is never in force: that says more than that it was not seen.
                let answered = answer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
                seen.push(waited? - request);
                anyhow::Ok(answered)
            })?;
            written.push(answered);
        }
        let used = programmer.cpu_time()?.saturating_sub(used).as_secs_f64() * 1_000.0 / f64::from(self.changes.max(1));
        let services = self.cluster.services;
        Ok((Latency::of(services, written), Latency::of(services, seen), used))
    }
}

fn slice(cluster: Cluster, service: u32, version: u32) -> Result<EndpointSlice> {
    let mut slice: EndpointSlice = serde_json::from_str(&cluster.slice(service, version))?;
    slice.metadata.resource_version = None;
    slice.metadata.uid = None;
    slice.metadata.owner_references = None;
    Ok(slice)
}

fn create(api: &ApiServer, cluster: Cluster, bar: &ProgressBar) -> Result<()> {
    bar.set_message(format!("creating {} services", cluster.services));
    bar.set_length(cluster.services.into());
    bar.set_position(0);
    let services: Api<Service> = Api::namespaced(api.client(), "default");
    let slices: Api<EndpointSlice> = Api::namespaced(api.client(), "default");
    api.block_on(async {
        let params = PostParams::default();
        let mut created = futures::stream::iter(0..cluster.services)
            .map(async |number| {
                let mut service: Service = serde_json::from_str(&cluster.service(number))?;
                service.metadata.resource_version = None;
                service.metadata.uid = None;
                if let Err(error) = services.create(&params, &service).await
                    && services.get_opt(&Cluster::name(number)).await?.is_none()
                {
                    // Else a first request for it got no answer, and another one finds the address taken.
                    return Err(error.into());
                }
                slices.create(&params, &slice(cluster, number, 0)?).await?;
                anyhow::Ok(())
            })
            .buffer_unordered(AT_A_TIME);
        while let Some(done) = created.next().await {
            done?;
            bar.inc(1);
        }
        Ok(())
    })
}

impl Proxy {
    /// Its figures for people, in the order of [`ROWS`].
    fn cells(&self) -> [String; ROWS.len()] {
        let ms = |Latency { median, p99, .. }: Latency| format!("{median:.1} ms (p99 {p99:.1})");
        let seconds = |seconds: f64| format!("{seconds:.2} s");
        [
            self.loaded.map_or_else(|| "-".to_owned(), seconds),
            seconds(self.synced),
            seconds(self.cpu),
            format!("{:.1} MiB", mib(self.resident)),
            ms(self.written),
            ms(self.seen),
            format!("{:.1} ms", self.cpu_of_change),
        ]
    }
}

/// What each figure of a [`Proxy`] is called.
const ROWS: [&str; 7] = [
    "from its start until it is ready to be told of services",
    "from its start until all services are programmed",
    "CPU time for that",
    "RSS",
    "a slice's change, from the request to its answer",
    "the same, from the request until it is in force",
    "CPU time of a change",
];

impl Real {
    /// The figures, with the names of the columns first.
    fn lines(&self) -> Vec<Vec<String>> {
        let sticky = if self.sticky { "with" } else { "without" };
        let mut head = vec![
            format!("before a kube-apiserver, {} services {sticky} affinity", self.services),
            "Affinity".to_owned(),
        ];
        let mut rows: Vec<Vec<String>> = ROWS.into_iter().map(|name| vec![name.to_owned()]).collect();
        let proxies = [Some(&self.daemon), self.kube_proxy.as_ref()];
        for proxy in proxies.into_iter().flatten() {
            rows.iter_mut().zip(proxy.cells()).for_each(|(row, cell)| row.push(cell));
        }
        if self.kube_proxy.is_some() {
            head.push("kube-proxy, nftables".to_owned());
        }
        rows.insert(0, head);
        rows
    }

    /// A table for people.
    pub fn table(&self) -> Table {
        let mut lines = self.lines().into_iter();
        let head = lines.next().unwrap_or_default();
        let mut table = table(&head.iter().map(String::as_str).collect::<Vec<_>>());
        table.add_rows(lines);
        table
    }

    /// What is to be said with it.
    pub fn note(&self) -> String {
        let Latency { changes, .. } = self.daemon.seen;
        format!(
            "Another client takes {:.2} s to list the slices in one answer and to decode them. {changes} changes of one endpoint,\n\
             one every {:.1} s or more: kube-proxy lets a second pass between two syncs (minSyncPeriod), which is not seen here.\n\
             In force is what the pinned map of frontends says, looked at all along, and for kube-proxy the commit of its rules, by\n\
             what the kernel tells of them. kube-proxy's CPU time has nft's in it.",
            self.listed,
            PACE.as_secs_f64()
        )
    }

    /// As README.md has it, in Markdown.
    pub fn markdown(&self) -> String {
        let mut lines: Vec<String> = self.lines().iter().map(|line| format!("| {} |\n", line.join(" | "))).collect();
        let columns = self.lines().first().map_or(0, Vec::len);
        lines.insert(1.min(lines.len()), format!("|{}\n", "---|".repeat(columns)));
        lines.concat()
    }
}
