//! The `affinity` binary in a lab's node: the daemon, and the verbs that people type beside it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::objects::{Document, to_yaml};
use crate::process::{Place, Process};
use crate::topology::Node;
use crate::wait;

/// The environment variable that names the binary; by default it is the release binary of this checkout.
pub const BINARY: &str = "AFFINITY_BIN";
/// Where the daemon pins unless told otherwise.
pub const PIN_DIR: &str = "/sys/fs/bpf/affinity";
/// How long a daemon may take until it serves.
const READY: Duration = Duration::from_secs(30);
/// How long a daemon may take to end when it is asked to.
const ENDS: Duration = Duration::from_secs(10);

/// Where a daemon has its objects from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// `--source-dir`
    Directory(PathBuf),
    /// `--kubeconfig`; the server must be reachable from the node: see [`crate::apiserver::ApiServer::proxy`].
    Kubeconfig(PathBuf),
}

/// How a daemon is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DaemonOptions {
    /// Where its objects are from.
    pub source: Source,
    /// `--pin-dir`
    pub pin_dir: PathBuf,
    /// `--interface`, each; by default all pods of a lab.
    pub interfaces: Vec<String>,
    /// `--cgroup`; without one `--socket-lb off`, as the machine's own sockets are no lab's business.
    pub cgroup: Option<PathBuf>,
    /// More arguments of `affinity run` (`--attach clsact`).
    pub arguments: Vec<String>,
    /// The capabilities that it has of root's (`bpf`), as in a container; by default all.
    pub capabilities: Option<Vec<String>>,
    /// More environment, such as the log's filter.
    pub environment: Vec<(String, String)>,
    /// The binary; by default what [`binary`] finds.
    pub binary: Option<PathBuf>,
}

impl DaemonOptions {
    /// The usual ones.
    pub fn new(source: Source) -> Self {
        Self {
            source,
            pin_dir: PIN_DIR.into(),
            interfaces: vec!["cli*".to_owned(), "be*".to_owned()],
            cgroup: None,
            arguments: Vec::new(),
            capabilities: None,
            environment: Vec::new(),
            binary: None,
        }
    }

    /// With more arguments of `affinity run`.
    #[must_use]
    pub fn arguments<'a>(mut self, arguments: impl IntoIterator<Item = &'a str>) -> Self {
        self.arguments.extend(arguments.into_iter().map(str::to_owned));
        self
    }
}

/// A daemon in a node. It is killed when this is dropped; what it pinned stays until the node goes.
#[derive(Debug)]
pub struct Daemon {
    options: DaemonOptions,
    cli: Cli,
    process: Option<Process>,
    directory: TempDir,
}

impl Daemon {
    /// Starts a daemon and waits until it serves.
    ///
    /// # Errors
    /// Where it does not; the end of its log is in the error.
    pub fn start(node: &Node, options: DaemonOptions) -> Result<Self> {
        let mut daemon = Self::stopped(node, options)?;
        daemon.resume()?;
        Ok(daemon)
    }

    /// Prepares a daemon that is started later, by [`Daemon::resume`] or [`Daemon::launch`].
    ///
    /// # Errors
    /// Where there is no binary.
    pub fn stopped(node: &Node, options: DaemonOptions) -> Result<Self> {
        let binary = match &options.binary {
            Some(binary) => binary.clone(),
            None => binary()?,
        };
        let cli = Cli { binary, place: node.place(), pin_dir: options.pin_dir.clone() };
        let directory = tempfile::Builder::new().prefix("affinity-daemon-").tempdir()?;
        Ok(Self { options, cli, process: None, directory })
    }

    /// Starts it (again), and waits until it serves.
    ///
    /// # Errors
    /// Where it runs already, or does not get that far; the end of its log is in the error.
    pub fn resume(&mut self) -> Result<()> {
        self.launch()?;
        self.wait_ready(READY)
    }

    /// Starts it (again), and waits for nothing.
    ///
    /// # Errors
    /// Where it runs already.
    pub fn launch(&mut self) -> Result<()> {
        ensure!(self.process.is_none(), "the daemon is running");
        if let Some(binary) = &self.options.binary {
            self.cli.binary.clone_from(binary);
        }
        let mut command = self.cli.command(&["run"]);
        match &self.options.source {
            Source::Directory(path) => command.arg("--source-dir").arg(path),
            Source::Kubeconfig(path) => command.arg("--kubeconfig").arg(path),
        };
        for pattern in &self.options.interfaces {
            command.arg("--interface").arg(pattern);
        }
        match &self.options.cgroup {
            Some(path) => command.arg("--cgroup").arg(path),
            None => command.args(["--socket-lb", "off"]),
        };
        command.args(&self.options.arguments);
        if let Some(capabilities) = &self.options.capabilities {
            command = bounded(&command, capabilities);
        }
        command.envs(self.options.environment.iter().map(|(name, value)| (name, value)));
        self.process = Some(Process::start(command, &self.cli.place, Some(&self.log_path()))?);
        Ok(())
    }

    /// Waits until it has synced, and has attached to the interfaces that are there.
    ///
    /// # Errors
    /// After `timeout`, or when it ends before; the end of its log is in the error.
    pub fn wait_ready(&mut self, timeout: Duration) -> Result<()> {
        let process = self.process.as_mut().context("the daemon is not running")?;
        let cli = &self.cli;
        let ready = wait::until_true("a ready daemon", timeout, || {
            process.must_run()?;
            // Before it has pinned anything there is nothing to tell.
            Ok(cli.json(&["status"]).is_ok_and(|status| is_ready(&status, process.pid())))
        });
        ready.with_context(|| process.log_tail())
    }

