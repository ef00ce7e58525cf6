//! The addresses of a block.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use thiserror::Error;

use super::pool::Block;

/// A family of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IpFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpFamily {
    /// An address's.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

impl fmt::Display for IpFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// Addresses in a row, of one family: at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range {
    first: IpAddr,
    last: IpAddr,
}

/// A block that has no addresses to give.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BlockError {
    /// It has neither form, or both.
    #[error("either cidr, or start and stop")]
    Form,
    /// A text is no CIDR.
    #[error("{0:?} is no CIDR")]
    Cidr(String),
    /// A text is no address.
    #[error("{0:?} is no IP address")]
    Address(String),
    /// Both ends are not of one family, or the last one is before the first.
    #[error("{0} to {1} is no range")]
    Order(IpAddr, IpAddr),
    /// An address that no service can have.
    #[error("{0} can't be the address of a service")]
    Unusable(IpAddr),
}

impl Range {
    /// From the first to the last one, both of them included.
    ///
    /// # Errors
    /// Where they are no range, or can't be the addresses of services.
    pub fn new(first: IpAddr, last: IpAddr) -> Result<Self, BlockError> {
        if IpFamily::of(first) != IpFamily::of(last) || first > last {
            return Err(BlockError::Order(first, last));
        }
        for end in [first, last] {
            let mapped = matches!(end, IpAddr::V6(end) if end.to_ipv4_mapped().is_some());
            if end.is_unspecified() || end.is_loopback() || end.is_multicast() || mapped {
                return Err(BlockError::Unusable(end));
            }
        }
        Ok(Self { first, last })
    }

    /// The addresses of a block that may be given.
    ///
    /// # Errors
    /// Where it is none.
    pub fn of(block: &Block) -> Result<Self, BlockError> {
        match (&block.cidr, &block.start, &block.stop) {
            (Some(cidr), None, None) => {
                let net: IpNet = cidr.parse().map_err(|_| BlockError::Cidr(cidr.clone()))?;
                let (first, last) = (net.network(), net.broadcast());
                match (first, last) {
                    (IpAddr::V4(first), IpAddr::V4(last)) if net.prefix_len() < 31 => {
                        let (first, last) = (u32::from(first) + 1, u32::from(last) - 1);
                        Self::new(IpAddr::V4(first.into()), IpAddr::V4(last.into()))
                    }
                    _ => Self::new(first, last),
                }
            }
            (None, Some(start), Some(stop)) => {
                let parse = |text: &String| text.parse().map_err(|_| BlockError::Address(text.clone()));
                Self::new(parse(start)?, parse(stop)?)
            }
            _ => Err(BlockError::Form),
        }
    }

    /// The family.
    pub fn family(&self) -> IpFamily {
        IpFamily::of(self.first)
    }

    /// The first address.
    pub fn first(&self) -> IpAddr {
        self.first
    }

    /// The last address.
    pub fn last(&self) -> IpAddr {
        self.last
    }

    /// Whether it has an address.
    pub fn contains(&self, address: IpAddr) -> bool {
        (self.first..=self.last).contains(&address)
    }

    /// Whether both have an address.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// How many addresses it has, or [`u128::MAX`] of all that there are.
    pub fn size(&self) -> u128 {
        (number(self.last) - number(self.first)).saturating_add(1)
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { self.first.fmt(f) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

/// The address that follows; none after the last one of its family.
pub fn next(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(address) => u32::from(address).checked_add(1).map(|next| IpAddr::V4(next.into())),
        IpAddr::V6(address) => u128::from(address).checked_add(1).map(|next| IpAddr::V6(next.into())),
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

/// Ranges in order, none of which overlaps or touches another: the same addresses, each once.
pub fn merged(mut ranges: Vec<Range>) -> Vec<Range> {
    ranges.sort_unstable();
    let mut merged: Vec<Range> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(before)
                if before.family() == range.family()
                    && next(before.last).is_none_or(|following| range.first <= following) =>
            {
                before.last = before.last.max(range.last);
            }
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(text: &str) -> Result<Range, BlockError> {
        Range::of(&Block { cidr: Some(text.to_owned()), ..Block::default() })
    }

    fn range(start: &str, stop: &str) -> Result<Range, BlockError> {
        Range::of(&Block { cidr: None, start: Some(start.to_owned()), stop: Some(stop.to_owned()) })
    }

    #[test]
    fn blocks_have_the_addresses_that_can_be_used() {
        for (block, first, last, size) in [
            (cidr("192.0.2.0/24"), "192.0.2.1", "192.0.2.254", 254),
            (cidr("192.0.2.77/24"), "192.0.2.1", "192.0.2.254", 254),
            (cidr("192.0.2.0/30"), "192.0.2.1", "192.0.2.2", 2),
            (cidr("192.0.2.0/31"), "192.0.2.0", "192.0.2.1", 2),
            (cidr("192.0.2.9/32"), "192.0.2.9", "192.0.2.9", 1),
            (cidr("2001:db8::/126"), "2001:db8::", "2001:db8::3", 4),
            (cidr("2001:db8::/48"), "2001:db8::", "2001:db8:0:ffff:ffff:ffff:ffff:ffff", 1 << 80),
            (range("192.0.2.0", "192.0.2.255"), "192.0.2.0", "192.0.2.255", 256),
            (range("2001:db8::1", "2001:db8::1"), "2001:db8::1", "2001:db8::1", 1),
        ] {
            let block = block.expect(first);
            assert_eq!((block.first().to_string(), block.last().to_string()), (first.to_owned(), last.to_owned()));
            assert_eq!(block.size(), size, "{block}");
        }
    }

    #[test]
    fn what_is_no_block_says_why() {
        for (block, message) in [
            (cidr("192.0.2.0"), "\"192.0.2.0\" is no CIDR"),
            (cidr("192.0.2.0/33"), "\"192.0.2.0/33\" is no CIDR"),
            (cidr("127.0.0.0/8"), "127.0.0.1 can't be the address of a service"),
            (cidr("224.0.0.0/4"), "224.0.0.1 can't be the address of a service"),
            (cidr("::/0"), ":: can't be the address of a service"),
            (range("192.0.2.9", "192.0.2.1"), "192.0.2.9 to 192.0.2.1 is no range"),
            (range("192.0.2.9", "2001:db8::1"), "192.0.2.9 to 2001:db8::1 is no range"),
            (range("x", "2001:db8::1"), "\"x\" is no IP address"),
            (Range::of(&Block::default()), "either cidr, or start and stop"),
        ] {
            assert_eq!(block.expect_err(message).to_string(), message);
        }
    }

    #[test]
    fn ranges_are_merged() {
        let ranges = [
            range("192.0.2.5", "192.0.2.7"),
            range("192.0.2.1", "192.0.2.2"),
            range("192.0.2.3", "192.0.2.3"),
            range("192.0.2.6", "192.0.2.9"),
            range("2001:db8::1", "2001:db8::1"),
        ];
        let texts: Vec<_> = merged(ranges.map(Result::unwrap).into()).iter().map(Range::to_string).collect();
        assert_eq!(texts, ["192.0.2.1-192.0.2.3", "192.0.2.5-192.0.2.9", "2001:db8::1"]);
    }
}
