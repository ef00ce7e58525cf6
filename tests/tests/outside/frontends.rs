//! What every frontend promises to who comes from outside.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use affinity_tests::topology::{Host, NODE_IP};
use affinity_tests::traffic::{Backend, ClientOptions, HttpConnection, UdpClient, http_get};
use affinity_tests::wait;
use anyhow::Result;

use crate::site::{SECOND, Site, Wanted, another_address};

/// Whichever way a client comes, it is on one pod, which sees it as itself or, elsewhere, as the node; others are on others.
#[test]
fn a_client_outside_is_on_one_pod_by_every_frontend() -> Result<()> {
    let site = Site::new(Wanted::default())?;
    for family in [0, 1] {
        let mut pods = BTreeSet::new();
        for frontend in Site::frontends(family) {
            for _ in 0..20 {
                pods.insert(site.ask_from_outside(frontend)?);
            }
        }
        assert_eq!(pods.len(), 1, "{pods:?}");
        for name in [&site.lab.backends[0].name, &site.far.name] {
            let source = site.until_answered_by(name, family)?;
            // Each of a service's ports has its own affinity.
            let mut by_udp = BTreeSet::new();
            for frontend in Site::frontends(family) {
                let options = ClientOptions { source: Some(source), ..ClientOptions::default().within(3 * SECOND) };
                let answer = http_get(&site.lab.outside.netns, frontend, &options)?;
                assert_eq!(answer.backend, *name, "{source} by {frontend}");
                let socket = UdpClient::open(&site.lab.outside.netns, frontend, &options)?;
                // In fragments, there and back.
                for bytes in [1, 4_000] {
                    let answer = socket.ask(frontend, &vec![7; bytes])?;
                    assert_eq!(answer.body.len(), bytes, "by {frontend}");
                    site.check(&answer, source.ip(), frontend);
                    by_udp.insert(answer.backend);
                }
            }
            assert_eq!(by_udp.len(), 1, "{by_udp:?}");
        }
    }
    Ok(())
}

/// Much data, both ways, in segments of the largest size that offloads make; the checksums are right, or it would not arrive.
#[test]
fn much_data_goes_through_to_a_pod_elsewhere() -> Result<()> {
    let site = Site::new(Wanted { without_local_pod: true, ..Wanted::default() })?;
    for frontend in [0, 1].map(Site::frontends).concat() {
        let options = ClientOptions::default().within(10 * SECOND);
        let mut connection = HttpConnection::open(&site.lab.outside.netns, frontend, &options)?;
        let answer = connection.echo(4 << 20, 7)?;
        assert_eq!((answer.backend.as_str(), answer.body.len()), ("far", 4 << 20), "by {frontend}");
    }
    let text = site.daemon.cli().text(&["conntrack", "list"])?;
    assert!(text.contains(&format!("{}:", NODE_IP[0])), "what a pod elsewhere sees is listed:\n{text}");
    Ok(())
}

/// `externalTrafficPolicy: Local` keeps clients outside to the pods of the node, by their own address, and no one else.
#[test]
fn a_local_policy_keeps_outsiders_on_the_node() -> Result<()> {
    let site = Site::new(Wanted { local: true, ..Wanted::default() })?;
    let own = &site.lab.backends[0].name;
    for family in [0, 1] {
        let (outside, pod) = (&site.lab.outside, &site.lab.clients[0]);
        for number in 0..8 {
            let source = another_address(&site, family, number)?;
            for frontend in &Site::frontends(family)[..3] {
                let options = ClientOptions { source: Some(source), ..ClientOptions::default().within(3 * SECOND) };
                let answer = http_get(&outside.netns, *frontend, &options)?;
                assert_eq!((&answer.backend, answer.client.ip()), (own, source.ip()));
            }
        }
        // A pod goes to any of them.
        let by_pod: BTreeSet<_> = Site::frontends(family)
            .into_iter()
            .map(|frontend| Ok(site.ask(&pod.netns, frontend)?.backend))
            .collect::<Result<_>>()?;
        assert_eq!(by_pod.len(), 1);
    }
    site.set(Wanted { local: true, without_local_pod: true, ..Wanted::default() })?;
    for family in [0, 1] {
        let frontend = Site::frontends(family)[1];
        wait::until_true("no pod is left on the node", 10 * SECOND, || {
            let options = ClientOptions::default().within(SECOND / 2);
            Ok(http_get(&site.lab.outside.netns, frontend, &options).is_err())
        })?;
        wait::until_true("a pod goes elsewhere", 10 * SECOND, || {
            Ok(site.ask(&site.lab.clients[0].netns, frontend).is_ok_and(|answer| answer.backend == "far"))
        })?;
    }
    let counted = site.daemon.cli().text(&["status"])?;
    assert!(counted.contains("no-local-backend"), "{counted}");
    Ok(())
}

