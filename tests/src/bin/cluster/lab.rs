//! The cluster as the suite sees it: `kubectl` as its administrator, commands on its nodes, the daemon's own verbs.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use affinity_tests::process::{Place, Process};
use anyhow::{Context as _, Result, bail};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::loaded_programs;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Where the demo is.
pub const DEMO: &str = "demo";
/// Where the daemon is.
pub const SYSTEM: &str = "affinity-system";
/// The nodes.
pub const NODES: [&str; 2] = ["n1", "n2"];
/// How long the cluster may take for anything, on a machine that has much else to do.
pub const PATIENCE: Duration = Duration::from_mins(4);

/// How long to wait before the cluster is asked again: asking takes a program's start, which takes time from those that work.
const INTERVAL: Duration = Duration::from_millis(300);

/// Asks until there is a value. A question that fails is asked again, too: what it needs may be on the way.
pub fn eventually<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = look();
        match found {
            Ok(Some(found)) => return Ok(found),
            found if Instant::now() >= deadline => {
                let why = found.err().map(|error| format!(": {error:#}")).unwrap_or_default();
                bail!("{what}: not within {PATIENCE:?}{why}");
            }
            _ => thread::sleep(INTERVAL),
        }
    }
}

/// The cluster.
pub struct Lab {
    /// Where `cluster.sh` writes.
    pub state: PathBuf,
    /// The program.
    pub kubectl: PathBuf,
    /// Where containerd's programs are.
    pub system: PathBuf,
}

/// A pod, as far as it matters.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Its unique id.
    pub uid: String,
    /// Where it is.
    pub node: String,
    /// Whether it serves, and is to go on doing so.
    pub is_ready: bool,
    /// Whether it is in its node's own network namespace.
    pub is_host: bool,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// A service's address by family.
#[derive(Clone, Copy, Debug)]
pub struct Frontend {
    /// The IPv4 one.
    pub v4: SocketAddr,
    /// The IPv6 one.
    pub v6: SocketAddr,
}

impl Frontend {
    /// Both.
    pub fn both(self) -> [SocketAddr; 2] {
        [self.v4, self.v6]
    }
}

