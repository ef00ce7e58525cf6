//! The daemon and its programs on real interfaces, with real sockets: what packet tests can't show.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use std::{fs, thread};

use affinity_common::abi::announced::{Announced, AnnouncedKey};
use affinity_common::abi::netns::{NetnsClient, NetnsKey};
use affinity_common::abi::sockets::{Socket, SocketKey};
use affinity_common::abi::source_ranges::{Range, RangeKey};
use affinity_tests::daemon::{Cli, Daemon, DaemonOptions, PIN_DIR, SourceDir};
use affinity_tests::objects::{Document, Endpoint, ServiceObject, SliceObject};
use affinity_tests::privilege::require_root;
use affinity_tests::topology::{Families, Host, Lab, LabOptions, Wiring};
use affinity_tests::traffic::{Backend, ClientOptions, HttpConnection, UdpClient, http_get};
use affinity_tests::{mountns, wait};
use affinity_user::loader::pin_name;
use affinity_user::tables::bpf;
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

const SECOND: Duration = Duration::from_secs(1);
const POD_PORT: u16 = 8080;
const STICKY: &str = "10.96.0.10:80";
const SPREAD: &str = "10.96.0.20:80";
/// The same services over IPv6, where the lab has that.
const STICKY6: &str = "[fd00:10:96::10]:80";
const SPREAD6: &str = "[fd00:10:96::20]:80";

/// A lab with pods that serve, and a daemon on a directory of YAML with a sticky and a spreading service of all of them.
struct Site {
    // In the order in which they are dropped.
    daemon: Daemon,
    _pods: Vec<Backend>,
    lab: Lab,
    source: SourceDir,
}

impl Site {
    fn new(options: LabOptions, arguments: &[&str]) -> Result<Self> {
        require_root();
        let lab = Lab::new(options)?;
        let pods = lab.backends.iter().map(|host| Backend::start(host, POD_PORT)).collect::<Result<_>>()?;
        let source = SourceDir::new()?;
        let states = vec![Endpoint::Ready; lab.backends.len()];
        write(&source, &lab, &states, Some(10_800))?;
        let options = DaemonOptions::new(source.source()).arguments(arguments.iter().copied());
        let daemon = Daemon::start(&lab.node, options)?;
        Ok(Self { daemon, _pods: pods, lab, source })
    }

    fn standard() -> Result<Self> {
        Self::new(LabOptions::default(), &[])
    }

    /// Changes the services, and waits until the maps hold it.
    fn set(&self, states: &[Endpoint], timeout: Option<i32>) -> Result<()> {
        write(&self.source, &self.lab, states, timeout)?;
        let ready = states.iter().filter(|state| matches!(state, Endpoint::Ready | Endpoint::Unknown)).count();
        let serving = states.iter().filter(|state| matches!(state, Endpoint::TerminatingServing)).count();
        // Of each family.
        let eligible = if ready == 0 { serving } else { ready } * self.lab.backends[0].addresses.len();
        let timeout = timeout.map(i32::cast_unsigned);
        self.cli().wait_for_service("default/sticky", 10 * SECOND, |row| {
            row.is_some_and(|row| row.eligible == eligible && row.affinity_timeout_seconds == timeout)
        })?;
        self.cli()
            .wait_for_service("default/spread", 10 * SECOND, |row| row.is_some_and(|row| row.eligible == eligible))
    }

    fn all(&self, state: Endpoint) -> Vec<Endpoint> {
        vec![state; self.lab.backends.len()]
    }

    fn cli(&self) -> &Cli {
        self.daemon.cli()
    }

    /// Asks a service on a new connection; returns the pod's name.
    fn ask(&self, client: usize, service: &str) -> Result<String> {
        ask(&self.lab.clients[client], service)
    }

    /// Which pods each client reaches by `requests` connections each.
    fn ask_all(&self, service: &str, requests: usize) -> Result<Vec<BTreeMap<String, usize>>> {
        let mut seen = vec![BTreeMap::new(); self.lab.clients.len()];
        for _ in 0..requests {
            for (client, seen) in seen.iter_mut().enumerate() {
                *seen.entry(self.ask(client, service)?).or_default() += 1;
            }
        }
        Ok(seen)
    }

    /// Asks a service by a datagram of so many bytes; returns the pod's name.
    fn ask_udp(&self, client: usize, service: &str, bytes: usize) -> Result<String> {
        let (client, service) = (&self.lab.clients[client], service.parse()?);
        let socket = UdpClient::open(&client.netns, service, &ClientOptions::default().within(3 * SECOND))?;
        Ok(socket.ask(service, &vec![7; bytes])?.backend)
    }

    fn open(&self, client: usize, service: &str) -> Result<HttpConnection> {
        HttpConnection::open(&self.lab.clients[client].netns, service.parse()?, &ClientOptions::default())
    }
}

