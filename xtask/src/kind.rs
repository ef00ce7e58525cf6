//! `cargo xtask kind`: Affinity in place of kube-proxy on a kind cluster, where there is Docker.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use clap::Subcommand;

use crate::{image, machine, process, say, workspace};

/// Run Affinity in place of kube-proxy on a kind cluster
///
/// Uses kind, Docker and kubectl as they are installed; `cargo xtask cluster` does without them. kind/README.md has the same
/// by hand.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  cargo xtask kind up\n  cargo xtask kind demo\n  cargo xtask kind down")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Create the cluster (one control plane, two workers, dual stack, no kube-proxy), load the image, install
    Up {
        /// Without kind's CNI plugin: nodes get ready when another one is installed
        #[arg(long)]
        without_cni: bool,
    },
    /// Install the demo (five pods, a sticky service, a client), and ask for it from inside and from outside
    Demo,
    /// Delete the cluster
    Down,
}

const PROGRAMS: [(&str, &str); 3] = [
    ("docker", "https://docs.docker.com/engine/install"),
    ("kind", "https://kind.sigs.k8s.io/docs/user/quick-start/#installation"),
    ("kubectl", "https://kubernetes.io/docs/tasks/tools"),
];
/// The cluster's name in kind/cluster.yaml.
const NAME: &str = "affinity";
const CONTEXT: &str = "kind-affinity";
/// The image of the demo's pods, which has a shell and curl.
const IMAGE: &str = "registry.k8s.io/e2e-test-images/agnhost:2.53";
/// How many requests the demo makes over each family.
const REQUESTS: u32 = 20;

/// Runs the verb.
pub fn verb(args: &Args) -> Result<()> {
    check()?;
    match args.verb {
        Verb::Up { without_cni } => up(without_cni),
        Verb::Demo => demo(),
        Verb::Down => process::run(command("kind", &["delete", "cluster", "--name", NAME])),
    }
}

/// Fails where something is missing, and names all of it.
fn check() -> Result<()> {
    let missing: Vec<String> = PROGRAMS
        .iter()
        .filter(|(program, _)| machine::find_program(program).is_none())
        .map(|(program, from)| format!("{program} ({from})"))
        .collect();
    if !missing.is_empty() {
        bail!(
            "a kind cluster needs {}: install that, or use `cargo xtask cluster`, which needs no Docker",
            missing.join(" and ")
        );
    }
    let mut info = command("docker", &["info"]);
    info.stdout(Stdio::null()).stderr(Stdio::null());
    if process::run(info).is_err() {
        bail!(
            "Docker's daemon does not answer (`docker info` says why): start it, or use `cargo xtask cluster`, which \
             needs none"
        );
    }
    Ok(())
}

fn up(without_cni: bool) -> Result<()> {
    let image = image::build()?;
    let file = if without_cni { "kind/cluster-without-cni.yaml" } else { "kind/cluster.yaml" };
    process::run(command("kind", &["create", "cluster", "--config", file]))?;
    let mut load = command("kind", &["load", "image-archive"]);
    load.arg(image).args(["--name", NAME]);
    process::run(load)?;
    process::run(kubectl(&["apply", "-k", "kind/deploy"]))?;
    if without_cni {
        say::progress("Waiting", "is left to you: install a CNI plugin, and the nodes get ready");
        return Ok(());
    }
    let rollout = ["-n", "affinity-system", "rollout", "status", "daemonset/affinity", "--timeout=3m"];
    process::run(kubectl(&rollout))?;
    say::progress("Running", &format!("`kubectl --context {CONTEXT} get nodes`, then `cargo xtask kind demo`"));
    Ok(())
}

fn demo() -> Result<()> {
    process::run(kubectl(&["apply", "-k", "kind/demo"]))?;
    process::run(kubectl(&["-n", "demo", "rollout", "status", "deployment/web", "--timeout=3m"]))?;
    process::run(kubectl(&["-n", "demo", "wait", "--for=condition=Ready", "pod/client", "--timeout=3m"]))?;
    for family in ["-4", "-6"] {
        let ask = asking(&format!("{family} http://web.demo.svc.cluster.local/hostname"));
        println!("{REQUESTS} requests by curl {family}, and who answered:");
        process::run(kubectl(&["-n", "demo", "exec", "client", "--", "sh", "-c", &ask]))?;
    }
    from_outside()?;
    println!("and the sessions that one of the nodes knows:");
    process::run(kubectl(&["-n", "affinity-system", "exec", "daemonset/affinity", "--", "affinity", "session", "list"]))
}

/// Containers on the nodes' network that are no nodes: clients outside of the cluster.
const OUTSIDERS: [&str; 2] = ["affinity-outside-1", "affinity-outside-2"];

/// Gives the service addresses that outsiders reach it by, and has two of them ask.
fn from_outside() -> Result<()> {
    process::run(kubectl(&["apply", "-k", "kind/lb"]))?;
    let balanced = r#"{"spec": {"type": "LoadBalancer"}}"#;
    process::run(kubectl(&["-n", "demo", "patch", "service", "web", "-p", balanced]))?;
    let given = "--for=jsonpath={.status.loadBalancer.ingress}";
    process::run(kubectl(&["-n", "demo", "wait", given, "service/web", "--timeout=1m"]))?;
    let ingress = "jsonpath={.status.loadBalancer.ingress[*].ip}";
    let addresses = process::capture(kubectl(&["-n", "demo", "get", "service", "web", "-o", ingress]))?;
    remove_outsiders();
    // Both at once, so that each has an address of its own.
    let asked = OUTSIDERS.iter().try_for_each(|name| {
        process::run(command(
            "docker",
            &["run", "--detach", "--rm", "--name", name, "--network", "kind", IMAGE, "pause"],
        ))
    });
    let asked = asked.and_then(|()| {
        for (name, address) in
            OUTSIDERS.iter().flat_map(|name| addresses.split_whitespace().map(move |address| (name, address)))
        {
            let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
            println!("{REQUESTS} requests of {name}, outside of the cluster, to {address}, and who answered:");
            let ask = asking(&format!("-g http://{host}/hostname"));
            process::run(command("docker", &["exec", name, "sh", "-c", &ask])).with_context(|| {
                format!("{address} is not answered for: is it of the network that `docker network inspect kind` shows? kind/lb/lb.yaml says which are given")
            })?;
        }
        Ok(())
    });
    remove_outsiders();
    asked
}

/// Removes them, where they are.
fn remove_outsiders() {
    let mut remove = command("docker", &["rm", "--force"]);
    remove.args(OUTSIDERS).stdout(Stdio::null()).stderr(Stdio::null());
    let _ = process::run(remove);
}

/// What asks many times by curl, and says how often each pod answered.
fn asking(what: &str) -> String {
    format!(
        "set -e; all=$(for i in $(seq {REQUESTS}); do curl -sf --max-time 5 {what} || exit 1; echo; done); \
         echo \"$all\" | sort | uniq -c"
    )
}

fn kubectl(arguments: &[&str]) -> Command {
    let mut kubectl = command("kubectl", &["--context", CONTEXT]);
    kubectl.args(arguments);
    kubectl
}

fn command(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(workspace::root());
    command
}
