//! `cargo xtask setup`: what building and testing need is there afterwards.

use anyhow::Result;

use crate::{
    machine, say,
    toolchain::{self, Toolchain},
};

/// Programs that the tests start, and the Debian packages that have them.
const TOOLS: [(&str, &str); 2] = [("bpftool", "bpftool"), ("nft", "nftables")];

/// Find or install the BPF toolchain and the tools of the tests
///
/// The other verbs do so by themselves. It uses rustup's nightly where it has rust-src and a bpf-linker of the same LLVM
/// is there or can be built; else Debian's packaged Rust, installed by apt-get (through sudo where you are not root). Says
/// what it installs before it does.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cargo xtask setup         # installs what is missing, says nothing more\n  \
                        cargo xtask setup --show  # and says what it found")]
pub struct Args {
    /// Say what was found
    #[arg(long)]
    show: bool,
}

/// Runs the verb.
pub fn verb(args: &Args) -> Result<()> {
    let toolchain = toolchain()?;
    tools()?;
    if args.show {
        say::progress("Found", &toolchain.describe());
        for (program, _) in TOOLS {
            if let Some(path) = machine::find_program(program) {
                say::progress("Found", &path.display().to_string());
            }
        }
    }
    Ok(())
}

/// Finds or installs the BPF toolchain.
pub fn toolchain() -> Result<Toolchain> {
    toolchain::find_or_install()
}

/// Finds or installs what the tests start.
pub fn tools() -> Result<()> {
    machine::install_missing(&TOOLS)
}