/// With the annotation, a client is on one pod over all ports of the service: here TCP's and UDP's.
#[test]
fn affinity_can_be_to_the_service_as_a_whole() -> Result<()> {
    let site = Site::standard()?;
    let service = ServiceObject::new("whole").tcp("http", 80, POD_PORT).udp("udp", 80, POD_PORT);
    let service =
        service.cluster_ip("10.96.0.30").affinity(600).annotation("affinity.dev/session-affinity-scope", "service");
    let addresses = site.lab.backends.iter().map(Host::ip);
    let slice = SliceObject::of("whole", "1").tcp("http", POD_PORT).udp("udp", POD_PORT);
    let slice = slice.endpoints(addresses, Endpoint::Ready);
    site.source.write("whole.yaml", &[&service.build(), &slice.build()])?;
    let count = site.lab.backends.len();
    site.cli().wait_for_service("default/whole", 10 * SECOND, |row| row.is_some_and(|row| row.eligible == count))?;
    for client in 0..site.lab.clients.len() {
        let pod = site.ask(client, "10.96.0.30:80")?;
        for _ in 0..10 {
            assert_eq!(site.ask_udp(client, "10.96.0.30:80", 7)?, pod);
            assert_eq!(site.ask(client, "10.96.0.30:80")?, pod);
        }
    }
    let sessions = site.cli().json(&["session", "list", "--service", "default/whole"])?;
    let sessions = sessions.as_array().context("an array")?;
    assert_eq!(sessions.len(), site.lab.clients.len(), "{sessions:?}");
    assert!(sessions.iter().all(|session| session["port_name"] == "*"), "{sessions:?}");
    Ok(())
}

fn write(source: &SourceDir, lab: &Lab, states: &[Endpoint], timeout: Option<i32>) -> Result<()> {
    for (name, frontends, timeout) in [("sticky", [STICKY, STICKY6], timeout), ("spread", [SPREAD, SPREAD6], None)] {
        let service = ServiceObject::new(name).tcp("http", 80, POD_PORT).udp("udp", 80, POD_PORT);
        let frontends: Vec<SocketAddr> = frontends.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
        // In the order of the lab's families.
        let host = &lab.backends[0].addresses;
        let of_host =
            host.iter().filter_map(|pod| frontends.iter().find(|frontend| frontend.is_ipv4() == pod.is_ipv4()));
        let service = match of_host.map(SocketAddr::ip).collect::<Vec<_>>()[..] {
            [ip] => service.cluster_ip(&ip.to_string()),
            [first, second] => service.cluster_ips(first, second),
            _ => unreachable!("a lab has one family or two"),
        };
        let service = match timeout {
            Some(seconds) => service.affinity(seconds),
            None => service.no_affinity(),
        };
        let slices: Vec<_> = (0..host.len())
            .map(|family| {
                let suffix = (family + 1).to_string();
                let mut slice = SliceObject::of(name, &suffix).tcp("http", POD_PORT).udp("udp", POD_PORT);
                for (host, state) in lab.backends.iter().zip(states) {
                    slice = slice.endpoint(host.addresses[family], *state).pod(&host.name);
                }
                slice.build()
            })
            .collect();
        let service = service.build();
        let mut objects: Vec<&dyn Document> = vec![&service];
        objects.extend(slices.iter().map(|slice| slice as &dyn Document));
        source.write(name, &objects)?;
    }
    Ok(())
}

fn ask(client: &Host, service: &str) -> Result<String> {
    let service: SocketAddr = service.parse()?;
    let answer = http_get(&client.netns, service, &ClientOptions::default().within(3 * SECOND))?;
    assert_eq!(answer.client.is_ipv4(), service.is_ipv4());
    assert!(client.addresses.contains(&answer.client.ip()), "the pod sees its client, not {}", answer.client);
    Ok(answer.backend)
}

fn one_pod_each(seen: &[BTreeMap<String, usize>]) -> Vec<String> {
    seen.iter()
        .map(|pods| {
            assert_eq!(pods.len(), 1, "one pod for each client: {seen:?}");
            pods.keys().next().cloned().unwrap_or_default()
        })
        .collect()
}

/// Each client keeps a pod over so many requests, different ones different pods, and the other service spreads; over each
/// family that the lab has.
fn clients_are_kept_and_spread(site: &Site, requests: usize) -> Result<()> {
    for address in &site.lab.clients[0].addresses {
        let [sticky, spread] = if address.is_ipv4() { [STICKY, SPREAD] } else { [STICKY6, SPREAD6] };
        let pods = one_pod_each(&site.ask_all(sticky, requests)?);
        assert!(pods.iter().collect::<BTreeSet<_>>().len() >= 2, "different clients, different pods: {pods:?}");
        for pods in site.ask_all(spread, 40)? {
            assert!(pods.len() >= 3, "spread: {pods:?}");
        }
        // UDP too, and what the client sees is the service's address.
        for client in &site.lab.clients {
            let mut reached = BTreeSet::new();
            for _ in 0..20 {
                let udp = UdpClient::open(&client.netns, sticky.parse()?, &ClientOptions::default())?;
                reached.insert(udp.ask(sticky.parse()?, b"who are you?")?.backend);
            }
            assert_eq!(reached.len(), 1);
        }
        // 1 MB each way: frames beyond the MTU where there is GSO, checksums left to the hardware where there is offload.
        for service in [sticky, spread] {
            site.open(0, service)?.echo(1 << 20, 7)?;
        }
    }
    Ok(())
}

