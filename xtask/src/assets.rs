//! Kubernetes' own programs, for the API tests, the benchmark and the cluster: from `KUBEBUILDER_ASSETS`, from the cache, or
//! built into it once, program by program.

use std::{
    env, fs,
    io::{IsTerminal as _, stderr},
    path::{self, Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::{machine, process, say, workspace};

/// The environment variable that names a directory with the programs of the API tests.
pub const VARIABLE: &str = "KUBEBUILDER_ASSETS";
/// How often a build says that it is still going on where there is no terminal for a spinner.
const HEARTBEAT: Duration = Duration::from_mins(1);

/// A program that is built from Go modules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Program {
    name: &'static str,
    package: &'static str,
    module: Module,
}

/// Whose requirements fix a program's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Module {
    /// `tests/kubernetes`.
    Kubernetes,
    /// `tests/kubernetes/coredns`, which requires other versions of the same modules.
    CoreDns,
}

const fn kubernetes(name: &'static str, package: &'static str) -> Program {
    Program { name, package, module: Module::Kubernetes }
}

/// In the order in which they are built: the API tests are the first to wait. Each [`Set`] is some neighbours of them.
const PROGRAMS: [Program; 9] = [
    kubernetes("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
    kubernetes("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
    kubernetes("etcd", "go.etcd.io/etcd/server/v3"),
    kubernetes("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
    kubernetes("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
    kubernetes("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
    kubernetes("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
    kubernetes("agnhost", "k8s.io/kubernetes/test/images/agnhost"),
    Program { name: "coredns", package: "github.com/coredns/coredns", module: Module::CoreDns },
];

/// Who needs which of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Set {
    /// The API tests.
    Api,
    /// The control plane's benchmark: what the API tests need, and kube-proxy to be measured beside.
    Bench,
    /// The cluster.
    Cluster,
}

impl Set {
    fn programs(self) -> &'static [Program] {
        match self {
            Self::Api => &PROGRAMS[1..3],
            Self::Bench => &PROGRAMS[..3],
            Self::Cluster => &PROGRAMS[1..],
        }
    }

    fn users(self) -> &'static str {
        match self {
            Self::Api => "the API tests",
            Self::Bench => "the control plane's benchmark",
            Self::Cluster => "the cluster",
        }
    }
}

/// The programs, or what is on the way to them.
pub enum Assets {
    /// Those of a [`Set`] and maybe others are in the cache, or are being built into it, at low priority, beside everything
    /// else.
    Cached(Cache, Option<Build>),
    /// Those of the API tests or of the benchmark are there by the choice of whoever runs us.
    Given(PathBuf),
    /// They are not there and cannot be built, and why.
    Missing(String),
}

/// A build in the background.
pub struct Build {
    thread: JoinHandle<Result<()>>,
    /// Packages compiled so far.
    compiled: Arc<AtomicUsize>,
    started: Instant,
}

impl Assets {
    /// Finds the programs, or begins to build them.
    pub fn find_or_build(set: Set) -> Self {
        find_or_build(set).unwrap_or_else(|error| Self::Missing(format!("{error:#}")))
    }

    /// The directory with Kubernetes' programs of the set; waits for their build.
    pub fn directory(&mut self, set: Set) -> Result<PathBuf> {
        let error = match self {
            Self::Given(directory) => return Ok(directory.clone()),
            Self::Missing(why) => bail!("{why}"),
            Self::Cached(cache, build) => match wait(cache, build, set) {
                Ok(()) => return Ok(cache.kubernetes.clone()),
                Err(error) => error,
            },
        };
        *self = Self::Missing(format!("{error:#}"));
        Err(error)
    }

    /// Where `CoreDNS` is, once [`Assets::directory`] has waited for the cluster's programs.
    pub fn coredns(&self) -> Result<PathBuf> {
        match self {
            Self::Cached(cache, _) => Ok(cache.coredns.join("coredns")),
            Self::Given(_) | Self::Missing(_) => bail!("no CoreDNS was built"),
        }
    }
}

/// Where the programs are kept, by their versions.
#[derive(Clone, Debug)]
pub struct Cache {
    kubernetes: PathBuf,
    coredns: PathBuf,
    version: String,
}

impl Cache {
    /// By the versions that this checkout requires, whether they are there or not.
    pub fn find() -> Result<Self> {
        let module = Module::Kubernetes.directory();
        let (kubernetes, etcd) =
            (required(&module, "k8s.io/kubernetes")?, required(&module, "go.etcd.io/etcd/server/v3")?);
        let coredns = required(&Module::CoreDns.directory(), "github.com/coredns/coredns")?;
        let cache = workspace::cache()?;
        Ok(Self {
            kubernetes: cache.join(format!("kubernetes/{kubernetes}-etcd-{etcd}")),
            coredns: cache.join(format!("coredns/{coredns}")),
            version: kubernetes,
        })
    }

    /// The directory of Kubernetes' own programs and of etcd.
    pub fn kubernetes(&self) -> &Path {
        &self.kubernetes
    }

    fn path(&self, program: Program) -> PathBuf {
        let directory = match program.module {
            Module::Kubernetes => &self.kubernetes,
            Module::CoreDns => &self.coredns,
        };
        directory.join(program.name)
    }

    fn missing(&self, set: Set) -> Vec<Program> {
        let missing = |program: &Program| !machine::is_executable(&self.path(*program));
        set.programs().iter().copied().filter(missing).collect()
    }
}

impl Module {
    fn directory(self) -> PathBuf {
        let module = workspace::root().join("tests/kubernetes");
        match self {
            Self::Kubernetes => module,
            Self::CoreDns => module.join("coredns"),
        }
    }
}

fn find_or_build(set: Set) -> Result<Assets> {
    if set != Set::Cluster
        && let Some(directory) = env::var_os(VARIABLE)
    {
        // The suites run in a directory of their own.
        let directory = path::absolute(directory).context(VARIABLE)?;
        let missing = set.programs().iter().find(|program| !machine::is_executable(&directory.join(program.name)));
        if let Some(missing) = missing {
            bail!("{VARIABLE} is {}, which has no {}", directory.display(), missing.name);
        }
        return Ok(Assets::Given(directory));
    }
    let cache = Cache::find()?;
    let missing = cache.missing(set);
    if missing.is_empty() {
        return Ok(Assets::Cached(cache, None));
    }
    let go =
        machine::find_program("go").or_else(|| Some("/usr/local/go/bin/go".into()).filter(|go: &PathBuf| go.is_file()));
    let names = missing.iter().map(|program| program.name).collect::<Vec<_>>().join(", ");
    let go = go.with_context(|| {
        format!("{} need {names}: install Go (https://go.dev/dl) to build them from their modules", set.users())
    })?;
    say::progress(
        "Building",
        &format!(
            "{names} of Kubernetes {} for {}: up to {} minutes, once ({})",
            cache.version,
            set.users(),
            if set == Set::Cluster { 15 } else { 10 },
            cache.kubernetes.display()
        ),
    );
    let compiled = Arc::new(AtomicUsize::new(0));
    let thread = thread::spawn({
        let (cache, compiled) = (cache.clone(), compiled.clone());
        move || missing.into_iter().try_for_each(|program| build(&go, &cache, program, &compiled))
    });
    Ok(Assets::Cached(cache, Some(Build { thread, compiled, started: Instant::now() })))
}

/// Waits until the set's programs are in the cache.
fn wait(cache: &Cache, build: &mut Option<Build>, set: Set) -> Result<()> {
    let bar = say::spinner("building Kubernetes' programs");
    let mut said = Instant::now();
    loop {
        let missing = cache.missing(set);
        let Some(first) = missing.first() else {
            bar.finish_and_clear();
            return Ok(());
        };
        let running = build.take_if(|build| build.thread.is_finished());
        if let Some(ended) = running {
            bar.finish_and_clear();
            ended.thread.join().map_err(|_| anyhow!("the build of {} panicked", first.name))??;
            // All are there now, or were never asked for.
            return match cache.missing(set).first() {
                None => Ok(()),
                Some(missing) => Err(anyhow!("{} is gone from the cache again", missing.name)),
            };
        }
        let build = build.as_ref().with_context(|| format!("{} was not asked to be built", first.name))?;
        let compiled = build.compiled.load(Ordering::Relaxed);
        bar.set_message(format!("{}: {compiled} packages compiled", first.name));
        if !stderr().is_terminal() && said.elapsed() > HEARTBEAT {
            said = Instant::now();
            let since = say::duration(build.started.elapsed());
            say::progress("Waiting", &format!("for {}: {compiled} packages compiled in {since}", first.name));
        }
        thread::sleep(Duration::from_millis(200));
    }
}

/// Builds one program beside its place and renames it there, so that two checkouts that do so at a time do not meet.
fn build(go: &Path, cache: &Cache, program: Program, compiled: &AtomicUsize) -> Result<()> {
    let path = cache.path(program);
    if machine::is_executable(&path) {
        // Another checkout was quicker.
        return Ok(());
    }
    let started = Instant::now();
    let directory = path.parent().context("a program has no directory")?;
    fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    let new = path.with_added_extension(format!("new-{}", std::process::id()));
    let built = compile(go, cache, program, &new, compiled)
        .and_then(|()| fs::rename(&new, &path).with_context(|| path.display().to_string()));
    if built.is_err() {
        let _ = fs::remove_file(&new);
    } else {
        say::progress("Built", &format!("{} in {}", program.name, say::duration(started.elapsed())));
    }
    built
}

fn compile(go: &Path, cache: &Cache, program: Program, output: &Path, compiled: &AtomicUsize) -> Result<()> {
    let flags = if program.package.starts_with("k8s.io/kubernetes/cmd/") {
        linker_flags(&cache.version)
    } else {
        "-s -w".to_owned()
    };
    let mut command = Command::new("nice");
    command.args(["-n", "10"]).arg(go).args(["build", "-v", "-ldflags", &flags, "-o"]).arg(output).arg(program.package);
    command.env("CGO_ENABLED", "0").env("GOFLAGS", "-buildvcs=false -trimpath -mod=readonly");
    command.current_dir(program.module.directory());
    process::watched(command, |_| {
        compiled.fetch_add(1, Ordering::Relaxed);
    })
}

/// What a program's `--version` and the API server's `/version` tell, as Kubernetes' own build sets it.
fn linker_flags(version: &str) -> String {
    let mut numbers = version.trim_start_matches('v').split('.');
    let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    let values = [("gitVersion", version), ("gitMajor", major), ("gitMinor", minor), ("gitTreeState", "clean")];
    let packages = ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"];
    let set = packages.map(|package| values.map(|(name, value)| format!("-X {package}.{name}={value}")).join(" "));
    format!("-s -w {}", set.join(" "))
}

/// The version of a module that the go.mod in the directory requires.
fn required(directory: &Path, module: &str) -> Result<String> {
    let file = directory.join("go.mod");
    let requirements = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    version(&requirements, module).with_context(|| format!("{} requires no {module}", file.display()))
}

/// The version of a module in the requirements of a go.mod.
fn version(requirements: &str, module: &str) -> Option<String> {
    requirements
        .lines()
        .find_map(|line| {
            let mut words = line.trim().trim_start_matches("require ").split_whitespace();
            (words.next()? == module).then(|| words.next().filter(|version| version.starts_with('v'))).flatten()
        })
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GO_MOD: &str = "module x\n\ntool (\n\tk8s.io/kubernetes/cmd/kube-apiserver\n)\n\nrequire (\n\
                          \tgo.etcd.io/etcd/server/v3 v3.6.4 // indirect\n\tk8s.io/kubernetes v1.37.2 // indirect\n)\n\
                          replace (\n\tk8s.io/api => k8s.io/api v0.37.2\n)\n";

    #[test]
    fn versions_come_from_the_requirements() {
        assert_eq!(version(GO_MOD, "k8s.io/kubernetes").as_deref(), Some("v1.37.2"));
        assert_eq!(version(GO_MOD, "go.etcd.io/etcd/server/v3").as_deref(), Some("v3.6.4"));
        assert_eq!(version(GO_MOD, "k8s.io/api"), None);
        assert_eq!(version("require k8s.io/kubernetes v1.37.2", "k8s.io/kubernetes").as_deref(), Some("v1.37.2"));
    }

    #[test]
    fn the_api_server_knows_its_version() {
        let flags = linker_flags("v1.37.2");
        assert!(flags.contains("-X k8s.io/component-base/version.gitVersion=v1.37.2"), "{flags}");
        assert!(flags.contains("-X k8s.io/client-go/pkg/version.gitMinor=37"), "{flags}");
    }

    #[test]
    fn the_checkout_requires_every_program() {
        Cache::find().expect("the modules require what is built");
        for program in PROGRAMS {
            let file = program.module.directory().join("go.mod");
            let requirements = fs::read_to_string(file).expect("go.mod is there");
            assert!(requirements.lines().any(|line| line.trim_start_matches("tool").trim() == program.package));
        }
    }

    #[test]
    fn a_set_is_built_before_those_that_need_more() {
        let names = |set: Set| set.programs().iter().map(|program| program.name).collect::<Vec<_>>();
        assert_eq!(names(Set::Api), ["kube-apiserver", "etcd"]);
        assert_eq!(names(Set::Bench), ["kube-proxy", "kube-apiserver", "etcd"]);
        assert!(names(Set::Cluster).contains(&"coredns") && names(Set::Cluster).starts_with(&names(Set::Api)));
    }
}
