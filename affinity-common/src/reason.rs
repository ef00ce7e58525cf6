//! What can become of a packet: the one list behind verdicts, counters, metrics and the text that people read.

/// The programs that count.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Program {
    /// TC ingress of a client's interface: packets from the client.
    Ingress,
    /// TC egress of a client's interface: packets to the client.
    Egress,
}

impl Program {
    /// Every program, in the order of its number.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// The name in counters and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// What is done with a packet. A packet that goes on is seen by the CNI's own programs after ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It goes on, not for us or as we have rewritten it.
    Pass,
    /// It is dropped.
    Drop,
    /// It was turned into the answer that it is refused, which goes back.
    Reject,
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $reason:ident = $name:literal,)+) => {
        /// Why a packet got its verdict.
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason { $($(#[doc = $doc])+ $reason,)+ }

        impl Reason {
            /// Every reason, in the order of its number.
            pub const ALL: [Self; [$(Self::$reason,)+].len()] = [$(Self::$reason,)+];

            /// The name in counters and in metrics.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$reason => $name,)+ }
            }

            /// What it means, in a line.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$reason => concat!($($doc,)+).trim_ascii_start(),)+ }
            }
        }
    };
}

reasons! {
    /// Neither IPv4 nor IPv6, or a family without services.
    NotIp = "not-ip",
    /// A protocol that services don't have.
    OtherProtocol = "other-protocol",
    /// Headers that are cut off or lie about their length; passed as it came.
    Malformed = "malformed",
    /// A fragment; passed as it came.
    Fragment = "fragment",
    /// No service has the destination.
    NotService = "not-service",
    /// To the client, but no reply from a service.
    NotReply = "not-reply",
    /// A packet of a known connection, to its backend.
    Established = "established",
    /// A reply of a backend, to its client.
    Reply = "reply",
    /// A new connection of a service without affinity, by the hash of its 5-tuple.
    Hashed = "hashed",
    /// A new connection to the backend that the client's affinity entry names.
    AffinityHit = "affinity-hit",
    /// A client without an affinity entry: its first choice.
    AffinityNew = "affinity-new",
    /// A client whose affinity had timed out: a fresh choice.
    AffinityExpired = "affinity-expired",
    /// A client whose backend is no longer eligible: a new choice.
    AffinityFailover = "affinity-failover",
    /// Another packet of the client chose at the same instant: its choice was adopted.
    AffinityAdopted = "affinity-adopted",
    /// The affinity map refused the entry: this connection's own choice stands.
    AffinityRefused = "affinity-refused",
    /// The middle of a connection whose conntrack entry is gone: rebuilt.
    Rebuilt = "rebuilt",
    /// The service has no eligible backend: refused by a TCP reset or an ICMP port unreachable.
    NoBackend = "no-backend",
    /// The chosen backend went away between two look-ups.
    BackendGone = "backend-gone",
    /// Another service's connection has the same client port and backend.
    Collision = "collision",
    /// The conntrack map refused the entry.
    ConntrackRefused = "conntrack-refused",
    /// The kernel refused to rewrite the packet.
    RewriteFailed = "rewrite-failed",
    /// The service has no eligible backend, and the packet gets no answer: a reset, or one with IP options.
    NoBackendDropped = "no-backend-dropped",
}

impl Reason {
    /// What is done with the packet.
    #[inline(always)]
    pub const fn verdict(self) -> Verdict {
        match self {
            Self::NotIp
            | Self::OtherProtocol
            | Self::Malformed
            | Self::Fragment
            | Self::NotService
            | Self::NotReply
            | Self::Established
            | Self::Reply
            | Self::Hashed
            | Self::AffinityHit
            | Self::AffinityNew
            | Self::AffinityExpired
            | Self::AffinityFailover
            | Self::AffinityAdopted
            | Self::AffinityRefused
            | Self::Rebuilt => Verdict::Pass,
            Self::NoBackend => Verdict::Reject,
            Self::NoBackendDropped
            | Self::BackendGone
            | Self::Collision
            | Self::ConntrackRefused
            | Self::RewriteFailed => Verdict::Drop,
        }
    }

    /// Whether a backend was chosen for a new connection; such reasons make a monitor event.
    pub const fn is_selection(self) -> bool {
        matches!(
            self,
            Self::Hashed
                | Self::AffinityHit
                | Self::AffinityNew
                | Self::AffinityExpired
                | Self::AffinityFailover
                | Self::AffinityAdopted
                | Self::AffinityRefused
                | Self::Rebuilt
        )
    }

    /// The reason of a number in a map; `None` where this version knows none.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }
}