#[test]
fn source_ranges_let_in_and_keep_out() -> Result<()> {
    let site = Site::new(Wanted::default())?;
    site.set(Wanted { ranges: Some(["198.51.100.128/25", "fd00:c5::1000/116"]), ..Wanted::default() })?;
    for family in [0, 1] {
        let [node_port, balancer, external, _] = Site::frontends(family);
        let netns = &site.lab.outside.netns;
        let short = ClientOptions::default().within(SECOND / 2);
        wait::until_true("it is kept out", 10 * SECOND, || Ok(http_get(netns, balancer, &short).is_err()))?;
        let source = Some(another_address(&site, family, 3)?);
        let options = ClientOptions { source, ..ClientOptions::default().within(3 * SECOND) };
        http_get(netns, balancer, &options)?;
        // By the other ways everybody comes in.
        site.ask_from_outside(node_port)?;
        site.ask_from_outside(external)?;
        let pod = &site.lab.clients[0].netns;
        assert!(http_get(pod, balancer, &short).is_err(), "a pod is in no range");
    }
    site.set(Wanted::default())?;
    for family in [0, 1] {
        wait::until_true("everybody is let in again", 10 * SECOND, || {
            Ok(site.ask(&site.lab.outside.netns, Site::frontends(family)[1]).is_ok())
        })?;
    }
    Ok(())
}

/// The daemon dies and comes again while a client outside holds a connection to a pod elsewhere, and opens others.
#[test]
fn clients_outside_do_not_notice_that_the_daemon_dies() -> Result<()> {
    let mut site = Site::new(Wanted { without_local_pod: true, ..Wanted::default() })?;
    let netns = site.lab.outside.netns.clone();
    let options = ClientOptions::default().within(3 * SECOND);
    let mut held: Vec<_> = [0, 1]
        .map(Site::frontends)
        .concat()
        .into_iter()
        .map(|frontend| HttpConnection::open(&netns, frontend, &options))
        .collect::<Result<_>>()?;
    let mut ask = |site: &Site| -> Result<()> {
        for connection in &mut held {
            assert_eq!(connection.get()?.backend, "far");
        }
        for frontend in [0, 1].map(Site::frontends).concat() {
            site.ask_from_outside(frontend)?;
        }
        Ok(())
    };
    ask(&site)?;
    site.daemon.kill()?;
    ask(&site)?;
    site.daemon.resume()?;
    ask(&site)?;
    site.daemon.terminate()?;
    ask(&site)
}

/// A daemon that starts knows neither the node's interfaces nor its addresses yet, and leaves what is known of them as it is.
#[test]
fn no_datagram_from_outside_is_lost_while_daemons_come_and_go() -> Result<()> {
    let mut site = Site::new(Wanted { without_local_pod: true, ..Wanted::default() })?;
    // Where node ports are is not known before the node's addresses are.
    site.daemon.options().arguments.extend(["--nodeport-addresses", "all"].map(str::to_owned));
    let (netns, over) = (&site.lab.outside.netns.clone(), &AtomicBool::new(false));
    let options = &ClientOptions::default().within(SECOND);
    let answered = thread::scope(|scope| {
        let asking = [0, 1].map(|family| {
            scope.spawn(move || -> Result<u32> {
                let frontend = Site::frontends(family)[0];
                let mut answered = 0;
                while !over.load(Ordering::Relaxed) {
                    UdpClient::open(netns, frontend, options)?.ask(frontend, b"who")?;
                    answered += 1;
                    // Each takes one of the node's ports for a while.
                    thread::sleep(Duration::from_millis(2));
                }
                Ok(answered)
            })
        });
        let restarted = (0..10).try_for_each(|_| site.daemon.kill().and_then(|_| site.daemon.resume()));
        over.store(true, Ordering::Relaxed);
        let answered = asking.map(|asking| asking.join().expect("a client"));
        restarted.map(|()| answered)
    })?;
    for answered in answered {
        assert!(answered? > 100);
    }
    Ok(())
}

/// Node ports take nothing else of the node: its other ports answer for themselves, and so does the node to a ping.
#[test]
fn the_nodes_own_ports_stay_its_own() -> Result<()> {
    let site = Site::new(Wanted::default())?;
    let own = Backend::start(
        &Host { name: "node".to_owned(), netns: site.lab.node.netns.clone(), ..site.lab.outside.clone() },
        2_000,
    )?;
    for address in NODE_IP {
        // In the range that packets leave by, too.
        let answer = site.ask(&site.lab.outside.netns, SocketAddr::new(address, 2_000))?;
        assert_eq!(answer.backend, "node");
        let answer = site.ask(&site.far.netns, SocketAddr::new(address, 2_000))?;
        assert_eq!(answer.backend, "node");
    }
    assert!(own.http.requests() >= 4);
    Ok(())
}
