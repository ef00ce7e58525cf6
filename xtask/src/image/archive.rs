//! An image as a file: the OCI image layout (image-spec 1.1) in a tar file, with the `manifest.json` beside it that
//! `docker load` reads. `ctr images import` and `kind load image-archive` take it, too.

use std::fmt::Write as _;
use std::io::Write as _;

use anyhow::{Context as _, Result};
use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType};

use super::layer::{Files, header};

/// What an image is, beside its files.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    /// `localhost/name:tag`.
    pub name: &'a str,
    /// What a container of it runs.
    pub entrypoint: &'a [&'a str],
    /// Its labels (`org.opencontainers.image.*`).
    pub labels: &'a [(&'a str, &'a str)],
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const PATH: &str = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";

/// The archive, and the digest of the image's manifest.
pub struct Archive {
    /// The bytes of the tar file.
    pub bytes: Vec<u8>,
    /// `sha256:…`: two images with the same one are the same.
    pub digest: String,
}

/// A content that is called by its own hash.
struct Blob {
    media_type: &'static str,
    digest: String,
    content: Vec<u8>,
}

/// `sha256:…` of a content.
fn digest(content: &[u8]) -> String {
    let mut digest = String::from("sha256:");
    for byte in Sha256::digest(content) {
        let _ = write!(digest, "{byte:02x}");
    }
    digest
}

/// Compressed by a compressor whose version is in `Cargo.lock`, with no time in it: the same bytes make the same bytes.
fn compress(content: &[u8]) -> Result<Vec<u8>> {
    let mut compressed = GzEncoder::new(Vec::new(), Compression::default());
    compressed.write_all(content).and_then(|()| compressed.finish()).context("compressing a layer")
}

impl Blob {
    fn new(media_type: &'static str, content: Vec<u8>) -> Self {
        Self { media_type, digest: digest(&content), content }
    }

    fn json(media_type: &'static str, content: &Value) -> Self {
        // serde_json keeps the keys of a map in their order.
        Self::new(media_type, content.to_string().into_bytes())
    }

    fn descriptor(&self) -> Value {
        json!({ "mediaType": self.media_type, "digest": self.digest, "size": self.content.len() })
    }

    fn path(&self) -> String {
        format!("blobs/{}", self.digest.replace(':', "/"))
    }
}

impl Image<'_> {
    /// Packs the files.
    pub fn pack(&self, files: &Files) -> Result<Archive> {
        let tag = self.name.rsplit_once(':').with_context(|| format!("image {} has no tag", self.name))?.1;
        let files = files.layer()?;
        let layer = Blob::new(LAYER, compress(&files)?);
        let labels: serde_json::Map<String, Value> =
            self.labels.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
        let config = Blob::json(
            CONFIG,
            &json!({
                "architecture": architecture(),
                "os": "linux",
                "config": { "Entrypoint": self.entrypoint, "Env": [PATH], "Labels": labels, "User": "0:0" },
                "rootfs": { "type": "layers", "diff_ids": [digest(&files)] },
                "history": [{ "created_by": "cargo xtask image" }],
            }),
        );
        let manifest = Blob::json(
            MANIFEST,
            &json!({
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": config.descriptor(),
                "layers": [layer.descriptor()],
            }),
        );
        let mut named = manifest.descriptor();
        named["annotations"] =
            json!({ "io.containerd.image.name": self.name, "org.opencontainers.image.ref.name": tag });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [named],
        });
        let docker = json!([{ "Config": config.path(), "RepoTags": [self.name], "Layers": [layer.path()] }]);

        let mut archive = Builder::new(Vec::new());
        let mut add = |path: &str, content: &[u8]| {
            let mut header = header(EntryType::Regular, 0o644);
            header.set_size(content.len() as u64);
            archive.append_data(&mut header, path, content).with_context(|| path.to_owned())
        };
        let mut blobs = [&layer, &config, &manifest];
        blobs.sort_by(|a, b| a.digest.cmp(&b.digest));
        for blob in blobs {
            add(&blob.path(), &blob.content)?;
        }
        add("index.json", index.to_string().as_bytes())?;
        add("manifest.json", docker.to_string().as_bytes())?;
        add("oci-layout", json!({ "imageLayoutVersion": "1.0.0" }).to_string().as_bytes())?;
        Ok(Archive { bytes: archive.into_inner().context("writing an archive")?, digest: manifest.digest })
    }
}

