//! The same before a real kube-apiserver: its list, its watch and the decoding of what it sends included.

use std::time::{Duration, Instant};

use affinity_tests::apiserver::{ASSETS, ApiOptions, ApiServer};
use anyhow::{Context as _, Result};
use futures::StreamExt as _;
use indicatif::ProgressBar;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::{ListParams, PostParams};
use serde::Serialize;

use super::cluster::Cluster;
use super::site::{self, Memory, Site};
use super::{Latency, next};

/// How many objects are created at a time.
const AT_A_TIME: usize = 24;

/// What a real API server adds.
#[derive(Serialize)]
pub struct Real {
    services: u32,
    /// Seconds that another client takes to list all slices in one answer and to decode them: what no daemon is quicker than.
    listed: f64,
    /// Seconds from the daemon's start until the maps held everything.
    synced: f64,
    /// Seconds of a CPU that the daemon used for it.
    cpu: f64,
    memory: Memory,
    /// From the request that changes a slice to its answer.
    written: Latency,
    /// From the request to the map.
    seen: Latency,
}

/// Measures it; `None` where there is no API server.
pub fn measure(services: u32, changes: u32, bar: &ProgressBar) -> Result<Option<Real>> {
    if std::env::var_os(ASSETS).is_none() {
        return Ok(None);
    }
    let cluster = Cluster { services, endpoints: 5, sticky: true };
    let api = ApiServer::start(ApiOptions::default())?;
    create(&api, cluster, bar)?;
    let slices: Api<EndpointSlice> = Api::all(api.client());
    let started = Instant::now();
    api.block_on(slices.list(&ListParams::default()))?;
    let listed = started.elapsed();

    let lab = site::node()?;
    let (_door, kubeconfig) = api.proxy(Some(&lab.node.netns))?;
    let mut site = Site::start(&lab, &kubeconfig, cluster)?;
    let (_, synced) = site.wait_synced()?;
    let cpu = site.cpu_time()?;
    std::thread::sleep(Duration::from_secs(3));
    let memory = site.memory()?;

    bar.set_message(format!("changes by a kube-apiserver with {services} services"));
    let slices: Api<EndpointSlice> = Api::namespaced(api.client(), "default");
    let (mut written, mut seen) = (Vec::new(), Vec::new());
    let mut versions = vec![0; services as usize];
    for _ in 0..changes {
        let service = fastrand::u32(..services);
        let before = site.frontend(service)?;
        let mut slice = slice(cluster, service, next(&mut versions, service))?;
        let name = slice.metadata.name.clone().context("a name")?;
        slice.metadata.resource_version = None;
        let request = Instant::now();
        let answered = std::thread::scope(|scope| {
            let answer = scope.spawn(|| {
                api.block_on(slices.replace(&name, &PostParams::default(), &slice)).map(|_| request.elapsed())
            });
            let (_, at) = site.wait_change(service, before)?;
            seen.push(at - request);
            Ok::<_, anyhow::Error>(answer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??)
        })?;
        written.push(answered);
    }
    Ok(Some(Real {
        services,
        listed: listed.as_secs_f64(),
        synced: synced.as_secs_f64(),
        cpu: cpu.as_secs_f64(),
        memory,
        written: Latency::of(services, written),
        seen: Latency::of(services, seen),
    }))
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
                services.create(&params, &service).await?;
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

impl Real {
    /// Rows for people: what it is, and how much.
    pub fn rows(&self) -> Vec<[String; 2]> {
        let Latency { median, p99, .. } = self.seen;
        let written = self.written;
        vec![
            [format!("another client lists and decodes {} slices", self.services), format!("{:.2} s", self.listed)],
            ["the daemon, from its start until all is programmed".to_owned(), format!("{:.2} s", self.synced)],
            ["of which on a CPU".to_owned(), format!("{:.2} s", self.cpu)],
            ["RSS".to_owned(), format!("{:.1} MiB", super::mib(self.memory.resident))],
            [
                "a slice's change, from the request to its answer".to_owned(),
                format!("{:.2} ms (p99 {:.2})", written.median, written.p99),
            ],
            ["the same, from the request to the map".to_owned(), format!("{median:.2} ms (p99 {p99:.2})")],
        ]
    }
}
