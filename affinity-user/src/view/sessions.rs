//! Clients and the backends that they are kept on.

use std::net::{IpAddr, SocketAddr};

use affinity_common::types::Nanos;
use serde::Serialize;

use super::Snapshot;

/// A client of a service port.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SessionRow {
    /// The client's address.
    pub client: IpAddr,
    /// `namespace/name`.
    pub service: String,
    /// The port's name; empty where it has none, `*` where clients are kept over all ports of the service.
    pub port_name: String,
    /// The pod's name, where it is known.
    pub pod: Option<String>,
    /// The backend's address, where it is still there.
    pub backend: Option<SocketAddr>,
    /// The backend's id.
    pub backend_id: u32,
    /// Seconds since the client was given this backend.
    pub age_seconds: f64,
    /// Seconds until the entry expires, unless it is used; none where it has, or the service has no affinity.
    pub left_seconds: Option<f64>,
    /// `live` or `expired`.
    pub state: &'static str,
}

/// Every client, by service and address.
pub fn sessions(snapshot: &Snapshot) -> Vec<SessionRow> {
    let affinities = snapshot.affinities();
    let mut rows: Vec<_> = snapshot
        .clients
        .iter()
        .map(|client| {
            let entry = &client.entry;
            let used = entry.last_used.age(snapshot.now);
            let keeping = affinities.get(&client.service);
            let left = keeping.and_then(|keeping| keeping.timeout.nanos().0.checked_sub(used.0));
            let is_shared = keeping.is_some_and(|keeping| keeping.services.len() > 1);
            let left = left.filter(|left| *left > 0).map(|left| seconds(Nanos(left)));
            SessionRow {
                client: client.address,
                service: snapshot.names.service(client.service),
                port_name: if is_shared { "*".to_owned() } else { snapshot.names.port(client.service) },
                pod: snapshot.names.pod(client.service, entry.backend),
                backend: snapshot.names.address(client.service, entry.backend),
                backend_id: entry.backend.id,
                age_seconds: seconds(entry.since.age(snapshot.now)),
                left_seconds: left,
                state: if left.is_some() { "live" } else { "expired" },
            }
        })
        .collect();
    rows.sort_by(|a, b| (&a.service, &a.port_name, a.client).cmp(&(&b.service, &b.port_name, b.client)));
    rows
}

pub(super) fn seconds(span: Nanos) -> f64 {
    std::time::Duration::from_nanos(span.0).as_secs_f64()
}