#[test]
fn clients_are_kept_over_a_thousand_requests() -> Result<()> {
    clients_are_kept_and_spread(&Site::standard()?, 334)
}

fn of(families: Families) -> LabOptions {
    LabOptions { families, ..LabOptions::default() }
}

#[test]
fn also_over_ipv6() -> Result<()> {
    clients_are_kept_and_spread(&Site::new(of(Families::V6), &[])?, 334)
}

#[test]
fn also_by_clsact() -> Result<()> {
    clients_are_kept_and_spread(&Site::new(of(Families::Dual), &["--attach", "clsact"])?, 50)
}

#[test]
fn also_on_a_bridge() -> Result<()> {
    clients_are_kept_and_spread(&Site::new(LabOptions { wiring: Wiring::Bridge, ..of(Families::Dual) }, &[])?, 50)
}

#[test]
fn also_without_offloads() -> Result<()> {
    clients_are_kept_and_spread(&Site::new(LabOptions { offloads: false, ..of(Families::Dual) }, &[])?, 50)
}

/// A client has an entry in each family, of the same service port; a pod that goes is left in both.
#[test]
fn both_families_of_a_service_follow_one_plan() -> Result<()> {
    let site = Site::new(of(Families::Dual), &[])?;
    let before = [STICKY, STICKY6].map(|service| site.ask_all(service, 3).map(|seen| one_pod_each(&seen)));
    let sessions = site.cli().sessions()?;
    for address in &site.lab.clients[0].addresses {
        let own: Vec<_> = sessions.iter().filter(|row| row.client == *address).collect();
        assert!(own.len() == 1 && own[0].service == "default/sticky" && own[0].is_live(), "{address}: {sessions:?}");
    }
    let before = before.into_iter().collect::<Result<Vec<_>>>()?;
    let lost = site.lab.backends.iter().position(|host| host.name == before[1][0]).context("a pod")?;
    let mut states = site.all(Endpoint::Ready);
    states[lost] = Endpoint::NotReady;
    site.set(&states, Some(10_800))?;
    for (service, before) in [STICKY, STICKY6].into_iter().zip(&before) {
        let after = one_pod_each(&site.ask_all(service, 3)?);
        for (before, after) in before.iter().zip(&after) {
            assert_eq!(before == after, *before != site.lab.backends[lost].name, "{service}");
        }
    }
    site.set(&site.all(Endpoint::Ready), None)?;
    for pods in site.ask_all(SPREAD6, 40)? {
        assert!(pods.len() >= 3, "{pods:?}");
    }
    Ok(())
}

#[test]
fn clients_of_a_lost_pod_move_and_only_they() -> Result<()> {
    let site = Site::standard()?;
    let before = one_pod_each(&site.ask_all(STICKY, 5)?);
    let mut kept = site.open(0, STICKY)?;
    kept.get()?;
    let lost = site.lab.backends.iter().position(|host| host.name == before[0]).context("a pod")?;
    for state in [Endpoint::NotReady, Endpoint::TerminatingServing, Endpoint::Terminating] {
        let mut states = site.all(Endpoint::Ready);
        states[lost] = state;
        site.set(&states, Some(10_800))?;
        let after = one_pod_each(&site.ask_all(STICKY, 5)?);
        for (before, after) in before.iter().zip(&after) {
            assert_eq!(before == after, *before != site.lab.backends[lost].name, "{state:?}");
        }
        // The established connection stays where it is.
        assert_eq!(kept.get()?.backend, before[0], "{state:?}");
    }
    let moved = one_pod_each(&site.ask_all(STICKY, 5)?);
    site.set(&site.all(Endpoint::Ready), Some(10_800))?;
    assert_eq!(one_pod_each(&site.ask_all(STICKY, 5)?), moved, "who has moved does not move back");
    Ok(())
}

#[test]
fn serving_pods_that_terminate_are_used_when_no_other_is_left() -> Result<()> {
    let site = Site::standard()?;
    let mut states = site.all(Endpoint::Terminating);
    states[3] = Endpoint::TerminatingServing;
    site.set(&states, Some(10_800))?;
    let pods = one_pod_each(&site.ask_all(STICKY, 3)?);
    assert!(pods.iter().all(|pod| *pod == site.lab.backends[3].name), "{pods:?}");
    site.set(&site.all(Endpoint::NotReady), Some(10_800))?;
    refused(&site, STICKY)?;
    let status = site.cli().json(&["status"])?;
    assert!(status.to_string().contains("no-backend"), "{status}");
    Ok(())
}

