//! By which address and as whom the API server is talked to.
//!
//! A pod is told the address of the `kubernetes` service, which nobody serves before this daemon does. So an address that
//! needs no service is looked for first: one that somebody gave, or that of the node's own kubelet. Credentials are the
//! pod's in any case.

use std::{
    env, fmt,
    path::{Path, PathBuf},
};

use http::Uri;
use kube::{
    Config,
    config::{KubeConfigOptions, Kubeconfig},
};

use crate::{causes::in_full, sources::SourceError};

/// Where kubeadm, and kind by it, has the kubelet's kubeconfig.
pub const KUBELET_KUBECONFIG: &str = "/etc/kubernetes/kubelet.conf";

/// What is known of where the API server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// Its URL, which wins over all other places; credentials are still found as without it.
    pub api_server: Option<Uri>,
    /// The kubeconfig of the node's kubelet, of which only `server:` is read.
    pub kubelet: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self { api_server: None, kubelet: KUBELET_KUBECONFIG.into() }
    }
}

/// What was looked for, and what came of it: one line for whoever reads an error.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tried(Vec<(String, String)>);

impl Tried {
    fn note(&mut self, place: impl Into<String>, outcome: impl Into<String>) {
        self.0.push((place.into(), outcome.into()));
    }
}

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, (place, outcome)) in self.0.iter().enumerate() {
            let comma = if number > 0 { "; " } else { "" };
            write!(f, "{comma}{place}: {outcome}")?;
        }
        Ok(())
    }
}

/// The configuration of a client, and what errors call the API server.
pub(super) async fn infer(places: &Places) -> Result<(Config, String), SourceError> {
    let mut tried = Tried::default();
    match Config::from_kubeconfig(&KubeConfigOptions::default()).await {
        Ok(mut config) => {
            if let Some(url) = &places.api_server {
                config.cluster_url = url.clone();
            }
            let url = config.cluster_url.to_string();
            return Ok((config, url));
        }
        Err(error) => tried.note("KUBECONFIG and ~/.kube/config", in_full(&error)),
    }
    // By another name than the environment's, so that only the pod's credentials are needed.
    let mut config = match Config::incluster_dns() {
        Ok(config) => config,
        Err(error) => {
            tried.note("the service account of a pod", in_full(&error));
            return Err(SourceError::NoCluster { tried });
        }
    };
    let kubelet = kubelet_server(&places.kubelet);
    let (url, called) = choose(places, &Environment::read(), kubelet, tried)?;
    config.cluster_url = url;
    config.apply_debug_overrides();
    Ok((config, called))
}

/// What a pod's environment says of the `kubernetes` service.
#[derive(Clone, Debug, Default)]
struct Environment {
    host: Option<String>,
    port: Option<String>,
    /// The service's address, where the kubelet has told it; a manifest that sets the host leaves it as it was.
    service: Option<String>,
}

impl Environment {
    fn read() -> Self {
        let read = |name| env::var(name).ok().filter(|value: &String| !value.is_empty());
        Self {
            host: read("KUBERNETES_SERVICE_HOST"),
            port: read("KUBERNETES_SERVICE_PORT"),
            service: read("KUBERNETES_PORT_443_TCP_ADDR"),
        }
    }

    fn url(&self) -> Option<Result<Uri, String>> {
        let host = self.host.as_ref()?;
        let port = self.port.as_deref().unwrap_or("443");
        let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
        let url = format!("https://{host}:{port}");
        Some(url.parse().map_err(|error| format!("{url}: {error}")))
    }

    /// Whether the host is of the manifest rather than of the kubelet.
    fn is_given(&self) -> bool {
        self.host.is_some() && self.host != self.service
    }
}

/// The address for a pod, by preference, and what errors call it.
fn choose(
    places: &Places,
    environment: &Environment,
    kubelet: Result<Uri, String>,
    mut tried: Tried,
) -> Result<(Uri, String), SourceError> {
    if let Some(url) = &places.api_server {
        return Ok((url.clone(), url.to_string()));
    }
    tried.note("--api-server", "not given");
    let own = environment.url();
    if environment.is_given()
        && let Some(url) = own
    {
        match url {
            Ok(url) => return Ok((url.clone(), format!("{url} (by KUBERNETES_SERVICE_HOST)"))),
            Err(error) => tried.note("KUBERNETES_SERVICE_HOST", error),
        }
    } else {
        tried.note("KUBERNETES_SERVICE_HOST", "not set by the manifest");
    }
    let place = places.kubelet.display().to_string();
    match kubelet {
        Ok(url) => return Ok((url.clone(), format!("{url} (by {place})"))),
        Err(error) => tried.note(place, error),
    }
    match environment.url() {
        Some(Ok(url)) => {
            let called = format!(
                "{url} (the `kubernetes` service, which nothing may serve on this node yet; an address of the API server \
                 itself was not found: {tried})"
            );
            Ok((url, called))
        }
        Some(Err(error)) => {
            tried.note("the `kubernetes` service", error);
            Err(SourceError::NoCluster { tried })
        }
        None => {
            tried.note("the `kubernetes` service", "KUBERNETES_SERVICE_HOST is not set");
            Err(SourceError::NoCluster { tried })
        }
    }
}

