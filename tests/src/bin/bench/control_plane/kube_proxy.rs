//! kube-proxy in nftables mode, before the same kube-apiserver as the daemon, in a node of its own.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use affinity_tests::apiserver::{self, ApiServer};
use affinity_tests::process::Process;
use affinity_tests::topology::Node as LabNode;
use affinity_tests::wait;
use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::PostParams;
use serde_json::json;

use super::process;
use super::real::{NODE, Programmer};
use super::rules::Rules;

/// Where it serves its metrics.
const METRICS: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 10249);
/// The metric that counts how often it has written all rules of IPv4.
const FULL_SYNCS: &str = "kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} ";
/// How long anything may take.
const PATIENCE: Duration = Duration::from_mins(3);

/// kube-proxy, running.
pub struct KubeProxy {
    process: Process,
    node: LabNode,
    started: Instant,
    rules: Rules,
    /// Of its files.
    _directory: tempfile::TempDir,
}

/// Whether there is a program to be run.
pub fn is_there() -> bool {
    apiserver::program("kube-proxy").is_ok()
}

/// What an API server says of a node of the lab.
pub fn node_object(node: &LabNode) -> Result<Node> {
    let addresses: Vec<_> =
        node.addresses.iter().map(|address| json!({ "type": "InternalIP", "address": address })).collect();
    Ok(serde_json::from_value(json!({ "metadata": { "name": NODE }, "status": { "addresses": addresses } }))?)
}

/// Makes the node known that it runs as: it waits for one with an address.
pub fn register(api: &ApiServer, node: &LabNode) -> Result<()> {
    let mut node = node_object(node)?;
    let nodes: Api<Node> = Api::all(api.client());
    api.block_on(async {
        let status = node.status.take();
        node = nodes.create(&PostParams::default(), &node).await?;
        node.status = status;
        nodes.replace_status(NODE, &PostParams::default(), &node).await
    })?;
    Ok(())
}

impl KubeProxy {
    /// Starts it with the defaults of its configuration, but for what it would set in the kernel that is not there in a
    /// namespace.
    pub fn start(node: &LabNode, kubeconfig: &Path) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("affinity-kube-proxy-").tempdir()?;
        let config = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clientConnection": { "kubeconfig": kubeconfig },
            "hostnameOverride": NODE,
            "clusterCIDR": "11.0.0.0/8",
            "conntrack": { "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s" },
            "nodePortAddresses": ["primary"],
            "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": format!("{}:{}", METRICS.0, METRICS.1),
        });
        let file = directory.path().join("config");
        std::fs::write(&file, config.to_string())?;
        let rules = Rules::follow(&node.netns)?;
        let mut command = Command::new(apiserver::program("kube-proxy")?);
        command.arg("--config").arg(&file);
        let started = Instant::now();
        let process = Process::start(command, &node.place(), Some(&directory.path().join("log")))?;
        Ok(Self { process, node: node.clone(), started, rules, _directory: directory })
    }

    /// Waits until its rules have so many services; returns how long after the start that was.
    pub fn wait_synced(&mut self, services: u32) -> Result<Duration> {
        wait::until_true("the first sync of kube-proxy", PATIENCE, || {
            self.process.must_run()?;
            Ok(self.full_syncs().unwrap_or_default() > 0)
        })
        .with_context(|| self.process.log_tail())?;
        let took = self.started.elapsed();
        let mut command = Command::new("nft");
        command.args(["list", "map", "ip", "kube-proxy", "service-ips"]);
        let found = self.node.netns.output(command)?.matches(": goto service-").count();
        ensure!(found == services as usize, "kube-proxy has {found} services of {services} after its first sync");
        Ok(took)
    }

    /// Fails where it has ended.
    pub fn must_run(&mut self) -> Result<()> {
        self.process.must_run()
    }

    /// How often it has written all rules.
    fn full_syncs(&self) -> Result<u64> {
        let text = self.node.netns.enter(|| {
            let mut stream = TcpStream::connect(METRICS)?;
            stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })?;
        let count = text.lines().find_map(|line| line.strip_prefix(FULL_SYNCS)).unwrap_or("0");
        Ok(count.trim().parse()?)
    }
}

impl Programmer for KubeProxy {
    fn look(&mut self, _: u32) -> Result<()> {
        self.rules.catch_up()
    }

    fn wait(&mut self, _: u32, first: Ipv4Addr) -> Result<Instant> {
        // With affinity an endpoint has a chain, whose name ends so; without, the rule of its service has a map of addresses.
        let (chain, address) = (format!("__{first}/"), first.octets());
        self.rules.wait(&[chain.as_bytes(), &address], PATIENCE).with_context(|| self.process.log_tail())
    }

    fn cpu_time(&mut self) -> Result<Duration> {
        process::cpu_time(self.process.pid())
    }

    fn resident(&mut self) -> Result<u64> {
        process::memory(self.process.pid(), "VmRSS:")
    }
}
