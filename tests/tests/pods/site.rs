//! A node with pods that are held by files, and a service; by which way a client comes to it.

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use affinity_tests::cgroup::ThreadCgroup;
use affinity_tests::daemon::{Daemon, DaemonOptions, SourceDir};
use affinity_tests::netns::Netns;
use affinity_tests::objects::{Document, Endpoint, ServiceObject, SliceObject};
use affinity_tests::privilege::require_root;
use affinity_tests::topology::{Lab, LabOptions};
use affinity_tests::traffic::{Backend, ClientOptions, http_get};
use anyhow::Result;
use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};
use tempfile::TempDir;

pub const SECOND: Duration = Duration::from_secs(1);
const POD_PORT: u16 = 8080;
pub const STICKY: &str = "10.96.0.10:80";
const NODE: &str = "node-1";

/// A lab with a service, and a daemon that attaches to all clients but `cli2`, and serves the sockets of this test.
pub struct Site {
    // In the order in which they are dropped.
    pub daemon: Daemon,
    _backends: Vec<Backend>,
    pub lab: Lab,
    source: SourceDir,
    /// Where namespaces are held.
    pub namespaces: TempDir,
    _cgroup: ThreadCgroup,
}

impl Site {
    pub fn new() -> Result<Self> {
        require_root();
        let cgroup = ThreadCgroup::enter()?;
        let lab = Lab::new(LabOptions { clients: 4, backends: 2, ..LabOptions::default() })?;
        let backends = lab.backends.iter().map(|host| Backend::start(host, POD_PORT)).collect::<Result<_>>()?;
        let source = SourceDir::new()?;
        let service = ServiceObject::new("sticky").cluster_ip("10.96.0.10").tcp("http", 80, POD_PORT).affinity(600);
        let service = service.change(|spec| spec.internal_traffic_policy = Some("Local".to_owned())).build();
        let mut slice = SliceObject::of("sticky", "1").tcp("http", POD_PORT);
        for host in &lab.backends {
            slice = slice.endpoint(host.ip(), Endpoint::Ready).pod(&host.name);
        }
        let slice = slice.change(|slice| {
            for endpoint in &mut slice.endpoints {
                endpoint.node_name = Some(NODE.to_owned());
            }
        });
        let node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": NODE, "labels": {"topology.kubernetes.io/zone": "zone-a"}},
        });
        source.write("service", &[&service as &dyn Document, &slice.build(), &node])?;
        let namespaces = tempfile::Builder::new().prefix("affinity-netns-").tempdir()?;
        let directory = namespaces.path().display().to_string();
        let mut options = DaemonOptions::new(source.source());
        options.interfaces.push("!cli2".to_owned());
        options.cgroup = Some(cgroup.path().to_owned());
        let options = options.arguments(["--node-name", NODE, "--netns-dir", &directory, "--netns-interval", "1"]);
        let daemon = Daemon::stopped(&lab.node, options)?;
        Ok(Self { daemon, _backends: backends, lab, source, namespaces, _cgroup: cgroup })
    }

    /// Lets the daemon see a namespace, as a CNI plugin does: a file that it is mounted on, in the node.
    pub fn hold(&self, name: &str, netns: &Netns) -> Result<()> {
        let path = self.namespaces.path().join(name);
        File::create(&path)?;
        self.lab
            .node
            .mounts
            .enter(|| Ok(mount(Some(&netns.path()), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?))
    }

    /// Pods of this node: name, address, and the annotation `affinity.dev/socket-lb`.
    pub fn write_pods(&self, pods: &[(&str, IpAddr, Option<&str>)]) -> Result<()> {
        let objects: Vec<Value> = pods.iter().map(|(name, ip, setting)| pod(name, *ip, *setting)).collect();
        let objects: Vec<&dyn Document> = objects.iter().map(|object| object as &dyn Document).collect();
        self.source.write("pods", &objects)
    }

    /// How often a program has ended so.
    fn counted(&self, program: &str, reason: &str) -> Result<u64> {
        self.daemon.cli().counted(|row| row.program == program && row.reason == reason)
    }

    /// By which way a client comes to the service, as its request tells.
    pub fn comes_by(&self, netns: &Netns) -> Result<&'static str> {
        let chosen = |program: &str| -> Result<u64> {
            Ok(self.counted(program, "affinity-new")? + self.counted(program, "affinity-hit")?)
        };
        let before = (chosen("connect")?, chosen("ingress")?);
        let service: SocketAddr = STICKY.parse()?;
        let answered = http_get(netns, service, &ClientOptions::default().within(SECOND)).is_ok();
        let after = (chosen("connect")?, chosen("ingress")?);
        Ok(match (answered, after.0 - before.0, after.1 - before.1) {
            (true, 1, 0) => "socket",
            (true, 0, 1) => "tc",
            (false, 0, 0) => "none",
            other => anyhow::bail!("{netns:?}: {other:?}"),
        })
    }
}

fn pod(name: &str, ip: IpAddr, setting: Option<&str>) -> Value {
    let annotations = setting.map(|setting| json!({"affinity.dev/socket-lb": setting}));
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}"), "annotations": annotations},
        "spec": {"nodeName": NODE, "containers": []},
        "status": {"podIPs": [{"ip": ip.to_string()}]},
    })
}
