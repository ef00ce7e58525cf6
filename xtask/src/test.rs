//! `cargo xtask test`: everything that CI holds the project to, by one command.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, anyhow};

use crate::{
    artifacts,
    assets::{self, Assets, Set},
    build::{self, Profile},
    cargo,
    cases::{Cases, Ran},
    cluster::Cluster,
    kernel, machine,
    outcome::{self, Counts, Outcome, Report},
    process, programs, say, setup,
    steps::{self, Action, Step},
    suites, toolchain, workspace,
};

/// Run every check and test; install what they need
///
/// The steps: fmt, build, clippy, clippy-bpf, doc, deny, common, user, harness, xtask, programs (whether one has grown by a
/// fifth), the suites of tests/tests (each by its file's name), kernel-6.1 (suites on the oldest kernel that is supported, in
/// a virtual machine), demo, and cluster (the core of `cargo xtask cluster test`). The API tests run the kube-apiserver and
/// etcd of `KUBEBUILDER_ASSETS`, or build them once, and the cluster's programs too, which takes about 15 minutes, into
/// ~/.cache/affinity. The last line of the output sums all test cases up.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cargo xtask test                # everything\n  \
                        cargo xtask test packet lab     # these steps only\n  \
                        cargo xtask test --kernel 6.1   # on an older kernel, in a virtual machine\n  \
                        cargo xtask test --without api  # all but what needs an API server")]
pub struct Args {
    /// The steps to run [default: all]
    #[arg(value_name = "STEP")]
    only: Vec<String>,
    /// Leave a step out (`api`: all that need an API server); the summary says so
    #[arg(long, value_name = "STEP")]
    without: Vec<String>,
    /// Run the steps of an older kernel in a virtual machine, and no others
    #[arg(long, value_name = "VERSION", value_parser = [steps::KERNEL], conflicts_with = "only")]
    kernel: Option<String>,
    /// Stop at the first step that fails
    #[arg(long)]
    fail_fast: bool,
}

/// Runs the verb.
pub fn verb(args: &Args) -> Result<()> {
    let steps = steps::all()?;
    let only: Vec<String> = args.kernel.iter().map(|version| format!("kernel-{version}")).collect();
    let only = if only.is_empty() { &args.only } else { &only };
    steps::check_names(&steps, only)?;
    steps::check_names(&steps, &args.without)?;
    let steps = steps::select(steps, only);
    let is_left_out = |step: &Step| args.without.iter().any(|name| step.is_called(name));
    setup::tools()?;
    let wanted = |needs: fn(&Step) -> bool| steps.iter().any(|step| needs(step) && !is_left_out(step));
    let mut run = Run { api: None, cluster: None, daemon: None };
    let cluster = wanted(|step| step.action == Action::Cluster);
    if cluster {
        run.cluster = Some(Assets::find_or_build(Set::Cluster));
    }
    // The cluster's are those of the API tests, too, unless these are to run others.
    if wanted(|step| step.needs_api) && (!cluster || env::var_os(assets::VARIABLE).is_some()) {
        run.api = Some(Assets::find_or_build(Set::Api));
    }
    let mut outcomes: Vec<Outcome> = Vec::new();
    for step in &steps {
        outcomes.push(if is_left_out(step) {
            Outcome::left_out(&step.name, "by --without")
        } else if args.fail_fast && outcomes.iter().any(Outcome::failed) {
            Outcome::left_out(&step.name, "a step before it failed (--fail-fast)")
        } else if step.needs_build && run.daemon.is_none() {
            Outcome::left_out(&step.name, "the build failed")
        } else {
            run.step(step)
        });
    }
    if outcomes.iter().any(|outcome| !outcome.passes.is_empty()) {
        outcomes.push(cases(&outcomes, only.is_empty() && args.without.is_empty()));
    }
    let sum = outcome::print_summary(&outcomes);
    if sum.failed > 0 {
        // The summary has said all, and its last line is to stay the last.
        std::process::exit(1);
    }
    Ok(())
}

/// Prints the table of cases with what the steps have shown of it. `whole`: all of it was to be run.
fn cases(outcomes: &[Outcome], whole: bool) -> Outcome {
    let started = Instant::now();
    let mut ran = Ran::new();
    for outcome in outcomes {
        let of = |name: &String| (outcome.name.clone(), name.clone());
        ran.extend(outcome.passes.iter().map(|name| (of(name), true)));
        ran.extend(outcome.failures.iter().map(|name| (of(name), false)));
    }
    let (failures, why) = match Cases::read() {
        Ok(cases) => (cases.print(&ran, whole), None),
        Err(error) => (vec!["the table".to_owned()], Some(format!("{error:#}"))),
    };
    let counts = match u64::try_from(failures.len()).unwrap_or(u64::MAX) {
        0 => Counts { passed: 1, ..Counts::default() },
        failed => Counts { failed, ..Counts::default() },
    };
    Outcome { name: "cases".to_owned(), counts, failures, passes: Vec::new(), why, time: started.elapsed() }
}

/// What the steps share.
struct Run {
    /// kube-apiserver and etcd, where a step needs them and they are not the cluster's.
    api: Option<Assets>,
    /// The cluster's programs, where a step needs them.
    cluster: Option<Assets>,
    /// The `affinity` binary, once it is built.
    daemon: Option<PathBuf>,
}

