//! The loaded programs, driven by whole packets through `BPF_PROG_TEST_RUN`; whole packets compared.

mod flood;
mod fragments;
mod hairpin;
mod icmp;
mod malformed;
mod services;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};

use affinity_common::abi::affinity::Affinity;
use affinity_common::abi::conntrack::{
    BACKEND_FIN, CLIENT_FIN, Conntrack, ConntrackKey, FORWARD, OPENED, REPLIED, RESET, REVERSE,
};
use affinity_common::family::{Family, V4, V6};
use affinity_common::reason::{Program, Reason};
use affinity_common::types::{BackendId, Proto, Seconds, Ticks};
use affinity_tests::packet::{Packet, Tcp, assert_same_packet, verify_checksums};
use affinity_tests::privilege::require_root;
use affinity_tests::programs::{DROP, PASS, Programs, REDIRECT, Run, Service, now};
use anyhow::{Context as _, Result};

const CLIENT: &str = "10.244.0.11:40000";
const STICKY: &str = "10.96.0.10:80";
const SPREAD: &str = "10.96.0.20:80";
/// No service has it.
const ELSEWHERE: &str = "192.0.2.1:443";
const TIMEOUT: u32 = 10;

/// A family that the tests' addresses, which are IPv4's, are taken over to.
trait Over: Family {
    fn over(addr: Ipv4Addr) -> IpAddr;
}

impl Over for V4 {
    fn over(addr: Ipv4Addr) -> IpAddr {
        addr.into()
    }
}

impl Over for V6 {
    fn over(addr: Ipv4Addr) -> IpAddr {
        let [a, b, c, d] = addr.octets().map(u16::from);
        Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, a << 8 | b, c << 8 | d).into()
    }
}

fn over<F: Over>(name: &str) -> SocketAddr {
    let name: SocketAddrV4 = name.parse().expect("an IPv4 address and a port");
    SocketAddr::new(F::over(*name.ip()), name.port())
}

/// What the tests call an address.
fn name(address: SocketAddr) -> String {
    match address.ip() {
        IpAddr::V4(ip) => SocketAddrV4::new(ip, address.port()).to_string(),
        IpAddr::V6(ip) => {
            let [.., a, b, c, d] = ip.octets();
            SocketAddrV4::new(Ipv4Addr::new(a, b, c, d), address.port()).to_string()
        }
    }
}

/// A packet taken over to a family.
fn in_family<F: Over>(packet: &Packet) -> Packet {
    let taken = |end: SocketAddr| over::<F>(&end.to_string());
    packet.clone().from(taken(packet.source())).to(taken(packet.destination()))
}

fn service<F: Over>(id: u32, frontend: &str, proto: Proto, timeout: u32) -> Service {
    let backends =
        [1, 2, 3].map(|backend| (id * 10 + backend, over::<F>(&format!("10.244.0.{}:8080", 100 + backend)), true));
    Service { id, frontend: over::<F>(frontend), proto, timeout, backends: backends.to_vec() }
}

/// A sticky and a spreading service, of TCP and of UDP each.
fn programs<F: Over>() -> Result<Programs> {
    require_root();
    let mut programs = Programs::load()?;
    programs.set_service(&service::<F>(1, STICKY, Proto::TCP, TIMEOUT))?;
    programs.set_service(&service::<F>(2, SPREAD, Proto::TCP, 0))?;
    programs.set_service(&service::<F>(3, STICKY, Proto::UDP, TIMEOUT))?;
    programs.set_service(&service::<F>(4, SPREAD, Proto::UDP, 0))?;
    Ok(programs)
}

fn ingress<F: Over>(programs: &Programs, packet: &Packet) -> Result<Run> {
    programs.run(Program::Ingress, &in_family::<F>(packet).build())
}

fn egress<F: Over>(programs: &Programs, packet: &Packet) -> Result<Run> {
    programs.run(Program::Egress, &in_family::<F>(packet).build())
}

/// Sends a packet of a client to a service; returns the backend that it was translated to.
fn send<F: Over>(programs: &Programs, packet: &Packet, reason: Reason) -> Result<String> {
    let run = ingress::<F>(programs, packet)?;
    assert_eq!((run.action, run.reason), (PASS, reason), "{packet:?}");
    // The last octet of the destination.
    let host = *run.packet.get(if F::VERSION == 4 { 33 } else { 53 }).context("an IP packet")?;
    let backend = format!("10.244.0.{host}:8080");
    assert!((101..=103).contains(&host), "{backend} is no backend");
    assert_same_packet(&in_family::<F>(&packet.clone().to(&*backend)).build(), &run.packet);
    Ok(backend)
}

