//! The images of the cluster that are no registry's: made of the programs that were built, and of the machine's own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    image::{self, archive::Image, layer::Files},
    machine, process, workspace,
};

/// What a shell in a pod of `localhost/agnhost:1` has beside Kubernetes' own test server.
const LINKED: [&str; 2] = ["curl", "ip"];

/// Makes `localhost/pause:1`, `localhost/agnhost:1` and `localhost/coredns:1`; returns where they are.
pub fn build(programs: &Path, coredns: &Path) -> Result<Vec<PathBuf>> {
    let read = |path: PathBuf| fs::read(&path).with_context(|| path.display().to_string());
    let agnhost = read(programs.join("agnhost"))?;
    let (mut pause, mut server, mut dns) = (Files::default(), Files::default(), Files::default());
    pause.program("/agnhost", agnhost.clone());
    server.program("/agnhost", agnhost);
    dns.program("/coredns", read(coredns.to_owned())?);

    let busybox = machine::find_program("busybox").context("busybox is not installed")?;
    let applets = process::capture({
        let mut list = Command::new(&busybox);
        list.arg("--list");
        list
    })?;
    server.program("/bin/busybox", read(busybox)?);
    // Of programs that are there in full, the shell would take its own.
    for applet in applets.lines().filter(|applet| *applet != "busybox" && !LINKED.contains(applet)) {
        server.link(format!("/bin/{applet}"), "busybox");
    }
    for name in LINKED {
        let program = machine::find_program(name).with_context(|| format!("{name} is not installed"))?;
        for library in libraries(&program)? {
            server.program(&library, read(library.clone())?);
        }
        server.program(format!("/usr/bin/{name}"), read(program)?);
    }
    server.text("/etc/passwd", "root:x:0:0:root:/:/bin/sh\n");
    server.directory("/tmp", 0o1777);

    let directory = workspace::root().join("target/image");
    [
        ("pause", &["/agnhost", "pause"][..], &pause),
        ("agnhost", &["/agnhost"], &server),
        ("coredns", &["/coredns"], &dns),
    ]
    .into_iter()
    .map(|(name, entrypoint, files)| {
        let image = Image { name: &format!("localhost/{name}:1"), entrypoint, labels: &[] };
        let path = directory.join(format!("{name}.tar"));
        image::write(&path, &image.pack(files)?.bytes)?;
        Ok(path)
    })
    .collect()
}

/// The shared libraries that a program of the machine's needs, the loader among them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let mut ldd = Command::new("ldd");
    ldd.arg(program);
    let listed = process::capture(ldd)?;
    Ok(listed.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}
