//! The few rtnetlink requests that a lab needs, on the connection that [`crate::netns::Netns::netlink`] gives.

use std::future::Future;
use std::net::IpAddr;

use anyhow::{Context as _, Result};
use futures::TryStreamExt as _;
use netlink_packet_route::address::AddressHeaderFlags;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};

/// Runs `work` with a netlink connection of the calling thread's namespace.
///
/// # Errors
/// Those of `work`, and of connecting.
pub fn block_on<R, F>(work: impl FnOnce(Handle) -> F) -> Result<R>
where
    F: Future<Output = Result<R>>,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().context("netlink")?;
        tokio::spawn(connection);
        work(handle).await
    })
}

/// What is known of one link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index in its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its Ethernet address; zeroes where it has none.
    pub mac: [u8; 6],
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it can carry traffic: it is up, and the other end of it.
    pub running: bool,
    /// Frames received and sent.
    pub packets: (u64, u64),
}

/// All links of the namespace.
///
/// # Errors
/// Where netlink fails.
pub async fn links(handle: &Handle) -> Result<Vec<Link>> {
    let messages: Vec<LinkMessage> = handle.link().get().execute().try_collect().await?;
    Ok(messages.iter().map(to_link).collect())
}

/// One link by its name.
///
/// # Errors
/// Where there is none of that name.
pub async fn link(handle: &Handle, name: &str) -> Result<Link> {
    let mut found = handle.link().get().match_name(name).execute();
    let message = found.try_next().await.with_context(|| format!("link {name}"))?;
    Ok(to_link(&message.with_context(|| format!("link {name}"))?))
}

/// Sets a link up.
///
/// # Errors
/// Where there is none of that name.
pub async fn set_up(handle: &Handle, name: &str) -> Result<()> {
    set(handle, name, LinkUnspec::new_with_name(name).up().build()).await
}

/// Sets a link down.
///
/// # Errors
/// Where there is none of that name.
pub async fn set_down(handle: &Handle, name: &str) -> Result<()> {
    set(handle, name, LinkUnspec::new_with_name(name).down().build()).await
}

/// Changes a link's MTU, in bytes.
///
/// # Errors
/// Where there is none of that name, or it can't have so large a one.
pub async fn set_mtu(handle: &Handle, name: &str, mtu: u32) -> Result<()> {
    set(handle, name, LinkUnspec::new_with_name(name).mtu(mtu).build()).await
}

/// Enslaves a link to the link with the index `controller` (a bridge).
///
/// # Errors
/// Where one of them does not exist.
pub async fn enslave(handle: &Handle, name: &str, controller: u32) -> Result<()> {
    let message = LinkUnspec::new_with_name(name).controller(controller).build();
    set(handle, name, message).await
}

async fn set(handle: &Handle, name: &str, message: LinkMessage) -> Result<()> {
    handle.link().set(message).execute().await.with_context(|| format!("changing link {name}"))
}

/// Deletes a link, and the other end with it where it is a veth.
///
/// # Errors
/// Where there is none of that name.
pub async fn delete(handle: &Handle, name: &str) -> Result<()> {
    let index = link(handle, name).await?.index;
    handle.link().del(index).execute().await.with_context(|| format!("deleting link {name}"))
}

/// Adds an address to the link with this index. Nobody looks for duplicates of it: it is bound to at once, where the kernel's
/// worker that would say that there are none comes late on a machine with much to do.
///
/// # Errors
/// Where the kernel refuses.
pub async fn add_address(handle: &Handle, link: u32, address: IpAddr, prefix: u8) -> Result<()> {
    let mut request = handle.address().add(link, address, prefix);
    request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
    request.execute().await.with_context(|| format!("adding address {address}/{prefix}"))
}

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// To neighbours on the link with this index.
    Link(u32),
    /// To a gateway that some other route reaches.
    Gateway(IpAddr),
}

/// Adds a route; a prefix of 0 makes it the default route of `destination`'s family.
///
/// # Errors
/// Where the kernel refuses.
pub async fn add_route(handle: &Handle, destination: IpAddr, prefix: u8, via: Via) -> Result<()> {
    let what = || format!("adding route {destination}/{prefix} by {via:?}");
    let mut route = RouteMessageBuilder::<IpAddr>::new().destination_prefix(destination, prefix).with_context(what)?;
    route = match via {
        Via::Link(index) => route.output_interface(index).scope(netlink_packet_route::route::RouteScope::Link),
        Via::Gateway(gateway) => route.gateway(gateway).with_context(what)?,
    };
    handle.route().add(route.build()).execute().await.with_context(what)
}

fn to_link(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: [0; 6],
        mtu: 0,
        running: message.header.flags.contains(LinkFlags::LowerUp),
        packets: (0, 0),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(mac) => {
                if let Ok(mac) = mac.as_slice().try_into() {
                    link.mac = mac;
                }
            }
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Stats64(stats) => link.packets = (stats.rx_packets, stats.tx_packets),
            _ => {}
        }
    }
    link
}