    /// Kills it by SIGKILL, as a crash does: it can undo nothing.
    ///
    /// # Errors
    /// Where it is not running.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.process.take().context("the daemon is not running")?.kill()
    }

    /// Asks it to end (SIGTERM), as an upgrade does, and waits.
    ///
    /// # Errors
    /// Where it is not running, or goes on for more than ten seconds.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.process.take().context("the daemon is not running")?.terminate(ENDS)
    }

    /// Waits for it to end by itself, for a daemon that cannot run.
    ///
    /// # Errors
    /// Where it is not running, or goes on for more than ten seconds.
    pub fn wait_end(&mut self) -> Result<ExitStatus> {
        self.process.take().context("the daemon is not running")?.wait(ENDS)
    }

    /// The process, for signals and `nsenter`.
    pub fn process(&mut self) -> Option<&mut Process> {
        self.process.as_mut()
    }

    /// How it is run; changes are for its next life.
    pub fn options(&mut self) -> &mut DaemonOptions {
        &mut self.options
    }

    /// The verbs, in the daemon's node and on its pins; they work without it too.
    pub fn cli(&self) -> &Cli {
        &self.cli
    }

    /// Everything it wrote, over all its lives.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// The file of [`Daemon::log`].
    pub fn log_path(&self) -> PathBuf {
        self.directory.path().join("log")
    }
}

/// What `affinity status -o json` says of a daemon that serves: all its sources have told everything once, the maps hold
/// it, and the interfaces that were there have the programs.
fn is_ready(status: &Value, pid: u32) -> bool {
    let daemon = status.get("daemon").unwrap_or(status);
    let ours = daemon.get("pid").is_none_or(|told| told.as_u64() == Some(pid.into()));
    ours && daemon.get("ready").and_then(Value::as_bool) == Some(true)
}

/// The verbs of the binary, run in a place on the pins of one directory.
#[derive(Clone, Debug)]
pub struct Cli {
    binary: PathBuf,
    place: Place,
    pin_dir: PathBuf,
}

impl Cli {
    /// The verbs in a node, on the usual pins.
    ///
    /// # Errors
    /// Where there is no binary.
    pub fn new(node: &Node) -> Result<Self> {
        Ok(Self { binary: binary()?, place: node.place(), pin_dir: PIN_DIR.into() })
    }

    /// Runs a verb with `-o json` and parses what it prints.
    ///
    /// # Errors
    /// Where it fails, or prints something else; its standard error is in the error.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.text(&[arguments, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("affinity {}: {text}", arguments.join(" ")))
    }

    /// Runs a verb and returns what it prints.
    ///
    /// # Errors
    /// Where it fails; its standard error is in the error.
    pub fn text(&self, arguments: &[&str]) -> Result<String> {
        let output = self.run(arguments)?;
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr);
            bail!("affinity {}: {}: {}", arguments.join(" "), output.status, error.trim_end());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Runs a verb, and returns how it ended and all that it wrote.
    ///
    /// # Errors
    /// Where it cannot be run.
    pub fn run(&self, arguments: &[&str]) -> Result<Output> {
        Process::run(self.command(arguments), &self.place)
    }

    /// Starts a verb that goes on (`monitor`) with its output in a file, line by line.
    ///
    /// # Errors
    /// Where it cannot be run.
    pub fn start(&self, arguments: &[&str], log: &Path) -> Result<Process> {
        Process::start(self.command(arguments), &self.place, Some(log))
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(arguments).arg("--pin-dir").arg(&self.pin_dir);
        command
    }
}

/// A command of root's that has no more than so many capabilities, nor gets them by what it starts.
fn bounded(command: &Command, capabilities: &[String]) -> Command {
    let set = capabilities.join(",+");
    let mut bounded = Command::new("setpriv");
    bounded.arg(format!("--bounding-set=-all,+{set}")).arg("--").arg(command.get_program()).args(command.get_args());
    bounded
}

/// The `affinity` binary: what `AFFINITY_BIN` names, otherwise the release binary of this checkout.
///
/// # Errors
/// Where there is none.
pub fn binary() -> Result<PathBuf> {
    let path = match std::env::var_os(BINARY) {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/affinity"),
    };
    fs::canonicalize(&path).with_context(|| format!("{}: build it by `cargo xtask build`", path.display()))
}

/// A directory of YAML for `--source-dir`; gone when dropped.
#[derive(Debug)]
pub struct SourceDir {
    directory: TempDir,
}

impl SourceDir {
    /// An empty one.
    ///
    /// # Errors
    /// Where there is no place for it.
    pub fn new() -> Result<Self> {
        Ok(Self { directory: tempfile::Builder::new().prefix("affinity-source-").tempdir()? })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Itself as a source.
    pub fn source(&self) -> Source {
        Source::Directory(self.path().to_owned())
    }

    /// Writes objects to `NAME.yaml`, which changes at once, as when an editor saves it.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn write(&self, name: &str, objects: &[&dyn Document]) -> Result<()> {
        self.write_text(name, &to_yaml(objects)?)
    }

    /// Writes any text to `NAME.yaml`, which changes at once.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn write_text(&self, name: &str, text: &str) -> Result<()> {
        let new = self.path().join(format!(".{name}.new"));
        fs::write(&new, text)?;
        fs::rename(&new, self.path().join(format!("{name}.yaml")))?;
        Ok(())
    }

    /// Deletes `NAME.yaml`.
    ///
    /// # Errors
    /// Where there is none.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.path().join(format!("{name}.yaml"));
        fs::remove_file(&path).with_context(|| path.display().to_string())
    }
}
