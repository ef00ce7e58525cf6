//! The kube-apiserver and etcd of the API tests: from `KUBEBUILDER_ASSETS`, from the cache, or built into it once.

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

/// The environment variable that names the directory with the two programs.
pub const VARIABLE: &str = "KUBEBUILDER_ASSETS";
const PROGRAMS: [&str; 2] = ["etcd", "kube-apiserver"];
/// How often a build says that it is still going on where there is no terminal for a spinner.
const HEARTBEAT: Duration = Duration::from_mins(1);

/// The directory with the two programs, or what is on the way to it.
pub enum Assets {
    /// They are there.
    Ready(PathBuf),
    /// They are being built, at low priority, beside everything else.
    Building(Build),
    /// They are not there and cannot be built, and why.
    Missing(String),
}

/// A build in the background.
pub struct Build {
    thread: JoinHandle<Result<PathBuf>>,
    /// Packages compiled so far.
    compiled: Arc<AtomicUsize>,
    started: Instant,
}

impl Assets {
    /// Finds the programs, or begins to build them.
    pub fn find_or_build() -> Self {
        find_or_build().unwrap_or_else(|error| Self::Missing(format!("{error:#}")))
    }

    /// The directory with the programs; waits for their build.
    pub fn directory(&mut self) -> Result<PathBuf> {
        let done = match std::mem::replace(self, Self::Missing(String::new())) {
            Self::Building(build) => build.wait(),
            Self::Ready(directory) => Ok(directory),
            Self::Missing(why) => Err(anyhow!(why)),
        };
        *self = match &done {
            Ok(directory) => Self::Ready(directory.clone()),
            Err(error) => Self::Missing(format!("{error:#}")),
        };
        done
    }
}

fn find_or_build() -> Result<Assets> {
    if let Some(directory) = env::var_os(VARIABLE) {
        // The suites run in a directory of their own.
        let directory = path::absolute(directory).context(VARIABLE)?;
        if let Some(missing) = missing(&directory) {
            bail!("{VARIABLE} is {}, which has no {missing}", directory.display());
        }
        return Ok(Assets::Ready(directory));
    }
    let module = workspace::root().join("tests/kubernetes");
    let file = module.join("go.mod");
    let requirements = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let version = |name| version(&requirements, name).with_context(|| format!("{} requires no {name}", file.display()));
    let (kubernetes, etcd) = (version("k8s.io/kubernetes")?, version("go.etcd.io/etcd/server/v3")?);
    let cached = workspace::cache()?.join(format!("kubernetes/{kubernetes}-etcd-{etcd}"));
    if missing(&cached).is_none() {
        return Ok(Assets::Ready(cached));
    }
    let go =
        machine::find_program("go").or_else(|| Some("/usr/local/go/bin/go".into()).filter(|go: &PathBuf| go.is_file()));
    let go = go.with_context(|| {
        format!("no kube-apiserver and etcd: set {VARIABLE} to their directory, or install Go (https://go.dev/dl) to build them")
    })?;
    say::progress(
        "Building",
        &format!(
            "kube-apiserver {kubernetes} and etcd {etcd} beside the tests: about 10 minutes, once ({})",
            cached.display()
        ),
    );
    let compiled = Arc::new(AtomicUsize::new(0));
    let flags = linker_flags(&kubernetes);
    let counter = compiled.clone();
    let thread = thread::spawn(move || build(&go, &module, &flags, &cached, &counter));
    Ok(Assets::Building(Build { thread, compiled, started: Instant::now() }))
}

impl Build {
    fn wait(self) -> Result<PathBuf> {
        let bar = say::spinner("building kube-apiserver and etcd");
        let mut said = Instant::now();
        while !self.thread.is_finished() {
            let compiled = self.compiled.load(Ordering::Relaxed);
            bar.set_message(format!("{compiled} packages compiled"));
            if !stderr().is_terminal() && said.elapsed() > HEARTBEAT {
                said = Instant::now();
                let since = say::duration(self.started.elapsed());
                say::progress("Waiting", &format!("for kube-apiserver: {compiled} packages compiled in {since}"));
            }
            thread::sleep(Duration::from_millis(200));
        }
        bar.finish_and_clear();
        self.thread.join().map_err(|_| anyhow!("the build of kube-apiserver panicked"))?
    }
}

/// Builds into a directory of our own, so that two checkouts that do so at a time do not meet.
fn build(go: &Path, module: &Path, flags: &str, cached: &Path, compiled: &AtomicUsize) -> Result<PathBuf> {
    let started = Instant::now();
    let new = cached.with_added_extension(format!("new-{}", std::process::id()));
    fs::create_dir_all(&new).with_context(|| new.display().to_string())?;
    let result =
        compile(go, module, "k8s.io/kubernetes/cmd/kube-apiserver", flags, &new.join("kube-apiserver"), compiled)
            .and_then(|()| compile(go, module, "go.etcd.io/etcd/server/v3", "-s -w", &new.join("etcd"), compiled));
    if let Err(error) = result {
        let _ = fs::remove_dir_all(&new);
        return Err(error);
    }
    if fs::rename(&new, cached).is_err() {
        // Another checkout was quicker, or half of it was there.
        if missing(cached).is_some() {
            fs::remove_dir_all(cached).with_context(|| cached.display().to_string())?;
            fs::rename(&new, cached).with_context(|| cached.display().to_string())?;
        } else {
            fs::remove_dir_all(&new).with_context(|| new.display().to_string())?;
        }
    }
    say::progress("Finished", &format!("kube-apiserver and etcd in {}", say::duration(started.elapsed())));
    Ok(cached.to_owned())
}

fn compile(go: &Path, module: &Path, package: &str, flags: &str, output: &Path, compiled: &AtomicUsize) -> Result<()> {
    let mut command = Command::new("nice");
    command.args(["-n", "10"]).arg(go).args(["build", "-v", "-ldflags", flags, "-o"]).arg(output).arg(package);
    command.env("CGO_ENABLED", "0").env("GOFLAGS", "-buildvcs=false -trimpath -mod=readonly").current_dir(module);
    process::watched(command, |_| {
        compiled.fetch_add(1, Ordering::Relaxed);
    })
}

/// What `kube-apiserver --version` and `/version` tell, as Kubernetes' own build sets it.
fn linker_flags(version: &str) -> String {
    let mut numbers = version.trim_start_matches('v').split('.');
    let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    let values = [("gitVersion", version), ("gitMajor", major), ("gitMinor", minor), ("gitTreeState", "clean")];
    let packages = ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"];
    let set = packages.map(|package| values.map(|(name, value)| format!("-X {package}.{name}={value}")).join(" "));
    format!("-s -w {}", set.join(" "))
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

fn missing(directory: &Path) -> Option<&'static str> {
    PROGRAMS.into_iter().find(|program| !machine::is_executable(&directory.join(program)))
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
    fn the_checkout_requires_both() {
        let file = workspace::root().join("tests/kubernetes/go.mod");
        let requirements = fs::read_to_string(file).expect("go.mod is there");
        assert!(version(&requirements, "k8s.io/kubernetes").is_some());
        assert!(version(&requirements, "go.etcd.io/etcd/server/v3").is_some());
    }
}
