//! What people read while it works: lines in cargo's own style, on standard error.

use std::{
    env,
    io::{IsTerminal as _, stderr},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};

const GREEN: &str = "\x1b[1;32m";
const YELLOW: &str = "\x1b[1;33m";
const RED: &str = "\x1b[1;31m";

/// A line of progress: what is done (one word) and with what.
pub fn progress(verb: &str, what: &str) {
    eprintln!("{} {what}", paint(GREEN, &format!("{verb:>12}")));
}

/// Something that is not as it should be, though the work goes on.
pub fn warning(what: &str) {
    eprintln!("{}: {what}", paint(YELLOW, "warning"));
}

/// Why the verb failed: one line with its causes.
pub fn error(error: &anyhow::Error) {
    eprintln!("{}: {error:#}", paint(RED, "error"));
}

/// A spinner with the time it has taken, for work that says nothing itself. Hidden where nobody watches.
pub fn spinner(what: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    let style = ProgressStyle::with_template("{spinner:>12.green} {prefix} [{elapsed}] {wide_msg:.dim}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
    bar.set_prefix(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

/// A duration as people say it: `0.4 s`, `12 s`, `3 min 05 s`.
pub fn duration(duration: Duration) -> String {
    match duration.as_secs() {
        0..10 => format!("{:.1} s", duration.as_secs_f64()),
        seconds @ 10..60 => format!("{seconds} s"),
        seconds => format!("{} min {:02} s", seconds / 60, seconds % 60),
    }
}

fn paint(color: &str, text: &str) -> String {
    if stderr().is_terminal() && env::var_os("NO_COLOR").is_none() {
        format!("{color}{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        assert_eq!(duration(Duration::from_millis(440)), "0.4 s");
        assert_eq!(duration(Duration::from_secs(12)), "12 s");
        assert_eq!(duration(Duration::from_secs(185)), "3 min 05 s");
    }
}
