//! The connections that are translated.

use std::net::SocketAddr;

use affinity_common::abi::conntrack::{BACKEND_FIN, CLIENT_FIN, REPLIED, RESET};
use affinity_common::types::Proto;
use serde::Serialize;

use super::Snapshot;

/// A connection in one direction.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ConnectionRow {
    /// TCP or UDP.
    pub proto: String,
    /// `forward`: from the client; `reverse`: to it.
    pub direction: &'static str,
    /// The client.
    pub client: SocketAddr,
    /// Whom the client talks to.
    pub frontend: SocketAddr,
    /// Who answers.
    pub backend: SocketAddr,
    /// What a backend on another node takes the client for, where it has come from outside.
    pub seen_as: Option<SocketAddr>,
    /// `namespace/name`.
    pub service: String,
    /// The pod's name, where it is known.
    pub pod: Option<String>,
    /// `new`, `established`, `closing`, `reset`, or `expired` where it only waits to be taken out.
    pub state: &'static str,
    /// Packets in this direction.
    pub packets: u32,
    /// Seconds since the last one.
    pub idle_seconds: f64,
    /// Seconds of silence after which it counts as gone.
    pub lifetime_seconds: u32,
}

/// Every connection, by client.
pub fn connections(snapshot: &Snapshot) -> Vec<ConnectionRow> {
    let mut rows: Vec<_> = snapshot
        .connections
        .iter()
        .map(|connection| ConnectionRow {
            proto: connection.proto.to_string(),
            direction: if connection.forward { "forward" } else { "reverse" },
            client: connection.client,
            frontend: connection.frontend,
            backend: connection.backend,
            seen_as: connection.seen_as,
            service: snapshot.names.service(connection.key.service),
            pod: snapshot.names.pod(connection.key.service, connection.key.backend),
            state: if connection.expired { "expired" } else { state(connection.proto, connection.seen) },
            packets: connection.packets,
            idle_seconds: super::sessions::seconds(connection.last_seen.age(snapshot.now)),
            lifetime_seconds: connection.lifetime.secs,
        })
        .collect();
    rows.sort_by(|a, b| (a.client, a.frontend, a.direction).cmp(&(b.client, b.frontend, b.direction)));
    rows
}

fn state(proto: Proto, seen: u8) -> &'static str {
    if seen & RESET != 0 {
        "reset"
    } else if proto == Proto::TCP && seen & (CLIENT_FIN | BACKEND_FIN) != 0 {
        "closing"
    } else if seen & REPLIED != 0 {
        "established"
    } else {
        "new"
    }
}
