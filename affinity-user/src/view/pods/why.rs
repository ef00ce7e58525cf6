//! Why a pod is not served in one of the two ways.

use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

/// A way by which a pod may be served: for programs its `code` and what belongs to it, for people a text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "code", rename_all = "kebab-case")]
pub enum Why {
    /// Its status has no address, and no namespace with a process of it was seen.
    NoAddress,
    /// No namespace with its addresses, or with a process of it, was seen.
    NamespaceNotSeen,
    /// The programs of sockets are attached to no cgroup.
    SocketsOff,
    /// `netns_*` has no entry of its namespace in a family.
    NamespaceNotKnown {
        /// In which.
        family: FamilyName,
    },
    /// `netns_*` leaves it to TC in a family: it has several addresses.
    SeveralAddresses {
        /// In which.
        family: FamilyName,
    },
    /// The same, for its annotation says so.
    Annotation,
    /// The same, for the daemon leaves all pods to TC that do not say otherwise.
    PodsOff,
    /// The same, for it may be the namespace of a pod that is to be left to TC and has no address yet, or was when that was
    /// last looked at.
    MayBeAnother,
    /// It is in the node's network namespace.
    HostNetwork,
    /// What it sends does not come in by an interface of the node.
    NoEnd {
        /// Its interface.
        interface: String,
        /// What that is: `macvlan`, `ipvlan`; none where it is not known, or a device.
        kind: Option<String>,
        /// The interface of the node that it is a part of.
        part_of: Option<String>,
        /// The device that it is: a function of a network card (SR-IOV), or the whole card.
        device: Option<String>,
    },
    /// No pattern has the name of the node's interface.
    NoPattern {
        /// That.
        interface: String,
        /// The patterns.
        patterns: Vec<String>,
    },
    /// The node's interface has no Ethernet header.
    NoEthernet {
        /// That.
        interface: String,
    },
    /// The programs could not be attached to the node's interface.
    Failed {
        /// That.
        interface: String,
        /// Why.
        error: String,
    },
    /// They are not attached to the node's interface, and nobody says why: perhaps it has just come, or no daemon runs.
    NotAttached {
        /// That.
        interface: String,
    },
}

/// An address family, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FamilyName {
    /// IPv4
    Ipv4,
    /// IPv6
    Ipv6,
}

impl From<IpAddr> for FamilyName {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::Ipv4,
            IpAddr::V6(_) => Self::Ipv6,
        }
    }
}

impl fmt::Display for FamilyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        })
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoAddress => f.write_str("it has no address yet"),
            Self::NamespaceNotSeen => f.write_str("its network namespace is not seen"),
            Self::SocketsOff => f.write_str("no programs of sockets are attached"),
            Self::NamespaceNotKnown { family } => write!(f, "its network namespace has no {family} client yet"),
            Self::SeveralAddresses { family } => write!(f, "several {family} addresses"),
            Self::Annotation => f.write_str("its annotation affinity.dev/socket-lb"),
            Self::PodsOff => f.write_str("--socket-lb-pods off"),
            Self::MayBeAnother => f.write_str("left out until it is known which pod is which"),
            Self::HostNetwork => f.write_str("it is in the node's network namespace"),
            Self::NoEnd { interface, kind, part_of, device } => {
                write!(f, "its {interface} ")?;
                match (device, kind, part_of) {
                    (Some(device), None, _) => write!(f, "is the device {device} (SR-IOV, or all of it)")?,
                    (_, Some(kind), Some(part_of)) => write!(f, "is {kind} on {part_of}")?,
                    (_, Some(kind), None) => write!(f, "is {kind}")?,
                    (None, None, _) => f.write_str("is of no kind that is known")?,
                }
                f.write_str(", with no end on the node")
            }
            Self::NoPattern { interface, patterns } => {
                write!(f, "{interface} is not one of --interface {}", patterns.join(" "))
            }
            Self::NoEthernet { interface } => write!(f, "{interface} has no Ethernet header"),
            Self::Failed { interface, error } => write!(f, "{interface}: {error}"),
            Self::NotAttached { interface } => write!(f, "nothing is attached to {interface}"),
        }
    }
}