#[test]
fn connections_that_people_forget_go_on_where_they_were() -> Result<()> {
    let site = Site::new(of(Families::Dual), &[])?;
    let services = [STICKY, SPREAD, STICKY6, SPREAD6];
    let mut kept: Vec<_> = services.iter().map(|service| site.open(0, service)).collect::<Result<_>>()?;
    let pods: Vec<String> = kept.iter_mut().map(|it| Ok(it.get()?.backend)).collect::<Result<_>>()?;
    let forget = |arguments: &[&str]| -> Result<u64> {
        let answer = site.cli().json(&[&["conntrack", "flush"], arguments].concat())?;
        answer["forgotten"].as_u64().with_context(|| answer.to_string())
    };
    assert_eq!(forget(&["--client", "192.0.2.1"])?, 0);
    assert_eq!(forget(&["--service", "sticky"])?, 4);
    assert_eq!(forget(&["--all"])?, 4);
    for (kept, pod) in kept.iter_mut().zip(&pods) {
        assert_eq!(kept.get()?.backend, *pod);
    }
    assert!(site.cli().json(&["conntrack", "flush", "--service", "nobody"]).is_err());
    assert!(site.cli().json(&["conntrack", "flush"]).is_err(), "not all of them by mistake");
    Ok(())
}

/// Nobody answers: the client is told so at once.
fn refused(site: &Site, service: &str) -> Result<()> {
    let options = ClientOptions::default().within(5 * SECOND);
    let since = Instant::now();
    for client in &site.lab.clients {
        let error = http_get(&client.netns, service.parse()?, &options).expect_err("no backend is left");
        ensure!(format!("{error:#}").contains("refused"), "{service} over TCP: {error:#}");
        let udp = UdpClient::open(&client.netns, service.parse()?, &options)?;
        udp.connect(service.parse()?)?;
        let error = udp.ask(service.parse()?, b"anybody?").expect_err("no backend is left");
        ensure!(format!("{error:#}").contains("refused"), "{service} over UDP: {error:#}");
    }
    ensure!(since.elapsed() < SECOND, "it took {:?}", since.elapsed());
    Ok(())
}

#[test]
fn who_has_no_backend_left_is_refused_at_once() -> Result<()> {
    for (offloads, attach) in [(true, "auto"), (false, "clsact")] {
        let mut site = Site::new(LabOptions { offloads, ..of(Families::Dual) }, &["--attach", attach])?;
        site.ask_all(STICKY, 1)?;
        let mut kept = site.open(0, SPREAD6)?;
        let pod = kept.get()?.backend;
        site.set(&site.all(Endpoint::NotReady), Some(10_800))?;
        for service in [STICKY, STICKY6, SPREAD, SPREAD6] {
            refused(&site, service)?;
        }
        assert_eq!(kept.get()?.backend, pod, "an established connection stays");
        site.daemon.kill()?;
        refused(&site, STICKY6).context("without a daemon")?;
        site.daemon.resume()?;
        refused(&site, STICKY)?;
        site.set(&site.all(Endpoint::Ready), Some(10_800))?;
        site.ask_all(STICKY6, 1)?;
    }
    Ok(())
}

#[test]
fn affinity_ends_with_its_timeout_and_traffic_puts_that_off() -> Result<()> {
    let site = Site::standard()?;
    site.set(&site.all(Endpoint::Ready), Some(2))?;
    let pod = site.ask(0, STICKY)?;
    let mut kept = site.open(0, STICKY)?;
    let since = Instant::now();
    // An established connection is use, too.
    while since.elapsed() < 4 * SECOND {
        assert_eq!(kept.get()?.backend, pod);
        thread::sleep(SECOND / 4);
    }
    let session = |site: &Site| -> Result<_> {
        let ip = site.lab.clients[0].ip();
        site.cli()
            .sessions()?
            .into_iter()
            .find(|row| row.client == ip && row.service == "default/sticky")
            .context("no session")
    };
    let row = session(&site)?;
    assert!(row.is_live() && row.age_seconds > 3.5, "{row:?}");
    assert_eq!(site.ask(0, STICKY)?, pod);
    thread::sleep(Duration::from_millis(1_700));
    assert!(session(&site)?.is_live(), "{:?}", session(&site)?);
    thread::sleep(Duration::from_millis(500));
    assert!(!session(&site)?.is_live(), "{:?}", session(&site)?);
    // A fresh choice meets another pod before long.
    let found = (0..12).try_fold(false, |found, _| {
        if found {
            return Ok(true);
        }
        let pod_now = site.ask(0, STICKY)?;
        thread::sleep(Duration::from_millis(2_200));
        anyhow::Ok(pod_now != pod)
    })?;
    assert!(found, "twelve expiries, and never another pod");
    Ok(())
}

