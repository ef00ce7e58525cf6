//! Beside what else is on a node: overlay devices, the masquerade rules of CNI plugins, strict checks of the reverse path.

use std::net::Ipv4Addr;
use std::process::Command;

use affinity_tests::netlink::{self, Via};
use affinity_tests::netns::Netns;
use affinity_tests::topology::{NODE_IP, OUTSIDE_IP};
use affinity_tests::traffic::{ClientOptions, HttpConnection, UdpClient, http_get};
use affinity_tests::wait;
use anyhow::{Context as _, Result};
use rtnetlink::LinkVxlan;

use crate::site::{FAR, SECOND, Site, Wanted, ip};

/// Packets that the node has thrown away since their source would be reached another way: martians.
fn martians(node: &Netns) -> Result<u64> {
    let text = node.enter(|| Ok(std::fs::read_to_string("/proc/thread-self/net/netstat")?))?;
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("TcpExt:")).collect();
    let [names, values] = lines[..] else { anyhow::bail!("netstat: {text}") };
    let found = names.split(' ').zip(values.split(' ')).find(|(name, _)| *name == "IPReversePathFilter");
    Ok(found.context("no IPReversePathFilter")?.1.parse()?)
}

/// Data both ways, and a datagram in fragments, by every frontend, to the pod elsewhere.
fn goes_through(site: &Site) -> Result<Vec<std::net::SocketAddr>> {
    let netns = &site.lab.outside.netns;
    let options = ClientOptions::default().within(5 * SECOND);
    let mut clients = Vec::new();
    for frontend in [0, 1].map(Site::frontends).concat() {
        let mut connection = HttpConnection::open(netns, frontend, &options)
            .with_context(|| format!("{frontend}: {}", site.daemon.log()))?;
        let answer = connection.echo(1 << 20, 5)?;
        assert_eq!((answer.backend.as_str(), answer.body.len()), ("far", 1 << 20), "by {frontend}");
        clients.push(answer.client);
        let socket = UdpClient::open(netns, frontend, &options)?;
        // The first may be too big for a link on the way, which its sender's stack is told.
        let mut answers = (0..3).map(|_| socket.ask(frontend, &[7; 4_000]));
        let answer = answers.find_map(Result::ok).with_context(|| format!("{frontend}: {}", site.daemon.log()))?;
        assert_eq!((answer.backend.as_str(), answer.body.len()), ("far", 4_000), "by {frontend}");
        clients.push(answer.client);
    }
    assert_eq!(martians(&site.lab.node.netns)?, 0, "nothing is taken for a martian");
    Ok(clients)
}

/// Over plain routing, each packet's source checked strictly.
#[test]
fn strict_checks_of_the_reverse_path_find_nothing() -> Result<()> {
    let site = Site::new(Wanted { without_local_pod: true, ..Wanted::default() })?;
    for interface in ["all", "eth0"] {
        let name = format!("net.ipv4.conf.{interface}.rp_filter");
        assert_eq!(site.lab.node.netns.sysctl(&name)?, "1");
    }
    goes_through(&site)?;
    Ok(())
}

/// Addresses of the two ends of the tunnel, as flannel gives them: the node's is what packets leave as.
pub const ENDS: [[&str; 2]; 2] = [["10.244.0.0", "10.245.0.0"], ["fd00:10:244:ffff::1", "fd00:10:244:ffff::2"]];

