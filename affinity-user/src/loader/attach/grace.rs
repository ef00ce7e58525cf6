//! Short grace periods of RCU while programs are attached.
//!
//! For each TCX link the kernel waits until no packet runs the programs that were there before (`tcx_entry_sync`), which takes
//! some 10 ms on an idle machine, and lets nobody change any interface meanwhile. Where `/sys/kernel/rcu_expedited` says so, it
//! asks the busy CPUs at once, which takes 0.1 ms: as it does by itself for other waits under that lock (`synchronize_net`,
//! commit be3fc413da9e).
//!
//! The setting is the whole machine's, so it is made for the moment alone. Of two daemons on one kernel, the first one to be done
//! ends it, which makes the other one slower.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Where the kernel has the setting.
const SETTING: &str = "/sys/kernel/rcu_expedited";
/// What it is set to, in place of 1: a process that was killed in that moment is known by it.
const OURS: &str = "2815";
const NORMAL: &str = "0";

/// How the kernel waits while programs are attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GracePeriods {
    /// As it is set to.
    #[default]
    AsSet,
    /// Expedited, where we may ask it to. Else as it is set to.
    Expedited,
}

/// The setting, as far as it is ours to change.
#[derive(Debug)]
pub(in crate::loader) struct Setting {
    path: PathBuf,
    is_ours: bool,
}

impl Setting {
    pub fn new(wanted: GracePeriods) -> Self {
        Self::at(SETTING.into(), wanted)
    }

    fn at(path: PathBuf, wanted: GracePeriods) -> Self {
        restore(&path);
        let mut setting = Self { path, is_ours: wanted == GracePeriods::Expedited };
        if setting.is_ours
            && let Err(error) = File::options().write(true).open(&setting.path)
        {
            tracing::info!(
                "programs are attached in some 20 ms instead of one, as {} can't be written: {error}",
                setting.path.display()
            );
            setting.is_ours = false;
        }
        setting
    }

    /// Makes grace periods short for as long as what is returned lives.
    pub fn expedite(&self) -> Expedited<'_> {
        if self.is_ours && is(&self.path, NORMAL) {
            write(&self.path, OURS);
        }
        Expedited(self)
    }
}

/// Takes back what a process has left that was killed while it attached.
pub(in crate::loader) fn take_back() {
    restore(Path::new(SETTING));
}

/// Somebody else's setting stays.
fn restore(path: &Path) {
    if is(path, OURS) {
        write(path, NORMAL);
    }
}

fn write(path: &Path, value: &str) {
    if let Err(error) = fs::write(path, value) {
        tracing::debug!(%error, value, "can't write {}", path.display());
    }
}

fn is(path: &Path, value: &str) -> bool {
    fs::read_to_string(path).is_ok_and(|found| found.trim() == value)
}

/// A moment of short grace periods.
pub(in crate::loader) struct Expedited<'a>(&'a Setting);

impl Drop for Expedited<'_> {
    fn drop(&mut self) {
        restore(&self.0.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(found: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("rcu_expedited");
        fs::write(&path, found).expect("written");
        (dir, path)
    }

    fn read(path: &Path) -> String {
        fs::read_to_string(path).expect("a file")
    }

    #[test]
    fn it_is_short_for_the_moment_alone() {
        let (_dir, path) = setting("0\n");
        let setting = Setting::at(path.clone(), GracePeriods::Expedited);
        let moment = setting.expedite();
        assert_eq!(read(&path), OURS);
        drop(moment);
        assert_eq!(read(&path), NORMAL);
    }

    #[test]
    fn what_somebody_else_has_set_stays() {
        let (_dir, path) = setting("1\n");
        drop(Setting::at(path.clone(), GracePeriods::Expedited).expedite());
        assert_eq!(read(&path), "1\n");
        let (_dir, path) = setting("0\n");
        let setting = Setting::at(path.clone(), GracePeriods::AsSet);
        let _moment = setting.expedite();
        assert_eq!(read(&path), "0\n");
    }

    #[test]
    fn what_a_killed_process_has_left_goes() {
        let (_dir, path) = setting("2815\n");
        // Also where it would set nothing itself.
        Setting::at(path.clone(), GracePeriods::AsSet);
        assert_eq!(read(&path), NORMAL);
    }

    #[test]
    fn it_does_without_where_there_is_no_such_setting() {
        let setting = Setting::at("/sys/kernel/none/such".into(), GracePeriods::Expedited);
        assert!(!setting.is_ours);
        drop(setting.expedite());
    }
}
