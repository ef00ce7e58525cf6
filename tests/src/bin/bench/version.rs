//! The address families that are measured beside each other.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::Serialize;

/// A version of IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(into = "u8")]
pub enum Version {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl From<Version> for u8 {
    fn from(version: Version) -> Self {
        match version {
            Version::V4 => 4,
            Version::V6 => 6,
        }
    }
}

impl Version {
    /// Both, in the order in which they are shown.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// That of an address.
    pub fn of_address(address: SocketAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// What people call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    /// Of the two, this family's.
    pub fn of<T>(self, v4: T, v6: T) -> T {
        match self {
            Self::V4 => v4,
            Self::V6 => v6,
        }
    }

    /// The address that is so far behind another one.
    pub fn address(self, v4: Ipv4Addr, v6: Ipv6Addr, number: u32) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::from_bits(v4.to_bits() + number).into(),
            Self::V6 => Ipv6Addr::from_bits(v6.to_bits() + u128::from(number)).into(),
        }
    }
}