/// How a step ended, where it could be run at all.
enum Ended {
    /// It has cases of its own.
    Cases(Report, Result<()>),
    /// It is one case.
    Whole(Result<()>),
    /// It could not be run here, and need not.
    LeftOut(String),
}

impl Run {
    fn step(&mut self, step: &Step) -> Outcome {
        say::progress("Testing", &step.name);
        let started = Instant::now();
        let (report, result) = match self.act(step).unwrap_or_else(|error| Ended::Whole(Err(error))) {
            Ended::LeftOut(why) => return Outcome::left_out(&step.name, &why),
            Ended::Cases(report, Ok(())) if report.counts == Counts::default() => {
                (report, Err(anyhow!("it has no test")))
            }
            Ended::Cases(report, result) => (report, result),
            Ended::Whole(result) => {
                let passed = u64::from(result.is_ok());
                (Report { counts: Counts { passed, ..Counts::default() }, ..Report::default() }, result)
            }
        };
        let Report { mut counts, failures, passes } = report;
        // A suite that ends before its summary, or does not compile, has failed though it names no case.
        let why = match result {
            Err(error) if counts.failed == 0 => {
                say::error(&error);
                counts.failed = 1;
                Some(format!("{error:#}"))
            }
            _ => None,
        };
        Outcome { name: step.name.clone(), counts, failures, passes, why, time: started.elapsed() }
    }

    fn act(&mut self, step: &Step) -> Result<Ended> {
        Ok(match step.action {
            Action::Build => Ended::Whole(self.build()),
            Action::Cargo(arguments) => {
                let mut cargo = cargo::host();
                cargo.args(arguments);
                Ended::Whole(process::run(cargo))
            }
            Action::ClippyBpf => Ended::Whole(toolchain::find_or_install()?.clippy().and_then(process::run)),
            Action::Deny => deny(),
            Action::Tests(arguments) => {
                let mut cargo = cargo::host();
                cargo.args(["test", "--no-fail-fast"]).args(arguments);
                counted(cargo)?
            }
            Action::Programs => Ended::Cases(programs::check(self.daemon()?)?, Ok(())),
            Action::Suite => {
                let executable = compile_suite(&step.name)?;
                let mut suite = suites::command(&executable, self.daemon()?);
                let package = workspace::root().join("tests");
                suite.env("CARGO_MANIFEST_DIR", &package).current_dir(package);
                if step.needs_api {
                    let assets = self.api.as_mut().or(self.cluster.as_mut()).context("no API server was looked for")?;
                    suite.env(assets::VARIABLE, assets.directory(Set::Api)?);
                }
                counted(machine::as_root(suite)?)?
            }
            Action::Kernel => on_kernel()?,
            Action::Demo => {
                let [demo] = build::binaries([("affinity-tests", "demo")], Profile::Debug)?;
                let daemon = self.daemon()?;
                let mut tour = suites::command(&demo, daemon);
                tour.arg("--once");
                Ended::Whole(process::run(machine::as_root(tour)?))
            }
            Action::Cluster => {
                let assets = self.cluster.as_mut().context("the cluster's programs were not looked for")?;
                let cluster = Cluster::prepare(assets)?;
                let suite = machine::as_root(cluster.suite(true)?)?;
                let running = cluster.up_for_now(false)?;
                let ended = counted(suite)?;
                running.end()?;
                ended
            }
        })
    }

    fn build(&mut self) -> Result<()> {
        self.daemon = Some(build::daemon(Profile::Release)?);
        Ok(())
    }

    fn daemon(&self) -> Result<&Path> {
        self.daemon.as_deref().context("the `affinity` binary is not built")
    }
}

/// Runs a test harness: its output goes on to ours and is counted.
fn counted(mut command: Command) -> Result<Ended> {
    let mut report = Report::default();
    let status = process::each_line(&mut command, |line| {
        println!("{line}");
        report.line(line);
    })?;
    Ok(Ended::Cases(report, process::check(status, &command)))
}

/// Runs suites in a virtual machine.
fn on_kernel() -> Result<Ended> {
    if let Some(why) = kernel::obstacle() {
        return Ok(Ended::LeftOut(why.to_owned()));
    }
    let mut suites = Vec::new();
    for name in steps::KERNEL_SUITES {
        suites.push((name, compile_suite(name)?));
    }
    let suites: Vec<(&str, &Path)> = suites.iter().map(|(name, path)| (*name, path.as_path())).collect();
    let mut report = Report::default();
    let result = kernel::run(steps::KERNEL, &suites, |line| {
        println!("{line}");
        report.line(line);
    });
    Ok(Ended::Cases(report, result))
}

fn compile_suite(name: &str) -> Result<PathBuf> {
    let mut cargo = cargo::host();
    cargo.args(["test", "--no-run", "--package=affinity-tests", "--test", name]);
    cargo.args(["--message-format", "json-render-diagnostics"]).stdin(Stdio::null());
    let built = artifacts::executables(&process::capture(cargo)?);
    let found = built.into_iter().find(|executable| executable.name == name);
    found.map(|executable| executable.path).with_context(|| format!("the tests crate has no suite `{name}`"))
}

fn deny() -> Ended {
    if machine::find_program("cargo-deny").is_none() {
        return Ended::LeftOut(
            "cargo-deny is not installed: `cargo install --locked cargo-deny` (takes minutes)".to_owned(),
        );
    }
    let mut cargo = cargo::host();
    cargo.args(["deny", "check", "bans", "licenses", "sources"]);
    Ended::Whole(process::run(cargo))
}
