//! Every entry of every map as a line of text, in a stable order: for people who look for a fault, and for tests.
//!
//! A line is the map's name, the key, and the value as `field=value`. Elements of arrays that are zero are left out.

use std::{fmt::Display, net::SocketAddr};

use affinity_common::{
    abi::{
        addresses::{Address, AddressKey},
        affinity::{Affinity, AffinityKey},
        announced::{Announced, AnnouncedKey},
        backend_names::BackendName,
        backend_stats::BackendStats,
        backends::{Backend, BackendKey},
        config::Config,
        conntrack::{Conntrack, ConntrackKey, FORWARD, SNAT_REPLY},
        counters::Counter,
        filter::FilterWord,
        fragments::{Fragments, FragmentsKey},
        frontends::{Frontend, FrontendKey, OUTSIDERS},
        ids::NextIds,
        lifetimes::Lifetimes,
        netns::{NetnsClient, NetnsKey},
        services::ServicePortName,
        slots::Slot,
        sockets::{Socket, SocketKey},
        source_ranges::{Range, RangeKey},
        uplinks::Uplink,
    },
    family::Family,
    types::{Port, ServiceId},
};

use super::{FamilyTables, SharedTables, Table, TableError, Tables, names};

/// The lines of all maps.
pub fn dump(tables: &Tables) -> Result<Vec<String>, TableError> {
    let mut lines = family(&tables.v4)?;
    lines.extend(family(&tables.v6)?);
    lines.extend(shared(&tables.shared)?);
    Ok(lines)
}

/// The lines of a family's maps.
pub fn family<F: Family>(tables: &FamilyTables<F>) -> Result<Vec<String>, TableError> {
    let mut lines = table(&*tables.frontends)?;
    lines.extend(table(&*tables.addresses)?);
    lines.extend(table(&*tables.backends)?);
    lines.extend(table(&*tables.affinity)?);
    lines.extend(table(&*tables.conntrack)?);
    lines.extend(table(&*tables.fragments)?);
    lines.extend(table(&*tables.netns)?);
    lines.extend(table(&*tables.sockets)?);
    lines.extend(table(&*tables.uplinks)?);
    lines.extend(table(&*tables.ranges)?);
    lines.extend(table(&*tables.announced)?);
    Ok(lines)
}

/// The lines of the maps that the families share.
pub fn shared(tables: &SharedTables) -> Result<Vec<String>, TableError> {
    let mut lines = table(&*tables.service_filter)?;
    lines.extend(table(&*tables.direct_filter)?);
    lines.extend(table(&*tables.snat_filter)?);
    lines.extend(table(&*tables.slots)?);
    lines.extend(table(&*tables.services)?);
    lines.extend(table(&*tables.backend_names)?);
    lines.extend(table(&*tables.backend_stats)?);
    lines.extend(table(&*tables.ids)?);
    lines.extend(table(&*tables.config)?);
    lines.extend(table(&*tables.lifetimes)?);
    lines.extend(table(&*tables.counters)?);
    Ok(lines)
}

/// The lines of one map.
pub fn table<K: Key, V: Value>(table: &dyn Table<K, V>) -> Result<Vec<String>, TableError> {
    let mut lines = Vec::new();
    for (key, value) in table.entries()? {
        if !V::IN_ARRAY || bytemuck::bytes_of(&value).iter().any(|&byte| byte != 0) {
            lines.push(format!("{} {} {}", table.name(), key.text(), value.text()));
        }
    }
    Ok(lines)
}

/// A key as text.
pub trait Key {
    /// The text.
    fn text(&self) -> String;
}

/// A value as text.
pub trait Value: bytemuck::Pod {
    /// Whether its map is an array, which has elements that nobody wrote.
    const IN_ARRAY: bool = false;

    /// The text.
    fn text(&self) -> String;
}

fn socket<F: Family>(addr: &F::Addr, port: Port) -> SocketAddr {
    SocketAddr::new(F::to_ip(addr), port.get())
}

/// A name, or a dash where there is none.
fn or_dash(name: Option<impl Display>) -> String {
    name.map_or_else(|| "-".to_owned(), |name| name.to_string())
}

impl Key for u32 {
    fn text(&self) -> String {
        self.to_string()
    }
}

impl Key for ServiceId {
    fn text(&self) -> String {
        self.to_string()
    }
}

