//! `uplinks_*`: what the datapath knows of the interfaces that lead outside.

use std::collections::BTreeMap;

use affinity_common::abi::uplinks::Uplink;
use affinity_common::family::Family;

use super::interfaces::{Interface, NodeAddress};
use crate::tables::{BoxTable, TableError};

/// What the map is to hold, by the interfaces' indices. Packets of others leave by an interface with its first address of the
/// family, as masquerading picks it.
fn wanted<'a, F: Family>(
    uplinks: impl Iterator<Item = &'a Interface>,
    addresses: &[NodeAddress],
) -> BTreeMap<u32, Uplink<F>> {
    let of = |index| {
        let mut own = addresses.iter().filter(|address| address.ifindex == index && address.is_primary);
        own.find_map(|address| F::from_ip(address.addr)).unwrap_or_default()
    };
    uplinks.map(|one| (one.index, Uplink { addr: of(one.index), mac: one.mac, zero: [0; 2] })).collect()
}

/// Brings a family's map to the uplinks that there are.
///
/// # Errors
/// Where the map can't be read or written.
pub fn settle<'a, F: Family>(
    table: &mut BoxTable<u32, Uplink<F>>,
    uplinks: impl Iterator<Item = &'a Interface>,
    addresses: &[NodeAddress],
) -> Result<(), TableError> {
    let wanted = wanted::<F>(uplinks, addresses);
    let there: BTreeMap<_, _> = table.entries()?.into_iter().collect();
    for (index, value) in &wanted {
        if there.get(index) != Some(value) {
            table.insert(index, value)?;
        }
    }
    there.keys().filter(|index| !wanted.contains_key(index)).try_for_each(|index| table.remove(index))
}

#[cfg(test)]
mod tests {
    use affinity_common::family::{V4, V6};

    use super::*;
    use crate::tables::Table as _;
    use crate::tables::memory::MemoryTables;

    #[test]
    fn the_map_follows_interfaces_and_addresses() {
        let memory = MemoryTables::default();
        let mut tables = memory.tables();
        let uplink = |index| Interface { index, name: format!("eth{index}"), is_ethernet: true, mac: [2; 6] };
        let address = |ifindex, addr: &str, is_primary| NodeAddress {
            ifindex,
            addr: addr.parse().expect("an address"),
            is_primary,
        };
        let addresses = [
            address(3, "192.0.2.3", true),
            address(2, "172.18.0.9", false),
            address(2, "fd00::2", true),
            address(2, "172.18.0.2", true),
            address(2, "172.18.0.3", true),
        ];
        settle(&mut tables.v4.uplinks, [uplink(2)].iter(), &addresses).expect("room");
        settle(&mut tables.v6.uplinks, [uplink(2)].iter(), &addresses).expect("room");
        let v4 = Uplink::<V4> { addr: [172, 18, 0, 2], mac: [2; 6], zero: [0; 2] };
        assert_eq!(memory.v4.uplinks.entries().expect("entries"), [(2, v4)]);
        let fd00_2 = V6::from_ip(address(2, "fd00::2", true).addr).expect("an address");
        assert_eq!(memory.v6.uplinks.get(&2).expect("entries").map(|uplink| uplink.addr), Some(fd00_2));
        settle(&mut tables.v4.uplinks, [uplink(3)].iter(), &[]).expect("room");
        let v4 = Uplink::<V4> { addr: [0; 4], mac: [2; 6], zero: [0; 2] };
        assert_eq!(memory.v4.uplinks.entries().expect("entries"), [(3, v4)]);
    }
}
