//! The stage: the lab, the pods' servers, the daemon on a directory of YAML, and what can be done to them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::symlink;
use std::time::Duration;

use affinity_tests::cgroup::ThreadCgroup;
use affinity_tests::daemon::{Daemon, DaemonOptions, SourceDir};
use affinity_tests::netlink::{self, Via};
use affinity_tests::topology::{ETH0, Families, Host, Lab, LabOptions};
use affinity_tests::traffic::{Backend, ClientOptions, http_get};
use affinity_tests::view::SessionRow;
use anyhow::{Context as _, Result};
use tempfile::TempDir;

use crate::manifests::{self, NODE, Outside, SPREAD, STICKY};

const POD_PORT: u16 = 8080;
/// How long the daemon may take to program a change.
const APPLIED: Duration = Duration::from_secs(10);

/// One of the two services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// The one that keeps its clients.
    Sticky,
    /// The one that spreads them.
    Spread,
}

impl Service {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sticky => STICKY,
            Self::Spread => SPREAD,
        }
    }

    /// Its address, of the same family as a pod's.
    fn ip(self, pod: IpAddr) -> IpAddr {
        let last = match self {
            Self::Sticky => 10,
            Self::Spread => 20,
        };
        match pod {
            IpAddr::V4(_) => Ipv4Addr::new(10, 96, 0, last).into(),
            IpAddr::V6(_) => Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, last.into()).into(),
        }
    }
}

/// How a client's connection reaches a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Its packets are translated, by TC.
    Packets,
    /// Its socket is connected to the pod, at the cgroup.
    Sockets,
}

/// How somebody outside reaches the sticky service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// By a port of the node.
    NodePort,
    /// By an address of a load balancer's, which is routed to the node.
    Balancer,
}

impl Door {
    /// Both.
    pub const ALL: [Self; 2] = [Self::NodePort, Self::Balancer];
}

/// People outside: addresses of one machine.
const OUTSIDERS: u8 = 4;
const NODE_PORT: u16 = 30_080;

/// An address of the load balancer's, of the family of this one.
fn balancer(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => Ipv4Addr::new(203, 0, 113, 10).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0xfd00, 0x203, 0, 0, 0, 0, 0, 0x10).into(),
    }
}

/// An address of somebody outside, of the family of this one.
fn outsider(like: IpAddr, number: u8) -> IpAddr {
    let last = 151 + number;
    match like {
        IpAddr::V4(_) => Ipv4Addr::new(198, 51, 100, last).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0xfd00, 0xc5, 0, 0, 0, 0, 0, last.into()).into(),
    }
}

/// Gives the machine outside its people's addresses, and the way to the load balancer's.
fn settle(lab: &Lab) -> Result<()> {
    let (like, node) = (lab.outside.ip(), lab.node.addresses[0]);
    let (prefix, host) = if like.is_ipv4() { (24, 32) } else { (64, 128) };
    lab.outside.netns.netlink(async |handle| {
        let eth0 = netlink::link(&handle, ETH0).await?.index;
        for number in 0..OUTSIDERS {
            netlink::add_address(&handle, eth0, outsider(like, number), prefix).await?;
        }
        netlink::add_route(&handle, balancer(like), host, Via::Gateway(node)).await
    })
}

/// A pod of both services.
struct Pod {
    host: Host,
    server: Backend,
    ready: bool,
}

/// Everything that is set up.
pub struct Stage {
    // Dropped first: the daemon ends before what it is attached to.
    daemon: Daemon,
    pods: Vec<Pod>,
    lab: Lab,
    source: SourceDir,
    /// Where the clients' namespaces are held, for the daemon to see.
    _namespaces: TempDir,
    /// Whose sockets the daemon serves.
    cgroup: ThreadCgroup,
    timeout: u32,
    sticky: bool,
}

impl Stage {
    /// Sets it all up and waits until the daemon has programmed the services.
    pub fn set(timeout: u32, attach: &str, families: Families) -> Result<Self> {
        eprintln!("setting up 3 clients, 5 pods, a node and the world outside, in network namespaces of this process");
        let cgroup = ThreadCgroup::enter()?;
        let lab = Lab::new(LabOptions { families, ..LabOptions::default() })?;
        let pods = lab
            .backends
            .iter()
            .map(|host| {
                let server = Backend::start(host, POD_PORT)?;
                Ok(Pod { host: host.clone(), server, ready: true })
            })
            .collect::<Result<Vec<_>>>()?;
        settle(&lab)?;
        let source = SourceDir::new()?;
        source.write_text(NODE, &manifests::node(&lab.node.addresses))?;
        write_manifests(&source, &pods, Some(timeout))?;
        eprintln!("starting the daemon on the YAML in {}", source.path().display());
        let namespaces = tempfile::Builder::new().prefix("affinity-netns-").tempdir()?;
        for client in &lab.clients {
            symlink(client.netns.path(), namespaces.path().join(&client.name))?;
        }
        let directory = namespaces.path().display().to_string();
        let mut options =
            DaemonOptions::new(source.source()).arguments(["--attach", attach, "--netns-dir", &directory]);
        options = options.arguments(["--node-name", NODE]);
        options.cgroup = Some(cgroup.path().to_owned());
        options.interfaces = vec!["cli*".to_owned()];
        let daemon = Daemon::start(&lab.node, options)?;
        Ok(Self { daemon, pods, lab, source, _namespaces: namespaces, cgroup, timeout, sticky: true })
    }

    /// The names of the clients.
    pub fn clients(&self) -> Vec<String> {
        self.lab.clients.iter().map(|host| host.name.clone()).collect()
    }

