//! Running other programs: their output, their failures, and their end when we are interrupted.

use std::{
    collections::{BTreeSet, VecDeque},
    fs,
    io::{BufRead as _, BufReader, Read, Write as _, stdout},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::say;

/// How long an interrupted child may clean up before it is killed.
const GRACE: Duration = Duration::from_secs(10);
/// How much of a quiet program's output is shown when it has failed.
const TAIL: usize = 40;

static CHILDREN: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());
static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// What is left to do when we are interrupted.
static CLEANUPS: Mutex<Vec<fn()>> = Mutex::new(Vec::new());

/// From here on Ctrl-C, SIGTERM and SIGHUP end our children and what these have started, then us.
pub fn end_children_on_interrupt() -> Result<()> {
    ctrlc::set_handler(|| {
        INTERRUPTED.store(true, Ordering::SeqCst);
        signal_children(Signal::SIGTERM);
        let deadline = Instant::now() + GRACE;
        while !children().is_empty() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        signal_children(Signal::SIGKILL);
        // They start programs of their own; whoever waits for one of ours stays parked.
        let cleanups = std::mem::take(&mut *CLEANUPS.lock().unwrap_or_else(PoisonError::into_inner));
        cleanups.into_iter().rev().for_each(|cleanup| cleanup());
        eprintln!("interrupted");
        std::process::exit(130);
    })
    .context("installing the handler of Ctrl-C")
}

/// From here on this is done, too, when we are interrupted, after our children have ended. It starts programs by
/// [`Command`] itself: everything here waits for our own end from then on.
pub fn on_interrupt(cleanup: fn()) {
    CLEANUPS.lock().unwrap_or_else(PoisonError::into_inner).push(cleanup);
}

/// Runs the command with our own standard streams.
pub fn run(mut command: Command) -> Result<()> {
    let status = Running::start(&mut command)?.wait()?;
    check(status, &command)
}

/// Runs the command behind a spinner that shows its last line; its output is shown only where it fails.
pub fn quiet(what: &str, command: Command) -> Result<()> {
    let bar = say::spinner(what);
    let done = watched(command, |line| bar.set_message(line.to_owned()));
    bar.finish_and_clear();
    if done.is_ok() {
        say::progress("Finished", &format!("{what} in {}", say::duration(bar.elapsed())));
    }
    done
}

/// Runs the command and hands its output over line by line; where it fails, the end of that is shown.
pub fn watched(mut command: Command, mut watch: impl FnMut(&str)) -> Result<()> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Running::start(&mut command)?;
    let mut tail = VecDeque::new();
    let (sender, lines) = mpsc::channel();
    thread::scope(|scope| {
        forward(scope, child.0.stdout.take(), sender.clone());
        forward(scope, child.0.stderr.take(), sender);
        for line in lines {
            watch(&line);
            tail.push_back(line);
            if tail.len() > TAIL {
                tail.pop_front();
            }
        }
    });
    let status = child.wait()?;
    if !status.success() {
        for line in tail {
            eprintln!("{line}");
        }
    }
    check(status, &command)
}

/// Runs the command and returns its standard output.
pub fn capture(mut command: Command) -> Result<String> {
    let mut output = String::new();
    let status = each_line(&mut command, |line| {
        output.push_str(line);
        output.push('\n');
    })?;
    check(status, &command)?;
    Ok(output)
}

/// Runs the command, hands its standard output over line by line, and returns how it ended.
pub fn each_line(command: &mut Command, mut line: impl FnMut(&str)) -> Result<ExitStatus> {
    let mut child = Running::start(command.stdout(Stdio::piped()))?;
    if let Some(output) = child.0.stdout.take() {
        for bytes in BufReader::new(output).split(b'\n') {
            line(&String::from_utf8_lossy(&bytes.context("reading a program's output")?));
        }
    }
    child.wait()
}

/// Becomes the command: it gets our signals, and its exit code is ours. Returns only where that fails.
pub fn become_it(mut command: Command) -> Result<()> {
    stdout().flush().context("writing to standard output")?;
    let error = command.exec();
    Err(error).with_context(|| format!("starting `{}`", line(&command)))
}

/// The command as one would type it, without its environment.
pub fn line(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(command.get_program());
    let words = std::iter::once(name).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Fails where the command did.
pub fn check(status: ExitStatus, command: &Command) -> Result<()> {
    if !status.success() {
        bail!("`{}` failed ({status})", line(command));
    }
    Ok(())
}

/// A child that is ended with us.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Result<Self> {
        stop_if_interrupted();
        // Held over the start, so that an interrupt finds either no child or one that it knows.
        let mut children = children();
        let child = command.spawn().with_context(|| format!("starting `{}`", line(command)))?;
        children.insert(child.id());
        Ok(Self(child))
    }

    fn wait(mut self) -> Result<ExitStatus> {
        let status = self.0.wait().context("waiting for a program")?;
        drop(self);
        stop_if_interrupted();
        Ok(status)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !matches!(self.0.try_wait(), Ok(Some(_))) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
        children().remove(&self.0.id());
    }
}

/// The handler ends the process: whoever waited for a child must not report its failure meanwhile.
fn stop_if_interrupted() {
    while INTERRUPTED.load(Ordering::SeqCst) {
        thread::park();
    }
}

fn children() -> MutexGuard<'static, BTreeSet<u32>> {
    CHILDREN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn signal_children(signal: Signal) {
    let roots: Vec<u32> = children().iter().copied().collect();
    for process in descendants(&roots, &parents()) {
        if let Ok(id) = i32::try_from(process) {
            // Gone already, or root's: then sudo, its parent and our child, hands the signal on.
            let _ = kill(Pid::from_raw(id), signal);
        }
    }
}

/// Every process with its parent.
fn parents() -> Vec<(u32, u32)> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| {
            let id = entry.file_name().to_str()?.parse().ok()?;
            Some((id, parent(&fs::read_to_string(entry.path().join("stat")).ok()?)?))
        })
        .collect()
}

/// The parent's id in a `/proc/<pid>/stat`: the second field after the name, which may hold blanks and brackets itself.
fn parent(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// The roots, their children, and so on.
fn descendants(roots: &[u32], parents: &[(u32, u32)]) -> Vec<u32> {
    let mut found = roots.to_vec();
    let mut next = 0;
    while let Some(&process) = found.get(next) {
        found.extend(parents.iter().filter(|(_, parent)| *parent == process).map(|(child, _)| *child));
        next += 1;
    }
    found
}

fn forward<'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    output: Option<impl Read + Send + 'scope>,
    lines: mpsc::Sender<String>,
) {
    if let Some(output) = output {
        scope.spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let _ = lines.send(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_may_have_brackets_in_its_name() {
        assert_eq!(parent("42 (tmux: (1) x) S 7 42 42 0 -1"), Some(7));
        assert_eq!(parent("42 (sh"), None);
    }

    #[test]
    fn children_of_children_are_found_and_others_are_not() {
        let parents = [(2, 1), (3, 2), (4, 3), (5, 1), (6, 5)];
        let mut found = descendants(&[2], &parents);
        found.sort_unstable();
        assert_eq!(found, [2, 3, 4]);
    }

    #[test]
    fn failures_name_the_command() {
        let mut command = Command::new("sh");
        command.args(["-c", "exit 3"]);
        let error = run(command).expect_err("the shell exits with 3").to_string();
        assert!(error.contains("sh -c exit 3") && error.contains('3'), "{error}");
    }

    #[test]
    fn output_is_captured() {
        let mut command = Command::new("echo");
        command.arg("hello");
        assert_eq!(capture(command).expect("echo runs"), "hello\n");
    }
}
