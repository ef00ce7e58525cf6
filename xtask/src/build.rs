//! `cargo xtask build`: the BPF object, and the one binary that carries it.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{artifacts, cargo, dwarf, machine, process, programs, say, setup, toolchain, workspace};

/// Build the `affinity` binary with the BPF object inside it
///
/// The object goes to target/bpf/affinity.o, where `cargo build`, `cargo test` and editors find it from then on. As root it
/// also prints how many instructions each program has, how many the verifier goes through and how much stack it takes, and
/// warns where that is a fifth more than affinity-ebpf/programs.json says.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cargo xtask build          # target/release/affinity\n  \
                        cargo xtask build --debug  # target/debug/affinity: compiles faster, asserts more\n  \
                        cargo xtask build --accept-programs  # a program has grown, and may")]
pub struct Args {
    /// Build the binary unoptimised, with debug assertions (the BPF object is the same)
    #[arg(long)]
    debug: bool,
    /// Write the programs' instructions and stack down, for later builds and tests to be held against
    #[arg(long)]
    accept_programs: bool,
}

/// Runs the verb.
pub fn verb(args: &Args) -> Result<()> {
    let profile = if args.debug { Profile::Debug } else { Profile::Release };
    let binary = daemon(profile)?;
    for path in [&workspace::object(), &binary] {
        let bytes = fs::metadata(path).with_context(|| path.display().to_string())?.len();
        say::progress("Built", &format!("{} ({})", workspace::short(path), size(bytes)));
    }
    programs::show(&binary, args.accept_programs)
}

const DAEMON: (&str, &str) = ("affinity-user", "affinity");

/// How user space is compiled.
#[derive(Clone, Copy, PartialEq)]
pub enum Profile {
    /// Quick to compile.
    Debug,
    /// Quick to run.
    Release,
}

impl Profile {
    /// cargo's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Profile::Debug => "dev",
            Profile::Release => "release",
        }
    }
}

/// Compiles the object and then the `affinity` binary; returns where that is.
pub fn daemon(profile: Profile) -> Result<PathBuf> {
    object()?;
    let [daemon] = binaries([DAEMON], profile)?;
    Ok(daemon)
}

/// Compiles the object, then the `affinity` binary and one of the `tests` crate; returns where they are. By one call of
/// cargo: it compiles what both depend on once, with the features that both want.
pub fn daemon_and(name: &str, profile: Profile) -> Result<(PathBuf, PathBuf)> {
    object()?;
    let [daemon, other] = binaries([DAEMON, ("affinity-tests", name)], profile)?;
    Ok((daemon, other))
}

/// Compiles the datapath to `target/bpf/affinity.o`, and the benchmark's to `bench.o` there. A file is touched only where
/// its content changes, so that nothing in user space is compiled anew for nothing.
pub fn object() -> Result<PathBuf> {
    // What is compiled next needs it: jemalloc, the daemon's allocator, is of C.
    machine::install_missing(&[("make", "make")])?;
    process::run(setup::toolchain()?.build()).context("compiling the datapath")?;
    let object = workspace::object();
    for (name, to) in [("affinity", &object), ("affinity-bench", &workspace::bench_object())] {
        let built = toolchain::built_object(name);
        let content = fs::read(&built).with_context(|| built.display().to_string())?;
        write_if_changed(&dwarf::stripped(&content)?, to)?;
    }
    Ok(object)
}

/// Compiles binaries (package, name) for this machine and returns where they are.
pub fn binaries<const N: usize>(wanted: [(&str, &str); N], profile: Profile) -> Result<[PathBuf; N]> {
    let mut cargo = cargo::host();
    cargo.args(["build", "--profile", profile.name(), "--message-format", "json-render-diagnostics"]);
    for (package, name) in wanted {
        cargo.args(["--package", package, "--bin", name]);
    }
    let built = artifacts::executables(&process::capture(cargo)?);
    let mut paths = [const { PathBuf::new() }; N];
    for (path, (package, name)) in paths.iter_mut().zip(wanted) {
        let found = built.iter().find(|executable| executable.name == name);
        path.clone_from(&found.with_context(|| format!("{package} has no binary `{name}`"))?.path);
    }
    Ok(paths)
}

/// Compiles the object, and the `affinity` binary so that it needs no library of the system's: by musl where the compiler
/// has that target, else with glibc in it. The same sources give the same bytes in whatever directory they are.
pub fn static_daemon() -> Result<PathBuf> {
    object()?;
    let target = static_target()?;
    let mut flags = vec!["-Ctarget-feature=+crt-static".to_owned()];
    flags.extend(cargo::remapped());
    let mut cargo = cargo::host();
    // cargo keeps these from build scripts and macros where a target is named.
    cargo.args(["build", "--locked", "--profile", Profile::Release.name(), "--target", &target]);
    cargo.args(["--package", DAEMON.0, "--bin", DAEMON.1, "--message-format", "json-render-diagnostics"]);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    if target.ends_with("-musl") {
        cargo.env(format!("CC_{}", target.replace('-', "_")), "gcc");
    }
    let built = artifacts::executables(&process::capture(cargo)?);
    let daemon = built.into_iter().find(|executable| executable.name == DAEMON.1);
    daemon.map(|executable| executable.path).context("affinity-user has no binary `affinity`")
}

fn static_target() -> Result<String> {
    let arch = env::consts::ARCH;
    let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.args(["--print", "sysroot"]).current_dir(workspace::root());
    let sysroot = PathBuf::from(process::capture(rustc)?.trim());
    let musl = format!("{arch}-unknown-linux-musl");
    let has_musl = sysroot.join("lib/rustlib").join(&musl).join("lib").is_dir();
    Ok(if has_musl { musl } else { format!("{arch}-unknown-linux-gnu") })
}

fn write_if_changed(content: &[u8], to: &Path) -> Result<()> {
    if fs::read(to).is_ok_and(|present| present == content) {
        return Ok(());
    }
    let directory = to.parent().context("the object has no directory")?;
    fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    // Renamed into place, so that a build script never reads half of it.
    let new = to.with_extension("new");
    fs::write(&new, content).with_context(|| new.display().to_string())?;
    fs::rename(&new, to).with_context(|| to.display().to_string())
}

/// A size as people say it.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{} KiB", bytes / 1024),
        _ => format!("{}.{} MiB", bytes >> 20, ((bytes & 0xf_ffff) * 10) >> 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(size(512), "512 B");
        assert_eq!(size(60_000), "58 KiB");
        assert_eq!(size(10 * 1_048_576 + 524_288), "10.5 MiB");
    }

    #[test]
    fn a_file_is_written_only_where_its_content_changes() -> Result<()> {
        let directory = env::temp_dir().join(format!("affinity-xtask-{}", std::process::id()));
        fs::create_dir_all(&directory)?;
        let to = directory.join("deeper/to");
        write_if_changed(b"one", &to)?;
        let before = fs::metadata(&to)?.modified()?;
        write_if_changed(b"one", &to)?;
        assert_eq!(fs::metadata(&to)?.modified()?, before);
        write_if_changed(b"two", &to)?;
        assert_eq!(fs::read_to_string(&to)?, "two");
        fs::remove_dir_all(&directory)?;
        Ok(())
    }
}
