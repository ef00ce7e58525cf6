//! Where the node has no port left towards a pod elsewhere: who is new is told so, who is there goes on.

use std::net::IpAddr;
use std::path::Path;

use affinity_common::abi::conntrack::{Conntrack, ConntrackKey, OPENED, REPLIED};
use affinity_common::dp::snat::{FIRST_PORT, PORTS};
use affinity_common::family::{Family, V4, V6};
use affinity_common::types::{Port, Proto};
use affinity_tests::daemon::PIN_DIR;
use affinity_tests::programs::now;
use affinity_tests::topology::NODE_IP;
use affinity_tests::traffic::{ClientOptions, HttpConnection, UdpClient};
use affinity_user::tables::{BoxTable, bpf};
use anyhow::{Context as _, Result, ensure};

use crate::beside;
use crate::cases::{PROTOS, counted, is_refused};
use crate::site::{FAR, POD_PORT, SECOND, Site, Wanted, ip};

type Connections<F> = BoxTable<ConntrackKey<F>, Conntrack<F>>;

/// Gives somebody else every port of the node's towards the pod elsewhere but one.
fn fill<F: Family>(table: &mut Connections<F>, node: IpAddr, pod: IpAddr, proto: Proto, kept: u16) -> Result<()> {
    let (node, pod) = (F::from_ip(node), F::from_ip(pod));
    let (node, pod) = node.zip(pod).context("addresses of the family")?;
    let port = Port::new(40_000);
    let (seen, last_seen) = (OPENED | REPLIED, now()?.ticks());
    let held = Conntrack { addr: pod, port, client_port: port, seen, last_seen, ..Conntrack::default() };
    let keys = (FIRST_PORT..FIRST_PORT + PORTS)
        .filter(|port| *port != kept)
        .map(|port| ConntrackKey::snat_reply(node, Port::new(port), pod, Port::new(POD_PORT), proto));
    let keys: Vec<_> = keys.collect();
    ensure!(keys.len() == usize::from(PORTS) - 1, "{kept} is none of the range");
    let (done, result) = table.insert_all(&keys, &vec![held; keys.len()]);
    result?;
    ensure!(done == keys.len());
    Ok(())
}

/// Takes out what was put in.
fn free<F: Family>(table: &mut Connections<F>, pod: IpAddr) -> Result<()> {
    let pod = F::from_ip(pod).context("an address of the family")?;
    let entries = table.entries()?;
    let theirs: Vec<_> = entries.into_iter().filter(|(_, held)| held.addr == pod).map(|(key, _)| key).collect();
    let wanted = theirs.len();
    ensure!(table.remove_all(&theirs)? == wanted);
    Ok(())
}

/// Of a site whose only pod is the one elsewhere, to which packets leave as these addresses.
fn those_who_are_new_are_refused(site: &Site, own: [IpAddr; 2]) -> Result<()> {
    let far = FAR.map(|(_, pod)| ip(pod));
    let netns = &site.lab.outside.netns;
    let options = ClientOptions::default().within(3 * SECOND);
    for frontend in [0, 1].map(Site::frontends).concat() {
        let family = usize::from(frontend.is_ipv6());
        let mut connection = HttpConnection::open(netns, frontend, &options)?;
        let seen_as = connection.get()?.client;
        let rows = site.daemon.cli().json(&["conntrack", "list"])?;
        let told = rows.as_array().into_iter().flatten().filter(|row| row["seen_as"] == seen_as.to_string());
        let told: Vec<_> = told.filter(|row| row["frontend"] == frontend.to_string()).collect();
        assert_eq!(told.len(), 2, "{frontend}, seen as {seen_as}: {rows:#}");
        let socket = UdpClient::open(netns, frontend, &options)?;
        let udp = socket.ask(frontend, b"who")?.client.port();
        let pins = || bpf::open_pinned(Path::new(PIN_DIR));
        site.lab.node.mounts.enter(|| {
            for (proto, kept) in [(Proto::TCP, seen_as.port()), (Proto::UDP, udp)] {
                match family {
                    0 => fill::<V4>(&mut pins()?.v4.conntrack, own[0], far[0], proto, kept)?,
                    _ => fill::<V6>(&mut pins()?.v6.conntrack, own[1], far[1], proto, kept)?,
                }
            }
            Ok(())
        })?;
        let before = counted(site, "snat-exhausted")?;
        for proto in PROTOS {
            assert!(is_refused(site, proto, frontend), "{frontend}, {proto:?}: {}", site.daemon.log());
        }
        // The last packets of a connection before this one may find no port either.
        assert!(counted(site, "snat-exhausted")? >= before + 2, "{frontend}");
        connection.get().with_context(|| format!("a connection that was there, by {frontend}"))?;
        socket.ask(frontend, b"who").with_context(|| format!("a flow that was there, by {frontend}"))?;
        site.lab.node.mounts.enter(|| match family {
            0 => free::<V4>(&mut pins()?.v4.conntrack, far[0]),
            _ => free::<V6>(&mut pins()?.v6.conntrack, far[1]),
        })?;
        HttpConnection::open(netns, frontend, &options)?.get()?;
    }
    Ok(())
}

#[test]
fn without_a_port_clients_are_refused_at_once_over_plain_routing() -> Result<()> {
    let site = Site::new(Wanted { without_local_pod: true, ..Wanted::default() })?;
    those_who_are_new_are_refused(&site, NODE_IP)
}

#[test]
fn without_a_port_clients_are_refused_at_once_over_a_vxlan() -> Result<()> {
    let site = Site::new(Wanted { without_local_pod: true, ..Wanted::default() })?;
    beside::tunnel(&site)?;
    those_who_are_new_are_refused(&site, beside::ENDS.map(|[node, _]| ip(node)))
}