#[test]
fn affinity_is_switched_while_it_runs() -> Result<()> {
    let site = Site::standard()?;
    let before = one_pod_each(&site.ask_all(STICKY, 5)?);
    site.set(&site.all(Endpoint::Ready), None)?;
    for pods in site.ask_all(STICKY, 40)? {
        assert!(pods.len() >= 3, "{pods:?}");
    }
    site.set(&site.all(Endpoint::Ready), Some(60))?;
    let after = one_pod_each(&site.ask_all(STICKY, 5)?);
    assert_eq!(before, after, "a first choice is by client and service, so it is the same again");
    site.set(&site.all(Endpoint::Ready), Some(600))?;
    assert_eq!(one_pod_each(&site.ask_all(STICKY, 5)?), after);
    let sessions = site.cli().sessions()?;
    assert!(sessions.iter().any(|row| row.left_seconds.is_some_and(|left| left > 590.0)), "{sessions:?}");
    Ok(())
}

/// Kills or ends the daemon, under a connection that goes on; nothing breaks, nobody moves, nothing is attached twice.
fn a_restart_is_not_noticed(attach: &str) -> Result<()> {
    let mut site = Site::new(LabOptions::default(), &["--attach", attach])?;
    let before = one_pod_each(&site.ask_all(STICKY, 3)?);
    let mut kept = site.open(0, SPREAD)?;
    let pod = kept.get()?.backend;
    let attached = programs_attached(&site)?;
    assert_eq!(attached.len(), 2, "one of each: {attached:?}");
    for round in 0..3 {
        if round % 2 == 0 {
            site.daemon.kill()?
        } else {
            site.daemon.terminate()?
        };
        assert_eq!(kept.get()?.backend, pod, "without a daemon");
        assert_eq!(one_pod_each(&site.ask_all(STICKY, 3)?), before, "without a daemon");
        assert!(!site.cli().sessions()?.is_empty(), "the verbs work without a daemon");
        site.daemon.resume()?;
        assert_eq!(kept.get()?.backend, pod);
        assert_eq!(one_pod_each(&site.ask_all(STICKY, 3)?), before);
        assert_eq!(programs_attached(&site)?, attached, "{attach}, round {round}");
    }
    Ok(())
}

#[test]
fn a_restart_is_not_noticed_by_tcx() -> Result<()> {
    a_restart_is_not_noticed("tcx")
}

#[test]
fn a_restart_is_not_noticed_by_clsact() -> Result<()> {
    a_restart_is_not_noticed("clsact")
}

/// How often each of our programs is attached to the first client's interface, by what a packet meets: the counters of one
/// connection.
fn programs_attached(site: &Site) -> Result<BTreeMap<String, u64>> {
    let before = counters(site.cli())?;
    let mut connection = site.open(0, SPREAD)?;
    connection.get()?;
    drop(connection);
    let after = counters(site.cli())?;
    let grown = |program: &str, reason: &str| {
        let key = (program.to_owned(), reason.to_owned());
        after.get(&key).copied().unwrap_or_default() - before.get(&key).copied().unwrap_or_default()
    };
    // A second program in the row would see the packet of the first one, translated: not a service's, no reply.
    Ok(BTreeMap::from([
        ("selections".to_owned(), grown("ingress", "hashed")),
        ("rebuilt".to_owned(), grown("ingress", "rebuilt")),
    ]))
}

fn counters(cli: &Cli) -> Result<BTreeMap<(String, String), u64>> {
    Ok(cli.counters()?.into_iter().map(|row| ((row.program, row.reason), row.packets)).collect())
}

#[test]
fn interfaces_come_and_go() -> Result<()> {
    let mut site = Site::standard()?;
    let new = site.lab.add_client()?.clone();
    wait::until("the new client at a service", 5 * SECOND, || Ok(ask(&new, STICKY).ok()))?;
    site.lab.remove(&new.name)?;
    let again = site.lab.add_client()?.clone();
    wait::until("another one", 5 * SECOND, || Ok(ask(&again, STICKY).ok()))?;
    site.lab.set_link(&again, false)?;
    site.lab.set_link(&again, true)?;
    wait::until("it after its link was down", 5 * SECOND, || Ok(ask(&again, STICKY).ok()))?;
    wait::until("a status that names who is there", 5 * SECOND, || {
        let status = site.cli().json(&["status"])?["attachments"].to_string();
        let names = |interface| status.contains(&format!("\"{interface}\""));
        Ok((names(&again.node_interface) && !names(&new.node_interface)).then_some(()))
    })?;
    Ok(())
}

#[test]
fn cleanup_removes_every_trace() -> Result<()> {
    for attach in ["tcx", "clsact"] {
        let mut site = Site::new(LabOptions::default(), &["--attach", attach])?;
        site.ask(0, STICKY)?;
        site.daemon.terminate()?;
        site.cli().text(&["cleanup"])?;
        let left = site.lab.node.mounts.enter(|| mountns::list("/sys/fs/bpf"))?;
        assert!(left.iter().all(|name| !name.contains("affinity")), "{attach}: {left:?}");
        let mut tc = Command::new("tc");
        tc.args(["qdisc", "show"]);
        let qdiscs = site.lab.node.netns.output(tc)?;
        assert!(!qdiscs.contains("clsact"), "{attach}: {qdiscs}");
        let options = ClientOptions::default().within(SECOND);
        http_get(&site.lab.clients[0].netns, STICKY.parse()?, &options).expect_err("nobody translates");
        // Again is no error.
        site.cli().text(&["cleanup"])?;
    }
    Ok(())
}

