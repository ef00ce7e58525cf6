//! A virtual machine with an older kernel, in which suites run: Debian's package of it under qemu's software emulation,
//! with a file system in memory that holds a shell, the suites and the libraries that they need.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
};

use anyhow::{Context as _, Result, bail};

use crate::{machine, process, say, workspace};

/// Programs that this needs, and the Debian packages that have them.
const PROGRAMS: [(&str, &str); 4] =
    [("qemu-system-x86_64", "qemu-system-x86"), ("busybox", "busybox-static"), ("cpio", "cpio"), ("strip", "binutils")];
/// How long the machine may run, in seconds: it takes eight minutes where nothing else runs, and several times that where much
/// does.
const TIMEOUT: &str = "2400";
/// What the machine says on a line of its own before all else.
const STARTS: &str = "the machine is up: ";
/// What the machine says of a suite that has ended, before its exit code.
const ENDED: &str = "the suite has ended: ";

/// Why there can be no such machine here; `None` where there can.
pub fn obstacle() -> Option<&'static str> {
    if env::consts::ARCH != "x86_64" {
        Some("it emulates x86-64 on x86-64 alone")
    } else if !machine::has_apt() {
        Some("the kernel comes from Debian's packages, and there is no apt-get")
    } else {
        None
    }
}

/// Boots the newest kernel of a series (`6.1`) and runs the suites (name, executable) in it, as root; hands over what they
/// print. Fails where one of them does.
pub fn run(series: &str, suites: &[(&str, &Path)], mut line: impl FnMut(&str)) -> Result<()> {
    let missing: Vec<&str> = PROGRAMS
        .iter()
        .filter(|(program, _)| machine::find_program(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    if !missing.is_empty() {
        machine::apt_install(&missing)?;
    }
    let kernel = find_or_download(series)?;
    let directory = workspace::root().join(format!("target/kernel-{series}"));
    let files = directory.join("files");
    if directory.exists() {
        fs::remove_dir_all(&directory).with_context(|| directory.display().to_string())?;
    }
    fs::create_dir_all(&files).with_context(|| files.display().to_string())?;
    fill(&files, suites)?;
    let archive = pack(&files, &directory.join("files.cpio"))?;

    let mut qemu = Command::new("timeout");
    qemu.args(["--kill-after=5", TIMEOUT, "qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", "max"]);
    qemu.args(["-m", "2048", "-smp", "2", "-nographic", "-no-reboot", "-nic", "none"]);
    qemu.arg("-kernel").arg(&kernel).arg("-initrd").arg(&archive).args(["-append", "console=ttyS0 quiet panic=-1"]);
    let (mut started, mut codes) = (false, Vec::new());
    let status: ExitStatus = process::each_line(&mut qemu, |text| {
        // The firmware plays with the terminal before the kernel speaks.
        started |= text.contains(STARTS);
        match text.trim_end().strip_prefix(ENDED) {
            Some(code) => codes.push(code.to_owned()),
            None if started => line(text.trim_end()),
            None => {}
        }
    })?;
    process::check(status, &qemu)?;
    if codes.len() != suites.len() {
        bail!("the machine went down after {} of {} suites", codes.len(), suites.len());
    }
    if codes.iter().any(|code| code != "0") {
        bail!("a suite failed on Linux {series}");
    }
    Ok(())
}

/// The kernel's image, from the cache or from Debian's package.
fn find_or_download(series: &str) -> Result<PathBuf> {
    let cache = workspace::cache()?.join("kernels");
    fs::create_dir_all(&cache).with_context(|| cache.display().to_string())?;
    let cached = || -> Result<Option<PathBuf>> {
        let mut images: Vec<PathBuf> = Vec::new();
        for entry in fs::read_dir(&cache)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with(&format!("vmlinuz-{series}.")) {
                images.push(path);
            }
        }
        images.sort();
        Ok(images.pop())
    };
    if let Some(image) = cached()? {
        return Ok(image);
    }
    let mut package = newest(series)?;
    if package.is_none() {
        // A machine that has never asked has no lists.
        machine::apt_update()?;
        package = newest(series)?;
    }
    let package = package.with_context(|| format!("apt-get knows no kernel package of Linux {series}"))?;
    say::progress("Downloading", &format!("{package} (Debian)"));
    let directory = cache.join(format!("new-{}", std::process::id()));
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let done = download(&package, &directory, &cache);
    fs::remove_dir_all(&directory).with_context(|| directory.display().to_string())?;
    done?;
    cached()?.with_context(|| format!("{package} has no kernel"))
}

/// The newest package of a series, by its ABI's number.
fn newest(series: &str) -> Result<Option<String>> {
    let mut search = Command::new("apt-cache");
    search.args(["search", "--names-only", &format!("^linux-image-{}\\..*-cloud-amd64$", series.replace('.', "\\."))]);
    let packages = process::capture(search)?;
    Ok(newest_of(packages.lines().filter_map(|line| line.split_whitespace().next())))
}

fn newest_of<'a>(packages: impl Iterator<Item = &'a str>) -> Option<String> {
    let numbers = |name: &str| -> Vec<u32> {
        name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
    };
    packages.max_by_key(|name| numbers(name)).map(str::to_owned)
}

