//! The lab itself: what the other suites rest on. No service, no daemon: traffic goes to the backends' own addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::Duration;

use affinity_tests::capture::{Capture, Injector};
use affinity_tests::daemon::{Daemon, DaemonOptions, SourceDir};
use affinity_tests::mountns;
use affinity_tests::netlink;
use affinity_tests::netns::Netns;
use affinity_tests::objects::ServiceObject;
use affinity_tests::packet::Packet;
use affinity_tests::privilege::require_root;
use affinity_tests::process::{Place, Process};
use affinity_tests::topology::{ETH0, Families, Host, Lab, LabOptions, Wiring};
use affinity_tests::traffic::{Backend, ClientOptions, HttpConnection, UdpClient, http_get};
use affinity_tests::wait;
use anyhow::{Context as _, Result};

const PORT: u16 = 8080;
const SECOND: Duration = Duration::from_secs(1);

/// Every client reaches every backend by each of its addresses, and is seen as what it is.
fn everyone_reaches_everyone(options: LabOptions) -> Result<()> {
    let lab = Lab::new(options)?;
    let _backends = serve(&lab)?;
    for client in &lab.clients {
        for backend in &lab.backends {
            for (own, address) in client.addresses.iter().zip(&backend.addresses) {
                reaches(client, *own, &backend.name, SocketAddr::new(*address, PORT))?;
            }
        }
    }
    Ok(())
}

fn serve(lab: &Lab) -> Result<Vec<Backend>> {
    let backends = lab.backends.iter();
    backends.map(|host| Backend::start(host, PORT)).collect()
}

fn reaches(client: &Host, own: IpAddr, backend: &str, server: SocketAddr) -> Result<()> {
    let what = || format!("{} to {backend}", client.name);
    let options = ClientOptions::default();
    let answer = http_get(&client.netns, server, &options).with_context(what)?;
    assert_eq!(answer.backend, backend);
    assert_eq!(answer.body, backend.as_bytes());
    assert_eq!(answer.client.ip(), own);
    let mut connection = HttpConnection::open(&client.netns, server, &options)?;
    for request in 0..3 {
        let answer = connection.echo(1 << 20, request).with_context(what)?;
        assert_eq!(answer.client, connection.local_addr()?);
    }
    let udp = UdpClient::open(&client.netns, server, &options)?;
    // The second is longer than any MTU: it is sent in fragments.
    for payload in [&b"question"[..], &[7; 4000]] {
        let answer = udp.ask(server, payload).with_context(what)?;
        assert_eq!(answer.backend, backend);
        assert_eq!(answer.client.ip(), own);
    }
    Ok(())
}

#[test]
fn the_standard_lab_routes() -> Result<()> {
    require_root();
    everyone_reaches_everyone(LabOptions::default())
}

#[test]
fn a_dual_stack_lab_on_a_bridge_routes() -> Result<()> {
    require_root();
    everyone_reaches_everyone(LabOptions {
        clients: 2,
        backends: 2,
        families: Families::Dual,
        wiring: Wiring::Bridge,
        ..LabOptions::default()
    })
}

#[test]
fn an_ipv6_lab_without_offloads_routes() -> Result<()> {
    require_root();
    everyone_reaches_everyone(LabOptions {
        clients: 1,
        backends: 2,
        families: Families::V6,
        offloads: false,
        mtu: 1400,
        ..LabOptions::default()
    })
}

/// A big transfer makes frames beyond the MTU where there are offloads, and none where there are not.
#[test]
fn offloads_are_on_or_off() -> Result<()> {
    require_root();
    for offloads in [true, false] {
        let lab = Lab::new(LabOptions { clients: 1, backends: 1, offloads, ..LabOptions::default() })?;
        let _backends = serve(&lab)?;
        let (client, backend) = (&lab.clients[0], &lab.backends[0]);
        let capture = Capture::start(&lab.node.netns, &client.node_interface)?;
        let server = SocketAddr::new(backend.ip(), PORT);
        HttpConnection::open(&client.netns, server, &ClientOptions::default())?.echo(1 << 20, 1)?;
        let longest = capture.frames().iter().map(|frame| frame.bytes.len()).max();
        let mtu = lab.options().mtu as usize + 14;
        assert_eq!(longest > Some(mtu), offloads, "{longest:?} bytes");
    }
    Ok(())
}

