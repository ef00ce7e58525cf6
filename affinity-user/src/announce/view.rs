//! Who answers for which address, for those who ask: as rows, of the Leases.

use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use serde::Serialize;

use super::{ADDRESS_ANNOTATION, INTERFACES_ANNOTATION, SERVICE_ANNOTATION};
use crate::lease::View;

/// An address, and who answers for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AnnouncementRow {
    /// The address.
    pub address: IpAddr,
    /// The service that has it, `NAMESPACE/NAME`.
    pub service: String,
    /// The node that answers for it; none where nobody does.
    pub node: Option<String>,
    /// The node's interfaces on which it does.
    pub interfaces: Vec<String>,
    /// Since when.
    pub since: Option<Timestamp>,
    /// How often another node has taken over.
    pub transitions: i32,
}

impl AnnouncementRow {
    /// The row of a Lease at a time; none of one that is for something else. A holder who has not renewed in time has gone.
    pub fn of(lease: &Lease, now: Timestamp) -> Option<Self> {
        let view = View::read(lease, None)?;
        let said = |key: &str| view.annotations.get(key).map(String::as_str).unwrap_or_default();
        let is_there =
            view.renewed.is_some_and(|at| now.duration_since(at).unsigned_abs() <= view.duration || at > now);
        let node = view.holder.clone().filter(|_| is_there);
        let interfaces = said(INTERFACES_ANNOTATION).split(',').filter(|name| node.is_some() && !name.is_empty());
        Some(Self {
            address: said(ADDRESS_ANNOTATION).parse().ok()?,
            service: said(SERVICE_ANNOTATION).to_owned(),
            interfaces: interfaces.map(str::to_owned).collect(),
            since: view.acquired.filter(|_| node.is_some()),
            node,
            transitions: view.transitions,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holder_that_does_not_renew_has_gone() {
        let lease: Lease = serde_saphyr::from_str(
            "metadata: {name: affinity-l2-192-0-2-1, annotations: {affinity.dev/address: 192.0.2.1, \
             affinity.dev/service: default/web, affinity.dev/interfaces: 'eth0,eth1'}}\n\
             spec: {holderIdentity: n1, leaseDurationSeconds: 15, leaseTransitions: 2, \
             acquireTime: '2026-01-01T00:00:00.000000Z', renewTime: '2026-01-01T00:10:00.000000Z'}",
        )
        .expect("a Lease");
        let at = |text: &str| AnnouncementRow::of(&lease, text.parse().expect("a time")).expect("an address's");
        let row = at("2026-01-01T00:10:15Z");
        assert_eq!((row.node.as_deref(), row.interfaces.len(), row.transitions), (Some("n1"), 2, 2));
        assert_eq!(row.since, Some("2026-01-01T00:00:00Z".parse().expect("a time")));
        let row = at("2026-01-01T00:10:16Z");
        assert_eq!((row.node, row.interfaces.len(), row.since), (None, 0, None));
        assert_eq!(row.service, "default/web");
        assert_eq!(AnnouncementRow::of(&Lease::default(), Timestamp::UNIX_EPOCH), None);
    }
}
