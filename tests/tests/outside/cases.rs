//! What becomes of clients outside, case by case: to a pod of the node, and to one elsewhere, by TCP and by UDP.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use affinity_tests::netns::Netns;
use affinity_tests::traffic::{Answer, ClientOptions, HttpConnection, UdpClient, http_get};
use anyhow::{Context as _, Result, ensure};

use crate::site::{self, SECOND, Site, Wanted, another_address};

/// How many clients are made: with so many it can't be that all of them are on one of two pods.
const CLIENTS: u16 = 24;
/// What is over the timeout of an affinity entry, by the seconds that it counts in.
const OVER: Duration = Duration::from_millis(1_200);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proto {
    Tcp,
    Udp,
}

pub const PROTOS: [Proto; 2] = [Proto::Tcp, Proto::Udp];

/// Asks on a connection, or by a socket, of its own.
fn ask(netns: &Netns, proto: Proto, source: SocketAddr, frontend: SocketAddr) -> Result<Answer> {
    // Datagrams in fragments.
    ask_with(netns, proto, source, frontend, &[7; 4_000])
}

fn ask_with(netns: &Netns, proto: Proto, source: SocketAddr, frontend: SocketAddr, datagram: &[u8]) -> Result<Answer> {
    let options = ClientOptions { source: Some(source), ..ClientOptions::default().within(3 * SECOND) };
    match proto {
        Proto::Tcp => http_get(netns, frontend, &options),
        Proto::Udp => {
            let socket = UdpClient::open(netns, frontend, &options)?;
            socket.connect(frontend)?;
            socket.ask(frontend, datagram)
        }
    }
}

/// Asks on behalf of each client; the pods' names, in their order.
fn ask_all(site: &Site, proto: Proto, clients: &[SocketAddr], frontend: SocketAddr) -> Result<Vec<String>> {
    let asked = clients.iter().map(|client| {
        let answer = ask(&site.lab.outside.netns, proto, *client, frontend);
        let answer = answer.with_context(|| format!("{client} by {frontend}, {proto:?}: {}", site.daemon.log()))?;
        site.check(&answer, client.ip(), frontend);
        Ok(answer.backend)
    });
    asked.collect()
}

fn clients(site: &Site, family: usize) -> Result<Vec<SocketAddr>> {
    (0..CLIENTS).map(|number| another_address(site, family, number)).collect()
}

/// The pod elsewhere goes, and comes again as the node's own goes: each time those who were on it move, and only they.
#[test]
fn clients_of_a_lost_pod_move_and_only_they() -> Result<()> {
    let site = Site::new(Wanted::default())?;
    let local = site.lab.backends[0].name.clone();
    for (family, proto) in [0, 1].into_iter().flat_map(|family| PROTOS.map(|proto| (family, proto))) {
        let clients = clients(&site, family)?;
        let frontend = Site::frontends(family)[1];
        let before = ask_all(&site, proto, &clients, frontend)?;
        assert!(before.contains(&local) && before.contains(&site.far.name), "{before:?}");
        site.set(Wanted { without_far_pod: true, ..Wanted::default() })?;
        site.wait_for_pods(1)?;
        let alone = ask_all(&site, proto, &clients, frontend)?;
        assert!(alone.iter().all(|pod| *pod == local), "{alone:?}");
        site.set(Wanted::default())?;
        site.wait_for_pods(2)?;
        assert_eq!(ask_all(&site, proto, &clients, frontend)?, alone, "nobody moves as it comes back");
        site.set(Wanted { without_local_pod: true, ..Wanted::default() })?;
        site.wait_for_pods(1)?;
        let elsewhere = ask_all(&site, proto, &clients, frontend)?;
        assert!(elsewhere.iter().all(|pod| *pod == site.far.name), "{elsewhere:?}");
        site.set(Wanted::default())?;
        site.wait_for_pods(2)?;
        assert_eq!(ask_all(&site, proto, &clients, frontend)?, elsewhere, "nobody moves as it comes back");
    }
    Ok(())
}

