//! Answers for addresses: by the maps from which the programs on the uplinks answer, and by what neighbours are told unasked.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use affinity_common::abi::announced::{Announced, AnnouncedKey};
use affinity_common::family::Family;
use affinity_common::types::Seconds;
use nix::ifaddrs::getifaddrs;

use super::frames::{solicited_node_address, solicited_node_group, unasked};
use super::link::Link;
use crate::tables::{FamilyTables, TableError, Tables};

/// When, after an address has come, neighbours are told of it.
const TELL: [Duration; 3] = [Duration::ZERO, Duration::from_millis(500), Duration::from_secs(1)];

/// An address that this node answers for, and on which interfaces, by their indices.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Announcement {
    /// The address.
    pub addr: IpAddr,
    /// The interfaces.
    pub interfaces: BTreeSet<u32>,
}

/// Where a node can answer, and what it must not answer for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The uplinks that have IPv4, by index, with their names.
    pub v4: BTreeMap<u32, String>,
    /// Those that have IPv6.
    pub v6: BTreeMap<u32, String>,
    /// The node's own addresses.
    pub own: BTreeSet<IpAddr>,
}

impl Place {
    /// The uplinks of an address's family.
    pub fn uplinks(&self, address: IpAddr) -> &BTreeMap<u32, String> {
        if address.is_ipv4() { &self.v4 } else { &self.v6 }
    }
}

/// Who answers for addresses.
pub trait Announcer: Send {
    /// Where it can.
    ///
    /// # Errors
    /// Where that can't be found out.
    fn place(&mut self) -> io::Result<Place>;

    /// Answers for these and for no others from now on. Called again and again: what has failed is tried again.
    fn set(&mut self, announcements: &[Announcement]);
}

/// By the datapath's maps.
pub struct TableAnnouncer {
    tables: Tables,
    /// For how long an answer stands that nobody has renewed: as long as the address's Lease.
    lifetime: Duration,
    links: BTreeMap<u32, Arc<Mutex<Link>>>,
    /// What neighbours were told of.
    told: BTreeSet<(IpAddr, u32)>,
    /// What was logged last.
    logged: BTreeSet<String>,
}

impl TableAnnouncer {
    /// By these maps. What is set stands for so long, unless it is set again.
    pub fn new(tables: Tables, lifetime: Duration) -> Self {
        Self { tables, lifetime, links: BTreeMap::new(), told: BTreeSet::new(), logged: BTreeSet::new() }
    }

    /// The uplinks' own link-layer addresses.
    fn macs(&self) -> Result<BTreeMap<u32, [u8; 6]>, TableError> {
        let v6 = self.tables.v6.uplinks.entries()?.into_iter().map(|(index, uplink)| (index, uplink.mac));
        let v4 = self.tables.v4.uplinks.entries()?.into_iter().map(|(index, uplink)| (index, uplink.mac));
        Ok(v6.chain(v4).collect())
    }

    /// Tells neighbours, three times over a second.
    fn tell(&mut self, address: IpAddr, ifindex: u32, mac: [u8; 6]) -> io::Result<()> {
        let link = self.link(ifindex)?;
        tokio::spawn(async move {
            let mut before = Duration::ZERO;
            for at in TELL {
                tokio::time::sleep(at.saturating_sub(before)).await;
                before = at;
                for frame in unasked(address, mac) {
                    let sent = link.lock().unwrap_or_else(PoisonError::into_inner).send(&frame);
                    if let Err(error) = sent {
                        tracing::warn!(%address, ifindex, %error, "neighbours can't be told of an address");
                    }
                }
            }
        });
        Ok(())
    }

    fn link(&mut self, ifindex: u32) -> io::Result<Arc<Mutex<Link>>> {
        if let Some(link) = self.links.get(&ifindex) {
            return Ok(link.clone());
        }
        let link = Arc::new(Mutex::new(Link::open(ifindex)?));
        self.links.insert(ifindex, link.clone());
        Ok(link)
    }

    fn try_set(&mut self, wanted: &BTreeSet<(IpAddr, u32)>) -> Vec<String> {
        let mut problems = Vec::new();
        let mut note = |what: &str, error: &dyn std::fmt::Display| problems.push(format!("{what}: {error}"));
        let until = Announced { until: crate::collector::now().after(ticks(self.lifetime)) };
        if let Err(error) = write(&mut self.tables.v4, wanted, until) {
            note("IPv4 addresses can't be answered for", &error);
        }
        if let Err(error) = write(&mut self.tables.v6, wanted, until) {
            note("IPv6 addresses can't be answered for", &error);
        }
        let used: BTreeSet<u32> = wanted.iter().map(|(_, ifindex)| *ifindex).collect();
        self.links.retain(|ifindex, _| used.contains(ifindex));
        for ifindex in used {
            let addresses = wanted.iter().filter(|(_, at)| *at == ifindex).filter_map(|(address, _)| match address {
                IpAddr::V4(_) => None,
                IpAddr::V6(address) => Some(*address),
            });
            let addresses: Vec<Ipv6Addr> = addresses.collect();
            let groups = addresses.iter().copied().map(solicited_node_group).collect();
            let joined = self.link(ifindex).and_then(|link| {
                let mut link = link.lock().unwrap_or_else(PoisonError::into_inner);
                link.set_groups(&groups)?;
                // Neighbours are heard without it where no switch keeps their questions back.
                let told = link.set_member_of(&addresses.into_iter().map(solicited_node_address).collect());
                if let Err(error) = told {
                    note(&format!("switches can't be told who is to be heard on interface {ifindex}"), &error);
                }
                Ok(())
            });
            if let Err(error) = joined {
                // Perhaps of an interface that has come again with its number.
                self.links.remove(&ifindex);
                note(&format!("neighbours can't be heard on interface {ifindex}"), &error);
            }
        }
        self.told.retain(|one| wanted.contains(one));
        let macs = match self.macs() {
            Ok(macs) => macs,
            Err(error) => {
                note("uplinks", &error);
                return problems;
            }
        };
        let new: Vec<(IpAddr, u32)> = wanted.difference(&self.told).copied().collect();
        for (address, ifindex) in new {
            let Some(mac) = macs.get(&ifindex) else { continue };
            match self.tell(address, ifindex, *mac) {
                Ok(()) => drop(self.told.insert((address, ifindex))),
                Err(error) => note(&format!("neighbours can't be told of {address} on interface {ifindex}"), &error),
            }
        }
        problems
    }
}

