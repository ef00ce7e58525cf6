//! A machine that is two links away from another one, which routes: neither end of the first link, which may be a narrow one, is its
//! own, so that who sends too much has to be told.
//!
//! ```text
//!   trunk NAME ---- up router down ---- eth0 machine
//! ```

use std::net::IpAddr;

use anyhow::{Context as _, Result};

use crate::netlink::{self, Via};
use crate::netns::Netns;
use crate::topology::{ETH0, join, network};

/// What is to be there; addresses are of IPv4 and of IPv6, in networks of 24 and of 64 bits.
#[derive(Clone, Copy, Debug)]
pub struct Branch {
    /// Its name, and that of the trunk's interface.
    pub name: &'static str,
    /// The trunk's end of the first link, and that of the router between.
    pub link: [(&'static str, &'static str); 2],
    /// The router's end of the second link, and the machine's.
    pub net: [(&'static str, &'static str); 2],
}

/// What it has become: it is there as long as this is.
#[derive(Debug)]
pub struct Grown {
    /// The machine.
    pub netns: Netns,
    _router: Netns,
}

impl Branch {
    /// Makes it. The first link carries packets of `mtu` bytes. The trunk is to forward, which is left to the caller.
    ///
    /// # Errors
    /// Where an address is none, a name is taken, or the kernel refuses.
    pub fn grow(&self, trunk: &Netns, mtu: u32) -> Result<Grown> {
        let Self { name, link, net } = *self;
        let (router, netns) = (Netns::new(&format!("{name}-router"))?, Netns::new(name)?);
        for netns in [&router, &netns] {
            netns.set_sysctls(&[
                ("net.ipv6.conf.all.accept_dad", "0"),
                ("net.ipv6.conf.default.accept_dad", "0"),
                ("net.ipv4.ip_forward", "1"),
                ("net.ipv6.conf.all.forwarding", "1"),
            ])?;
        }
        join((trunk, name), (&router, "up"), mtu)?;
        join((&router, "down"), (&netns, ETH0), 1_500)?;
        for (family, (prefix, any)) in [(24, "0.0.0.0"), (64, "::")].into_iter().enumerate() {
            let [(upper, lower), (gateway, own)] = [link[family], net[family]];
            let [upper, lower, gateway, own, any] = [ip(upper)?, ip(lower)?, ip(gateway)?, ip(own)?, ip(any)?];
            trunk.netlink(async |handle| {
                let index = netlink::link(&handle, name).await?.index;
                netlink::add_address(&handle, index, upper, prefix).await?;
                netlink::add_route(&handle, network(own), prefix, Via::Gateway(lower)).await
            })?;
            router.netlink(async |handle| {
                let up = netlink::link(&handle, "up").await?.index;
                let down = netlink::link(&handle, "down").await?.index;
                netlink::add_address(&handle, up, lower, prefix).await?;
                netlink::add_address(&handle, down, gateway, prefix).await?;
                netlink::add_route(&handle, any, 0, Via::Gateway(upper)).await
            })?;
            netns.netlink(async |handle| {
                let eth0 = netlink::link(&handle, ETH0).await?.index;
                netlink::add_address(&handle, eth0, own, prefix).await?;
                netlink::add_route(&handle, any, 0, Via::Gateway(gateway)).await
            })?;
        }
        Ok(Grown { netns, _router: router })
    }
}

fn ip(text: &str) -> Result<IpAddr> {
    text.parse().with_context(|| format!("{text} is no address"))
}