/// Halfway through it everybody is where they were; when it is over each gets a fresh choice, which it keeps by every frontend.
#[test]
fn affinity_ends_with_its_timeout() -> Result<()> {
    const TIMEOUT: i32 = 3;
    let site = Site::new(Wanted { timeout: Some(TIMEOUT), ..Wanted::default() })?;
    for (family, proto) in [0, 1].into_iter().flat_map(|family| PROTOS.map(|proto| (family, proto))) {
        let clients = clients(&site, family)?;
        let frontends = Site::frontends(family);
        let since = Instant::now();
        let first = ask_all(&site, proto, &clients, frontends[0])?;
        let again = ask_all(&site, proto, &clients, frontends[1])?;
        let asked = Instant::now();
        ensure!(
            since.elapsed() < SECOND * TIMEOUT.unsigned_abs(),
            "this machine is too slow for it: {:?}",
            since.elapsed()
        );
        assert_eq!(again, first, "by another frontend within the timeout");
        let over = SECOND * TIMEOUT.unsigned_abs() + OVER;
        std::thread::sleep(over.saturating_sub(asked.elapsed()));
        let fresh = ask_all(&site, proto, &clients, frontends[2])?;
        // Of two pods each, by chance: that all have the same one again happens once in 16 million times.
        assert_ne!(fresh, first, "nobody of {CLIENTS} has got another pod");
        assert_eq!(ask_all(&site, proto, &clients, frontends[0])?, fresh, "the fresh choice is kept");
    }
    Ok(())
}

/// What kind of error it was.
fn kind(error: &anyhow::Error) -> Option<ErrorKind> {
    error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>()).map(std::io::Error::kind)
}

pub fn is_refused(site: &Site, proto: Proto, frontend: SocketAddr) -> bool {
    let source = SocketAddr::new(site.lab.outside.addresses[usize::from(frontend.is_ipv6())], 0);
    // What is not in one piece has no answer.
    let asked = ask_with(&site.lab.outside.netns, proto, source, frontend, b"who");
    asked.is_err_and(|error| kind(&error) == Some(ErrorKind::ConnectionRefused))
}

#[test]
fn without_a_pod_clients_are_refused_at_once() -> Result<()> {
    let nobody = Wanted { without_local_pod: true, without_far_pod: true, ..Wanted::default() };
    let site = Site::new(nobody)?;
    for frontend in [0, 1].map(Site::frontends).concat() {
        for proto in PROTOS {
            assert!(is_refused(&site, proto, frontend), "{frontend}, {proto:?}: {}", site.daemon.log());
        }
    }
    Ok(())
}

#[test]
fn a_port_that_the_service_has_not_is_refused() -> Result<()> {
    let site = Site::new(Wanted::default())?;
    for frontend in [0, 1].map(Site::frontends).concat() {
        for proto in PROTOS {
            // Of the node's own address the node itself refuses it.
            let other = SocketAddr::new(frontend.ip(), 4_711);
            assert!(is_refused(&site, proto, other), "{other}, {proto:?}: {}", site.daemon.log());
        }
    }
    Ok(())
}

/// It leaves as the node's own, and so it is answered past nobody.
#[test]
fn a_pod_elsewhere_reaches_itself() -> Result<()> {
    let site = Site::new(Wanted { without_local_pod: true, ..Wanted::default() })?;
    for family in [0, 1] {
        for frontend in Site::frontends(family) {
            for proto in PROTOS {
                let source = SocketAddr::new(site.far.addresses[family], 0);
                let answer = ask(&site.far.netns, proto, source, frontend);
                let answer = answer.with_context(|| format!("{frontend}, {proto:?}: {}", site.daemon.log()))?;
                site.check(&answer, source.ip(), frontend);
            }
        }
    }
    Ok(())
}

