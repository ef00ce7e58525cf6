//! The sockets that were connected to a backend at once.

use std::net::{IpAddr, SocketAddr};

use affinity_common::abi::sockets::{Socket, SocketKey};
use affinity_common::family::Family;
use serde::Serialize;

use super::Names;
use crate::tables::{FamilyTables, TableError, Tables};

/// A socket and a backend that it talks to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SocketRow {
    /// The socket's cookie, in hexadecimal digits as `ss -e` prints it.
    pub cookie: String,
    /// TCP or UDP.
    pub proto: String,
    /// The client that the socket counts as: its network namespace's address, or what it is bound to.
    pub client: IpAddr,
    /// Whom it has asked for.
    pub frontend: SocketAddr,
    /// Whom it talks to.
    pub backend: SocketAddr,
    /// `namespace/name`.
    pub service: String,
    /// The port's name; empty where it has none.
    pub port_name: String,
    /// The pod's name, where it is known.
    pub pod: Option<String>,
}

/// Every socket, by client and whom it has asked for.
///
/// # Errors
/// Where a map can't be read.
pub fn sockets(tables: &Tables, names: &Names) -> Result<Vec<SocketRow>, TableError> {
    let mut rows = of_family(&tables.v4, names)?;
    rows.extend(of_family(&tables.v6, names)?);
    rows.sort_by(|a, b| (a.client, a.frontend, &a.proto, &a.cookie).cmp(&(b.client, b.frontend, &b.proto, &b.cookie)));
    Ok(rows)
}

fn of_family<F: Family>(tables: &FamilyTables<F>, names: &Names) -> Result<Vec<SocketRow>, TableError> {
    Ok(tables.sockets.entries()?.iter().map(|(key, socket)| row(key, socket, names)).collect())
}

fn row<F: Family>(key: &SocketKey<F>, socket: &Socket<F>, names: &Names) -> SocketRow {
    SocketRow {
        cookie: format!("{:x}", key.cookie.get()),
        proto: key.proto.to_string(),
        client: F::to_ip(&socket.client),
        frontend: super::socket::<F>(&socket.addr, socket.port),
        backend: super::socket::<F>(&key.addr, key.port),
        service: names.service(socket.service),
        port_name: names.port(socket.service),
        pod: names.pod(socket.service, socket.backend),
    }
}