/// A packet to a service that nobody translates leaves by the uplink, and nothing answers.
#[test]
fn the_node_knows_no_service_address() -> Result<()> {
    require_root();
    let lab = Lab::new(LabOptions::default())?;
    let capture = Capture::start(&lab.outside.netns, ETH0)?;
    let service = "10.96.0.10:80".parse()?;
    let options = ClientOptions::default().within(SECOND);
    let error = http_get(&lab.clients[0].netns, service, &options).expect_err("no such service");
    assert!(format!("{error:#}").contains("timed out"), "{error:#}");
    let seen =
        capture.wait_for("the packet outside", SECOND, |frame| frame.bytes.get(30..34) == Some(&[10, 96, 0, 10]))?;
    assert!(!seen.outgoing);
    Ok(())
}

/// Strict reverse-path filtering is in force: a packet from another pod's address is not forwarded.
#[test]
fn a_stolen_source_address_is_dropped() -> Result<()> {
    require_root();
    let lab = Lab::new(LabOptions { offloads: false, ..LabOptions::default() })?;
    let (client, other, backend) = (&lab.clients[0], &lab.clients[1], &lab.backends[0]);
    let capture = Capture::start(&backend.netns, ETH0)?;
    let arrived = |source: &Host, payload: &'static [u8]| {
        capture.wait_for("the packet", SECOND, move |frame| {
            frame.bytes.get(26..30) == source.ip4().map(|ip| ip.octets()).as_ref().map(|ip| &ip[..])
                && frame.bytes.ends_with(payload)
        })
    };
    let socket = Injector::open(&client.netns, ETH0)?;
    for (source, payload) in [(client, &b"true"[..]), (other, b"false")] {
        let packet = Packet::udp((source.ip(), 1000), (backend.ip(), PORT)).payload(payload);
        socket.send(&packet.macs(client.mac, client.node_mac).build())?;
    }
    arrived(client, b"true")?;
    arrived(other, b"false").expect_err("the node let a stolen address through");
    Ok(())
}

#[test]
fn pods_come_and_go() -> Result<()> {
    require_root();
    let mut lab = Lab::new(LabOptions { clients: 1, backends: 1, ..LabOptions::default() })?;
    let new = lab.add_backend()?.clone();
    assert_eq!(new.name, "backend1");
    let server = SocketAddr::new(new.ip(), PORT);
    let options = ClientOptions::default().within(SECOND);
    let mut backend = Backend::start(&new, PORT)?;
    let client = lab.clients[0].netns.clone();
    http_get(&client, server, &options)?;

    let mut kept = HttpConnection::open(&client, server, &options)?;
    kept.get()?;
    backend.http.stop();
    assert!(!kept.wait_closed()?, "a stopped server closes by FIN");
    let error = http_get(&client, server, &options).expect_err("nobody listens");
    assert!(format!("{error:#}").contains("refused"), "{error:#}");

    lab.set_link(&new, false)?;
    lab.set_link(&new, true)?;
    UdpClient::open(&client, server, &options)?.ask(server, b"again")?;
    lab.remove("backend1")?;
    let names = fs::read_to_string("/proc/self/net/dev")?;
    assert!(!names.contains("be1"), "interfaces of the lab stay in it");
    http_get(&client, server, &options).expect_err("the backend has gone");
    assert_eq!(lab.add_backend()?.name, "backend2");
    Ok(())
}

#[test]
fn a_source_port_can_be_chosen_and_used_again() -> Result<()> {
    require_root();
    let lab = Lab::new(LabOptions::default())?;
    let _backends = serve(&lab)?;
    let backend = lab.backends[0].ip();
    let server = SocketAddr::new(backend, PORT);
    let options = ClientOptions::default().from_port(backend, 33333);
    for _ in 0..2 {
        let mut connection = HttpConnection::open(&lab.clients[0].netns, server, &options)?;
        assert_eq!(connection.get()?.client.port(), 33333);
        connection.reset()?;
        let udp = UdpClient::open(&lab.clients[0].netns, server, &options)?;
        assert_eq!(udp.ask(server, b"")?.client.port(), 33333);
    }
    Ok(())
}