/// One client port, by all frontends at once: to the pod they would be one connection.
#[test]
fn one_client_port_works_by_all_frontends_at_once() -> Result<()> {
    const PORT: u16 = 45_000;
    for wanted in
        [Wanted { without_local_pod: true, ..Wanted::default() }, Wanted { without_far_pod: true, ..Wanted::default() }]
    {
        let site = Site::new(wanted)?;
        let netns = &site.lab.outside.netns;
        for family in [0, 1] {
            let source = Some(SocketAddr::new(site.lab.outside.addresses[family], PORT));
            let options = ClientOptions { source, ..ClientOptions::default().within(3 * SECOND) };
            let (mut connections, mut sockets) = (Vec::new(), Vec::new());
            for frontend in Site::frontends(family) {
                connections.push((frontend, HttpConnection::open(netns, frontend, &options)?));
                let socket = UdpClient::open(netns, frontend, &options)?;
                socket.connect(frontend)?;
                sockets.push((frontend, socket));
            }
            let mut seen = BTreeMap::new();
            for _ in 0..3 {
                for (frontend, connection) in &mut connections {
                    let answer = connection.get().with_context(|| format!("{frontend}: {}", site.daemon.log()))?;
                    seen.insert((*frontend, Proto::Tcp as u8), answer.client);
                }
                for (frontend, socket) in &sockets {
                    let answer = socket.ask(*frontend, b"who");
                    let answer = answer.with_context(|| format!("{frontend}: {}", site.daemon.log()))?;
                    seen.insert((*frontend, Proto::Udp as u8), answer.client);
                }
            }
            for proto in PROTOS {
                let of = seen.iter().filter(|((_, of), _)| *of == proto as u8);
                let mut ports: Vec<_> = of.map(|(_, client)| client.port()).collect();
                ports.sort_unstable();
                ports.dedup();
                assert_eq!(ports.len(), connections.len(), "the pod tells them apart: {seen:?}");
            }
        }
    }
    Ok(())
}

/// A link of 1300 bytes, on the way to the pod elsewhere or on that to the client: who sends too much is told, as if of the way to
/// whom it had asked.
#[test]
fn a_megabyte_passes_a_narrow_link_on_either_side() -> Result<()> {
    const NARROW: u32 = 1_300;
    const WIDE: u32 = 1_500;
    let elsewhere = Wanted { without_local_pod: true, ..Wanted::default() };
    let on_the_node = Wanted { without_far_pod: true, ..Wanted::default() };
    for (wanted, to_pod, to_client) in
        [(elsewhere, NARROW, WIDE), (elsewhere, WIDE, NARROW), (on_the_node, WIDE, NARROW)]
    {
        let site = Site::narrow(wanted, to_pod)?;
        let home = site::home(&site.lab.outside.netns, 1, to_client)?;
        for frontend in [0, 1].map(Site::frontends).concat() {
            let options = ClientOptions::default().within(20 * SECOND);
            let mut connection = HttpConnection::open(&home.netns, frontend, &options)?;
            for seed in 0..2 {
                let answer = connection.echo(1 << 20, seed);
                let answer = answer.with_context(|| format!("{frontend}, {wanted:?}: {}", site.daemon.log()))?;
                assert_eq!(answer.body.len(), 1 << 20, "by {frontend}");
            }
            // And datagrams, which the stack of their sender parts anew once it knows.
            let socket = UdpClient::open(&home.netns, frontend, &ClientOptions::default().within(SECOND))?;
            let answered = (0..5).any(|_| socket.ask(frontend, &[5; 8_000]).is_ok());
            assert!(answered, "{frontend}, {wanted:?}: 8 kB by UDP");
        }
        // One a family at least: what a pod's stack has learnt by one frontend it makes use of by the next.
        assert!(counted(&site, "icmp-error")? >= 2, "{wanted:?}: nobody was told");
    }
    Ok(())
}

/// How many packets became of this reason, in all programs.
pub fn counted(site: &Site, reason: &str) -> Result<u64> {
    site.daemon.cli().counted(|row| row.reason == reason)
}
