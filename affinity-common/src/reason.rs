//! What can become of a packet: the one list behind verdicts, counters, metrics and the text that people read.

/// The programs that count.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Program {
    /// TC ingress of a client's interface: packets from the client.
    Ingress,
    /// TC egress of a client's interface: packets to the client.
    Egress,
    /// A socket that connects.
    Connect,
    /// An unconnected UDP socket that sends.
    Sendmsg,
    /// A UDP socket that asks who has sent to it.
    Recvmsg,
    /// A socket that asks whom it is connected to.
    Getpeername,
    /// A socket that is closed.
    Release,
}

impl Program {
    /// Every program, in the order of its number.
    pub const ALL: [Self; 7] =
        [Self::Ingress, Self::Egress, Self::Connect, Self::Sendmsg, Self::Recvmsg, Self::Getpeername, Self::Release];

    /// Those that see packets.
    pub const TC: [Self; 2] = [Self::Ingress, Self::Egress];

    /// The name in counters and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
            Self::Connect => "connect",
            Self::Sendmsg => "sendmsg",
            Self::Recvmsg => "recvmsg",
            Self::Getpeername => "getpeername",
            Self::Release => "release",
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
    /// It goes back out by the interface that it has come by: as the answer that it is refused, or as a packet of a pod to
    /// itself.
    SendBack,
}

impl Verdict {
    /// The name in what people read and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Drop => "drop",
            Self::SendBack => "send-back",
        }
    }
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
    /// A fragment that is for no service; passed as it came.
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
    /// The service has no such port: refused by a TCP reset or an ICMP port unreachable, as is a ping.
    NoSuchPort = "no-such-port",
    /// The service has no such port, and the packet gets no answer: a reset, or one with IP options.
    NoSuchPortDropped = "no-such-port-dropped",
    /// Of a pod that is its own backend: to itself, from the service's address.
    Hairpin = "hairpin",
    /// Past services, on ports that a connection through one has too: from another port.
    Direct = "direct",
    /// An ICMP error about a translated packet: it shows what its receiver has sent.
    IcmpError = "icmp-error",
    /// A fragment that came before the first one of its datagram, or after the connection's end: there is no telling where
    /// it is to go.
    FragmentAlone = "fragment-alone",
    /// A socket of a namespace whose address is not known (yet): its packets go by TC.
    UnknownClient = "unknown-client",
    /// A socket of a namespace that is left to TC: it has several addresses, or is not to be served by sockets.
    LeftToTc = "left-to-tc",
    /// The map of sockets refused the entry: the socket's packets go by TC.
    SocketRefused = "socket-refused",
    /// A socket that was connected to a service is closed.
    Closed = "closed",
    /// The service has backends, but none on this node, to which its traffic policy keeps it; a socket is refused.
    NoLocalBackend = "no-local-backend",
    /// The client is in none of the ranges that the service lets in; a socket is refused.
    NotAllowed = "not-allowed",
    /// From outside to a backend elsewhere: it leaves the node as the node's own.
    Snat = "snat",
    /// The answer to such a packet: to the client again.
    SnatReply = "snat-reply",
    /// From outside to a backend elsewhere, to which the node has no port left: refused by a TCP reset or an ICMP port
    /// unreachable.
    SnatExhausted = "snat-exhausted",
    /// Who has a service's address was asked for, which this node announces: answered.
    Announced = "announced",
    /// From outside to a backend elsewhere, to which the node has no port left, and the packet gets no answer: a fragment, a
    /// reset, or one with IP options.
    SnatExhaustedDropped = "snat-exhausted-dropped",
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
            | Self::Rebuilt
            | Self::Direct
            | Self::IcmpError
            | Self::UnknownClient
            | Self::LeftToTc
            | Self::SocketRefused
            | Self::Closed
            | Self::Snat
            | Self::SnatReply => Verdict::Pass,
            Self::NoBackend | Self::NoSuchPort | Self::Hairpin | Self::SnatExhausted | Self::Announced => {
                Verdict::SendBack
            }
            Self::NoBackendDropped
            | Self::NoSuchPortDropped
            | Self::FragmentAlone
            | Self::BackendGone
            | Self::NoLocalBackend
            | Self::NotAllowed
            | Self::SnatExhaustedDropped
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
