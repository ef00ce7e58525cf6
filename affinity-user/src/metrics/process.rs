//! What the process uses, of `/proc/self` (`proc(5)`): the names are those of Prometheus' own clients.

use std::fs;
use std::io;

use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage};
use nix::sys::time::TimeValLike as _;
use nix::unistd::{SysconfVar, sysconf};

/// What the process uses.
#[derive(Clone, Debug)]
pub(super) struct Usage {
    pub cpu_seconds: f64,
    pub resident_bytes: u64,
    pub virtual_bytes: u64,
    pub open_fds: u64,
    pub max_fds: u64,
    pub threads: u64,
}

impl Usage {
    /// Of this process, now.
    pub fn read() -> io::Result<Self> {
        let usage = getrusage(UsageWho::RUSAGE_SELF)?;
        #[expect(clippy::cast_precision_loss, reason = "microseconds of CPU time are under 2^52")]
        let cpu_seconds = (usage.user_time() + usage.system_time()).num_microseconds() as f64 / 1e6;
        let statm = fs::read_to_string("/proc/self/statm")?;
        let page = sysconf(SysconfVar::PAGE_SIZE)?.and_then(|size| u64::try_from(size).ok()).unwrap_or(4096);
        let mut pages = statm.split_whitespace().map(|number| number.parse().unwrap_or(0_u64) * page);
        let (virtual_bytes, resident_bytes) = (pages.next().unwrap_or_default(), pages.next().unwrap_or_default());
        let count = |directory| fs::read_dir(directory).map(|entries| entries.count() as u64);
        Ok(Self {
            cpu_seconds,
            resident_bytes,
            virtual_bytes,
            open_fds: count("/proc/self/fd")?,
            max_fds: getrlimit(Resource::RLIMIT_NOFILE)?.0,
            threads: count("/proc/self/task")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_uses_something_of_all() {
        let usage = Usage::read().expect("proc");
        assert!(usage.cpu_seconds >= 0.0 && usage.virtual_bytes > usage.resident_bytes, "{usage:?}");
        assert!(usage.resident_bytes > 1 << 20 && usage.open_fds > 2 && usage.max_fds > 2 && usage.threads > 0);
    }
}