/// A span in ticks.
fn ticks(span: Duration) -> u32 {
    Seconds::new(u32::try_from(span.as_secs()).unwrap_or(u32::MAX / 256)).ticks()
}

/// Brings a map to what is wanted of its family: what is too much goes first, as room may be needed; the rest is renewed.
fn write<F: Family>(
    tables: &mut FamilyTables<F>,
    wanted: &BTreeSet<(IpAddr, u32)>,
    value: Announced,
) -> Result<(), TableError> {
    let key =
        |(address, ifindex): &(IpAddr, u32)| Some(AnnouncedKey::<F> { addr: F::from_ip(*address)?, ifindex: *ifindex });
    let wanted: BTreeSet<AnnouncedKey<F>> = wanted.iter().filter_map(key).collect();
    let present: BTreeSet<AnnouncedKey<F>> = tables.announced.keys()?.into_iter().collect();
    let gone: Vec<AnnouncedKey<F>> = present.difference(&wanted).copied().collect();
    tables.announced.remove_all(&gone)?;
    wanted.iter().try_for_each(|key| tables.announced.insert(key, &value))
}

impl Announcer for TableAnnouncer {
    fn place(&mut self) -> io::Result<Place> {
        let mut place = Place::default();
        let mut names: BTreeMap<u32, String> = BTreeMap::new();
        for interface in getifaddrs()? {
            let Some(address) = interface.address else { continue };
            if let Some(link) = address.as_link_addr() {
                names.insert(u32::try_from(link.ifindex()).unwrap_or_default(), interface.interface_name.clone());
            }
            place.own.extend(address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip())));
            place.own.extend(address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())));
        }
        let named = |indices: Vec<u32>| {
            indices.into_iter().filter_map(|index| Some((index, names.get(&index)?.clone()))).collect()
        };
        place.v4 = named(self.tables.v4.uplinks.keys().map_err(io::Error::other)?);
        place.v6 = named(self.tables.v6.uplinks.keys().map_err(io::Error::other)?);
        Ok(place)
    }

    fn set(&mut self, announcements: &[Announcement]) {
        let pairs = |one: &Announcement| one.interfaces.iter().map(|ifindex| (one.addr, *ifindex)).collect::<Vec<_>>();
        let wanted: BTreeSet<(IpAddr, u32)> = announcements.iter().flat_map(pairs).collect();
        let problems: BTreeSet<String> = self.try_set(&wanted).into_iter().collect();
        for problem in problems.difference(&self.logged) {
            tracing::warn!("{problem}");
        }
        self.logged = problems;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::memory::MemoryTables;
    use affinity_common::family::{V4, V6};
    use affinity_common::types::Ticks;

    #[test]
    fn maps_hold_what_is_answered_for_and_nothing_else() {
        let memory = MemoryTables::default();
        let mut tables = memory.tables();
        let (four, six) = (IpAddr::from([192, 0, 2, 1]), "2001:db8::1".parse::<IpAddr>().expect("an address"));
        // What an earlier process has left.
        let stale = AnnouncedKey::<V4> { addr: [192, 0, 2, 9], ifindex: 2 };
        tables.v4.announced.insert(&stale, &Announced::default()).expect("room");
        let wanted = [(four, 2), (four, 3), (six, 2)].into();
        let value = Announced { until: Ticks { at: 77 } };
        write(&mut tables.v4, &wanted, value).expect("room");
        write(&mut tables.v6, &wanted, value).expect("room");
        let v4 = |ifindex| AnnouncedKey::<V4> { addr: [192, 0, 2, 1], ifindex };
        assert_eq!(tables.v4.announced.keys().expect("keys"), [v4(2), v4(3)]);
        let v6 = AnnouncedKey::<V6> { addr: V6::from_ip(six).expect("of the family"), ifindex: 2 };
        assert_eq!(tables.v6.announced.keys().expect("keys"), [v6]);
        assert_eq!(tables.v4.announced.get(&v4(2)).expect("a value"), Some(value));
        write(&mut tables.v4, &BTreeSet::new(), value).expect("room");
        assert!(tables.v4.announced.is_empty().expect("a number"));
    }
}