#[test]
fn maps_are_dumped_with_field_names() -> Result<()> {
    let site = Site::new(of(Families::Dual), &[])?;
    site.ask_all(STICKY, 1)?;
    site.ask_all(STICKY6, 1)?;
    for service in [STICKY, STICKY6] {
        // In fragments.
        site.ask_udp(0, service, 8_000)?;
    }
    let names = site.lab.node.mounts.enter(|| {
        // No socket of this lab is in the way of the programs that write these.
        let mut tables = bpf::open_pinned(Path::new(PIN_DIR))?;
        tables.v4.netns.insert(&NetnsKey::default(), &NetnsClient::default())?;
        tables.v6.netns.insert(&NetnsKey::default(), &NetnsClient::default())?;
        tables.v4.sockets.insert(&SocketKey::default(), &Socket::default())?;
        tables.v6.sockets.insert(&SocketKey::default(), &Socket::default())?;
        // Nor is an address announced, or a client kept out; one uplink has an address of a family at least.
        tables.v4.ranges.insert(&RangeKey::default(), &Range::default())?;
        tables.v6.ranges.insert(&RangeKey::default(), &Range::default())?;
        tables.v4.announced.insert(&AnnouncedKey::default(), &Announced::default())?;
        tables.v6.announced.insert(&AnnouncedKey::default(), &Announced::default())?;
        mountns::list(PIN_DIR)
    })?;
    let mut dumped = 0;
    for map in affinity_common::abi::MAPS {
        let pin = pin_name(map);
        assert!(names.contains(&pin), "{pin} is not pinned: {names:?}");
        if matches!(map.kind, affinity_common::abi::Kind::RingBuf | affinity_common::abi::Kind::ProgArray) {
            // The kernel has no way to read a ring buffer but to consume it, and programs have no fields.
            continue;
        }
        let mut bpftool = Command::new("bpftool");
        // All of a long array takes bpftool its time.
        let is_long = map.kind == affinity_common::abi::Kind::Array && map.default_size > 1_000;
        bpftool.args(["-j", "map", if is_long { "lookup" } else { "dump" }, "pinned"]);
        bpftool.arg(format!("{PIN_DIR}/{pin}"));
        if is_long {
            bpftool.args(["key", "0", "0", "0", "0"]);
        }
        let text = affinity_tests::process::Process::output(bpftool, &site.lab.node.place())?;
        let entries: Value = serde_json::from_str(&text).with_context(|| format!("{}: {text}", map.name))?;
        let entry = if is_long { Some(&entries) } else { entries.get(0) };
        let entry = entry.with_context(|| format!("{} is empty", map.name))?;
        let formatted = entry.get("formatted").with_context(|| format!("{}: no BTF: {entry}", map.name))?;
        let value = formatted.get("value").or_else(|| formatted.pointer("/values/0/value"));
        let named = value.and_then(Value::as_object).is_some_and(|fields| !fields.is_empty());
        assert!(named, "{}: no field names: {formatted}", map.name);
        dumped += 1;
    }
    assert_eq!(dumped, affinity_common::abi::MAPS.len() - 3);
    Ok(())
}

#[test]
fn monitor_shows_choices_failover_and_expiry() -> Result<()> {
    let site = Site::standard()?;
    site.set(&site.all(Endpoint::Ready), Some(1))?;
    let directory = tempfile::tempdir()?;
    let log = directory.path().join("monitor");
    let mut monitor = site.cli().start(&["monitor", "-o", "json"], &log)?;
    thread::sleep(SECOND);
    let pod = site.ask(0, STICKY)?;
    monitor.wait_for_log("affinity-new", 5 * SECOND)?;
    let mut states = site.all(Endpoint::Ready);
    let lost = site.lab.backends.iter().position(|host| host.name == pod).context("a pod")?;
    states[lost] = Endpoint::NotReady;
    site.set(&states, Some(600))?;
    site.ask(0, STICKY)?;
    let line = monitor.wait_for_log("affinity-failover", 5 * SECOND)?;
    assert!(line.contains(&site.lab.clients[0].ip().to_string()) && line.contains("default/sticky"), "{line}");
    site.set(&states, Some(1))?;
    monitor.wait_for_log("expired", 6 * SECOND)?;
    // A second reader is told who reads.
    let other = site.cli().run(&["monitor"])?;
    assert!(!other.status.success());
    assert!(String::from_utf8_lossy(&other.stderr).contains(&monitor.pid().to_string()));
    Ok(())
}

