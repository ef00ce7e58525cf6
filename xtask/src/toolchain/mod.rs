//! The BPF toolchain: a compiler that has (or builds) `core` for the BPF target, and a `bpf-linker` of the same LLVM.

mod debian;
mod linker;
mod rustup;
mod version;

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail};

use crate::{
    cargo::{forget_toolchain, remapped},
    machine, process, workspace,
};
use version::{Version, llvm_of, release_of};

/// Found and ready to compile the datapath.
pub struct Toolchain {
    compiler: Compiler,
    linker: PathBuf,
}

/// A compiler that can make BPF bitcode.
struct Compiler {
    /// What people call it.
    name: &'static str,
    cargo: PathBuf,
    rustc: PathBuf,
    release: Version,
    /// The major version of the LLVM that makes the bitcode.
    llvm: u32,
    core: Core,
}

/// Where the `core` of the BPF target comes from.
#[derive(Clone, Copy, PartialEq)]
enum Core {
    /// Compiled from `rust-src`, as only a nightly does.
    Source,
    /// Shipped compiled.
    Prebuilt,
}

/// Finds the BPF toolchain, or installs it and says what.
pub fn find_or_install() -> Result<Toolchain> {
    // The nightly only where nothing is missing, or what is missing can be had.
    if let Some(compiler) = rustup::compiler()
        && (linker::find(compiler.llvm).is_some() || linker::installable(compiler.llvm))
    {
        return with_linker(compiler);
    }
    if let Some(compiler) = debian::compiler() {
        return with_linker(compiler);
    }
    if !machine::has_apt() {
        bail!(
            "no BPF toolchain here and no apt-get to install Debian's: type `rustup toolchain install nightly \
             --component rust-src` and install a bpf-linker of the same LLVM \
             (https://github.com/aya-rs/bpf-linker#installation)"
        );
    }
    with_linker(debian::install()?)
}

fn with_linker(compiler: Compiler) -> Result<Toolchain> {
    let linker = match linker::find(compiler.llvm) {
        Some(linker) => linker,
        None => linker::install(compiler.llvm)?,
    };
    Ok(Toolchain { compiler, linker })
}

impl Toolchain {
    /// In one line: which compiler, which linker.
    pub fn describe(&self) -> String {
        let Compiler { name, release, llvm, .. } = &self.compiler;
        format!("{name} {release} (LLVM {llvm}), {}", self.linker.display())
    }

    /// `cargo build` of this toolchain for the BPF target.
    pub fn build(&self) -> Command {
        let mut cargo = Command::new(&self.compiler.cargo);
        cargo.arg("build");
        self.prepare(&mut cargo);
        cargo
    }

    /// This toolchain's clippy over the datapath, installed where it is missing. Warnings are errors.
    pub fn clippy(&self) -> Result<Command> {
        let program = self.compiler.cargo.with_file_name("cargo-clippy");
        if !machine::is_executable(&program) {
            match self.compiler.core {
                Core::Source => {
                    bail!("no {}: type `rustup component add clippy --toolchain nightly`", program.display())
                }
                Core::Prebuilt => debian::install_clippy()?,
            }
        }
        let mut clippy = Command::new(program);
        clippy.arg("clippy");
        self.prepare(&mut clippy);
        clippy.args(["--", "--deny=warnings"]);
        Ok(clippy)
    }

    /// Makes a command of cargo's compile the datapath, without what the cargo around us has set for its own children.
    fn prepare(&self, cargo: &mut Command) {
        cargo.current_dir(workspace::root());
        forget_toolchain(cargo);
        cargo.env("CARGO", &self.compiler.cargo).env("RUSTC", &self.compiler.rustc);
        let mut flags = vec![
            format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH),
            "-Cdebuginfo=2".to_owned(),
            "-Clink-arg=--btf".to_owned(),
            // Linux 6.1 refuses a loop whose end falls through to its start, and the layout is the compiler's.
            "-Clink-arg=--unroll-loops".to_owned(),
            // A program that hands over to others may call functions of its own only from 256 bytes of stack.
            "-Clink-arg=--llvm-args=-inline-threshold=100000".to_owned(),
            // Otherwise LLVM 22 comes to an end at a copy between places aligned to 16 bytes.
            "-Clink-arg=--disable-expand-memcpy-in-order".to_owned(),
            // Atomics that return what was there came with v3 (kernel 5.12).
            "-Ctarget-cpu=v3".to_owned(),
            format!("-Clinker={}", self.linker.display()),
        ];
        // The object is the same in whatever directory it is compiled, and so is an image with it.
        flags.extend(remapped());
        cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        match self.compiler.core {
            Core::Source => cargo.arg("-Zbuild-std=core"),
            // `asm_experimental_arch` on a compiler that is no nightly.
            Core::Prebuilt => cargo.env("RUSTC_BOOTSTRAP", "1"),
        };
        cargo.args(["--locked", "--package=affinity-ebpf", "--profile=bpf", "--target", TARGET]);
        // A target directory of its own: two cargos would throw away each other's work in a common one.
        cargo.arg("--target-dir").arg(target_directory());
    }
}

/// Where a linked object is after [`Toolchain::build`].
pub fn built_object(name: &str) -> PathBuf {
    target_directory().join(TARGET).join("bpf").join(name)
}

fn target_directory() -> PathBuf {
    workspace::root().join("target/bpf-build")
}

/// The BPF target of this machine's byte order.
const TARGET: &str = if cfg!(target_endian = "little") { "bpfel-unknown-none" } else { "bpfeb-unknown-none" };

impl Compiler {
    /// Asks the compiler what it is. `None` where it does not say, or is too old for the workspace.
    fn probe(name: &'static str, cargo: PathBuf, rustc: &Path, core: Core) -> Option<Self> {
        if !machine::is_executable(&cargo) || !machine::is_executable(rustc) {
            return None;
        }
        let mut ask = Command::new(rustc);
        ask.arg("-vV").env_remove("LD_LIBRARY_PATH");
        let answer = process::capture(ask).ok()?;
        let (release, llvm) = (release_of(&answer)?, llvm_of(&answer)?);
        let enough = Version::parse(workspace::RUST_VERSION).is_none_or(|oldest| release >= oldest);
        enough.then(|| Self { name, cargo, rustc: rustc.to_owned(), release, llvm, core })
    }
}