/// The node has a bpffs of its own: pins are seen by its processes alone, and go with it.
#[test]
fn a_node_has_its_own_mounts() -> Result<()> {
    require_root();
    let [one, other] = [Lab::new(small())?, Lab::new(small())?];
    let directory = "/sys/fs/bpf/affinity-lab-test";
    let mut mkdir = Command::new("mkdir");
    mkdir.arg(directory);
    Process::output(mkdir, &one.node.place())?;
    one.node.mounts.enter(|| {
        assert!(mountns::list("/sys/fs/bpf")?.contains(&"affinity-lab-test".to_owned()));
        assert!(mountns::list("/run")?.is_empty());
        Ok(())
    })?;
    other.node.mounts.enter(|| {
        assert!(!fs::exists(directory)?, "another node sees the pins");
        Ok(())
    })?;
    assert!(!fs::exists(directory)?, "the machine sees the pins");
    Ok(())
}

#[test]
fn a_node_can_be_without_bpffs() -> Result<()> {
    require_root();
    let lab = Lab::new(LabOptions { bpffs: false, ..small() })?;
    lab.node.mounts.enter(|| {
        let mounts = fs::read_to_string("/proc/thread-self/mounts")?;
        assert!(!mounts.contains("/sys/fs/bpf"), "{mounts}");
        Ok(())
    })
}

/// A process of the node is in its namespaces, which people enter by its id.
#[test]
fn a_process_can_be_entered_by_its_id() -> Result<()> {
    require_root();
    let lab = Lab::new(small())?;
    let mut sleep = Command::new("sleep");
    sleep.arg("60");
    let mut process = Process::start(sleep, &lab.node.place(), None)?;
    let pid = process.pid();
    let mut nsenter = Command::new("nsenter");
    nsenter.args(["--target", &pid.to_string(), "--net", "--mount"]);
    nsenter.args(["cat", "/proc/self/net/dev"]);
    let interfaces = Process::output(nsenter, &Place::default())?;
    for name in ["cli0:", "be0:", "eth0:"] {
        assert!(interfaces.contains(name), "{interfaces}");
    }
    let mut by_path = Command::new("nsenter");
    by_path.arg(format!("--net={}", lab.clients[0].netns.path().display()));
    by_path.args(["cat", "/proc/self/net/dev"]);
    assert!(Process::output(by_path, &Place::default())?.contains("eth0:"));
    process.must_run()?;
    drop(process);
    assert!(!fs::exists(format!("/proc/{pid}"))?);
    Ok(())
}

/// What stands for the binary in [`a_daemon_is_started_and_ended`]: it says where it is, and is ready when it has said so;
/// killed, it leaves what a later one must not be taken for.
const STAND_IN: &str = r#"#!/bin/sh
case "$1" in
run)
    trap 'rm /run/ready; echo ended; exit 0' TERM
    echo "started $*"; cut -d: -f1 /proc/self/net/dev; echo $$ > /run/ready
    while :; do sleep 0.1; done ;;
status) test -e /run/ready && echo "{\"ready\": true, \"pid\": $(cat /run/ready)}" ;;
*) echo "no verb $1" >&2; exit 2 ;;
esac
"#;

#[test]
fn a_daemon_is_started_and_ended() -> Result<()> {
    require_root();
    let lab = Lab::new(small())?;
    let directory = tempfile::tempdir()?;
    let binary = directory.path().join("affinity");
    fs::write(&binary, STAND_IN)?;
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755))?;
    let source = SourceDir::new()?;
    source.write("web", &[&ServiceObject::new("web").tcp("http", 80, 8080).build()])?;
    assert_eq!(mountns::list(source.path())?, ["web.yaml"]);
    let mut options = DaemonOptions::new(source.source()).arguments(["--attach", "clsact"]);
    options.binary = Some(binary);
    let mut daemon = Daemon::start(&lab.node, options)?;
    let log = daemon.log();
    let started = format!(
        "started run --pin-dir /sys/fs/bpf/affinity --source-dir {} --interface cli* --interface be* --socket-lb off \
         --attach clsact",
        source.path().display()
    );
    for part in [&started[..], "cli0", "be0"] {
        assert!(log.contains(part), "{part:?} in {log}");
    }
    assert!(!daemon.kill()?.success());
    assert_eq!(daemon.cli().json(&["status"])?["ready"], true, "it could undo nothing");
    daemon.resume()?;
    assert!(daemon.terminate()?.success());
    assert!(daemon.log().ends_with("ended\n"));
    let error = daemon.cli().json(&["nonsense"]).expect_err("no such verb");
    assert!(format!("{error:#}").contains("no verb nonsense"), "{error:#}");
    Ok(())
}