impl Key for BackendKey {
    fn text(&self) -> String {
        format!("{}/{}", self.service, self.backend)
    }
}

impl<F: Family> Key for FrontendKey<F> {
    fn text(&self) -> String {
        let whose = if self.origin == OUTSIDERS { " outside" } else { "" };
        format!("{}/{}{whose}", socket::<F>(&self.addr, self.port), self.proto)
    }
}

impl<F: Family> Key for RangeKey<F> {
    fn text(&self) -> String {
        format!("service={} {}/{}", self.service, F::to_ip(&self.addr), self.bits())
    }
}

impl Value for Range {
    fn text(&self) -> String {
        "allowed".to_owned()
    }
}

impl<F: Family> Key for AnnouncedKey<F> {
    fn text(&self) -> String {
        format!("{} ifindex={}", F::to_ip(&self.addr), self.ifindex)
    }
}

impl Value for Announced {
    fn text(&self) -> String {
        format!("until={}", self.until.at)
    }
}

impl<F: Family> Value for Uplink<F> {
    fn text(&self) -> String {
        let mac = self.mac.map(|octet| format!("{octet:02x}")).join(":");
        format!("addr={} mac={mac}", F::to_ip(&self.addr))
    }
}

impl<F: Family> Key for AffinityKey<F> {
    fn text(&self) -> String {
        format!("{} service={} scope={}", F::to_ip(&self.client), self.service, self.scope)
    }
}

impl<F: Family> Key for ConntrackKey<F> {
    fn text(&self) -> String {
        let (client, peer) = (socket::<F>(&self.client, self.client_port), socket::<F>(&self.peer, self.peer_port));
        let (from, to) = if self.direction == FORWARD { (client, peer) } else { (peer, client) };
        let snat = if self.direction == SNAT_REPLY { " snat" } else { "" };
        format!("{from}->{to}/{}{snat}", self.proto)
    }
}

impl Key for NetnsKey {
    fn text(&self) -> String {
        format!("cookie={}", self.cookie)
    }
}

impl<F: Family> Key for SocketKey<F> {
    fn text(&self) -> String {
        format!("cookie={}->{}/{}", self.cookie.get(), socket::<F>(&self.addr, self.port), self.proto)
    }
}

impl<F: Family> Key for AddressKey<F> {
    fn text(&self) -> String {
        F::to_ip(&self.addr).to_string()
    }
}

impl Value for Address {
    fn text(&self) -> String {
        "service".to_owned()
    }
}

impl Value for FilterWord {
    const IN_ARRAY: bool = true;

    fn text(&self) -> String {
        format!("bits={:016x}", self.bits)
    }
}

impl<F: Family> Key for FragmentsKey<F> {
    fn text(&self) -> String {
        let id = u32::from_be_bytes(self.id);
        format!("{}->{}/{} id={id:08x}", F::to_ip(&self.src), F::to_ip(&self.dst), self.proto)
    }
}

impl Value for Fragments {
    fn text(&self) -> String {
        format!("ports={}->{} at={}", self.src_port, self.dst_port, self.at.at)
    }
}

impl Value for Lifetimes {
    const IN_ARRAY: bool = true;

    fn text(&self) -> String {
        let Self { tcp_syn_sent, tcp_established, tcp_fin_wait, tcp_close, udp, udp_stream } = self;
        let tcp = [tcp_syn_sent, tcp_established, tcp_fin_wait, tcp_close].map(|lifetime| lifetime.secs);
        format!("tcp={tcp:?} udp={} udp_stream={}", udp.secs, udp_stream.secs)
    }
}

impl Value for Frontend {
    fn text(&self) -> String {
        let Self { service, affinity, seed, first_slot, slot_count, timeout, scope, flags } = self;
        let timeout = timeout.secs;
        format!(
            "service={service} affinity={affinity} seed={seed:08x} slots={first_slot}+{slot_count} timeout={timeout} scope={scope} flags={flags}",
        )
    }
}

impl<F: Family> Value for Backend<F> {
    fn text(&self) -> String {
        format!("addr={} eligible={}", socket::<F>(&self.addr, self.port), u8::from(self.is_eligible_anywhere()))
    }
}

