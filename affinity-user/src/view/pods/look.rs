//! What there is to see of a node's pods.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use affinity_common::abi::netns::{NetnsClient, NetnsKey};
use thiserror::Error;

use super::{FamilyName, NamespaceView, NodeView};
use crate::loader;
use crate::sockets::pods::Sight;
use crate::sockets::{discovery, namespace, pods, wiring};
use crate::status::{StatusFile, interface_object};
use crate::tables::{TableError, Tables};
use crate::view::{SnapshotError, open};

/// The node can't be looked at.
#[derive(Debug, Error)]
pub enum LookError {
    /// The maps can't be opened.
    #[error(transparent)]
    Maps(#[from] SnapshotError),
    /// A map can't be read.
    #[error(transparent)]
    Table(#[from] TableError),
    /// There is no `/proc`, or no netlink.
    #[error("the node's network namespaces can't be looked at: {0}")]
    System(#[from] io::Error),
}

/// Looks at the node: at its network namespaces, which takes the same rights as the daemon has for it, its interfaces and the
/// maps that are pinned in a directory; and at what its daemon says, if one runs.
///
/// # Errors
/// Where there are no maps, or nothing can be seen.
pub fn look(pin_dir: &Path, status: Option<&StatusFile>) -> Result<NodeView, LookError> {
    let tables = open(pin_dir)?;
    let own = discovery::own()?;
    let told = status.and_then(|status| status.clients.as_ref());
    let directories =
        told.map_or_else(|| vec![PathBuf::from(discovery::DIRECTORY)], |told| told.netns_directories.clone());
    let mut view = NodeView {
        sockets: match status {
            Some(status) => status.cgroup.is_some(),
            None => loader::attached_cgroup(pin_dir).is_some(),
        },
        pods: status.and_then(|status| status.pods.clone()),
        pods_are_served: told.is_none_or(|told| told.pods_are_served),
        patterns: told.map(|told| told.interfaces.clone()),
        own: clients(&tables, NetnsKey { cookie: namespace::cookie()? })?,
        node: wiring::node()?,
        attached: status
            .map_or_else(|| loader::attached(pin_dir), |status| status.attachments.clone())
            .into_iter()
            .map(|attachment| (attachment.ifindex, attachment.mode))
            .collect(),
        ..NodeView::default()
    };
    if let Some(status) = status {
        let failed = |name: &str| {
            let object = interface_object(name);
            status.problems.iter().find(|problem| problem.object == object).map(|problem| problem.message.clone())
        };
        let names = view.node.interfaces.values().map(|interface| &interface.name);
        view.failed = names.filter_map(|name| Some((name.clone(), failed(name)?))).collect();
    }
    let mut uids = pods::uids();
    for (namespace, path) in discovery::find(&directories)?.into_iter().filter(|(namespace, _)| *namespace != own) {
        match wiring::look(namespace, &path) {
            Ok((seen, interfaces)) => view.namespaces.push(NamespaceView {
                path: path.display().to_string(),
                clients: clients(&tables, seen.key)?,
                sight: Sight { addresses: seen.addresses, uids: uids.remove(&namespace).unwrap_or_default() },
                interfaces,
            }),
            // Gone in between.
            Err(_) if discovery::of(&path, own) != Some(namespace) => {}
            Err(error) => view.problems.push(format!("{}: {error}", path.display())),
        }
    }
    Ok(view)
}

/// The families in which a namespace is known, and whether its sockets are left to TC.
fn clients(tables: &Tables, key: NetnsKey) -> Result<BTreeMap<FamilyName, bool>, TableError> {
    let v4 = tables.v4.netns.get(&key)?.map(|client| (FamilyName::Ipv4, NetnsClient::is_tc_only(&client)));
    let v6 = tables.v6.netns.get(&key)?.map(|client| (FamilyName::Ipv6, NetnsClient::is_tc_only(&client)));
    Ok(v4.into_iter().chain(v6).collect())
}
