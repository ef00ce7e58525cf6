//! Finds the BPF object that goes into this library.

use std::env;
use std::path::PathBuf;

fn main() {
    println!("cargo::rerun-if-env-changed=AFFINITY_BPF_OBJECT");
    let here = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from).unwrap_or_default();
    let built = || here.join("../target/bpf/affinity.o");
    let object = env::var_os("AFFINITY_BPF_OBJECT").map_or_else(built, PathBuf::from);
    println!("cargo::rerun-if-changed={}", object.display());
    match object.canonicalize() {
        Ok(object) => println!("cargo::rustc-env=AFFINITY_BPF_OBJECT={}", object.display()),
        Err(_) => println!("cargo::error=the BPF object is missing: type `cargo xtask build`"),
    }
}
