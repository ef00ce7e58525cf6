//! What the kernel makes of the BPF programs, held against what was written down of them: one that grows is noticed.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use anyhow::{Context as _, Result};
use nix::unistd::Uid;
use serde::{Deserialize, Serialize};

use crate::{
    machine,
    outcome::{Counts, Report},
    process, say, workspace,
};

/// What was written down, from the root of the checkout.
const FILE: &str = "affinity-ebpf/programs.json";

/// A program's figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Figures {
    /// Instructions, without those that are never reached.
    instructions: u64,
    /// Instructions that the verifier went through, those of every path.
    verified: u64,
    /// Bytes of stack, where the kernel lets us see it.
    stack: Option<u64>,
}

/// The figures of all programs on a kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Programs {
    /// Its series: `6.18`. Another one's verifier goes through the same program in another way.
    kernel: String,
    programs: BTreeMap<String, Figures>,
}

/// What `affinity programs -o json` prints.
#[derive(Deserialize)]
struct Shown {
    kernel: String,
    programs: Vec<ShownProgram>,
}

#[derive(Deserialize)]
struct ShownProgram {
    program: String,
    #[serde(flatten)]
    figures: Figures,
}

impl From<Shown> for Programs {
    fn from(shown: Shown) -> Self {
        let mut numbers = shown.kernel.split(|c: char| !c.is_ascii_digit());
        let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
        let programs = shown.programs.into_iter().map(|it| (it.program, it.figures)).collect();
        Self { kernel: format!("{major}.{minor}"), programs }
    }
}