#[test]
fn bad_objects_are_named_and_harm_nothing_else() -> Result<()> {
    let mut site = Site::standard()?;
    let pods = one_pod_each(&site.ask_all(STICKY, 2)?);
    let service = |name: &str, ip: &str| ServiceObject::new(name).cluster_ip(ip).tcp("http", 80, POD_PORT);
    site.source.write_text("broken", "kind: Service\n  metadata: [")?;
    site.source.write("long", &[&service("long", "10.96.0.31").affinity(86_401).build()])?;
    site.source.write("nowhere", &[&service("nowhere", "10.96.0.x").build()])?;
    site.source.write("double", &[&service("double", "10.96.0.10").build()])?;
    site.source.write(
        "slice",
        &[&SliceObject::of("sticky", "2").tcp("http", 1).endpoint("not-an-address", Endpoint::Ready).build()],
    )?;
    let said = wait::until("all five in status", 10 * SECOND, || {
        let status = site.cli().json(&["status"])?.to_string();
        let all = ["broken.yaml", "default/long", "default/nowhere", "default/double", "default/sticky-2"];
        Ok(all.iter().all(|name| status.contains(name)).then_some(status))
    })?;
    for field in ["timeoutSeconds", "86401", "10.96.0.x", "not-an-address"] {
        assert!(said.contains(field), "{field}: {said}");
    }
    let log = site.daemon.log();
    for name in ["broken.yaml", "default/long", "default/nowhere", "default/double"] {
        assert!(log.contains(name), "{name} is not in the log: {log}");
    }
    assert_eq!(one_pod_each(&site.ask_all(STICKY, 2)?), pods);
    // A good object that becomes bad keeps its last good state; good again, it is followed.
    let mut text = fs::read_to_string(site.source.path().join("sticky.yaml"))?;
    text = text.replace("timeoutSeconds: 10800", "timeoutSeconds: 0");
    site.source.write_text("sticky", &text)?;
    wait::until("the timeout in status", 10 * SECOND, || {
        let status = site.cli().json(&["status"])?.to_string();
        Ok(status.contains("default/sticky\"").then_some(()))
    })?;
    assert_eq!(one_pod_each(&site.ask_all(STICKY, 2)?), pods);
    // Also through a restart, from which on nothing good is known of it, and nothing of who had its address first.
    site.source.remove("double")?;
    site.daemon.terminate()?;
    site.daemon.resume()?;
    assert_eq!(one_pod_each(&site.ask_all(STICKY, 2)?), pods);
    for name in ["broken", "long", "nowhere", "slice"] {
        site.source.remove(name)?;
    }
    site.set(&site.all(Endpoint::Ready), Some(60))?;
    wait::until_true("a status without complaints", 10 * SECOND, || {
        let status = site.cli().json(&["status"])?;
        Ok(!status.to_string().contains("default/long"))
    })?;
    Ok(())
}

#[test]
fn a_full_map_is_named_and_those_in_place_go_on() -> Result<()> {
    let site = Site::new(LabOptions::default(), &["--map-size", "frontends=6"])?;
    let pods = one_pod_each(&site.ask_all(STICKY, 2)?);
    let host = site.lab.backends[0].ip();
    for number in 1..=6 {
        let name = format!("more{number}");
        let service = ServiceObject::new(&name).cluster_ip(&format!("10.96.1.{number}")).tcp("http", 80, POD_PORT);
        let slice = SliceObject::of(&name, "1").tcp("http", POD_PORT).endpoint(host, Endpoint::Ready);
        site.source.write(&name, &[&service.build(), &slice.build()])?;
    }
    wait::until_true("a full map in status", 10 * SECOND, || {
        let status = site.cli().json(&["status"])?.to_string();
        Ok(status.contains("full") && status.contains("default/more"))
    })?;
    assert_eq!(one_pod_each(&site.ask_all(STICKY, 2)?), pods);
    // Room is made: the rest follows.
    for number in 1..=4 {
        site.source.remove(&format!("more{number}"))?;
    }
    for number in 5..=6 {
        site.cli().wait_for_service(&format!("default/more{number}"), 30 * SECOND, |row| {
            row.is_some_and(|row| row.eligible == 1)
        })?;
        assert_eq!(site.ask(0, &format!("10.96.1.{number}:80"))?, site.lab.backends[0].name);
    }
    Ok(())
}

#[test]
fn bpffs_is_mounted_where_it_is_not() -> Result<()> {
    let site = Site::new(LabOptions { bpffs: false, ..LabOptions::default() }, &[])?;
    one_pod_each(&site.ask_all(STICKY, 2)?);
    Ok(())
}

#[test]
fn maps_of_another_layout_are_refused() -> Result<()> {
    let mut site = Site::standard()?;
    site.daemon.terminate()?;
    let mut bpftool = Command::new("bpftool");
    bpftool.args(["map", "update", "pinned", &format!("{PIN_DIR}/config"), "key", "0", "0", "0", "0", "value"]);
    bpftool.args(["77", "0", "0", "0", "0", "0", "0", "0", "0", "0", "0", "0", "0", "0", "0", "0"]);
    affinity_tests::process::Process::output(bpftool, &site.lab.node.place())?;
    site.daemon.launch()?;
    let ended = site.daemon.wait_end()?;
    assert!(!ended.success());
    let log = site.daemon.log();
    let line = log.lines().last().unwrap_or_default();
    assert!(line.contains("layout 77") && line.contains("affinity cleanup"), "{log}");
    // The programs of the other daemon go on.
    site.ask(0, STICKY)?;
    Ok(())
}

