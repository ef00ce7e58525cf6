//! The status file: what a running daemon knows and the maps don't, for `affinity status`.

mod place;

use std::fmt::Display;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::collector::CollectorStatus;
use crate::duties::DutiesStatus;
use crate::loader::Attachment;
use crate::loader::cgroup::CgroupAttachment;
use crate::model::Rejection;
use crate::sockets::keeper::SocketsStatus;
pub use place::{ClientsStatus, NodeStatus, PodStatus};

/// Where the daemon writes unless told otherwise.
pub const STATE_DIR: &str = "/run/affinity";
const FILE: &str = "status.json";

/// The status file can't be written or read.
#[derive(Debug, Error)]
#[error("{}: {source}", path.display())]
pub struct StatusError {
    /// The file.
    pub path: PathBuf,
    /// Why not.
    pub source: io::Error,
}

/// What a daemon says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusFile {
    /// Its process.
    pub pid: u32,
    /// When that process was started, in clock ticks since boot (field 22 of `/proc/PID/stat`): a pid can be reused.
    pub start_time_ticks: u64,
    /// Its version.
    pub version: String,
    /// When it was started, in seconds since 1970.
    pub started: i64,
    /// Whether it has synced, programmed everything and attached to all interfaces.
    pub ready: bool,
    /// Whether every source was heard out.
    pub synced: bool,
    /// Where its objects come from.
    pub source: SourceStatus,
    /// Where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeStatus>,
    /// What it recognises clients by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clients: Option<ClientsStatus>,
    /// The pods of the node; none where its source has listed none yet, or may not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pods: Option<Vec<PodStatus>>,
    /// Objects and files that are not programmed as they are.
    pub rejected: Vec<RejectionStatus>,
    /// What could not be programmed or attached, though nothing is wrong with the object.
    pub problems: Vec<ProblemStatus>,
    /// Where its programs are.
    pub attachments: Vec<Attachment>,
    /// How long interfaces that came have waited for them.
    #[serde(default)]
    pub attaching: AttachingStatus,
    /// The cgroup whose sockets are served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<CgroupAttachment>,
    /// What the collector of connections has done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collector: Option<CollectorStatus>,
    /// How they are looked after.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sockets: Option<SocketsStatus>,
    /// What it does for the cluster, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duties: Option<DutiesStatus>,
}

/// A source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceStatus {
    /// `kubernetes` or `directory`.
    pub kind: String,
    /// Which.
    pub detail: String,
    /// Since when it can't be followed, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stale_since: Option<i64>,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

impl SourceStatus {
    /// A source that is up to date.
    pub fn new(kind: &str, detail: impl Display) -> Self {
        Self { kind: kind.to_owned(), detail: detail.to_string(), stale_since: None, last_error: None }
    }
}

/// An object or file with something wrong in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejectionStatus {
    /// The object or file.
    pub object: String,
    /// The field; empty where it is the whole.
    pub field: String,
    /// What is wrong with it.
    pub message: String,
}

impl From<&Rejection> for RejectionStatus {
    fn from(rejection: &Rejection) -> Self {
        Self {
            object: rejection.object.to_string(),
            field: rejection.problem.field.clone(),
            message: rejection.problem.fault.to_string(),
        }
    }
}

/// How an interface is called where something could not be done with it.
pub fn interface_object(name: &str) -> String {
    format!("interface {name}")
}

/// Something that could not be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProblemStatus {
    /// The service port or interface.
    pub object: String,
    /// Why, and what to do.
    pub message: String,
}

/// How long interfaces that came while the daemon ran have waited for its programs, of the last thousand: from the kernel's
/// word that one is there, which has no time of its own, to both programs being attached.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AttachingStatus {
    /// How many there were.
    pub interfaces: u64,
    /// Half of them have waited no longer.
    pub p50_seconds: f64,
    /// 99 of a hundred have waited no longer.
    pub p99_seconds: f64,
    /// None has waited longer.
    pub longest_seconds: f64,
}

impl StatusFile {
    /// Of this process, which has done nothing yet.
    ///
    /// # Errors
    /// Without `/proc`.
    pub fn new(source: SourceStatus) -> Result<Self, StatusError> {
        let pid = std::process::id();
        let start_time_ticks = start_time(pid)
            .ok_or_else(|| StatusError { path: "/proc/self/stat".into(), source: io::ErrorKind::NotFound.into() })?;
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Self {
            pid,
            start_time_ticks,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started: since_1970.as_secs().cast_signed(),
            ready: false,
            synced: false,
            source,
            node: None,
            clients: None,
            pods: None,
            rejected: Vec::new(),
            problems: Vec::new(),
            attachments: Vec::new(),
            attaching: AttachingStatus::default(),
            cgroup: None,
            collector: None,
            sockets: None,
            duties: None,
        })
    }

    /// Replaces the file in a directory, which is made if need be. Readers see the old one or the new one.
    ///
    /// # Errors
    /// Where it can't be written.
    pub fn write(&self, state_dir: &Path) -> Result<(), StatusError> {
        let path = state_dir.join(FILE);
        let new = state_dir.join(format!(".{FILE}.new"));
        let write = || {
            fs::create_dir_all(state_dir)?;
            let mut file = fs::File::create(&new)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            fs::rename(&new, &path)
        };
        write().map_err(|source| StatusError { path: path.clone(), source })
    }

    /// The status of the daemon that runs now; `None` where none does.
    ///
    /// # Errors
    /// Where there is a file that can't be read.
    pub fn read(state_dir: &Path) -> Result<Option<Self>, StatusError> {
        let path = state_dir.join(FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StatusError { path, source }),
        };
        let status: Self = serde_json::from_slice(&text).map_err(|error| StatusError { path, source: error.into() })?;
        Ok((start_time(status.pid) == Some(status.start_time_ticks)).then_some(status))
    }

    /// Removes the file of this process, which ends; not that of a successor which runs already.
    pub fn remove(&self, state_dir: &Path) {
        let ours = Self::read(state_dir).is_ok_and(|found| found.is_some_and(|found| found.pid == self.pid));
        if ours {
            // A file that stays is known to be old by its process.
            let _ = fs::remove_file(state_dir.join(FILE));
        }
    }
}

/// When a process was started, in clock ticks since boot.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read_while_its_process_runs() {
        let directory = tempfile::tempdir().expect("a directory");
        assert_eq!(StatusFile::read(directory.path()).expect("no file is no error"), None);
        let mut status = StatusFile::new(SourceStatus::new("directory", "/somewhere")).expect("a process");
        status.ready = true;
        status.write(directory.path()).expect("a file");
        assert_eq!(StatusFile::read(directory.path()).expect("a file"), Some(status.clone()));
        // Another process with the same number.
        status.start_time_ticks += 1;
        status.write(directory.path()).expect("a file");
        assert_eq!(StatusFile::read(directory.path()).expect("a file"), None);
        status.remove(directory.path());
        assert!(directory.path().join(FILE).exists(), "it is not ours");
    }
}
