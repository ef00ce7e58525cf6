//! The file system of an image, as one layer: entries in the order of their paths, without owner and time, so that the same
//! files make the same bytes.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use tar::{Builder, EntryType, Header};

/// What is in an image, by path from its root.
#[derive(Clone, Debug, Default)]
pub struct Files(BTreeMap<PathBuf, Entry>);

#[derive(Clone, Debug)]
enum Entry {
    File { mode: u32, content: Vec<u8> },
    Link { target: PathBuf },
    Directory { mode: u32 },
}

impl Files {
    /// A program.
    pub fn program(&mut self, path: impl AsRef<Path>, content: Vec<u8>) {
        self.add(path.as_ref(), Entry::File { mode: 0o755, content });
    }

    /// A file to be read.
    pub fn text(&mut self, path: impl AsRef<Path>, content: &str) {
        self.add(path.as_ref(), Entry::File { mode: 0o644, content: content.as_bytes().to_vec() });
    }

    /// A symbolic link.
    pub fn link(&mut self, path: impl AsRef<Path>, target: impl Into<PathBuf>) {
        self.add(path.as_ref(), Entry::Link { target: target.into() });
    }

    /// A directory with a mode of its own.
    pub fn directory(&mut self, path: impl AsRef<Path>, mode: u32) {
        self.add(path.as_ref(), Entry::Directory { mode });
    }

    fn add(&mut self, path: &Path, entry: Entry) {
        let path = path.strip_prefix("/").unwrap_or(path).to_owned();
        for parent in path.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty()) {
            self.0.entry(parent.to_owned()).or_insert(Entry::Directory { mode: 0o755 });
        }
        self.0.insert(path, entry);
    }

    /// The layer: a tar file.
    pub fn layer(&self) -> Result<Vec<u8>> {
        let mut layer = Builder::new(Vec::new());
        for (path, entry) in &self.0 {
            let named = || path.display().to_string();
            match entry {
                Entry::File { mode, content } => {
                    let mut header = header(EntryType::Regular, *mode);
                    header.set_size(content.len() as u64);
                    layer.append_data(&mut header, path, content.as_slice()).with_context(named)?;
                }
                Entry::Link { target } => {
                    layer.append_link(&mut header(EntryType::Symlink, 0o777), path, target).with_context(named)?;
                }
                Entry::Directory { mode } => {
                    // A directory's name ends with a slash.
                    layer
                        .append_data(&mut header(EntryType::Directory, *mode), path.join(""), [].as_slice())
                        .with_context(named)?;
                }
            }
        }
        layer.into_inner().context("writing a layer")
    }
}

/// Of root, of no time.
pub(super) fn header(kind: EntryType, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    header
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn the_order_of_adding_makes_no_difference() -> Result<()> {
        let (mut one, mut other) = (Files::default(), Files::default());
        one.program("/usr/bin/affinity", b"x".to_vec());
        one.text("etc/passwd", "root");
        other.text("/etc/passwd", "root");
        other.program("usr/bin/affinity", b"x".to_vec());
        assert_eq!(one.layer()?, other.layer()?);
        Ok(())
    }

    #[test]
    fn directories_come_before_what_is_in_them_and_nothing_has_a_time() -> Result<()> {
        let mut files = Files::default();
        files.program("/usr/bin/a", b"abc".to_vec());
        files.link("/bin/sh", "../usr/bin/a");
        files.directory("/tmp", 0o1777);
        let layer = files.layer()?;
        let mut seen = Vec::new();
        for entry in tar::Archive::new(layer.as_slice()).entries()? {
            let mut entry = entry?;
            let header = entry.header();
            assert_eq!((header.mtime()?, header.uid()?, header.gid()?), (0, 0, 0));
            let described = format!("{} {:o}", entry.path()?.display(), entry.header().mode()?);
            let mut content = String::new();
            entry.read_to_string(&mut content)?;
            seen.push(format!("{described} {content}"));
        }
        assert_eq!(seen, ["bin/ 755 ", "bin/sh 777 ", "tmp/ 1777 ", "usr/ 755 ", "usr/bin/ 755 ", "usr/bin/a 755 abc"]);
        Ok(())
    }
}
