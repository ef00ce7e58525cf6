//! What a daemon does for the cluster, as `affinity status` tells it.

use crate::duties::DutiesStatus;
use crate::ipam::pool::Usage;

/// How many of the addresses that are answered for are named.
const NAMED: usize = 10;

/// A line for each pool, for services without an address, and for what is answered for; none where there is nothing.
pub(super) fn lines(duties: &DutiesStatus) -> Vec<String> {
    let mut lines = Vec::new();
    if duties.gives_addresses {
        lines.push("addresses: this node gives them to services".to_owned());
    }
    for (name, pool) in &duties.pools {
        let families = [("IPv4", pool.ipv4), ("IPv6", pool.ipv6)];
        let told = families.iter().filter(|(_, usage)| usage.total > 0).map(|(family, usage)| {
            let Usage { total, used, available } = usage;
            format!("{used} of {total} {family} addresses used, {available} free")
        });
        lines.push(format!("pool {name}: {}", told.collect::<Vec<_>>().join("; ")));
    }
    for (reason, count) in &duties.unmet {
        lines.push(format!("services without the addresses that they ask for: {count} ({reason})"));
    }
    if !duties.announced.is_empty() {
        let named: Vec<_> = duties.announced.iter().take(NAMED).map(ToString::to_string).collect();
        let more = match duties.announced.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        lines.push(format!("answers for: {}{more}", named.join(", ")));
    }
    lines
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::duties::PoolStatus;

    #[test]
    fn duties_are_told_as_far_as_there_are_any() {
        assert_eq!(lines(&DutiesStatus::default()), [""; 0]);
        let usage = |total, used| Usage { total, used, available: total - used };
        let pool = |ipv4, ipv6| PoolStatus { ipv4, ipv6 };
        let pools = [("a", pool(usage(254, 3), usage(16, 16))), ("b", pool(usage(0, 0), usage(2, 0)))];
        let duties = DutiesStatus {
            gives_addresses: true,
            pools: pools.map(|(name, pool)| (name.to_owned(), pool)).into(),
            unmet: [("PoolExhausted".to_owned(), 2)].into(),
            announced: (1..=12).map(|last| IpAddr::from([192, 0, 2, last])).collect(),
        };
        let expected = [
            "addresses: this node gives them to services",
            "pool a: 3 of 254 IPv4 addresses used, 251 free; 16 of 16 IPv6 addresses used, 0 free",
            "pool b: 0 of 2 IPv6 addresses used, 2 free",
            "services without the addresses that they ask for: 2 (PoolExhausted)",
        ];
        let lines = lines(&duties);
        assert_eq!(lines[..4], expected);
        assert!(lines[4].starts_with("answers for: 192.0.2.1, ") && lines[4].ends_with("192.0.2.10 and 2 more"));
    }
}
