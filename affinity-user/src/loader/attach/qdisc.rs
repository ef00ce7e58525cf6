//! What is in an interface's clsact qdisc, and its removal when nothing is.

use futures::TryStreamExt as _;
use netlink_packet_route::tc::{TcAttribute, TcMessage};
use nix::net::if_::if_nametoindex;
use rtnetlink::{Handle, new_connection};

/// Runs a question to the kernel, on a thread of its own: the caller may be in a runtime or not.
fn ask<T: Send>(question: impl AsyncFnOnce(Handle) -> Result<T, rtnetlink::Error> + Send) -> Option<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
            runtime.block_on(async {
                let (connection, handle, _) = new_connection().ok()?;
                tokio::spawn(connection);
                question(handle).await.inspect_err(|error| tracing::debug!(%error, "netlink")).ok()
            })
        });
        thread.join().ok().flatten()
    })
}

/// The filters of an interface, of both directions.
async fn filters(handle: &Handle, index: i32) -> Result<Vec<TcMessage>, rtnetlink::Error> {
    let mut filters: Vec<_> = handle.traffic_filter(index).get().ingress().execute().try_collect().await?;
    let egress: Vec<_> = handle.traffic_filter(index).get().egress().execute().try_collect().await?;
    filters.extend(egress);
    Ok(filters)
}

/// Whether an interface has a filter at the given place.
pub(super) fn has_filter(interface: &str, priority: u16, handle: u32) -> bool {
    let Ok(index) = if_nametoindex(interface) else { return false };
    let is_ours = |it: &TcMessage| it.header.info >> 16 == u32::from(priority) && u32::from(it.header.handle) == handle;
    ask(async |netlink| filters(&netlink, index.cast_signed()).await).is_some_and(|all| all.iter().any(is_ours))
}

/// Removes the clsact qdisc of an interface if no filter is in it.
pub(super) fn remove_empty(interface: &str) {
    let Ok(index) = if_nametoindex(interface) else { return };
    let index = index.cast_signed();
    ask(async |handle| {
        if !filters(&handle, index).await?.is_empty() {
            return Ok(());
        }
        let qdiscs: Vec<_> = handle.qdisc().get().index(index).execute().try_collect().await?;
        let is_clsact =
            |it: &TcMessage| it.attributes.iter().any(|it| matches!(it, TcAttribute::Kind(kind) if kind == "clsact"));
        for qdisc in qdiscs.into_iter().filter(|it| it.header.index == index && is_clsact(it)) {
            let mut request = handle.qdisc().del(index);
            *request.message_mut() = qdisc;
            request.execute().await?;
        }
        Ok(())
    });
}
