//! Checksums in the plainest way, independent of everything that is tested by them.

use std::net::IpAddr;

use anyhow::{Context as _, Result, bail, ensure};

use super::{ETHERNET, FRAGMENT_HEADER, ICMP, ICMP6, TCP, UDP};

/// The internet checksum of some bytes (RFC 1071), an odd one padded: 0 over bytes with a right checksum in them.
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        let word = [pair[0], pair.get(1).copied().unwrap_or(0)];
        sum += u32::from(u16::from_be_bytes(word));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let [_, _, a, b] = sum.to_be_bytes();
    !u16::from_be_bytes([a, b])
}

/// The checksum of what is above IP, pseudo-header included where the protocol has one.
///
/// # Panics
/// Where the addresses are of two families, or the length is beyond what IP allows.
pub fn upper_checksum(source: IpAddr, destination: IpAddr, protocol: u8, upper: &[u8]) -> u16 {
    let length = u32::try_from(upper.len()).expect("longer than IP allows");
    let mut bytes = Vec::new();
    match (source, destination) {
        (IpAddr::V4(_), IpAddr::V4(_)) if protocol == ICMP => {}
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            bytes.extend(source.octets());
            bytes.extend(destination.octets());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            bytes.extend(source.octets());
            bytes.extend(destination.octets());
        }
        _ => panic!("{source} and {destination} are of two families"),
    }
    if !bytes.is_empty() {
        bytes.extend(u32::from(protocol).to_be_bytes());
        bytes.extend(length.to_be_bytes());
    }
    bytes.extend(upper);
    checksum(&bytes)
}

/// Verifies every checksum of a whole, well-formed frame: of the IPv4 header, and of TCP, UDP or ICMP above it.
///
/// A UDP checksum of 0 is one that is not there, which IPv6 does not allow. In a fragment only that of the IPv4 header can
/// be verified.
///
/// # Errors
/// Where one is wrong, and where the frame is not well-formed.
pub fn verify_checksums(frame: &[u8]) -> Result<()> {
    let ip = frame.get(ETHERNET..).context("no IP header")?;
    let version = ip.first().context("no IP header")? >> 4;
    let bytes = |at: usize, length: usize| ip.get(at..at + length).context("a truncated IP header");
    let number = |at: usize| -> Result<usize> {
        let two = bytes(at, 2)?;
        Ok(u16::from_be_bytes([two[0], two[1]]).into())
    };
    let (source, destination, mut protocol, mut start, end, fragment) = match version {
        4 => {
            let header = usize::from(ip[0] & 0xf) * 4;
            ensure!(checksum(bytes(0, header)?) == 0, "wrong IPv4 header checksum");
            let address = |at| -> Result<IpAddr> { Ok(<[u8; 4]>::try_from(bytes(at, 4)?)?.into()) };
            let fragment = number(6)? & 0x3fff != 0;
            (address(12)?, address(16)?, bytes(9, 1)?[0], header, number(2)?, fragment)
        }
        6 => {
            let address = |at| -> Result<IpAddr> { Ok(<[u8; 16]>::try_from(bytes(at, 16)?)?.into()) };
            (address(8)?, address(24)?, bytes(6, 1)?[0], 40, 40 + number(4)?, false)
        }
        other => bail!("IP version {other}"),
    };
    if version == 6 && protocol == FRAGMENT_HEADER {
        let header = bytes(start, 8)?;
        if header[2..4] != [0, 0] {
            return Ok(());
        }
        protocol = header[0];
        start += 8;
    }
    if fragment {
        return Ok(());
    }
    let upper = ip.get(start..end).context("shorter than its IP header says")?;
    match protocol {
        UDP if upper.get(6..8) == Some(&[0, 0]) => {
            ensure!(version == 4, "no UDP checksum, which IPv6 needs");
        }
        TCP | UDP | ICMP | ICMP6 => ensure!(
            upper_checksum(source, destination, protocol, upper) == 0,
            "wrong checksum above IP (protocol {protocol})"
        ),
        _ => {}
    }
    Ok(())
}