/// Sends a backend's packet to a client; it must come from the frontend.
fn reply<F: Over>(programs: &Programs, packet: &Packet, frontend: &str) -> Result<()> {
    let run = egress::<F>(programs, packet)?;
    assert_eq!((run.action, run.reason), (PASS, Reason::Reply));
    assert_same_packet(&in_family::<F>(&packet.clone().from(frontend)).build(), &run.packet);
    Ok(())
}

/// A packet that must go on as it came, and leave no trace but its count.
fn untouched(programs: &Programs, program: Program, bytes: &[u8], reason: Option<Reason>) -> Result<()> {
    let run = programs.run(program, bytes)?;
    assert_eq!(run.action, PASS, "{:?}: {bytes:02x?}", run.reason);
    if let Some(reason) = reason {
        assert_eq!(run.reason, reason, "{bytes:02x?}");
    }
    assert_same_packet(bytes, &run.packet);
    Ok(())
}

fn syn(from: &str, to: &str) -> Packet {
    Packet::tcp(from, to).flags(Tcp::SYN)
}

/// As the answer that a packet is turned into.
fn back(packet: Packet) -> Packet {
    let macs = packet.build()[..12].to_vec();
    let half = |at: usize| <[u8; 6]>::try_from(&macs[at..at + 6]).expect("six bytes");
    packet.macs(half(0), half(6)).identification(0)
}

/// Two services with one backend.
fn two_of_one<F: Over>(programs: &mut Programs, proto: Proto) -> Result<[&'static str; 2]> {
    let frontends = ["10.96.0.31:80", "10.96.0.32:80"];
    for (id, frontend) in [6, 7].into_iter().zip(frontends) {
        let mut one = service::<F>(id, frontend, proto, TIMEOUT);
        one.backends.truncate(1);
        programs.set_service(&one)?;
    }
    Ok(frontends)
}

/// The source port of what has left.
fn source_port<F: Over>(run: &Run) -> u16 {
    let at = if F::VERSION == 4 { 34 } else { 54 };
    u16::from_be_bytes([run.packet[at], run.packet[at + 1]])
}

/// Makes a test of each function of a module for each family.
macro_rules! in_both_families {
    ($($module:ident { $($name:ident),+ $(,)? })+) => {
        mod v4 { $($(#[test] fn $name() -> anyhow::Result<()> { super::$module::$name::<super::V4>() })+)+ }
        mod v6 { $($(#[test] fn $name() -> anyhow::Result<()> { super::$module::$name::<super::V6>() })+)+ }
    };
}

in_both_families! {
    flood {
        clients_that_are_there_survive_a_flood_of_first_packets,
    }
    services {
        a_connection_is_translated_both_ways,
        udp_is_translated_both_ways,
        a_client_keeps_its_backend_over_many_connections,
        clients_and_connections_spread,
        affinity_lasts_for_its_timeout_and_a_packet_refreshes_it,
        an_established_flow_refreshes_its_clients_entry_and_only_its_own,
        clients_of_a_lost_backend_move_and_only_they,
        an_evicted_entry_is_rebuilt_on_the_same_backend,
        a_udp_flow_ends_with_its_backend_or_its_time,
        resets_and_fins_are_seen_in_both_directions,
        without_a_backend_tcp_is_reset_and_udp_unreachable,
        two_frontends_with_one_backend_and_one_client_port_both_work,
        what_no_port_is_for_is_refused,
        a_slot_without_its_backend_is_dropped_and_counted,
        a_backends_connections_are_counted,
    }
    fragments {
        all_parts_of_a_datagram_follow_its_first,
        all_parts_of_a_segment_follow_its_first,
        a_part_before_its_first_is_dropped_and_counted,
        parts_keep_the_port_that_their_connection_was_given,
    }
    hairpin {
        a_pods_packets_to_itself_come_back_from_the_service,
    }
    icmp {
        an_error_shows_its_receiver_what_that_has_sent,
        an_error_about_a_datagram_without_a_checksum_keeps_it_so,
        errors_about_other_flows_pass_untouched,
        an_error_about_the_other_frontends_flow_is_not_taken_for_ours,
    }
}
