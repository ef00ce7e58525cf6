//! Forgetting connections: the one thing that people take out of the maps themselves.

use std::net::IpAddr;

use affinity_common::abi::conntrack::SNAT_REPLY;
use affinity_common::family::Family;
use affinity_common::types::ServiceId;

use crate::tables::{FamilyTables, TableError, Tables};

/// Takes out the conntrack entries of both directions, and those of answers that come to the node itself, for which `chosen` holds, by their client and service port; returns
/// how many. What goes on of such a connection makes them anew, on the same backend where affinity or the hash still say
/// so.
///
/// # Errors
/// Where a map can't be read or written.
pub fn connections(tables: &mut Tables, chosen: impl Fn(IpAddr, ServiceId) -> bool) -> Result<usize, TableError> {
    Ok(of_family(&mut tables.v4, &chosen)? + of_family(&mut tables.v6, &chosen)?)
}

fn of_family<F: Family>(
    tables: &mut FamilyTables<F>,
    chosen: &impl Fn(IpAddr, ServiceId) -> bool,
) -> Result<usize, TableError> {
    let entries = tables.conntrack.entries()?.into_iter();
    let chosen = entries.filter(|(key, entry)| {
        let client = if key.direction == SNAT_REPLY { &entry.addr } else { &key.client };
        chosen(F::to_ip(client), entry.service)
    });
    let keys: Vec<_> = chosen.map(|(key, _)| key).collect();
    tables.conntrack.remove_all(&keys)
}

#[cfg(test)]
mod tests {
    use affinity_common::abi::conntrack::{Conntrack, ConntrackKey};
    use affinity_common::family::{V4, V6};
    use affinity_common::types::{Port, Proto};

    use super::*;
    use crate::tables::memory::{MemoryTables, Sizes};

    #[test]
    fn only_what_is_chosen_is_forgotten_in_both_families() {
        let memory = MemoryTables::new(&Sizes::default());
        let mut tables = memory.tables();
        let of = |service| ServiceId { id: service };
        for (host, service) in [(1, 7), (1, 8), (2, 7)] {
            let (client, port) = ([10, 0, 0, host], Port::new(40_000 + u16::from(host) + service));
            let key = ConntrackKey::<V4>::forward(client, port, [10, 96, 0, 1], Port::new(80), Proto::TCP);
            let value = Conntrack::<V4> { service: of(service.into()), ..Conntrack::default() };
            tables.v4.conntrack.insert(&key, &value).unwrap();
        }
        let key = ConntrackKey::<V6>::forward([1; 16], Port::new(1), [2; 16], Port::new(80), Proto::UDP);
        tables.v6.conntrack.insert(&key, &Conntrack { service: of(7), ..Conntrack::default() }).unwrap();

        let node = [172, 18, 0, 2];
        let key = ConntrackKey::<V4>::snat_reply(node, Port::new(2_000), [10, 244, 1, 9], Port::new(80), Proto::TCP);
        let value = Conntrack { service: of(7), addr: [10, 0, 0, 1], ..Conntrack::default() };
        tables.v4.conntrack.insert(&key, &value).unwrap();

        assert_eq!(connections(&mut tables, |ip, _| ip == IpAddr::from(node)).unwrap(), 0);
        let client = IpAddr::from([10, 0, 0, 1]);
        assert_eq!(connections(&mut tables, |ip, service| ip == client && service == of(7)).unwrap(), 2);
        assert_eq!(connections(&mut tables, |_, service| service == of(7)).unwrap(), 2);
        assert_eq!(connections(&mut tables, |_, _| true).unwrap(), 1);
        assert_eq!(connections(&mut tables, |_, _| true).unwrap(), 0);
    }
}