impl Value for Affinity {
    fn text(&self) -> String {
        format!("backend={} last_used={} since={}", self.backend, self.last_used.at, self.since.at)
    }
}

impl<F: Family> Value for Conntrack<F> {
    fn text(&self) -> String {
        let Self { packets, service, backend, last_seen, due, port, client_port, seen, addr, .. } = self;
        format!(
            "to={} client_port={client_port} service={service} backend={backend} packets={packets} seen={seen} last_seen={} due={}",
            socket::<F>(addr, *port),
            last_seen.at,
            due.at
        )
    }
}

impl<F: Family> Value for NetnsClient<F> {
    fn text(&self) -> String {
        format!("client={} tc_only={}", F::to_ip(&self.addr), u8::from(self.is_tc_only()))
    }
}

impl<F: Family> Value for Socket<F> {
    fn text(&self) -> String {
        let Self { service, backend, client, addr, port, .. } = self;
        let (client, frontend) = (F::to_ip(client), socket::<F>(addr, *port));
        format!("client={client} frontend={frontend} service={service} backend={backend}")
    }
}

impl Value for Slot {
    const IN_ARRAY: bool = true;

    fn text(&self) -> String {
        format!("backend={}", self.backend)
    }
}

impl Value for ServicePortName {
    fn text(&self) -> String {
        format!("name={}", or_dash(names::decode_service(self)))
    }
}

impl Value for BackendName {
    fn text(&self) -> String {
        format!("name={}", or_dash(names::decode_backend(self)))
    }
}

impl Value for BackendStats {
    fn text(&self) -> String {
        format!("connections={}", self.connections)
    }
}

impl Value for NextIds {
    const IN_ARRAY: bool = true;

    fn text(&self) -> String {
        format!("service={} backend={}", self.service, self.backend)
    }
}

impl Value for Config {
    const IN_ARRAY: bool = true;

    fn text(&self) -> String {
        format!("layout={} monitor_until={}", self.layout, self.monitor_until)
    }
}

impl Value for Counter {
    const IN_ARRAY: bool = true;

    fn text(&self) -> String {
        format!("packets={} bytes={}", self.packets, self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use affinity_common::{
        abi::{backends::ELIGIBLE, conntrack::REVERSE},
        family::{V4, V6},
        types::{BackendId, Proto, Seconds},
    };

    use super::*;
    use crate::tables::memory::MemoryTables;

    #[test]
    fn each_entry_is_a_line() {
        let memory = MemoryTables::default();
        let mut tables = memory.tables();
        let service = ServiceId { id: 7 };
        let key = FrontendKey::<V4>::new([10, 96, 0, 1], Port::new(80), Proto::TCP);
        let frontend = Frontend {
            service,
            affinity: service,
            seed: 0xabc,
            first_slot: 3,
            slot_count: 251,
            timeout: Seconds::new(10_800),
            scope: 1,
            flags: 1,
        };
        tables.v4.frontends.insert(&key, &frontend).unwrap();
        let key = BackendKey { service, backend: BackendId { id: 9 } };
        let addr = "fd00::9".parse::<std::net::Ipv6Addr>().unwrap().octets();
        let backend = Backend::<V6> { addr, port: Port::new(8080), flags: ELIGIBLE, zero: 0 };
        tables.v6.backends.insert(&key, &backend).unwrap();
        let key = ConntrackKey::<V4>::reverse([10, 0, 0, 1], Port::new(1), [10, 0, 0, 2], Port::new(2), Proto::UDP);
        assert_eq!(key.direction, REVERSE);
        tables.v4.conntrack.insert(&key, &Conntrack { port: Port::new(80), ..Conntrack::default() }).unwrap();
        tables.shared.slots.insert(&5, &Slot { backend: BackendId { id: 9 } }).unwrap();
        assert_eq!(
            dump(&tables).unwrap(),
            [
                "frontends_v4 10.96.0.1:80/TCP service=7 affinity=7 seed=00000abc slots=3+251 timeout=10800 scope=1 flags=1",
                "conntrack_v4 10.0.0.2:2->10.0.0.1:1/UDP to=0.0.0.0:80 client_port=0 service=0 backend=0 packets=0 seen=0 \
                 last_seen=0 due=0",
                "backends_v6 7/9 addr=[fd00::9]:8080 eligible=1",
                "slots 5 backend=9",
            ]
        );
    }
}