impl Lab {
    /// Runs kubectl and returns what it prints.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new("nsenter");
        command.arg("--net=/run/netns/affinity-cp").arg(&self.kubectl);
        command.arg("--kubeconfig").arg(self.state.join("admin.kubeconfig")).args(arguments);
        Process::output(command, &Place::default()).with_context(|| format!("kubectl {}", arguments.join(" ")))
    }

    /// Runs a command on a node.
    pub fn on_node(&self, node: &str, command: &[&str]) -> Result<String> {
        let file = self.state.join(node).join("init.pid");
        let pid = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let mut entered = Command::new("nsenter");
        entered.args(["--mount", "--net", "--cgroup", "--pid", "-t", pid.trim()]).args(command);
        Process::output(entered, &Place::default()).with_context(|| format!("on {node}: {}", command.join(" ")))
    }

    /// Imports an archive into the node's images.
    pub fn import(&self, node: &str, archive: &str) -> Result<()> {
        let ctr = self.system.join("usr/bin/ctr").display().to_string();
        self.on_node(node, &[&ctr, "-n", "k8s.io", "images", "import", archive]).map(|_| ())
    }

    /// What the node's pinned links run: the tags of the programs' instructions, by the links' paths.
    pub fn programs(&self, node: &str) -> Result<BTreeMap<String, u64>> {
        let init = fs::read_to_string(self.state.join(node).join("init.pid"))?;
        let pins = PathBuf::from(format!("/proc/{}/root/sys/fs/bpf/affinity/links", init.trim()));
        let tags = loaded_programs().filter_map(Result::ok).map(|program| (program.id(), program.tag()));
        let tags: BTreeMap<u32, u64> = tags.collect();
        let mut found = BTreeMap::new();
        for pin in fs::read_dir(&pins).with_context(|| pins.display().to_string())? {
            let pin = pin?.path();
            let link = FdLink::from(PinnedLink::from_pin(&pin)?).info()?;
            let tag = tags.get(&link.program_id()).with_context(|| pin.display().to_string())?;
            found.insert(pin.file_name().unwrap_or_default().display().to_string(), *tag);
        }
        Ok(found)
    }

    fn get<T: DeserializeOwned>(&self, arguments: &[&str]) -> Result<T> {
        let text = self.kubectl(&[&["get", "-o", "json"], arguments].concat())?;
        serde_json::from_str(&text).with_context(|| format!("kubectl get {}", arguments.join(" ")))
    }

    /// The pods of a namespace with these labels.
    pub fn pods(&self, namespace: &str, labels: &str) -> Result<Vec<Pod>> {
        #[derive(Deserialize)]
        struct List {
            items: Vec<Value>,
        }
        let list: List = self.get(&["pods", "-n", namespace, "-l", labels])?;
        Ok(list.items.iter().map(pod).collect())
    }

    /// The web pods that serve.
    pub fn web(&self) -> Result<Vec<Pod>> {
        Ok(self.pods(DEMO, "app=web")?.into_iter().filter(|pod| pod.is_ready).collect())
    }

    /// Waits until this many web pods serve and no other one is left.
    pub fn wait_for_web(&self, count: usize) -> Result<()> {
        eventually(&format!("{count} web pods"), || {
            let pods = self.pods(DEMO, "app=web")?;
            Ok((pods.len() == count && pods.iter().all(|pod| pod.is_ready)).then_some(()))
        })
    }

    /// A service's addresses with a port of it.
    pub fn frontend(&self, namespace: &str, name: &str, port: u16) -> Result<Frontend> {
        let service: Value = self.get(&["service", "-n", namespace, name])?;
        let addresses = service["spec"]["clusterIPs"].as_array().context("no clusterIPs")?;
        let addresses: Vec<IpAddr> = addresses.iter().filter_map(|address| address.as_str()?.parse().ok()).collect();
        let of = |is_v4: bool| addresses.iter().find(|address| address.is_ipv4() == is_v4).copied();
        let [v4, v6] = [true, false].map(|is_v4| {
            of(is_v4).map(|address| SocketAddr::new(address, port)).context("not an address of each family")
        });
        Ok(Frontend { v4: v4?, v6: v6? })
    }

    /// The daemon's pod on a node, once it is ready.
    pub fn daemon(&self, node: &str) -> Result<Pod> {
        eventually(&format!("the daemon on {node}"), || {
            let pods = self.pods(SYSTEM, "app.kubernetes.io/name=affinity")?;
            Ok(pods.into_iter().find(|pod| pod.node == node && pod.is_ready))
        })
    }

    /// What the daemon's own verb prints on a node, as JSON.
    pub fn affinity<T: DeserializeOwned>(&self, node: &str, verb: &[&str]) -> Result<T> {
        let text = self.affinity_text(node, &[verb, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("affinity {}: {text}", verb.join(" ")))
    }

    /// What the daemon's own verb prints on a node.
    pub fn affinity_text(&self, node: &str, verb: &[&str]) -> Result<String> {
        let pod = self.daemon(node)?;
        self.kubectl(&[&["exec", "-n", SYSTEM, &pod.name, "-c", "affinity", "--", "affinity"], verb].concat())
    }

    /// Waits until a rollout is over.
    pub fn rolled_out(&self, namespace: &str, what: &str) -> Result<()> {
        let timeout = format!("--timeout={}s", PATIENCE.as_secs());
        self.kubectl(&["rollout", "status", "-n", namespace, what, &timeout]).map(|_| ())
    }
}

fn pod(object: &Value) -> Pod {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (status, spec, metadata) = (&object["status"], &object["spec"], &object["metadata"]);
    let conditions = status["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let is_ready = conditions.iter().any(|one| one["type"] == "Ready" && one["status"] == "True");
    let addresses = status["podIPs"].as_array().map(Vec::as_slice).unwrap_or_default();
    Pod {
        name: text(&metadata["name"]),
        uid: text(&metadata["uid"]),
        node: text(&spec["nodeName"]),
        is_ready: is_ready && metadata["deletionTimestamp"].is_null(),
        is_host: spec["hostNetwork"] == true,
        addresses: addresses.iter().filter_map(|one| one["ip"].as_str()?.parse().ok()).collect(),
    }
}

/// A process of the pod's container, by its id out here: one that serves, for the sandbox's own does not.
pub fn process_of(uid: &str) -> Result<u32> {
    processes_of(uid, "netexec")?.first().copied().context("it has no process")
}

/// The processes in a pod's cgroups whose command line has this word.
pub fn processes_of(uid: &str, word: &str) -> Result<Vec<u32>> {
    let of_pod = format!("/pod{uid}/");
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let read = |file| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
        if read("cgroup").contains(&of_pod) && read("cmdline").split('\0').any(|one| one == word) {
            found.push(pid);
        }
    }
    if found.is_empty() {
        bail!("no process in cgroups of {of_pod} has {word:?} in its command line");
    }
    Ok(found)
}
