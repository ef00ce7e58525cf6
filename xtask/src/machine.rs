//! What the machine has, and how it gets what it lacks: programs, root, Debian's packages.

use std::{
    env,
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
    process::Command,
    sync::Once,
};

use anyhow::{Context as _, Result, bail};
use nix::unistd::{AccessFlags, Uid, access};

use crate::{process, say};

/// The directories of `PATH`, and those of administrators' programs, which are not in everybody's.
pub fn search_path() -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<PathBuf> = env::split_paths(&path).collect();
    for directory in ["/usr/sbin", "/sbin"].map(PathBuf::from) {
        if !directories.contains(&directory) {
            directories.push(directory);
        }
    }
    directories
}

/// The program's path, in [`search_path`].
pub fn find_program(name: &str) -> Option<PathBuf> {
    search_path().into_iter().map(|directory| directory.join(name)).find(|program| is_executable(program))
}

/// Whether the path is a file that we may execute.
pub fn is_executable(path: &Path) -> bool {
    path.is_file() && access(path, AccessFlags::X_OK).is_ok()
}

/// The command as root: itself where we are root, by sudo otherwise, with the same environment.
pub fn as_root(command: Command) -> Result<Command> {
    if Uid::effective().is_root() {
        return Ok(command);
    }
    let sudo = find_program("sudo")
        .with_context(|| format!("`{}` needs root and there is no sudo: run as root", process::line(&command)))?;
    let mut elevated = Command::new(sudo);
    // sudo resets PATH even where it is told to keep the environment.
    elevated.args(["-E", "env"]).arg(assignment("PATH", &env::var_os("PATH").unwrap_or_default()));
    elevated.args(command.get_envs().filter_map(|(name, value)| Some(assignment(name, value?))));
    elevated.arg(command.get_program()).args(command.get_args());
    if let Some(directory) = command.get_current_dir() {
        elevated.current_dir(directory);
    }
    Ok(elevated)
}

fn assignment(name: impl AsRef<OsStr>, value: &OsStr) -> OsString {
    let mut assignment = name.as_ref().to_owned();
    assignment.push("=");
    assignment.push(value);
    assignment
}

/// Whether the machine has Debian's package manager.
pub fn has_apt() -> bool {
    find_program("apt-get").is_some()
}

/// Reads the lists of Debian's packages anew, once.
pub fn apt_update() -> Result<()> {
    static UPDATED: Once = Once::new();
    let mut lists = Ok(());
    UPDATED.call_once(|| lists = apt(&["update"], "apt-get update"));
    lists
}

/// Installs Debian packages, saying so first.
pub fn apt_install(packages: &[&str]) -> Result<()> {
    if !has_apt() {
        bail!("no apt-get to install {} with: install what provides them on this system", packages.join(" "));
    }
    say::progress("Installing", &format!("Debian packages {}", packages.join(" ")));
    ask_for_root().with_context(|| format!("type as root `apt-get install {}`", packages.join(" ")))?;
    if let Err(error) = apt_update() {
        // An unreachable list need not hold what we look for, and old lists may do.
        say::warning(&format!("{error:#}"));
    }
    apt(&[&["install", "-y", "--no-install-recommends"], packages].concat(), "apt-get install")
}

/// Installs the packages of those programs that are not there.
pub fn install_missing(tools: &[(&str, &str)]) -> Result<()> {
    let missing = tools.iter().filter(|(program, _)| find_program(program).is_none());
    let packages: Vec<&str> = missing.map(|(_, package)| *package).collect();
    if packages.is_empty() { Ok(()) } else { apt_install(&packages) }
}

/// Has sudo ask for its password now, rather than behind a spinner.
fn ask_for_root() -> Result<()> {
    if Uid::effective().is_root() {
        return Ok(());
    }
    let mut sudo = Command::new(find_program("sudo").context("this needs root and there is no sudo")?);
    sudo.arg("-v");
    process::run(sudo)
}

fn apt(arguments: &[&str], what: &str) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    process::quiet(what, as_root(command)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_and_others_are_not() {
        assert!(find_program("sh").is_some_and(|path| is_executable(&path)));
        assert_eq!(find_program("no-such-program-anywhere"), None);
        assert!(!is_executable(Path::new("/etc/passwd")));
    }
}
