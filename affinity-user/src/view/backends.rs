//! Backends: which pods receive traffic.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use affinity_common::abi::backends::BackendKey;
use serde::Serialize;

use super::{FrontendAt, Snapshot};

/// A backend of a service port.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BackendRow {
    /// `namespace/name`.
    pub service: String,
    /// The port's name; empty where it has none.
    pub port_name: String,
    /// Its id.
    pub id: u32,
    /// The pod's name, where it is known.
    pub pod: Option<String>,
    /// Address and port.
    pub address: SocketAddr,
    /// `eligible`, or `draining`: it keeps its flows and gets no new ones.
    pub state: &'static str,
    /// Its share of the service's slots, from 0 to 1: of first choices.
    pub share: f64,
    /// New connections that it was given.
    pub connections: u64,
    /// Clients that are kept on it at the moment.
    pub live_sessions: usize,
    /// Connections that are in conntrack.
    pub flows: usize,
    /// Packets from clients of those.
    pub packets: u64,
}

/// Every backend, by service and address.
pub fn backends(snapshot: &Snapshot) -> Vec<BackendRow> {
    let mut rows: BTreeMap<BackendKey, BackendRow> = BTreeMap::new();
    for (key, backend) in &snapshot.names.backends {
        rows.insert(
            *key,
            BackendRow {
                service: snapshot.names.service(key.service),
                port_name: snapshot.names.port(key.service),
                id: key.backend.id,
                pod: snapshot.names.pod(key.service, key.backend),
                address: backend.address,
                state: if backend.eligible { "eligible" } else { "draining" },
                share: 0.0,
                connections: snapshot.stats.get(key).map_or(0, |stats| stats.connections),
                live_sessions: 0,
                flows: 0,
                packets: 0,
            },
        );
    }
    let mut counted = std::collections::BTreeSet::new();
    // Where a service port has frontends of both scopes, the share is that among the whole cluster's clients.
    let mut scopes: BTreeMap<_, u16> = BTreeMap::new();
    let family_of = |it: &FrontendAt| (it.value.service, it.address.is_ipv4());
    for it in &snapshot.frontends {
        let scope = scopes.entry(family_of(it)).or_insert(it.value.scope);
        *scope = it.value.scope.min(*scope);
    }
    for it in snapshot.frontends.iter().filter(|it| scopes.get(&family_of(it)) == Some(&it.value.scope)) {
        let frontend = &it.value;
        // Several frontends of a service port share its slots.
        if !counted.insert((frontend.service, frontend.first_slot)) {
            continue;
        }
        for index in frontend.first_slot..frontend.first_slot.saturating_add(frontend.slot_count) {
            let Some(backend) = snapshot.slots.get(&index) else { continue };
            if let Some(row) = rows.get_mut(&BackendKey { service: frontend.service, backend: *backend }) {
                row.share += 1.0 / f64::from(frontend.slot_count);
            }
        }
    }
    let affinities = snapshot.affinities();
    for client in &snapshot.clients {
        let Some(keeping) = affinities.get(&client.service) else { continue };
        let live = usize::from(client.entry.pair().is_live(keeping.timeout, snapshot.now));
        for &service in &keeping.services {
            if let Some(row) = rows.get_mut(&BackendKey { service, backend: client.entry.backend }) {
                row.live_sessions += live;
            }
        }
    }
    for connection in snapshot.connections.iter().filter(|connection| connection.forward && !connection.expired) {
        if let Some(row) = rows.get_mut(&connection.key) {
            row.flows += 1;
            row.packets += u64::from(connection.packets);
        }
    }
    let mut rows: Vec<_> = rows.into_values().collect();
    rows.sort_by(|a, b| (&a.service, &a.port_name, a.address).cmp(&(&b.service, &b.port_name, b.address)));
    rows
}
