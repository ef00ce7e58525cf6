//! What the kernel says of a process: its memory, and its time on CPUs.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// A figure in bytes of `/proc/PID/status`, by its name there: `VmRSS:`.
pub fn memory(pid: u32, name: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let text = line.and_then(|line| line.split_whitespace().next()).context("/proc/PID/status")?;
    Ok(text.parse::<u64>()? * 1024)
}

/// How much time of a CPU it has used so far, with its children that have ended.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit_once(')').context("/proc/PID/stat")?.1.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).context("/proc/PID/stat").and_then(|text| Ok(text.parse::<u64>()?));
    // User and system time, its own and its children's, in hundredths of a second (USER_HZ).
    Ok(Duration::from_millis((ticks(11)? + ticks(12)? + ticks(13)? + ticks(14)?) * 10))
}