/// The `server:` of the current context of a kubeconfig.
fn kubelet_server(path: &Path) -> Result<Uri, String> {
    // `Kubeconfig::read_from` would make files that it names absolute; none of them is read here.
    let kubeconfig = Kubeconfig::read_from(path).map_err(|error| in_full(&error))?;
    let current = kubeconfig.current_context.as_ref();
    let context = kubeconfig.contexts.iter().find(|context| Some(&context.name) == current);
    let context = context.and_then(|context| context.context.as_ref()).ok_or("it has no current context")?;
    let cluster = kubeconfig.clusters.iter().find(|cluster| cluster.name == context.cluster);
    let server = cluster.and_then(|cluster| cluster.cluster.as_ref()?.server.as_deref());
    let server = server.ok_or_else(|| format!("its cluster {:?} has no server", context.cluster))?;
    server.parse().map_err(|error| format!("server {server:?}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn environment(host: Option<&str>, service: Option<&str>) -> Environment {
        Environment {
            host: host.map(str::to_owned),
            port: host.map(|_| "6443".to_owned()),
            service: service.map(str::to_owned),
        }
    }

    fn chosen(
        places: &Places,
        environment: &Environment,
        kubelet: Result<&str, &str>,
    ) -> Result<(String, String), String> {
        let kubelet = kubelet.map(|url| url.parse().expect("a URL")).map_err(str::to_owned);
        choose(places, environment, kubelet, Tried::default())
            .map(|(url, called)| (url.to_string(), called))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn an_address_that_needs_no_service_wins() {
        let given = Places { api_server: Some("https://cp:6443".parse().expect("a URL")), ..Places::default() };
        let (kubelet, service) = (Ok("https://node:6443"), environment(Some("10.96.0.1"), Some("10.96.0.1")));
        let url = |places: &Places, environment: &Environment| chosen(places, environment, kubelet).expect("one").0;
        assert_eq!(url(&given, &service), "https://cp:6443/");
        let by_manifest = environment(Some("198.51.100.1"), Some("10.96.0.1"));
        assert_eq!(url(&Places::default(), &by_manifest), "https://198.51.100.1:6443/");
        assert_eq!(url(&Places::default(), &environment(Some("fd00::1"), None)), "https://[fd00::1]:6443/");
        assert_eq!(url(&Places::default(), &service), "https://node:6443/");
    }

    #[test]
    fn what_was_tried_is_told_with_the_services_address() {
        let service = environment(Some("10.96.0.1"), Some("10.96.0.1"));
        let (url, called) = chosen(&Places::default(), &service, Err("no such file")).expect("the service");
        assert_eq!(url, "https://10.96.0.1:6443/");
        for part in ["--api-server: not given", "not set by the manifest", "/etc/kubernetes/kubelet.conf: no such file"]
        {
            assert!(called.contains(part), "{called}");
        }
    }

    #[test]
    fn without_any_address_the_error_says_where_it_was_looked_for() {
        let error = chosen(&Places::default(), &Environment::default(), Err("no such file")).expect_err("no address");
        for part in ["--api-server", "KUBERNETES_SERVICE_HOST", "/etc/kubernetes/kubelet.conf: no such file"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn the_kubelets_server_is_read_and_nothing_else_of_it() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        // As kubeadm writes it: the certificate is a file that a pod can't see.
        let text = "apiVersion: v1\nkind: Config\ncurrent-context: system:node:n1@kind\n\
                    clusters: [{name: kind, cluster: {server: 'https://kind-control-plane:6443'}}]\n\
                    contexts: [{name: 'system:node:n1@kind', context: {cluster: kind, user: 'system:node:n1'}}]\n\
                    users: [{name: 'system:node:n1', user: {client-certificate: /var/lib/kubelet/pki/current.pem}}]\n";
        file.write_all(text.as_bytes()).expect("written");
        assert_eq!(kubelet_server(file.path()).expect("a server").to_string(), "https://kind-control-plane:6443/");
        file.as_file().set_len(20).expect("cut off");
        assert!(kubelet_server(file.path()).is_err());
        assert!(kubelet_server(Path::new("/does/not/exist")).expect_err("no file").contains("/does/not/exist"));
    }
}
