//! Child processes that live in a lab's namespaces and never outlive this process.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sched::CloneFlags;
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use crate::mountns::MountNs;
use crate::netns::{Netns, on_thread};
use crate::{sys, wait};

/// The namespaces that something runs in; by default those of this process.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// The network namespace.
    pub net: Option<Netns>,
    /// The mount namespace.
    pub mount: Option<MountNs>,
}

impl Place {
    /// Runs `work` there, on a thread of its own. A panic goes through.
    ///
    /// # Errors
    /// Those of `work`, and of entering.
    pub fn enter<R: Send>(&self, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
        let inner = || match &self.mount {
            // This is a thread of its own already, but only `Netns::enter` says so by its type.
            Some(mount) => mount.enter(work),
            None => work(),
        };
        match &self.net {
            Some(net) => net.enter(inner),
            None => on_thread("place", inner),
        }
    }

    fn prepare(&self, command: &mut Command) {
        let net = self.net.as_ref().map(Netns::shared_fd);
        let mount = self.mount.as_ref().map(MountNs::shared_fd);
        let namespaces = net
            .map(|fd| (fd, CloneFlags::CLONE_NEWNET))
            .into_iter()
            .chain(mount.map(|fd| (fd, CloneFlags::CLONE_NEWNS)))
            .collect();
        sys::prepare_child(command, namespaces);
    }
}

/// A child process. It is killed when this is dropped, and by the kernel when this process dies.
///
/// `nsenter --target PID --net --mount` enters where it lives.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: Option<PathBuf>,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command` in `place`; with `log`, its standard output and error are appended to that file.
    ///
    /// Its working directory is `/` where it enters a mount namespace: paths should be absolute.
    ///
    /// # Errors
    /// Where the program cannot be run, or the namespaces not be entered.
    pub fn start(mut command: Command, place: &Place, log: Option<&Path>) -> Result<Self> {
        let name = program_name(&command);
        if let Some(path) = log {
            let file = append(path)?;
            command.stderr(file.try_clone()?).stdout(file);
        }
        command.stdin(Stdio::null());
        let child = spawn(command, place)?;
        Ok(Self { name, child, log: log.map(Path::to_owned), status: None })
    }

    /// Runs `command` in `place` to its end and returns its standard output.
    ///
    /// # Errors
    /// Where it cannot run or fails; standard error is in the error.
    pub fn output(command: Command, place: &Place) -> Result<String> {
        let name = program_name(&command);
        let output = Self::run(command, place)?;
        if !output.status.success() {
            bail!("{name}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim_end());
        }
        String::from_utf8(output.stdout).with_context(|| format!("{name}: output"))
    }

    /// Runs `command` in `place` to its end and returns everything that is known of it.
    ///
    /// # Errors
    /// Where it cannot run.
    pub fn run(mut command: Command, place: &Place) -> Result<Output> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(spawn(command, place)?.wait_with_output()?)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, where it has.
    ///
    /// # Errors
    /// Where the kernel cannot tell.
    pub fn exit_status(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status)
    }

    /// Fails with the end of its log where it has ended.
    ///
    /// # Errors
    /// Where it has ended.
    pub fn must_run(&mut self) -> Result<()> {
        match self.exit_status()? {
            None => Ok(()),
            Some(status) => bail!("{} ended: {status}\n{}", self.name, self.log_tail()),
        }
    }

    /// Sends a signal; nothing happens where it has ended.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.exit_status()?.is_some() {
            return Ok(());
        }
        let pid = Pid::from_raw(self.pid().try_into()?);
        signal::kill(pid, signal).with_context(|| format!("{signal} to {}", self.name))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// After `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        wait::until(&what, timeout, || self.exit_status())
    }

    /// Asks it to end (SIGTERM) and waits.
    ///
    /// # Errors
    /// After `timeout`, when it still runs.
    pub fn terminate(&mut self, timeout: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait(timeout)
    }

    /// Kills it (SIGKILL) and waits.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGKILL)?;
        self.wait(Duration::from_secs(10))
    }

    /// Everything it wrote, where it was started with a log.
    pub fn log(&self) -> String {
        self.log
            .as_ref()
            .and_then(|path| fs::read(path).ok())
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// The last lines of [`Process::log`].
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Waits until the log has a line that contains `text`, and returns that line.
    ///
    /// # Errors
    /// After `timeout`, or when the process ends before.
    pub fn wait_for_log(&mut self, text: &str, timeout: Duration) -> Result<String> {
        let what = format!("{text:?} in the log of {}", self.name);
        wait::until(&what, timeout, || {
            let found = self.log().lines().find(|line| line.contains(text)).map(str::to_owned);
            if found.is_none() {
                self.must_run()?;
            }
            Ok(found)
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.exit_status(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn append(path: &Path) -> Result<File> {
    OpenOptions::new().create(true).append(true).open(path).with_context(|| path.display().to_string())
}

fn program_name(command: &Command) -> String {
    Path::new(command.get_program()).file_name().unwrap_or(command.get_program()).to_string_lossy().into_owned()
}

/// Spawns from the one thread that lives as long as this process: the kernel kills the child when the *thread* that
/// made it ends, and a test's thread ends before the process does.
fn spawn(mut command: Command, place: &Place) -> Result<Child> {
    type Job = Box<dyn FnOnce() + Send>;
    static SPAWNER: OnceLock<Sender<Job>> = OnceLock::new();

    place.prepare(&mut command);
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, next) = mpsc::channel::<Job>();
        thread::spawn(move || next.into_iter().for_each(|job| job()));
        jobs
    });
    let (reply, result) = mpsc::channel();
    let program: PathBuf = AsRef::<OsStr>::as_ref(command.get_program()).into();
    spawner
        .send(Box::new(move || {
            let _ = reply.send(command.spawn());
        }))
        .map_err(|_| anyhow!("the spawner thread is gone"))?;
    result.recv().context("the spawner thread is gone")?.with_context(|| format!("starting {}", program.display()))
}
