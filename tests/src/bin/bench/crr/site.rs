//! A client, a node and two backends in namespaces of their own, with one way from the client to the backends.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::symlink;
use std::process::Command;
use std::thread;
use std::time::Duration;

use affinity_tests::cgroup::ThreadCgroup;
use affinity_tests::daemon::{Daemon, DaemonOptions, SourceDir};
use affinity_tests::netns::Netns;
use affinity_tests::objects::{Endpoint, ServiceObject, SliceObject, to_yaml};
use affinity_tests::topology::{Families, Host, Lab, LabOptions};
use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use tempfile::TempDir;

use super::load::{self, Done};
use super::rules;
use crate::version::Version;

/// Where the measured service is reached; it has affinity.
const SERVICE: [&str; 2] = ["10.96.0.10:80", "[fd00:10:96::10]:80"];
/// Where backends serve.
const PORT: u16 = 8080;

/// How the client's connections get to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// By the backend's own address.
    Direct,
    /// By the backend's own address, and the node tracks connections.
    DirectTracked,
    /// By the service's address and kube-proxy's rules.
    Nftables,
    /// By the service's address and the programs on the pods' interfaces.
    Tc,
    /// By the service's address and the programs on the client's cgroup, beside those on the interfaces.
    SocketLb,
}

impl Way {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::DirectTracked => "direct, conntrack",
            Self::Nftables => "kube-proxy-shaped nftables",
            Self::Tc => "Affinity, TC",
            Self::SocketLb => "Affinity, socket-LB",
        }
    }

    /// Whether the kernel tracks connections on this way.
    fn is_tracked(self) -> bool {
        matches!(self, Self::DirectTracked | Self::Nftables)
    }
}

/// Everything of one way.
pub struct Site {
    // In the order in which they are dropped.
    /// Who serves it.
    daemon: Option<Daemon>,
    source: SourceDir,
    namespaces: TempDir,
    /// What the client's threads are in, where sockets are served.
    cgroup: Option<ThreadCgroup>,
    /// The namespaces.
    lab: Lab,
    way: Way,
    to: SocketAddr,
}

impl Site {
    /// Builds it with so many services beside the measured one.
    pub fn new(way: Way, version: Version, others: u32) -> Result<Self> {
        let families = version.of(Families::V4, Families::V6);
        let lab = Lab::new(LabOptions { clients: 1, backends: 2, families, ..LabOptions::default() })?;
        quicken(&lab.clients[0].netns, lab.backends.iter().map(|backend| &backend.netns))?;
        for backend in &lab.backends {
            load::serve(backend, PORT)?;
        }
        let backends: Vec<SocketAddr> = lab.backends.iter().map(|host| SocketAddr::new(host.ip(), PORT)).collect();
        let [v4, v6] = SERVICE;
        let service: SocketAddr = version.of(v4, v6).parse()?;
        let (source, namespaces) = (SourceDir::new()?, tempfile::Builder::new().prefix("affinity-netns-").tempdir()?);
        let mut site = Self { daemon: None, source, namespaces, cgroup: None, lab, way, to: service };
        match way {
            Way::Direct => site.to = backends[0],
            Way::DirectTracked => {
                site.to = backends[0];
                site.nft(rules::TRACK)?;
            }
            Way::Nftables => site.nft(&rules::kube_proxy(service, &backends, others))?,
            Way::Tc | Way::SocketLb => site.start(others)?,
        }
        if way.is_tracked() {
            forget_soon(&site.lab.node.netns)?;
        }
        Ok(site)
    }

    /// Runs the load.
    pub fn run(&self, threads: usize, duration: Duration) -> Result<Done> {
        let done = load::run(&self.lab.clients[0], self.cgroup.as_ref(), self.to, threads, duration)
            .with_context(|| self.way.name())?;
        // Hooks of netfilter are there by namespace: what is tracked shows whether they are.
        let tracked: u64 = self.lab.node.netns.sysctl("net.netfilter.nf_conntrack_count")?.parse()?;
        let way = self.way;
        ensure!((tracked > 0) == way.is_tracked(), "{}: the node tracks {tracked} connections", way.name());
        Ok(done)
    }

