//! What came of a step, and the summary of all.

use std::{
    fmt::{self, Display, Formatter},
    ops::AddAssign,
    time::Duration,
};

use crate::say;

/// Test cases by what came of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Held.
    pub passed: u64,
    /// Did not hold.
    pub failed: u64,
    /// Not run.
    pub skipped: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl Display for Counts {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { passed, failed, skipped } = self;
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

/// What the test harness's output told, line by line.
#[derive(Default)]
pub struct Report {
    /// The cases, summed up over its `test result:` lines.
    pub counts: Counts,
    /// The names of those that failed.
    pub failures: Vec<String>,
    /// The names of those that held.
    pub passes: Vec<String>,
}

impl Report {
    /// Takes one line of output.
    pub fn line(&mut self, line: &str) {
        if let Some(counts) = result_line(line) {
            self.counts += counts;
        } else if let Some(name) = failure_line(line) {
            self.failures.push(name.to_owned());
        } else if let Some(name) = pass_line(line) {
            self.passes.push(name.to_owned());
        }
    }
}

/// `test result: ok. 14 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s`
fn result_line(line: &str) -> Option<Counts> {
    let numbers = line.trim().strip_prefix("test result: ")?.split_once(". ")?.1;
    let number = |name: &str| {
        let mut parts = numbers.split(';').map(str::trim);
        parts.find_map(|part| part.strip_suffix(name)?.trim().parse().ok())
    };
    Some(Counts { passed: number("passed")?, failed: number("failed")?, skipped: number("ignored")? })
}

/// `test some::name ... FAILED`
fn failure_line(line: &str) -> Option<&str> {
    line.trim().strip_prefix("test ")?.strip_suffix(" ... FAILED")
}

/// `test some::name ... ok`
fn pass_line(line: &str) -> Option<&str> {
    line.trim().strip_prefix("test ")?.strip_suffix(" ... ok")
}

/// A step that is over.
pub struct Outcome {
    /// The step's name.
    pub name: String,
    /// Its cases; a step without cases counts as one.
    pub counts: Counts,
    /// Names of failed cases.
    pub failures: Vec<String>,
    /// Names of those that held.
    pub passes: Vec<String>,
    /// Why it failed or was left out.
    pub why: Option<String>,
    /// How long it took.
    pub time: Duration,
}

impl Outcome {
    /// A step that was not run, and why.
    pub fn left_out(name: &str, why: &str) -> Self {
        let counts = Counts { skipped: 1, ..Counts::default() };
        Self {
            name: name.to_owned(),
            counts,
            failures: Vec::new(),
            passes: Vec::new(),
            why: Some(why.to_owned()),
            time: Duration::ZERO,
        }
    }

    /// Whether anything in it failed.
    pub fn failed(&self) -> bool {
        self.counts.failed > 0
    }

    fn verdict(&self) -> &'static str {
        match self.counts {
            Counts { failed: 1.., .. } => "FAILED",
            Counts { passed: 1.., .. } => "passed",
            _ => "left out",
        }
    }
}

/// Writes the table of all steps, what failed in them, and alone on the last line the sum of all cases.
pub fn print_summary(outcomes: &[Outcome]) -> Counts {
    let mut sum = Counts::default();
    let width = outcomes.iter().map(|outcome| outcome.name.len()).max().unwrap_or(0).max(4);
    println!(
        "\n{:<width$}  {:<8}  {:>6}  {:>6}  {:>7}  {:>12}",
        "step", "verdict", "passed", "failed", "skipped", "time"
    );
    for outcome in outcomes {
        let Outcome { name, counts, why, time, failures, .. } = outcome;
        let Counts { passed, failed, skipped } = counts;
        let time = say::duration(*time);
        let verdict = outcome.verdict();
        let why = why.as_ref().map(|why| format!("  {why}")).unwrap_or_default();
        println!("{name:<width$}  {verdict:<8}  {passed:>6}  {failed:>6}  {skipped:>7}  {time:>12}{why}");
        for failure in failures {
            println!("{:width$}  - {failure}", "");
        }
        sum += *counts;
    }
    println!("\n{sum}");
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_summed_up_over_the_result_lines() {
        let mut report = Report::default();
        let output = "\nrunning 3 tests\ntest a ... ok\ntest deep::b ... FAILED\ntest c ... ignored\n\n\
            test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.01s\n\n\
            running 14 tests\n..............\n\
            test result: ok. 14 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.30s\n";
        output.lines().for_each(|line| report.line(line));
        assert_eq!(report.counts, Counts { passed: 15, failed: 1, skipped: 1 });
        assert_eq!((report.failures, report.passes), (vec!["deep::b".to_owned()], vec!["a".to_owned()]));
    }

    #[test]
    fn other_lines_count_nothing() {
        let mut report = Report::default();
        for line in ["test result: what it was", "a test result: ok. 1 passed", "test x ... ok", ""] {
            report.line(line);
        }
        assert_eq!(report.counts, Counts::default());
        assert!(report.failures.is_empty());
    }

    #[test]
    fn the_sum_reads_as_ci_wants_it() {
        let counts = Counts { passed: 3, failed: 0, skipped: 1 };
        assert_eq!(counts.to_string(), "3 passed, 0 failed, 1 skipped");
    }

    #[test]
    fn verdicts_follow_the_cases() {
        let mut outcome = Outcome::left_out("deny", "cargo-deny is not installed");
        assert_eq!(outcome.verdict(), "left out");
        outcome.counts.passed = 3;
        assert_eq!(outcome.verdict(), "passed");
        outcome.counts.failed = 1;
        assert_eq!(outcome.verdict(), "FAILED");
    }
}
