//! The words that both sides use: ids, ports, protocols and time.

use core::fmt;

use crate::pod::pod;

/// How many nanoseconds the recorded time of a map entry counts in one [`Ticks`], as a power of two: 16.8 ms.
///
/// A shift and no division on the packet path, and 32 bits of it last for 2.28 years.
pub const TICK_SHIFT: u32 = 24;

pod! {
    /// A service port: what affinity's scope is. Monotonic, persisted, never reused; 0 is none.
    #[derive(Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct ServiceId: 4 {
        /// The number.
        pub id: u32,
    }

    /// A backend of one service port. Monotonic over all services, persisted, never reused; 0 is none.
    #[derive(Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct BackendId: 4 {
        /// The number.
        pub id: u32,
    }

    /// A port in network byte order.
    #[derive(Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct Port: 2 {
        /// The octets, as on the wire.
        pub be: [u8; 2],
    }

    /// A transport protocol by its IANA number.
    #[derive(Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct Proto: 1 {
        /// The IANA number.
        pub number: u8,
    }

    /// A point on the coarse monotonic clock (`CLOCK_MONOTONIC_COARSE`, `bpf_ktime_get_coarse_ns`) in units of
    /// 2^24 ns. It wraps after 2.28 years of uptime: only differences mean something, and only those under half of that.
    #[derive(Default, PartialEq, Eq, Hash)]
    pub struct Ticks: 4 {
        /// The low 32 bits of the number of ticks since boot.
        pub at: u32,
    }

    /// A span of whole seconds.
    #[derive(Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct Seconds: 4 {
        /// The number.
        pub secs: u32,
    }
}

impl Port {
    /// A port of the number as people write it.
    pub const fn new(port: u16) -> Self {
        Self { be: port.to_be_bytes() }
    }

    /// The number as people write it.
    pub const fn get(self) -> u16 {
        u16::from_be_bytes(self.be)
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

impl Proto {
    /// TCP.
    pub const TCP: Self = Self { number: 6 };
    /// UDP.
    pub const UDP: Self = Self { number: 17 };
    /// ICMP, of IPv4.
    pub const ICMP: Self = Self { number: 1 };
    /// ICMP, of IPv6.
    pub const ICMP6: Self = Self { number: 58 };
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::TCP => f.pad("TCP"),
            Self::UDP => f.pad("UDP"),
            Self { number } => number.fmt(f),
        }
    }
}

impl fmt::Display for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.id.fmt(f)
    }
}

impl fmt::Display for BackendId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.id.fmt(f)
    }
}

impl Seconds {
    /// So many seconds.
    pub const fn new(secs: u32) -> Self {
        Self { secs }
    }

    /// The span in nanoseconds.
    pub const fn nanos(self) -> Nanos {
        Nanos(self.secs as u64 * 1_000_000_000)
    }

    /// The span in ticks, rounded up.
    #[expect(clippy::cast_possible_truncation, reason = "2^32 s are under 2^38 ticks; lifetimes are under 2^26 s")]
    pub const fn ticks(self) -> u32 {
        self.nanos().0.div_ceil(1 << TICK_SHIFT) as u32
    }
}

/// A point on the coarse monotonic clock, or a span of it, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nanos(pub u64);

impl Nanos {
    /// One second.
    pub const SECOND: Self = Self(1_000_000_000);

    /// The tick that the point lies in.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "ticks wrap by design")]
    pub const fn ticks(self) -> Ticks {
        Ticks { at: (self.0 >> TICK_SHIFT) as u32 }
    }
}

impl Ticks {
    /// How many ticks have passed from `self` to `now`; 0 where `self` lies ahead, as it may by another CPU's clock.
    #[inline(always)]
    pub const fn until(self, now: Self) -> u32 {
        let passed = now.at.wrapping_sub(self.at);
        if passed > u32::MAX / 2 { 0 } else { passed }
    }

    /// The nanoseconds from the start of this tick to `now`; 0 where it lies ahead.
    #[inline(always)]
    pub const fn age(self, now: Nanos) -> Nanos {
        let passed = now.ticks().at.wrapping_sub(self.at);
        if passed > u32::MAX / 2 {
            return Nanos(0);
        }
        Nanos(((passed as u64) << TICK_SHIFT) + (now.0 & ((1 << TICK_SHIFT) - 1)))
    }

    /// The tick that comes `ticks` after this one.
    #[inline(always)]
    #[must_use]
    pub const fn after(self, ticks: u32) -> Self {
        Self { at: self.at.wrapping_add(ticks) }
    }

    /// Whether the tick has come by `now`.
    #[inline(always)]
    pub const fn is_due(self, now: Self) -> bool {
        now.at.wrapping_sub(self.at) <= u32::MAX / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn age_is_counted_from_the_start_of_the_tick_and_over_the_wrap() {
        let tick = 1u64 << TICK_SHIFT;
        assert_eq!(Nanos(5 * tick + 7).ticks().age(Nanos(9 * tick + 3)), Nanos(4 * tick + 3));
        let before_wrap = Nanos((1 << 56) - 1);
        assert_eq!(before_wrap.ticks().age(Nanos((1 << 56) + 1)), Nanos(tick + 1));
    }

    #[test]
    fn a_tick_ahead_of_the_clock_is_no_age_and_not_due() {
        let now = Nanos(100 << TICK_SHIFT);
        let ahead = now.ticks().after(1);
        assert_eq!(ahead.age(now), Nanos(0));
        assert_eq!(ahead.until(now.ticks()), 0);
        assert!(!ahead.is_due(now.ticks()));
        assert!(now.ticks().is_due(now.ticks()));
    }
}