    /// The address of a client.
    pub fn client_ip(&self, client: usize) -> IpAddr {
        self.lab.clients[client].ip()
    }

    /// The names of the pods, and whether each is ready.
    pub fn pods(&self) -> Vec<(String, bool)> {
        self.pods.iter().map(|pod| (pod.host.name.clone(), pod.ready)).collect()
    }

    /// The affinity timeout in seconds, where the sticky service has affinity at the moment.
    pub fn affinity(&self) -> Option<u32> {
        self.sticky.then_some(self.timeout)
    }

    /// The daemon's process id, in whose namespaces people can look around.
    pub fn daemon_pid(&mut self) -> Option<u32> {
        self.daemon.process().map(|process| process.pid())
    }

    /// Asks a service on behalf of a client, on a connection of its own; returns the pod's name.
    pub fn ask(&self, client: usize, service: Service, way: Way) -> Result<String> {
        let server = SocketAddr::new(service.ip(self.client_ip(client)), 80);
        let options = ClientOptions::default().within(Duration::from_secs(2));
        let ask = || http_get(&self.lab.clients[client].netns, server, &options);
        let answer = if way == Way::Sockets { ask() } else { self.cgroup.outside(ask) };
        let answer = answer.with_context(|| format!("{} to {}", self.lab.clients[client].name, service.name()))?;
        Ok(answer.backend)
    }

    /// The addresses of people outside.
    pub fn outsiders(&self) -> Vec<IpAddr> {
        (0..OUTSIDERS).map(|number| outsider(self.lab.outside.ip(), number)).collect()
    }

    /// Asks the sticky service on behalf of somebody outside; returns the pod's name, and whom it took for its client.
    pub fn ask_from_outside(&self, person: IpAddr, door: Door) -> Result<(String, IpAddr)> {
        let server = match door {
            Door::NodePort => SocketAddr::new(self.lab.node.addresses[0], NODE_PORT),
            Door::Balancer => SocketAddr::new(balancer(person), 80),
        };
        let options = ClientOptions { source: Some(SocketAddr::new(person, 0)), timeout: Duration::from_secs(2) };
        // Its own sockets are no business of the node's.
        let answer = self.cgroup.outside(|| http_get(&self.lab.outside.netns, server, &options));
        let answer = answer.with_context(|| format!("{person} to {server}"))?;
        Ok((answer.backend, answer.client.ip()))
    }

    /// How many connections of clients were given a pod, by their packets and by their sockets.
    pub fn connections(&self) -> Result<[u64; 2]> {
        let rows = self.daemon.cli().counters()?;
        let given = |program: &str| {
            let of = rows.iter().filter(|row| row.program == program && row.reason.starts_with("affinity-"));
            of.map(|row| row.packets).sum()
        };
        Ok([given("ingress"), given("connect")])
    }

    /// Takes a pod away: its server ends, and the slices no longer name it.
    pub fn take_away(&mut self, name: &str) -> Result<()> {
        let pod = self.pods.iter_mut().find(|pod| pod.host.name == name).context("no such pod")?;
        pod.ready = false;
        pod.server.http.stop();
        self.apply()
    }

    /// Brings a pod back.
    pub fn bring_back(&mut self, name: &str) -> Result<()> {
        let pod = self.pods.iter_mut().find(|pod| pod.host.name == name).context("no such pod")?;
        pod.server = Backend::start(&pod.host, POD_PORT)?;
        pod.ready = true;
        self.apply()
    }

    /// Switches the sticky service between `ClientIP` and `None`.
    pub fn set_sticky(&mut self, sticky: bool) -> Result<()> {
        self.sticky = sticky;
        self.apply()
    }

    /// The clients' affinity entries of the sticky service, as `affinity session list -o json` has them.
    pub fn sessions(&self) -> Result<Vec<SessionRow>> {
        let mut sessions = self.daemon.cli().sessions()?;
        let clients: Vec<IpAddr> = self.lab.clients.iter().map(Host::ip).collect();
        sessions.retain(|row| row.service.ends_with(Service::Sticky.name()) && clients.contains(&row.client));
        Ok(sessions)
    }

    /// Writes the manifests anew and waits until the daemon has programmed them.
    fn apply(&mut self) -> Result<()> {
        write_manifests(&self.source, &self.pods, self.affinity())?;
        let ready = self.pods.iter().filter(|pod| pod.ready).count();
        let timeout = self.affinity();
        let cli = self.daemon.cli();
        cli.wait_for_service(&format!("default/{}", Service::Sticky.name()), APPLIED, |row| {
            row.is_some_and(|row| row.eligible == ready && row.affinity_timeout_seconds == timeout)
        })?;
        cli.wait_for_service(&format!("default/{}", Service::Spread.name()), APPLIED, |row| {
            row.is_some_and(|row| row.eligible == ready)
        })
    }
}

fn write_manifests(source: &SourceDir, pods: &[Pod], timeout: Option<u32>) -> Result<()> {
    let family = pods.first().context("no pods")?.host.ip();
    let pods: Vec<_> =
        pods.iter().filter(|pod| pod.ready).map(|pod| (pod.host.name.clone(), pod.host.ip(), true)).collect();
    let outside = Outside { node_port: NODE_PORT, balancer: balancer(family) };
    for (service, timeout, outside) in [(Service::Sticky, timeout, Some(&outside)), (Service::Spread, None, None)] {
        let yaml = format!(
            "{}---\n{}",
            manifests::service(service.name(), service.ip(family), timeout, outside),
            manifests::slice(service.name(), family, &pods)
        );
        source.write_text(service.name(), &yaml)?;
    }
    Ok(())
}