fn download(package: &str, directory: &Path, cache: &Path) -> Result<()> {
    let mut apt = Command::new("apt-get");
    apt.args(["download", package]).current_dir(directory);
    process::quiet("apt-get download", apt)?;
    let files = fs::read_dir(directory)?.collect::<Result<Vec<_>, _>>()?;
    let file = files.iter().map(fs::DirEntry::path).find(|path| path.extension().is_some_and(|name| name == "deb"));
    let mut unpack = Command::new("dpkg-deb");
    unpack.arg("-x").arg(file.context("apt-get downloaded nothing")?).arg(directory);
    process::run(unpack)?;
    for entry in fs::read_dir(directory.join("boot"))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("vmlinuz-") {
            // Renamed into place: another checkout may look for it.
            fs::rename(entry.path(), cache.join(entry.file_name()))?;
        }
    }
    Ok(())
}

/// Makes the machine's files.
fn fill(files: &Path, suites: &[(&str, &Path)]) -> Result<()> {
    for directory in ["bin", "dev", "proc", "run", "suites", "sys", "tmp"] {
        fs::create_dir_all(files.join(directory))?;
    }
    let busybox = machine::find_program("busybox").context("no busybox")?;
    fs::copy(busybox, files.join("bin/busybox"))?;
    for (name, executable) in suites {
        let copy = files.join("suites").join(name);
        // Its debug information is as large as the machine's memory is dear.
        let mut strip = Command::new("strip");
        strip.arg("-o").arg(&copy).arg(executable);
        process::run(strip)?;
        let mut libraries = Command::new("ldd");
        libraries.arg(executable);
        for library in process::capture(libraries)?.split_whitespace().filter(|word| word.starts_with('/')) {
            let to = files.join(library.trim_start_matches('/'));
            fs::create_dir_all(to.parent().context("a library lies in a directory")?)?;
            fs::copy(library, &to).with_context(|| library.to_owned())?;
        }
    }
    let init = files.join("init");
    fs::write(&init, script(suites.iter().map(|(name, _)| *name)))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// What the machine does.
fn script<'a>(suites: impl Iterator<Item = &'a str>) -> String {
    let start = "#!/bin/busybox sh\n\
         export PATH=/bin RUST_BACKTRACE=0\n\
         busybox mount -t proc proc /proc\n\
         busybox mount -t sysfs sys /sys\n\
         busybox mount -t devtmpfs dev /dev\n\
         busybox mount -t bpf bpf /sys/fs/bpf\n\
         busybox ip link set lo up\n\
         cd /suites\n\
         echo\necho \"the machine is up: Linux $(busybox uname -r)\"\n";
    let suites = suites.map(|suite| format!("./{suite}\necho \"{ENDED}$?\"\n"));
    [start.to_owned(), suites.collect(), "busybox poweroff -f\n".to_owned()].concat()
}

/// Packs the files as the kernel unpacks them.
fn pack(files: &Path, archive: &Path) -> Result<PathBuf> {
    let mut cpio = Command::new("sh");
    cpio.args(["-c", "find . | cpio --create --format=newc --quiet > \"$1\"", "sh"]).arg(archive).current_dir(files);
    process::run(cpio)?;
    Ok(archive.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_package_is_found_by_its_numbers() {
        let names =
            ["linux-image-6.1.0-9-cloud-amd64", "linux-image-6.1.0-56-cloud-amd64", "linux-image-6.1.0-40-cloud-amd64"];
        assert_eq!(newest_of(names.into_iter()).as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(newest_of([].into_iter()), None);
    }

    #[test]
    fn the_machine_runs_each_suite_and_goes_down() {
        let script = script(["packet", "race"].into_iter());
        assert!(script.starts_with("#!/bin/busybox sh\n") && script.ends_with("busybox poweroff -f\n"));
        assert!(script.contains("\n./packet\n") && script.contains("\n./race\n"), "{script}");
    }
}