/// This machine's architecture by Go's name, which image-spec uses.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, io::Read as _};

    use super::*;

    const IMAGE: Image<'_> = Image {
        name: "localhost/affinity:dev",
        entrypoint: &["/usr/bin/affinity"],
        labels: &[("org.opencontainers.image.title", "affinity")],
    };

    fn files() -> Files {
        let mut files = Files::default();
        files.program("/usr/bin/affinity", vec![7; 10_000]);
        files
    }

    fn unpack(archive: &Archive) -> Result<BTreeMap<String, Vec<u8>>> {
        let mut found = BTreeMap::new();
        for entry in tar::Archive::new(archive.bytes.as_slice()).entries()? {
            let mut entry = entry?;
            assert_eq!((entry.header().mtime()?, entry.header().uid()?), (0, 0));
            let path = entry.path()?.display().to_string();
            let mut content = Vec::new();
            entry.read_to_end(&mut content)?;
            found.insert(path, content);
        }
        Ok(found)
    }

    #[test]
    fn two_builds_give_one_digest_and_another_binary_another() -> Result<()> {
        let (one, two) = (IMAGE.pack(&files())?, IMAGE.pack(&files())?);
        assert_eq!((&one.digest, &one.bytes), (&two.digest, &two.bytes));
        let mut other = files();
        other.program("/usr/bin/affinity", vec![8; 10_000]);
        assert_ne!(IMAGE.pack(&other)?.digest, one.digest);
        Ok(())
    }

    #[test]
    fn the_layout_is_what_oci_says() -> Result<()> {
        let archive = IMAGE.pack(&files())?;
        let found = unpack(&archive)?;
        let json = |path: &str| -> Result<Value> { Ok(serde_json::from_slice(found.get(path).context("a file")?)?) };
        let blob = |descriptor: &Value| -> Result<Vec<u8>> {
            let digest = descriptor["digest"].as_str().context("a digest")?;
            let content = found.get(&format!("blobs/{}", digest.replace(':', "/"))).context("a blob")?;
            assert_eq!(descriptor["size"], content.len());
            assert_eq!(Blob::new("", content.clone()).digest, digest, "a blob is called by its hash");
            Ok(content.clone())
        };
        assert_eq!(json("oci-layout")?["imageLayoutVersion"], "1.0.0");
        let index = json("index.json")?;
        let named = &index["manifests"][0];
        assert_eq!(named["digest"], archive.digest.as_str());
        assert_eq!(named["annotations"]["io.containerd.image.name"], "localhost/affinity:dev");
        let manifest: Value = serde_json::from_slice(&blob(named)?)?;
        assert_eq!((&manifest["schemaVersion"], &manifest["mediaType"]), (&json!(2), &json!(MANIFEST)));
        let layer = &manifest["layers"][0];
        let mut files = Vec::new();
        flate2::read::GzDecoder::new(blob(layer)?.as_slice()).read_to_end(&mut files)?;
        assert_eq!(layer["mediaType"], LAYER);
        let config: Value = serde_json::from_slice(&blob(&manifest["config"])?)?;
        // Of what is in the layer before it was compressed.
        assert_eq!(config["rootfs"]["diff_ids"][0], digest(&files));
        assert_eq!(config["config"]["Entrypoint"], json!(["/usr/bin/affinity"]));
        assert_eq!(config["os"], "linux");
        Ok(())
    }

    #[test]
    fn docker_finds_its_own_manifest() -> Result<()> {
        let found = unpack(&IMAGE.pack(&files())?)?;
        let docker: Value = serde_json::from_slice(found.get("manifest.json").context("manifest.json")?)?;
        assert_eq!(docker[0]["RepoTags"], json!(["localhost/affinity:dev"]));
        for path in [&docker[0]["Config"], &docker[0]["Layers"][0]] {
            assert!(found.contains_key(path.as_str().context("a path")?));
        }
        Ok(())
    }
}