#[test]
fn who_is_not_root_is_told_so_in_a_line() -> Result<()> {
    require_root();
    let binary = affinity_tests::daemon::binary()?;
    // Where everybody may run it.
    let directory = tempfile::Builder::new().prefix("affinity-").tempdir_in("/tmp")?;
    let copy = directory.path().join("affinity");
    // By a process of its own: one that another test starts meanwhile would hold our descriptor, and the file be busy.
    ensure!(Command::new("cp").arg(binary).arg(&copy).status()?.success());
    let mut open = fs::metadata(directory.path())?.permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut open, 0o755);
    fs::set_permissions(directory.path(), open)?;
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]);
    command.arg(&copy).args(["run", "--source-dir", "/tmp"]);
    let output = command.output()?;
    let error = String::from_utf8(output.stderr)?;
    ensure!(!output.status.success(), "{error}");
    assert_eq!(error.trim_end().lines().count(), 1, "{error}");
    assert!(error.contains("root") || error.contains("CAP_BPF"), "{error}");
    Ok(())
}

#[test]
fn the_datapath_logs_each_packet_where_that_was_asked_for() -> Result<()> {
    for (arguments, logs) in [(&["--datapath-log", "debug"][..], true), (&[][..], false)] {
        let site = Site::new(LabOptions::default(), arguments)?;
        site.ask(0, STICKY)?;
        let has = |reason: &str| site.daemon.log().contains(reason);
        if logs {
            wait::until_true("both directions in the log", 5 * SECOND, || {
                Ok(["ingress: ", "bytes: affinity-new", "egress: ", "bytes: reply"].iter().all(|text| has(text)))
            })?;
        } else {
            assert!(!has("affinity-new"));
        }
    }
    Ok(())
}

#[test]
fn a_source_that_is_none_is_told_in_a_line_before_anything_is_loaded() -> Result<()> {
    require_root();
    let pins = tempfile::Builder::new().prefix("affinity-").tempdir()?;
    let nowhere = pins.path().join("nowhere");
    for flag in ["--source-dir", "--kubeconfig"] {
        let mut command = Command::new(affinity_tests::daemon::binary()?);
        let output = command.args(["run", flag]).arg(&nowhere).arg("--pin-dir").arg(pins.path()).output()?;
        let error = String::from_utf8(output.stderr)?;
        ensure!(!output.status.success(), "{flag}: {error}");
        assert_eq!(error.trim_end().lines().count(), 1, "{error}");
        assert!(error.contains("nowhere: ") && error.matches("No such file").count() == 1, "{error}");
    }
    assert_eq!(fs::read_dir(pins.path())?.count(), 0);
    Ok(())
}

/// Two threads of one client connect at the same instant, each time as a client that is new to the service: both reach one
/// pod. (The suite `race` does 10,000 pairs of each kind on the programs; this is the same over real sockets.)
#[test]
fn first_connections_over_sockets_meet_on_one_pod() -> Result<()> {
    let site = Site::standard()?;
    let netns = site.lab.clients[0].netns.clone();
    for pair in 0..300 {
        let mut bpftool = Command::new("bpftool");
        bpftool.args(["-j", "map", "dump", "pinned", &format!("{PIN_DIR}/affinity_v4")]);
        if pair > 0 {
            forget_clients(&site)?;
        }
        let mut pods = Vec::new();
        thread::scope(|scope| {
            let asks: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        http_get(&netns, STICKY.parse()?, &ClientOptions::default()).map(|answer| answer.backend)
                    })
                })
                .collect();
            for one in asks {
                pods.push(one.join().expect("no panic")?);
            }
            anyhow::Ok(())
        })?;
        assert_eq!(pods[0], pods[1], "pair {pair}");
    }
    Ok(())
}

/// Removes every affinity entry, as an LRU may.
fn forget_clients(site: &Site) -> Result<()> {
    let mut bpftool = Command::new("bpftool");
    bpftool.args(["-j", "map", "dump", "pinned", &format!("{PIN_DIR}/affinity_v4")]);
    let text = affinity_tests::process::Process::output(bpftool, &site.lab.node.place())?;
    let entries: Vec<Value> = serde_json::from_str(&text)?;
    for entry in entries {
        let key = entry.get("key").and_then(Value::as_array).context("a key")?;
        let bytes = key.iter().filter_map(Value::as_str).map(str::to_owned);
        let mut bpftool = Command::new("bpftool");
        bpftool.args(["map", "delete", "pinned", &format!("{PIN_DIR}/affinity_v4"), "key"]).args(bytes);
        affinity_tests::process::Process::output(bpftool, &site.lab.node.place())?;
    }
    Ok(())
}
