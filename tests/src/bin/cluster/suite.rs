//! Steps, each with a name and a line on what came of it, and a summary in the words of Rust's own test harness, which
//! `cargo xtask test` counts.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::load::Seen;

/// What the suite has found so far.
pub struct Suite {
    only: Vec<String>,
    passed: usize,
    failed: Vec<String>,
    left_out: Vec<String>,
    started: Instant,
    /// All requests of all steps in which none may fail.
    total: Seen,
}

impl Suite {
    /// A suite of these steps alone, or of all where none is named.
    pub fn new(only: &[String]) -> Self {
        let (only, started) = (only.to_vec(), Instant::now());
        Self { only, passed: 0, failed: Vec::new(), left_out: Vec::new(), started, total: Seen::default() }
    }

    /// Whether a step is to be run, by its name or what that begins with.
    pub fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|wanted| name.starts_with(wanted.as_str()))
    }

    /// Runs a step. One that fails does not keep the others from running.
    pub fn step(&mut self, name: &str, step: impl FnOnce() -> Result<Figures>) {
        if !self.wants(name) {
            self.left_out.push(name.to_owned());
            return;
        }
        let started = Instant::now();
        match step() {
            Ok(figures) => {
                self.passed += 1;
                self.total.add(&figures.seen);
                println!("[ok] {name}: {} ({})", figures.line, seconds(started.elapsed()));
            }
            Err(error) => {
                self.failed.push(name.to_owned());
                println!("[FAILED] {name}: {error:#} ({})", seconds(started.elapsed()));
            }
        }
    }

    /// Prints the summary; true where nothing failed, and something was run.
    pub fn finish(&self) -> bool {
        if self.passed + self.failed.len() == 0 {
            println!("no step is called {}; there are {}", self.only.join(" or "), self.left_out.join(", "));
            return false;
        }
        let Seen { requests, failed, .. } = self.total;
        println!("{requests} requests in the steps that held, {failed} of them failed");
        for name in &self.failed {
            println!("test {name} ... FAILED");
        }
        println!(
            "test result: {}. {} passed; {} failed; 0 ignored; 0 measured; {} filtered out; finished in {}",
            if self.failed.is_empty() { "ok" } else { "FAILED" },
            self.passed,
            self.failed.len(),
            self.left_out.len(),
            seconds(self.started.elapsed()),
        );
        self.failed.is_empty()
    }
}

/// What a step has to tell.
#[derive(Debug, Default)]
pub struct Figures {
    line: String,
    seen: Seen,
}

impl From<String> for Figures {
    fn from(line: String) -> Self {
        Self { line, seen: Seen::default() }
    }
}

/// Loads that ran together, by what they were.
#[derive(Debug, Default)]
pub struct Observed(BTreeMap<String, Seen>);

impl Observed {
    /// Notes what a load has seen.
    pub fn note(&mut self, what: String, seen: Seen) {
        self.0.insert(what, seen);
    }

    /// Adds what the same loads have seen later.
    pub fn add(&mut self, later: Self) {
        for (what, seen) in later.0 {
            self.0.entry(what).or_default().add(&seen);
        }
    }

    /// All of them together.
    pub fn sum(&self) -> Seen {
        let mut sum = Seen::default();
        self.0.values().for_each(|seen| sum.add(seen));
        sum
    }

    /// Fails where a request failed, and names the first load of which one did.
    pub fn none_failed(&self) -> Result<()> {
        let failed: u64 = self.0.values().map(|seen| seen.failed).sum();
        if let Some((what, seen)) = self.0.iter().find(|(_, seen)| seen.failed > 0) {
            let requests: u64 = self.0.values().map(|seen| seen.requests).sum();
            bail!(
                "{failed} of {requests} requests failed; {what}: {} of {}: {:?}",
                seen.failed,
                seen.requests,
                seen.errors
            );
        }
        match self.0.iter().find(|(_, seen)| seen.requests == 0) {
            Some((what, _)) => bail!("{what}: no request was made"),
            None => Ok(()),
        }
    }

    /// Fails where a client came to more than this many pods one after the other.
    pub fn moved_at_most(&self, times: u64) -> Result<()> {
        match self.0.iter().find(|(_, seen)| seen.moved > times) {
            Some((what, seen)) => bail!("{what}: moved {} times, over {:?}", seen.moved, seen.pods),
            None => Ok(()),
        }
    }

    /// Each load with what it saw.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Seen)> {
        self.0.iter().map(|(what, seen)| (what.as_str(), seen))
    }

    /// The figures of a step: requests, failed, moved, and more words.
    pub fn figures(&self, more: &str) -> Figures {
        let seen = self.sum();
        let slowest = self.0.iter().max_by_key(|(_, seen)| seen.slowest);
        let slowest = slowest.map(|(what, seen)| format!("slowest {} ms ({what})", seen.slowest.as_millis()));
        let line = format!(
            "{} clients, {} requests, {} failed, {} moved, {}{}{more}",
            self.0.len(),
            seen.requests,
            seen.failed,
            seen.moved,
            slowest.unwrap_or_default(),
            if more.is_empty() { "" } else { "; " }
        );
        Figures { line, seen }
    }
}

fn seconds(duration: Duration) -> String {
    format!("{:.1}s", duration.as_secs_f64())
}
