//! What a node's link sees of addresses that come to the node: told unasked, and the groups that it listens to.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use affinity_common::abi::uplinks::Uplink;
use affinity_common::family::{V4, V6};
use affinity_tests::capture::{Capture, Frame};
use affinity_tests::privilege::require_root;
use affinity_tests::topology::{ETH0, Families, Lab, LabOptions};
use affinity_tests::wait;
use affinity_user::announce::announcer::{Announcement, Announcer as _, TableAnnouncer};
use affinity_user::announce::frames::{solicited_node_address, solicited_node_group, unasked};
use affinity_user::tables::Table as _;
use affinity_user::tables::memory::MemoryTables;
use anyhow::{Context as _, Result};
use caps::{CapSet, Capability};
use nix::net::if_::if_nametoindex;

const SECOND: Duration = Duration::from_secs(1);
/// MLD: from now on a node hears a group, whoever sends.
const CHANGE_TO_EXCLUDE: u8 = 4;
/// MLD: from now on it hears nobody's.
const CHANGE_TO_INCLUDE: u8 = 3;

#[test]
fn neighbours_are_told_three_times_and_questions_are_heard() -> Result<()> {
    require_root();
    let lab = Lab::new(LabOptions { families: Families::Dual, ..LabOptions::default() })?;
    let addresses: [IpAddr; 2] = ["198.51.100.77".parse()?, "fd00:c5::77:beef".parse()?];
    let mac = lab.outside.node_mac;
    let capture = Capture::start(&lab.outside.netns, ETH0)?;
    let (groups, own) = lab.node.netns.enter(|| {
        let ifindex = if_nametoindex(ETH0)?;
        let memory = MemoryTables::default();
        let mut tables = memory.tables();
        tables.v4.uplinks.insert(&ifindex, &Uplink::<V4> { mac, ..Uplink::default() })?;
        tables.v6.uplinks.insert(&ifindex, &Uplink::<V6> { mac, ..Uplink::default() })?;
        let mut announcer = TableAnnouncer::new(tables, Duration::from_mins(1));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let place = announcer.place()?;
            assert_eq!(place.v4.get(&ifindex).map(String::as_str), Some(ETH0));
            assert_eq!(place.v4, place.v6);
            let all = addresses.map(|addr| Announcement { addr, interfaces: BTreeSet::from([ifindex]) });
            announcer.set(&all);
            // Again, as it is done all the time: neighbours are not told anew.
            announcer.set(&all);
            tokio::time::sleep(2 * SECOND).await;
            let heard = groups()?;
            assert_eq!((memory.v4.announced.len()?, memory.v6.announced.len()?), (1, 1));
            announcer.set(&[]);
            assert_eq!((memory.v4.announced.len()?, memory.v6.announced.len()?), (0, 0));
            assert!(!groups()?.contains(&group(addresses[1])), "it listens no more");
            Ok((heard, place.own))
        })
    })?;
    assert!(groups.contains(&group(addresses[1])), "{groups:?}");
    // A switch is told by MLD: a report that names the group, and one that says that nobody is in it any more.
    let solicited = solicited_node_address("fd00:c5::77:beef".parse()?).octets();
    let reports = || -> Vec<u8> {
        let frames = capture.frames().into_iter().filter(|frame| !frame.outgoing);
        frames.filter_map(|frame| record_of(&frame.bytes, solicited)).collect()
    };
    wait::until_true("both reports", 5 * SECOND, || {
        let seen: BTreeSet<u8> = reports().into_iter().collect();
        Ok(seen.is_superset(&[CHANGE_TO_EXCLUDE, CHANGE_TO_INCLUDE].into()))
    })
    .with_context(|| format!("{:?}", reports()))?;
    assert!(lab.node.addresses.iter().all(|address| own.contains(address)), "{own:?}");
    for address in addresses {
        for frame in unasked(address, mac) {
            let is_it = |seen: &Frame| !seen.outgoing && seen.bytes == frame;
            let times = capture.frames().into_iter().filter(is_it).count();
            assert_eq!(times, 3, "{address}: {frame:02x?}");
        }
    }
    Ok(())
}

/// Who asks is answered by the datapath, which takes no such right.
#[test]
fn without_net_raw_addresses_are_answered_for_and_nobody_is_told() -> Result<()> {
    require_root();
    let lab = Lab::new(LabOptions::default())?;
    let address: IpAddr = "198.51.100.77".parse()?;
    let mac = lab.outside.node_mac;
    let capture = Capture::start(&lab.outside.netns, ETH0)?;
    lab.node.netns.enter(|| {
        // Of this thread alone, which ends with its work.
        caps::drop(None, CapSet::Effective, Capability::CAP_NET_RAW)?;
        let ifindex = if_nametoindex(ETH0)?;
        let memory = MemoryTables::default();
        let mut tables = memory.tables();
        tables.v4.uplinks.insert(&ifindex, &Uplink::<V4> { mac, ..Uplink::default() })?;
        let mut announcer = TableAnnouncer::new(tables, Duration::from_mins(1));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            announcer.set(&[Announcement { addr: address, interfaces: BTreeSet::from([ifindex]) }]);
            tokio::time::sleep(2 * SECOND).await;
        });
        assert_eq!(memory.v4.announced.len()?, 1);
        Ok(())
    })?;
    for frame in unasked(address, mac) {
        assert!(!capture.frames().iter().any(|seen| seen.bytes == frame));
    }
    Ok(())
}

/// The kind of the record for a group in a frame, if that is an MLD report (RFC 3810, 5.2).
fn record_of(frame: &[u8], group: [u8; 16]) -> Option<u8> {
    // Ethernet, IPv6, and a hop-by-hop header with the router alert; then type 143.
    const REPORT: usize = 14 + 40 + 8;
    if frame.get(12..14) != Some(&[0x86, 0xdd]) || frame.get(REPORT) != Some(&143) {
        return None;
    }
    // Each record: kind, length of its data, number of sources, and the group.
    frame.get(REPORT + 8..)?.chunks_exact(20).find(|record| record[4..] == group).map(|record| record[0])
}

/// The group of an IPv6 address, as the kernel prints it.
fn group(address: IpAddr) -> String {
    let IpAddr::V6(address) = address else { return String::new() };
    solicited_node_group(address).map(|byte| format!("{byte:02x}")).concat()
}

/// The groups of link-layer addresses that interfaces of this thread's network namespace are in.
fn groups() -> Result<BTreeSet<String>> {
    const FILE: &str = "/proc/thread-self/net/dev_mcast";
    let text = std::fs::read_to_string(FILE).context(FILE)?;
    Ok(text.lines().filter_map(|line| Some(line.split_whitespace().last()?.to_owned())).collect())
}
