//! The connections that are translated.

use std::net::SocketAddr;

use affinity_common::abi::conntrack::{BACKEND_FIN, CLIENT_FIN, FORWARD, REPLIED, RESET, lifetime};
use affinity_common::family::V4;
use affinity_common::types::Proto;
use serde::Serialize;

use super::{Snapshot, socket};

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
    /// `namespace/name`.
    pub service: String,
    /// The pod's name, where it is known.
    pub pod: Option<String>,
    /// `new`, `established`, `closing` or `reset`.
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
        .conntrack
        .iter()
        .map(|(key, entry)| {
            let peer = socket::<V4>(&key.peer, key.peer_port);
            let other = socket::<V4>(&entry.addr, entry.port);
            let forward = key.direction == FORWARD;
            let (frontend, backend) = if forward { (peer, other) } else { (other, peer) };
            ConnectionRow {
                proto: key.proto.to_string(),
                direction: if forward { "forward" } else { "reverse" },
                client: socket::<V4>(&key.client, key.client_port),
                frontend,
                backend,
                service: snapshot.names.service(entry.service),
                pod: snapshot.names.pod(entry.service, entry.backend),
                state: state(key.proto, entry.seen),
                packets: entry.packets,
                idle_seconds: super::sessions::seconds(entry.last_seen.age(snapshot.now)),
                lifetime_seconds: lifetime(key.proto, entry.seen).secs,
            }
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
