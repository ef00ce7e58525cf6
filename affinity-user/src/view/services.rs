//! Service ports.

use std::collections::BTreeMap;

use affinity_common::abi::frontends::LOCAL;
use affinity_common::types::ServiceId;
use serde::Serialize;

use super::{FrontendAt, Snapshot};

/// A service port.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ServiceRow {
    /// `namespace/name`.
    pub service: String,
    /// The port's name; empty where it has none.
    pub port_name: String,
    /// Its id.
    pub id: u32,
    /// Where it is reached: `10.96.0.10:80/TCP`.
    pub frontends: Vec<String>,
    /// Seconds of affinity; none for `sessionAffinity: None`.
    pub affinity_timeout_seconds: Option<u32>,
    /// `spec.internalTrafficPolicy`: `Cluster`, or `Local` where clients are led to endpoints on this node alone.
    pub internal_traffic_policy: &'static str,
    /// Backends that take new sessions.
    pub eligible: usize,
    /// All backends.
    pub backends: usize,
    /// Clients that it keeps at the moment.
    pub live_sessions: usize,
}

/// Every service port, by name.
pub fn services(snapshot: &Snapshot) -> Vec<ServiceRow> {
    let mut rows: BTreeMap<ServiceId, ServiceRow> = BTreeMap::new();
    for FrontendAt { address, proto, value: frontend } in &snapshot.frontends {
        let id = frontend.service;
        let row = rows.entry(id).or_insert_with(|| ServiceRow {
            service: snapshot.names.service(id),
            port_name: snapshot.names.port(id),
            id: id.id,
            frontends: Vec::new(),
            affinity_timeout_seconds: frontend.has_affinity().then_some(frontend.timeout.secs),
            internal_traffic_policy: if frontend.scope == LOCAL { "Local" } else { "Cluster" },
            eligible: 0,
            backends: 0,
            live_sessions: 0,
        });
        row.frontends.push(format!("{address}/{proto}"));
    }
    for (key, backend) in &snapshot.names.backends {
        if let Some(row) = rows.get_mut(&key.service) {
            row.backends += 1;
            row.eligible += usize::from(backend.eligible);
        }
    }
    let affinities = snapshot.affinities();
    for client in &snapshot.clients {
        let Some(keeping) = affinities.get(&client.service) else { continue };
        let live = usize::from(client.entry.pair().is_live(keeping.timeout, snapshot.now));
        for service in &keeping.services {
            if let Some(row) = rows.get_mut(service) {
                row.live_sessions += live;
            }
        }
    }
    let mut rows: Vec<_> = rows.into_values().collect();
    rows.sort_by(|a, b| (&a.service, &a.port_name, a.id).cmp(&(&b.service, &b.port_name, b.id)));
    rows
}