fn small() -> LabOptions {
    LabOptions { clients: 1, backends: 1, ..LabOptions::default() }
}

/// Marks the process that [`nothing_outlives_the_process`] starts and kills.
const VICTIM: &str = "AFFINITY_LAB_VICTIM";

/// Killed by SIGKILL, a lab leaves nothing: no process, no namespace, no interface.
#[test]
fn nothing_outlives_the_process() -> Result<()> {
    require_root();
    if std::env::var_os(VICTIM).is_some() {
        return be_a_victim();
    }
    let mut victim = Command::new(std::env::current_exe()?);
    victim.args(["--exact", "--nocapture", "nothing_outlives_the_process"]);
    victim.env(VICTIM, "1");
    let directory = tempfile::tempdir()?;
    let log = directory.path().join("log");
    let mut victim = Process::start(victim, &Place::default(), Some(&log))?;
    let line = victim.wait_for_log("child ", 20 * SECOND)?;
    let mut words = line.split(' ').skip_while(|word| *word != "child").skip(1);
    let child: u32 = words.next().context("a process id")?.parse()?;
    let interfaces: BTreeSet<String> = words.map(str::to_owned).collect();
    assert_eq!(interfaces.len(), 6, "{line}");
    assert!(fs::exists(format!("/proc/{child}"))?);
    assert!(interfaces.is_subset(&living_interfaces()?), "{line}");

    victim.kill()?;
    wait::until_true("the end of the child", 5 * SECOND, || Ok(!fs::exists(format!("/proc/{child}"))?))?;
    let left = &interfaces & &living_interfaces()?;
    assert!(left.is_empty(), "still there: {left:?}");
    Ok(())
}

/// The Ethernet addresses in every network namespace that some process is in or holds a descriptor of; one that none
/// does is deleted by the kernel. (Not the namespaces' inodes: those are used again at once, by other tests.)
fn living_interfaces() -> Result<BTreeSet<String>> {
    let mut namespaces = BTreeMap::new();
    for process in fs::read_dir("/proc")? {
        let process = process?.path();
        let links = fs::read_dir(process.join("fd")).into_iter().flatten();
        let links = links.filter_map(|link| Some(link.ok()?.path()));
        for link in links.chain([process.join("ns/net")]) {
            let target = fs::read_link(&link).unwrap_or_default();
            if target.to_string_lossy().starts_with("net:[") {
                namespaces.insert(target, link);
            }
        }
    }
    let mut found = BTreeSet::new();
    for path in namespaces.values() {
        // Processes come and go meanwhile, and their namespaces with them.
        let Ok(netns) = Netns::open(path) else {
            continue;
        };
        let links = netns.netlink(async |handle| netlink::links(&handle).await)?;
        found.extend(links.into_iter().map(|link| mac_text(link.mac)));
    }
    Ok(found)
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// What [`nothing_outlives_the_process`] does where it is run by itself: a lab with a process, and then nothing.
fn be_a_victim() -> Result<()> {
    let lab = Lab::new(small())?;
    let mut sleep = Command::new("sleep");
    sleep.arg("60");
    let child = Process::start(sleep, &lab.node.place(), None)?;
    let hosts = [&lab.outside, &lab.clients[0], &lab.backends[0]];
    let interfaces = hosts.map(|host| format!("{} {}", mac_text(host.mac), mac_text(host.node_mac)));
    println!("child {} {}", child.pid(), interfaces.join(" "));
    std::thread::sleep(60 * SECOND);
    Ok(())
}
