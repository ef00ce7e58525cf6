//! What is measured, how much of it, and about how long that takes.

use std::fmt::Write as _;
use std::time::Duration;

use crate::{cases, crr, north_south, packets, sockets};

/// A part of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The programs on packets.
    Packets,
    /// The programs at the cgroup.
    Sockets,
    /// Connect, request, response, close.
    Crr,
    /// The same from outside, by a node port.
    NorthSouth,
}

impl Part {
    /// What its flag is called.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Packets => "packets",
            Self::Sockets => "sockets",
            Self::Crr => "crr",
            Self::NorthSouth => "north-south",
        }
    }
}

/// How much is measured of each part.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    rounds: u32,
    quick: bool,
}

impl Plan {
    /// So many rounds; quickly, three at most.
    pub fn new(rounds: u32, quick: bool) -> Self {
        Self { rounds: if quick { rounds.min(3) } else { rounds }, quick }
    }

    /// Samples of each row.
    pub fn rounds(self) -> u32 {
        self.rounds
    }

    /// Of packets.
    pub fn packets(self) -> packets::Setting {
        let services = if self.quick { &[1, 1_000][..] } else { &[1, 1_000, 20_000] };
        let effort = if self.quick {
            cases::Effort { runs: 5_000, connections: 2_000 }
        } else {
            cases::Effort { runs: 100_000, connections: 20_000 }
        };
        packets::Setting { rounds: self.rounds, services, effort }
    }

    /// Of calls.
    pub fn sockets(self) -> sockets::Setting {
        sockets::Setting { rounds: self.rounds, calls: if self.quick { 200 } else { 5_000 } }
    }

    /// Of exchanges.
    pub fn crr(self) -> crr::Setting {
        let (sample, services) = if self.quick {
            (50, [&[1, 20][..], &[1][..]])
        } else {
            // The rules of 10,000 services take a minute or two to load: once will do.
            (400, [&[1, 1_000, 10_000][..], &[1, 1_000][..]])
        };
        crr::Setting { rounds: self.rounds, sample: Duration::from_millis(sample), services }
    }

    /// Of exchanges from outside.
    pub fn north_south(self) -> north_south::Setting {
        north_south::Setting { rounds: self.rounds, sample: Duration::from_millis(if self.quick { 50 } else { 400 }) }
    }

    /// What is going to be measured, a line a part, and about how long all takes on an idle machine.
    pub fn describe(self, parts: &[Part]) -> String {
        let mut text = String::new();
        for part in parts {
            let rows = self.rows(*part);
            let what = match part {
                Part::Packets => "the programs on packets, IPv6 beside IPv4",
                Part::Sockets => "the programs at the cgroup, by calls of UDP sockets",
                Part::Crr => "connect, request, response, close, by each way between two namespaces",
                Part::NorthSouth => "the same from outside to node ports, beside kube-proxy",
            };
            let time = duration(self.seconds(*part));
            let _ = writeln!(text, "{}: {what}; {rows} rows, {} rounds, about {time}", part.name(), self.rounds);
        }
        let all = parts.iter().map(|part| self.seconds(*part)).sum();
        let _ = writeln!(text, "about {} in all; keep the machine idle", duration(all));
        text
    }

    fn rows(self, part: Part) -> usize {
        match part {
            Part::Packets => packets::rows(self.packets().services.len()),
            Part::Sockets => sockets::ROWS,
            Part::Crr => crr::rows(self.crr()),
            Part::NorthSouth => north_south::ROWS,
        }
    }

    /// To set up, and to measure. The figures are of a virtual machine with two CPUs.
    fn seconds(self, part: Part) -> u64 {
        let samples = self.rows(part) as u64 * u64::from(self.rounds);
        let (setup, sample_ms) = match (part, self.quick) {
            (Part::Packets, false) => (30, 80),
            (Part::Packets, true) => (15, 15),
            (Part::Sockets, false) => (5, 30),
            (Part::Sockets, true) => (5, 5),
            (Part::Crr, false) => (150, 420),
            (Part::Crr, true) => (20, 60),
            (Part::NorthSouth, false) => (30, 420),
            (Part::NorthSouth, true) => (30, 60),
        };
        setup + samples * sample_ms / 1000
    }
}

fn duration(seconds: u64) -> String {
    if seconds < 90 { format!("{} s", seconds.div_ceil(10) * 10) } else { format!("{} min", seconds.div_ceil(60)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_is_described_with_its_time_and_all_with_the_sum() {
        let plan = Plan::new(15, false);
        let text = plan.describe(&[Part::Sockets, Part::Packets]);
        assert!(text.starts_with("sockets: ") && text.contains("\npackets: ") && !text.contains("crr"), "{text}");
        assert!(text.contains("15 rounds, about ") && text.contains(" in all"), "{text}");
        let seconds = |plan: Plan| plan.seconds(Part::Packets);
        assert!(seconds(Plan::new(30, false)) > seconds(plan) && seconds(Plan::new(30, true)) < seconds(plan));
    }

    #[test]
    fn durations_are_about_right() {
        assert_eq!([3, 61, 95, 600].map(duration), ["10 s", "70 s", "2 min", "10 min"]);
    }
}