/// A VXLAN between the node and the machine before the pod elsewhere, and the way to that pod through it.
pub fn tunnel(site: &Site) -> Result<()> {
    const NAME: &str = "flannel.1";
    const PORT: u16 = 8_472;
    let v4 = |address| match address {
        std::net::IpAddr::V4(address) => address,
        std::net::IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
    };
    let (node, outside) = (&site.lab.node.netns, &site.lab.outside.netns);
    let ends = [(node, NODE_IP[0], OUTSIDE_IP[0], 0), (outside, OUTSIDE_IP[0], NODE_IP[0], 1)];
    for (netns, local, remote, own) in ends {
        netns.netlink(async |handle| {
            let link = LinkVxlan::new(NAME, 1).local(v4(local)).remote(v4(remote)).port(PORT).up().build();
            handle.link().add(link).execute().await.context("adding a vxlan")?;
            netlink::set_mtu(&handle, NAME, 1_450).await?;
            let index = netlink::link(&handle, NAME).await?.index;
            for (addresses, prefix) in ENDS.into_iter().zip([32, 128]) {
                netlink::add_address(&handle, index, ip(addresses[own]), prefix).await?;
                netlink::add_route(&handle, ip(addresses[1 - own]), prefix, Via::Link(index)).await?;
                if own == 0 {
                    let family = usize::from(prefix == 128);
                    netlink::add_route(&handle, ip(FAR[family].1), prefix, Via::Gateway(ip(addresses[1]))).await?;
                }
            }
            Ok(())
        })?;
    }
    wait::until_true("the programs are on the overlay device", 10 * SECOND, || {
        let status = site.daemon.cli().json(&["status"])?;
        let attached = status["attachments"].as_array().context("no attachments")?;
        Ok(attached.iter().any(|one| one["interface"] == NAME))
    })
}

/// Packets leave as the address of the overlay device, and come back through it.
#[test]
fn pods_elsewhere_are_reached_over_a_vxlan() -> Result<()> {
    let site = Site::new(Wanted { without_local_pod: true, ..Wanted::default() })?;
    tunnel(&site)?;
    for client in goes_through(&site)? {
        let own = ENDS[usize::from(client.is_ipv6())][0];
        assert_eq!(client.ip(), ip(own), "as the pod sees it");
    }
    Ok(())
}

/// What flannel and kindnet have of netfilter: whatever comes from elsewhere and goes to a pod is masqueraded by flannel, whatever
/// leaves the pods' network by both. What has the node's address already is left alone.
const MASQUERADE: &str = "
table inet flannel {
  set pods4 { type ipv4_addr; flags interval; elements = { 10.244.0.0/15 } }
  set pods6 { type ipv6_addr; flags interval; elements = { fd00:10:244::/47 } }
  chain postrouting {
    type nat hook postrouting priority srcnat; policy accept;
    oifname \"lo\" return
    ip saddr @pods4 ip daddr @pods4 return
    ip6 saddr @pods6 ip6 daddr @pods6 return
    ip saddr @pods4 ip daddr != 224.0.0.0/4 masquerade fully-random
    ip6 saddr @pods6 ip6 daddr != ff00::/8 masquerade fully-random
    ip saddr != @pods4 ip daddr @pods4 masquerade fully-random
    ip6 saddr != @pods6 ip6 daddr @pods6 masquerade fully-random
  }
}
";

#[test]
fn masquerade_rules_of_cni_plugins_are_no_hindrance() -> Result<()> {
    let site = Site::new(Wanted { without_local_pod: true, ..Wanted::default() })?;
    let file = site.source.path().join("masquerade.nft");
    std::fs::write(&file, MASQUERADE)?;
    let mut command = Command::new("nft");
    command.arg("-f").arg(file);
    site.lab.node.netns.output(command)?;
    for client in goes_through(&site)? {
        assert_eq!(client.ip(), NODE_IP[usize::from(client.is_ipv6())], "as the pod sees it");
    }
    // And to the node's own pod, by flannel's rules as the node as well.
    site.set(Wanted { without_far_pod: true, ..Wanted::default() })?;
    for frontend in [0, 1].map(Site::frontends).concat() {
        wait::until_true(&format!("the node's own pod by {frontend}"), 10 * SECOND, || {
            let answer = http_get(&site.lab.outside.netns, frontend, &ClientOptions::default().within(3 * SECOND))?;
            Ok(answer.backend == site.lab.backends[0].name)
        })?;
    }
    Ok(())
}
