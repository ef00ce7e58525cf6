//! `cargo xtask image`: the daemon as a container image, made without a container engine.

pub mod archive;
pub mod earlier;
pub mod layer;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::{build, say, workspace};
use archive::{Archive, Image};
use layer::Files;

/// The image's name, as the manifests in `kind/deploy` have it.
pub const NAME: &str = "localhost/affinity:dev";
/// The largest archive that is still right, in bytes: what is more is a mistake.
const LARGEST: usize = 30 << 20;

/// Build the container image, as target/image/affinity.tar; needs no Docker
///
/// An OCI archive with the one static binary and nothing else, which `kind load image-archive`, `ctr images import`,
/// `docker load`, `podman load` and `skopeo copy oci-archive:` take. Two builds of a commit by one compiler give one digest.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cargo xtask image\n  kind load image-archive target/image/affinity.tar\n  \
                        ctr -n k8s.io images import target/image/affinity.tar")]
pub struct Args {}

/// Runs the verb.
pub fn verb(_: &Args) -> Result<()> {
    build().map(|_| ())
}

/// Builds the image and returns where it is.
pub fn build() -> Result<PathBuf> {
    let binary = build::static_daemon()?;
    let Archive { bytes, digest } = pack(&binary, NAME)?;
    if bytes.len() >= LARGEST {
        bail!("the image has {} MiB: {} are the most that is expected", bytes.len() >> 20, LARGEST >> 20);
    }
    let path = workspace::root().join("target/image/affinity.tar");
    write(&path, &bytes)?;
    let size = build::size(bytes.len() as u64);
    say::progress("Built", &format!("{} ({NAME}, {size}, {digest})", workspace::short(&path)));
    Ok(path)
}

fn pack(binary: &Path, name: &str) -> Result<Archive> {
    let mut files = Files::default();
    files.program("/usr/bin/affinity", fs::read(binary).with_context(|| binary.display().to_string())?);
    let image = Image {
        name,
        entrypoint: &["/usr/bin/affinity"],
        labels: &[
            ("org.opencontainers.image.title", "affinity"),
            ("org.opencontainers.image.description", "Sticky Kubernetes Services in eBPF"),
            ("org.opencontainers.image.licenses", "MIT OR Apache-2.0"),
            ("org.opencontainers.image.source", env!("CARGO_PKG_REPOSITORY")),
            ("org.opencontainers.image.version", env!("CARGO_PKG_VERSION")),
        ],
    };
    image.pack(&files)
}

/// Writes a file and the directories that it is in; nobody reads half of it.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let directory = path.parent().context("a file has no directory")?;
    fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    let new = path.with_added_extension(format!("new-{}", std::process::id()));
    fs::write(&new, bytes).with_context(|| new.display().to_string())?;
    fs::rename(&new, path).with_context(|| path.display().to_string())
}
