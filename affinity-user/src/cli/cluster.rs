//! What the API server is asked: for `pool list`, `announce list`, and `service get`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::ListParams;
use kube::{Api, Client};

use super::args::{ClusterArgs, Common, Output};
use super::print::{self, or_dash, span};
use crate::announce::PURPOSE;
use crate::announce::view::AnnouncementRow;
use crate::ipam::pool::{LoadBalancerPool, Usage};
use crate::ipam::view::PoolRow;
use crate::lease::LABEL;
use crate::sources::kubernetes;

/// How long an API server is waited for that nobody has named.
const PATIENCE: Duration = Duration::from_secs(2);

pub(super) fn pools(common: &Common, cluster: ClusterArgs) -> Result<()> {
    let pools = ask(cluster, async |client: Client| {
        let api: Api<LoadBalancerPool> = Api::all(client);
        api.list(&ListParams::default()).await.context("LoadBalancerPools; is the custom resource installed?")
    })?;
    let rows: Vec<PoolRow> = pools.iter().map(PoolRow::of).collect();
    if common.output == Output::Json {
        return print::json(&rows);
    }
    let header = ["pool", "blocks", "ipv4 used", "ipv4 available", "ipv6 used", "ipv6 available", "state"];
    let number = |usage: Usage, number: i64| or_dash((usage.total > 0).then_some(number));
    print::table(
        &header,
        rows.iter().map(|row| {
            vec![
                row.pool.clone(),
                row.blocks.join(", "),
                number(row.ipv4, row.ipv4.used),
                number(row.ipv4, row.ipv4.available),
                number(row.ipv6, row.ipv6.used),
                number(row.ipv6, row.ipv6.available),
                row.summary(),
            ]
        }),
    )
}

pub(super) fn announcements(common: &Common, cluster: ClusterArgs, namespace: Option<&str>) -> Result<()> {
    let now = Timestamp::now();
    let rows = ask(cluster, async |client: Client| announced(client, namespace, now).await)?;
    if common.output == Output::Json {
        return print::json(&rows);
    }
    print::table(
        &["address", "service", "node", "interfaces", "since"],
        rows.iter().map(|row| {
            let since = row.since.map(|since| format!("{} ago", span(now.duration_since(since).as_secs_f64())));
            vec![
                row.address.to_string(),
                row.service.clone(),
                or_dash(row.node.as_ref()),
                or_dash(Some(row.interfaces.join(", ")).filter(|text| !text.is_empty())),
                or_dash(since),
            ]
        }),
    )
}

/// Which node answers for which address. An API server that nobody has named need not be there, nor answer.
pub(super) fn announcers(cluster: ClusterArgs, namespace: Option<&str>) -> Result<BTreeMap<IpAddr, String>> {
    let is_named = cluster.is_named();
    let rows = ask(cluster, async |client: Client| {
        let rows = announced(client, namespace, Timestamp::now());
        if is_named { rows.await } else { tokio::time::timeout(PATIENCE, rows).await? }
    });
    match rows {
        Ok(rows) => Ok(rows.into_iter().filter_map(|row| Some((row.address, row.node?))).collect()),
        Err(error) if is_named => Err(error),
        Err(_) => Ok(BTreeMap::new()),
    }
}

async fn announced(client: Client, namespace: Option<&str>, now: Timestamp) -> Result<Vec<AnnouncementRow>> {
    let api: Api<Lease> = match namespace {
        Some(namespace) => Api::namespaced(client, namespace),
        None => Api::all(client),
    };
    let leases = api.list(&ListParams::default().labels(&format!("{LABEL}={PURPOSE}"))).await.context("Leases")?;
    let mut rows: Vec<AnnouncementRow> = leases.iter().filter_map(|lease| AnnouncementRow::of(lease, now)).collect();
    rows.sort_by_key(|row| row.address);
    Ok(rows)
}

/// Asks the API server.
fn ask<T>(cluster: ClusterArgs, work: impl AsyncFnOnce(Client) -> Result<T>) -> Result<T> {
    let options = kubernetes::Options { access: cluster.access(), ..kubernetes::Options::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (client, url) = kubernetes::connect(&options).await?;
        work(client).await.context(url)
    })
}