    /// Fails where connections have not gone the way that they should have: only the programs of interfaces remember them.
    pub fn check(&self) -> Result<()> {
        let Some(daemon) = &self.daemon else { return Ok(()) };
        let text = daemon.cli().text(&["conntrack", "list", "-o", "json"])?;
        let remembered = text.contains(&self.to.ip().to_string());
        let name = self.way.name();
        ensure!(
            remembered == (self.way == Way::Tc),
            "{name}: programs of interfaces translated it, or did not: {text}"
        );
        Ok(())
    }

    fn nft(&self, rules: &str) -> Result<()> {
        let file = self.source.path().join("rules.nft");
        std::fs::write(&file, rules)?;
        let mut command = Command::new("nft");
        command.arg("-f").arg(file);
        self.lab.node.netns.output(command).context("nft, of Debian's package nftables")?;
        Ok(())
    }

    fn start(&mut self, others: u32) -> Result<()> {
        let addresses: Vec<_> = self.lab.backends.iter().map(Host::ip).collect();
        write(&self.source, self.to, &addresses, others)?;
        let mut options = DaemonOptions::new(self.source.source());
        if self.way == Way::SocketLb {
            let client = &self.lab.clients[0];
            symlink(client.netns.path(), self.namespaces.path().join(&client.name))?;
            let directory = self.namespaces.path().display().to_string();
            options = options.arguments(["--netns-dir", &directory]);
            let cgroup = own_cgroup()?;
            options.cgroup = Some(cgroup.path().to_owned());
            self.cgroup = Some(cgroup);
        }
        self.daemon = Some(Daemon::start(&self.lab.node, options)?);
        Ok(())
    }
}

/// A cgroup that the calling thread is not in.
fn own_cgroup() -> Result<ThreadCgroup> {
    thread::spawn(ThreadCgroup::enter).join().map_err(|_| anyhow::anyhow!("no thread"))?
}

/// Has a node soon forget tracked connections that are over: else their table grows all through the measurement.
pub fn forget_soon(node: &Netns) -> Result<()> {
    let after = ["time_wait", "close", "fin_wait", "last_ack", "close_wait"];
    for state in after {
        node.set_sysctl(&format!("net.netfilter.nf_conntrack_tcp_timeout_{state}"), "2")?;
    }
    Ok(())
}

/// Ports are used again at once, so that their number limits nothing.
pub fn quicken<'a>(client: &Netns, backends: impl IntoIterator<Item = &'a Netns>) -> Result<()> {
    client.set_sysctls(&[
        ("net.ipv4.ip_local_port_range", "1024 65535"),
        ("net.ipv4.tcp_max_tw_buckets", "64"),
        ("net.ipv4.tcp_tw_reuse", "1"),
    ])?;
    for backend in backends {
        backend.set_sysctls(&[("net.core.somaxconn", "8192"), ("net.ipv4.tcp_max_tw_buckets", "64")])?;
    }
    Ok(())
}

/// The measured service, then the others, as YAML.
fn write(source: &SourceDir, to: SocketAddr, backends: &[IpAddr], others: u32) -> Result<()> {
    let name = "measured";
    let service = ServiceObject::new(name).cluster_ip(&to.ip().to_string()).tcp("http", 80, PORT).affinity(10_800);
    let slice = SliceObject::of(name, "a").tcp("http", PORT).endpoints(backends, Endpoint::Ready);
    source.write(name, &[&service.build(), &slice.build()])?;
    for first in (1..=others).step_by(500) {
        let mut text = Vec::new();
        for number in first..(first + 500).min(others + 1) {
            let name = format!("other-{number}");
            let [address, backends @ ..] = rules::other(to, number);
            let service = ServiceObject::new(&name).cluster_ip(&address.to_string()).tcp("http", 80, PORT);
            let addresses = backends.map(|address| address.to_string());
            let slice = SliceObject::of(&name, "a").tcp("http", PORT).endpoints(addresses, Endpoint::Ready);
            text.push(to_yaml(&[&service.build(), &slice.build()])?);
        }
        source.write_text(&format!("others-{first}"), &text.join("---\n"))?;
    }
    Ok(())
}
