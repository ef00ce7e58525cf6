//! The list of what `cargo xtask test` does, in its order.

use std::fs;

use anyhow::{Context as _, Result};

use crate::workspace;

/// The suites that start an API server. A suite that is missing here and needs one fails by saying so.
const API_SUITES: [&str; 3] = ["api", "balancer", "lab_api"];
/// What `--without` and the arguments call all steps that need the API server.
pub const API: &str = "api";

/// The step that runs on a real cluster.
pub const CLUSTER: &str = "cluster";

/// The kernel that the suites of [`Action::Kernel`] run on, beside this machine's: the oldest that is supported.
pub const KERNEL: &str = "6.1";
/// Those suites.
pub const KERNEL_SUITES: [&str; 2] = ["packet", "tables"];

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What people call it.
    pub name: String,
    /// Whether it needs kube-apiserver and etcd.
    pub needs_api: bool,
    /// Whether it needs the `affinity` binary, or at least the BPF object, before it compiles.
    pub needs_build: bool,
    /// What it does.
    pub action: Action,
}

/// What a step does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Compiles the object and the daemon.
    Build,
    /// Runs the checkout's cargo with these arguments.
    Cargo(&'static [&'static str]),
    /// Runs clippy of the BPF toolchain over the datapath.
    ClippyBpf,
    /// Runs cargo-deny where it is installed.
    Deny,
    /// Runs `cargo test` with these arguments and counts its cases.
    Tests(&'static [&'static str]),
    /// Has the kernel load the BPF programs, and holds what it makes of them against what was written down.
    Programs,
    /// Compiles a suite of the `tests` crate as whoever we are, and runs it as root.
    Suite,
    /// Compiles suites as whoever we are, and runs them in a virtual machine on an older kernel.
    Kernel,
    /// Compiles the demonstration as whoever we are, and does its tour as root.
    Demo,
    /// Builds the image, and runs the core of the cluster's suite on a cluster of its own, as root.
    Cluster,
}

/// All steps: the quick ones first, and last those that wait for the API server to be built.
pub fn all() -> Result<Vec<Step>> {
    let directory = workspace::root().join("tests/tests");
    let mut files = Vec::new();
    for entry in fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // A suite of several files is a directory.
        files.push(if entry.path().join("main.rs").exists() { format!("{name}.rs") } else { name });
    }
    Ok(list(&files))
}

fn list(suite_files: &[String]) -> Vec<Step> {
    let before = |name: &str, action| step(name, false, action);
    let after = |name: &str, action| step(name, true, action);
    let mut steps = vec![
        before("fmt", Action::Cargo(&["fmt", "--all", "--check"])),
        before("build", Action::Build),
        after(
            "clippy",
            Action::Cargo(&[
                "clippy",
                "--workspace",
                "--exclude=affinity-ebpf",
                "--all-targets",
                "--all-features",
                "--",
                "--deny=warnings",
            ]),
        ),
        after("clippy-bpf", Action::ClippyBpf),
        after(
            "doc",
            Action::Cargo(&[
                "doc",
                "--config=build.rustdocflags=['--deny=warnings']",
                "--workspace",
                "--exclude=affinity-ebpf",
                "--no-deps",
                "--all-features",
            ]),
        ),
        before("deny", Action::Deny),
        after("common", Action::Tests(&["--package=affinity-common", "--all-features"])),
        after("user", Action::Tests(&["--package=affinity-user"])),
        after("harness", Action::Tests(&["--package=affinity-tests", "--lib", "--bins"])),
        before("xtask", Action::Tests(&["--package=xtask"])),
        after("programs", Action::Programs),
    ];
    let mut suites: Vec<&str> = suite_files.iter().filter_map(|file| file.strip_suffix(".rs")).collect();
    suites.sort_unstable();
    let (with_api, without_api): (Vec<&str>, Vec<&str>) = suites.iter().partition(|name| API_SUITES.contains(name));
    steps.extend(without_api.iter().map(|name| after(name, Action::Suite)));
    steps.push(after(&format!("kernel-{KERNEL}"), Action::Kernel));
    steps.push(after("demo", Action::Demo));
    steps.extend(with_api.iter().map(|name| Step { needs_api: true, ..after(name, Action::Suite) }));
    steps.push(after(CLUSTER, Action::Cluster));
    steps
}

fn step(name: &str, needs_build: bool, action: Action) -> Step {
    Step { name: name.to_owned(), needs_api: false, needs_build, action }
}

/// Fails where one of the names is no step's.
pub fn check_names(steps: &[Step], names: &[String]) -> Result<()> {
    for name in names {
        let known: Vec<&str> = steps.iter().map(|step| step.name.as_str()).collect();
        if name != API && !known.contains(&name.as_str()) {
            anyhow::bail!("no step is called `{name}`: there are {}", known.join(", "));
        }
    }
    Ok(())
}

/// Takes the steps that were asked for (all where none was), and the build where one of them needs it.
pub fn select(steps: Vec<Step>, asked: &[String]) -> Vec<Step> {
    if asked.is_empty() {
        return steps;
    }
    let is_asked = |step: &Step| asked.iter().any(|name| step.is_called(name));
    let build = steps.iter().any(|step| is_asked(step) && step.needs_build);
    steps.into_iter().filter(|step| is_asked(step) || (build && step.action == Action::Build)).collect()
}

impl Step {
    /// Whether the name is this step's or that of a group which it is in.
    pub fn is_called(&self, name: &str) -> bool {
        self.name == name || (name == API && self.needs_api)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps() -> Vec<Step> {
        list(&["packet.rs", "api.rs", "lab_api.rs", "lab.rs", "common"].map(str::to_owned))
    }

    fn names(steps: &[Step]) -> Vec<&str> {
        steps.iter().map(|step| step.name.as_str()).collect()
    }

    #[test]
    fn every_suite_is_a_step_and_those_with_an_api_server_come_last() {
        let steps = steps();
        let last = ["programs", "lab", "packet", "kernel-6.1", "demo", "api", "lab_api", "cluster"];
        assert_eq!(names(&steps)[10..], last);
        assert!(steps.iter().filter(|step| step.needs_api).all(|step| step.action == Action::Suite));
    }

    #[test]
    fn the_build_comes_with_what_needs_it() {
        let select = |asked: &[&str]| select(steps(), &asked.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        assert_eq!(names(&select(&["packet"])), ["build", "packet"]);
        assert_eq!(names(&select(&["fmt"])), ["fmt"]);
        assert_eq!(names(&select(&["api"])), ["build", "api", "lab_api"]);
        assert_eq!(select(&[]), steps());
    }

    #[test]
    fn unknown_names_are_refused_with_the_known_ones() {
        assert!(check_names(&steps(), &["packet".to_owned(), "api".to_owned()]).is_ok());
        let error = check_names(&steps(), &["pakcet".to_owned()]).expect_err("no such step").to_string();
        assert!(error.contains("`pakcet`") && error.contains("packet, kernel-6.1, demo"), "{error}");
    }
}