/// For `cargo xtask build`: prints the figures, and warns of what has grown. Where programs can't be loaded it says so, and
/// fails only where `accept` has the figures written down.
pub fn show(daemon: &Path, accept: bool) -> Result<()> {
    if !accept && !Uid::effective().is_root() {
        let daemon = workspace::short(daemon);
        say::warning(&format!(
            "the programs' instructions and stack are left out, for only root may load them: `sudo {daemon} programs`"
        ));
        return Ok(());
    }
    let found = match load(daemon) {
        Ok(found) => found,
        Err(error) if !accept => {
            say::warning(&format!("the programs' instructions and stack are left out: {error:#}"));
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    print!("{}", table(&found));
    if accept {
        return write(&found);
    }
    let compared = compare(&read()?, &found);
    compared.failures.iter().for_each(|failure| say::warning(failure));
    if let Some(note) = &compared.note {
        say::warning(note);
    }
    Ok(())
}

/// For `cargo xtask test`: a case for each program.
pub fn check(daemon: &Path) -> Result<Report> {
    let found = load(daemon)?;
    let compared = compare(&read()?, &found);
    print!("{}", table(&found));
    compared.failures.iter().for_each(|failure| println!("{failure}"));
    if let Some(note) = &compared.note {
        println!("{note}");
    }
    Ok(compared.report())
}

/// Has the kernel load them all.
fn load(daemon: &Path) -> Result<Programs> {
    let mut command = Command::new(daemon);
    command.args(["programs", "--output", "json"]);
    let text = process::capture(machine::as_root(command)?)?;
    let shown: Shown = serde_json::from_str(&text).context("reading what `affinity programs` says")?;
    Ok(shown.into())
}

fn read() -> Result<Programs> {
    let text = fs::read_to_string(workspace::root().join(FILE)).context(FILE)?;
    serde_json::from_str(&text).context(FILE)
}

fn write(found: &Programs) -> Result<()> {
    let text = serde_json::to_string_pretty(found)? + "\n";
    fs::write(workspace::root().join(FILE), text).context(FILE)?;
    say::progress("Wrote", FILE);
    Ok(())
}

/// What a comparison has come to.
struct Compared {
    /// The programs that are as they were, or less.
    passes: Vec<String>,
    /// What is wrong with the others, each with its name.
    failures: Vec<String>,
    /// How many figures were not compared.
    skipped: u64,
    /// Why not.
    note: Option<String>,
}

impl Compared {
    fn report(self) -> Report {
        let count = |of: &Vec<String>| u64::try_from(of.len()).unwrap_or(u64::MAX);
        let counts = Counts { passed: count(&self.passes), failed: count(&self.failures), skipped: self.skipped };
        Report { counts, failures: self.failures, passes: self.passes }
    }
}

/// Holds what was found against what was written down.
fn compare(written: &Programs, found: &Programs) -> Compared {
    let same_kernel = written.kernel == found.kernel;
    let mut compared = Compared { passes: Vec::new(), failures: Vec::new(), skipped: 0, note: None };
    if !same_kernel {
        compared.skipped = u64::try_from(found.programs.len()).unwrap_or(u64::MAX);
        compared.note = Some(format!(
            "what the verifier went through is not compared, for this is Linux {} and {FILE} is of {}",
            found.kernel, written.kernel
        ));
    }
    for (name, before) in &written.programs {
        let Some(now) = found.programs.get(name) else {
            compared.failures.push(format!("{name}: it is in {FILE}, and there is no such program"));
            continue;
        };
        let grown = [
            ("instructions", Some(before.instructions), Some(now.instructions)),
            ("instructions verified", Some(before.verified).filter(|_| same_kernel), Some(now.verified)),
            ("bytes of stack", before.stack, now.stack),
        ];
        let grown = grown.into_iter().filter_map(|(what, before, now)| growth(what, before?, now?));
        let grown: Vec<String> = grown.collect();
        if grown.is_empty() {
            compared.passes.push(name.clone());
        } else {
            let accept = "if it is worth that: `cargo xtask build --accept-programs`";
            compared.failures.push(format!("{name}: {}; {accept}", grown.join(", ")));
        }
    }
    for name in found.programs.keys().filter(|name| !written.programs.contains_key(*name)) {
        compared.failures.push(format!("{name}: it is not in {FILE}: `cargo xtask build --accept-programs`"));
    }
    compared
}

/// What there is to say of a figure that has grown by a fifth or more.
fn growth(what: &str, before: u64, now: u64) -> Option<String> {
    (now > before && now * 5 >= before * 6).then(|| format!("{now} {what}, where there were {before}"))
}

fn table(programs: &Programs) -> String {
    let width = programs.programs.keys().map(String::len).max().unwrap_or(0);
    let head = format!("{:<width$}  {:>12}  {:>8}  {:>5}\n", "program", "instructions", "verified", "stack");
    let row = |(name, figures): (&String, &Figures)| {
        let Figures { instructions, verified, stack } = figures;
        let stack = stack.map_or_else(|| "-".to_owned(), |bytes| bytes.to_string());
        format!("{name:<width$}  {instructions:>12}  {verified:>8}  {stack:>5}\n")
    };
    head + &programs.programs.iter().map(row).collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn programs(kernel: &str, of: &[(&str, [u64; 3])]) -> Programs {
        let figures =
            |[instructions, verified, stack]: [u64; 3]| Figures { instructions, verified, stack: Some(stack) };
        let programs = of.iter().map(|(name, it)| ((*name).to_owned(), figures(*it))).collect();
        Programs { kernel: kernel.to_owned(), programs }
    }

    #[test]
    fn a_fifth_more_of_any_figure_is_named_and_less_is_not() {
        let written = programs("6.18", &[("ingress", [1000, 5000, 400])]);
        let failures = |figures| compare(&written, &programs("6.18", &[("ingress", figures)])).failures;
        assert!(failures([1199, 5999, 472]).is_empty());
        assert!(failures([10, 10, 8]).is_empty());
        for (figures, what) in [
            ([1200, 5000, 400], "ingress: 1200 instructions, where there were 1000"),
            ([1000, 6000, 400], "ingress: 6000 instructions verified, where there were 5000"),
            ([1000, 5000, 480], "ingress: 480 bytes of stack, where there were 400"),
        ] {
            let failures = failures(figures);
            assert!(failures.len() == 1 && failures[0].starts_with(what), "{failures:?}");
        }
    }

    #[test]
    fn programs_that_come_and_go_are_named() {
        let written = programs("6.18", &[("ingress", [1, 1, 8]), ("old", [1, 1, 8])]);
        let compared = compare(&written, &programs("6.18", &[("ingress", [1, 1, 8]), ("new", [1, 1, 8])]));
        assert_eq!(compared.passes, ["ingress"]);
        assert!(compared.failures[0].starts_with("old: ") && compared.failures[1].starts_with("new: "));
        assert_eq!(compared.report().counts, Counts { passed: 1, failed: 2, skipped: 0 });
    }

    #[test]
    fn another_kernel_s_verifier_is_not_compared_and_that_is_counted() {
        let written = programs("6.18", &[("ingress", [1000, 5000, 400])]);
        let compared = compare(&written, &programs("6.1", &[("ingress", [1000, 9000, 400])]));
        assert!(compared.failures.is_empty() && compared.note.is_some());
        assert_eq!(compared.report().counts, Counts { passed: 1, failed: 0, skipped: 1 });
        assert_eq!(compare(&written, &programs("6.1", &[("ingress", [1000, 9000, 500])])).failures.len(), 1);
    }

    #[test]
    fn what_the_daemon_prints_is_read() -> Result<()> {
        let text = r#"{"kernel": "6.18.44-cloud", "programs": [
            {"program": "affinity_reply", "instructions": 7, "verified": 9, "stack": null, "machine_code": 50}]}"#;
        let programs = Programs::from(serde_json::from_str::<Shown>(text)?);
        assert_eq!(programs.kernel, "6.18");
        let figures = Figures { instructions: 7, verified: 9, stack: None };
        assert_eq!(programs.programs.get("affinity_reply"), Some(&figures));
        Ok(())
    }
}
