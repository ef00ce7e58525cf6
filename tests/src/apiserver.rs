//! A real API server: etcd and kube-apiserver, as processes on loopback that die with this one.
//!
//! The binaries come from the directory that the environment variable `KUBEBUILDER_ASSETS` names; `cargo xtask test` sees to
//! it. There are no controllers: suites write `EndpointSlices` themselves, and a namespace is not emptied when it is deleted.
//!
//! # How to see 410 Gone
//! A watch that asks for changes since a version that the server no longer has begins as any other, with 200, and is then
//! ended by one `ERROR` event with a status of code 410 and reason `Expired` (seen with Kubernetes 1.37). Two ways make that
//! happen for certain, once the client's own connection is [`Door::Silent`] or cut, and something has been changed:
//!
//! * [`ApiServer::stop`] and [`ApiServer::resume`]: a server starts with an empty watch cache, which knows nothing from
//!   before it was filled.
//! * [`ApiOptions::watch_cache`] off and [`ApiServer::compact`]: without the cache the watch goes to etcd, which has
//!   forgotten. (With the cache, compaction alone does nothing: the cache answers.)
//!
//! [`ApiServer::watch_is_gone`] asks the server itself whether a version is gone, so that a test knows that it tests this.

use std::fmt::{self, Debug};
use std::fs;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use futures::StreamExt as _;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule, RoleRef, Subject};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, ListParams, PostParams, WatchEvent, WatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::apiproxy::ApiProxy;
use crate::certs::{Authority, Identity};
use crate::netns::Netns;
use crate::process::{Place, Process};
use crate::traffic::http;
use crate::wait;

#[cfg(doc)]
use crate::apiproxy::Door;

/// The environment variable that names the directory of `etcd` and `kube-apiserver`.
pub const ASSETS: &str = "KUBEBUILDER_ASSETS";
/// The addresses that services get, of the first family and of both.
pub const SERVICE_RANGE: &str = "10.96.0.0/16,fd00:10:96::/112";
/// How long a server may take to be ready: one with two busy cores takes ten seconds.
const READY: Duration = Duration::from_mins(2);

/// How an API server is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiOptions {
    /// Whether it answers watches from memory, as everywhere; without, it asks etcd for each.
    pub watch_cache: bool,
    /// More arguments of kube-apiserver.
    pub arguments: Vec<String>,
}

impl Default for ApiOptions {
    fn default() -> Self {
        Self { watch_cache: true, arguments: Vec::new() }
    }
}

/// An API server with its etcd. Both end when it is dropped.
pub struct ApiServer {
    // In the order in which they are dropped.
    client: Client,
    runtime: Runtime,
    server: Option<Process>,
    etcd: Process,
    etcd_address: SocketAddr,
    address: SocketAddr,
    files: Files,
    options: ApiOptions,
    /// The last, because the others write to it.
    directory: TempDir,
}

/// The certificates that the server and its clients use.
#[derive(Debug)]
struct Files {
    authority: Authority,
    server: Identity,
    admin: Identity,
    service_accounts: Identity,
}

impl ApiServer {
    /// Starts both and waits until the server says that it is ready.
    ///
    /// # Errors
    /// Without `KUBEBUILDER_ASSETS`, and where one of them does not start; its log is in the error.
    pub fn start(options: ApiOptions) -> Result<Self> {
        let [etcd_port, peer_port, port] = free_ports()?;
        let directory = tempfile::Builder::new().prefix("affinity-api-").tempdir()?;
        let files = Files::new(directory.path())?;
        let etcd_address = loopback(etcd_port);
        let etcd = start_etcd(directory.path(), etcd_address, loopback(peer_port))?;
        let address = loopback(port);
        let kubeconfig = directory.path().join("kubeconfig");
        write_kubeconfig(&kubeconfig, address, &files.authority.certificate(), &files.admin)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let client = runtime.block_on(connect(&kubeconfig))?;
        let mut server = Self { client, runtime, server: None, etcd, etcd_address, address, files, options, directory };
        server.resume()?;
        Ok(server)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A kubeconfig of an administrator.
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("kubeconfig")
    }

    /// A door in front of the server, listening in `netns` (or in this process's namespace), and the kubeconfig of an
    /// administrator who goes through it.
    ///
    /// # Errors
    /// Where it cannot listen.
    pub fn proxy(&self, netns: Option<&Netns>) -> Result<(ApiProxy, PathBuf)> {
        let proxy = ApiProxy::start(netns, self.address)?;
        let path = self.directory.path().join(format!("kubeconfig-{}", proxy.address().port()));
        write_kubeconfig(&path, proxy.address(), &self.files.authority.certificate(), &self.files.admin)?;
        Ok((proxy, path))
    }

    /// The kubeconfig of a user who is nobody special and goes through a door: see [`ApiServer::let_work`].
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn kubeconfig_of(&self, user: &str, door: &ApiProxy) -> Result<PathBuf> {
        let identity = self.files.authority.sign(user, user, None, &[])?;
        let path = self.directory.path().join(format!("kubeconfig-{user}"));
        write_kubeconfig(&path, door.address(), &self.files.authority.certificate(), &identity)?;
        Ok(path)
    }

    /// Gives a user the rights that `kind/deploy` gives the daemon.
    ///
    /// # Errors
    /// Where the server refuses, or it was done before.
    pub fn let_work(&self, user: &str) -> Result<()> {
        let metadata = ObjectMeta { name: Some(user.to_owned()), ..ObjectMeta::default() };
        let role = ClusterRole { metadata: metadata.clone(), rules: Some(rules()?), ..ClusterRole::default() };
        let group = "rbac.authorization.k8s.io".to_owned();
        let binding = ClusterRoleBinding {
            metadata,
            role_ref: RoleRef { api_group: group.clone(), kind: "ClusterRole".to_owned(), name: user.to_owned() },
            subjects: Some(vec![Subject {
                api_group: Some(group),
                kind: "User".to_owned(),
                name: user.to_owned(),
                namespace: None,
            }]),
        };
        self.block_on(async {
            Api::all(self.client()).create(&PostParams::default(), &role).await?;
            Api::all(self.client()).create(&PostParams::default(), &binding).await
        })
        .with_context(|| format!("letting {user} work"))?;
        Ok(())
    }

    /// Takes back what [`ApiServer::let_work`] gave.
    ///
    /// # Errors
    /// Where there is nothing to take back.
    pub fn let_work_no_more(&self, user: &str) -> Result<()> {
        self.block_on(async {
            let params = DeleteParams::default();
            Api::<ClusterRoleBinding>::all(self.client()).delete(user, &params).await?;
            Api::<ClusterRole>::all(self.client()).delete(user, &params).await
        })
        .with_context(|| format!("letting {user} work no more"))?;
        Ok(())
    }

    /// A client of this server, for use within [`ApiServer::block_on`].
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Runs something asynchronous to its end.
    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// Ends the server in order, as an upgrade does. etcd, and with it every object, stays.
    ///
    /// # Errors
    /// Where it does not end within 90 seconds: a server first waits for the requests that it serves.
    pub fn stop(&mut self) -> Result<()> {
        if let Some(mut server) = self.server.take() {
            server.terminate(Duration::from_secs(90))?;
        }
        Ok(())
    }

    /// Kills the server. etcd, and with it every object, stays.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut server) = self.server.take() {
            server.kill()?;
        }
        Ok(())
    }

    /// Starts the server again, on the same port and with the same objects, and waits until it is ready.
    ///
    /// # Errors
    /// Where it runs already or does not start; its log is in the error.
    pub fn resume(&mut self) -> Result<()> {
        ensure!(self.server.is_none(), "the API server is running");
        let log = self.directory.path().join("kube-apiserver.log");
        let command = self.command()?;
        let server = self.server.insert(Process::start(command, &Place::default(), Some(&log))?);
        let client = &self.client;
        let runtime = &self.runtime;
        wait::until_true("the API server", READY, || {
            server.must_run()?;
            self.etcd.must_run()?;
            Ok(runtime.block_on(is_ready(client)))
        })
        .map_err(|error| match server.exit_status() {
            // Otherwise the error has the log already.
            Ok(None) => error.context(server.log_tail()),
            _ => error,
        })
    }

    /// What the server wrote, over all its lives.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("kube-apiserver.log")).unwrap_or_default()
    }

    /// Has etcd forget all versions before the present one.
    ///
    /// # Errors
    /// Where etcd does not answer.
    pub fn compact(&self) -> Result<()> {
        let ask = |path: &str, body: serde_json::Value| -> Result<serde_json::Value> {
            let answer = http::post_json(self.etcd_address, path, &body.to_string())?;
            serde_json::from_slice(&answer).with_context(|| format!("the answer of etcd to {path}"))
        };
        let status = ask("/v3/maintenance/status", json!({}))?;
        let revision = status["header"]["revision"].as_str().context("etcd told no revision")?;
        ask("/v3/kv/compaction", json!({ "revision": revision, "physical": true }))?;
        Ok(())
    }

    /// The version of the whole store, from which a watch would go on.
    ///
    /// # Errors
    /// Where the server does not answer.
    pub fn resource_version(&self) -> Result<String> {
        let services: Api<Service> = Api::all(self.client());
        let list = self.block_on(services.list(&ListParams::default().limit(1)))?;
        list.metadata.resource_version.context("a list without a version")
    }

    /// Whether a watch of services from this version on gets 410 Gone, in whichever way.
    ///
    /// # Errors
    /// Where the server answers with something else that is wrong.
    pub fn watch_is_gone(&self, version: &str) -> Result<bool> {
        let services: Api<Service> = Api::all(self.client());
        self.block_on(async {
            let params = WatchParams::default().timeout(1);
            let mut events = match services.watch(&params, version).await {
                Ok(events) => events.boxed(),
                Err(kube::Error::Api(status)) if status.code == 410 => return Ok(true),
                Err(error) => return Err(error.into()),
            };
            while let Some(event) = events.next().await {
                match event {
                    Ok(WatchEvent::Error(status)) if status.code == 410 => return Ok(true),
                    Ok(WatchEvent::Error(status)) => bail!("{status:?}"),
                    Ok(_) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(false)
        })
    }

    /// Creates an object, or replaces the one of its name: it says what `object` says then, and nothing else.
    ///
    /// # Errors
    /// Where the server refuses it.
    pub fn apply<K: Object>(&self, object: &K) -> Result<K> {
        let (namespace, name) = name_of(object)?;
        let api: Api<K> = Api::namespaced(self.client(), namespace);
        let applied = self.block_on(async {
            let params = PostParams::default();
            let Some(present) = api.get_opt(name).await? else {
                return api.create(&params, object).await;
            };
            let mut object = object.clone();
            object.meta_mut().resource_version = present.resource_version();
            api.replace(name, &params, &object).await
        });
        applied.with_context(|| format!("applying {namespace}/{name}"))
    }

    /// Deletes the object of that name.
    ///
    /// # Errors
    /// Where there is none, or the server refuses.
    pub fn delete<K: Object>(&self, object: &K) -> Result<()> {
        let (namespace, name) = name_of(object)?;
        let api: Api<K> = Api::namespaced(self.client(), namespace);
        self.block_on(api.delete(name, &DeleteParams::default()))
            .with_context(|| format!("deleting {namespace}/{name}"))?;
        Ok(())
    }

    /// The object of that name as the server has it.
    ///
    /// # Errors
    /// Where there is none.
    pub fn get<K: Object>(&self, object: &K) -> Result<K> {
        let (namespace, name) = name_of(object)?;
        let api: Api<K> = Api::namespaced(self.client(), namespace);
        self.block_on(api.get(name)).with_context(|| format!("{namespace}/{name}"))
    }

    /// Creates a namespace.
    ///
    /// # Errors
    /// Where it exists.
    pub fn create_namespace(&self, name: &str) -> Result<()> {
        let api: Api<Namespace> = Api::all(self.client());
        let mut namespace = Namespace::default();
        namespace.metadata.name = Some(name.to_owned());
        self.block_on(api.create(&PostParams::default(), &namespace))
            .with_context(|| format!("creating namespace {name}"))?;
        Ok(())
    }

    fn command(&self) -> Result<Command> {
        let Files { authority, server, admin, service_accounts } = &self.files;
        let mut command = Command::new(program("kube-apiserver")?);
        let mut argument = |name: &str, value: &dyn AsRef<std::ffi::OsStr>| {
            let mut text = std::ffi::OsString::from(format!("--{name}="));
            text.push(value);
            command.arg(text);
        };
        argument("bind-address", &self.address.ip().to_string());
        argument("secure-port", &self.address.port().to_string());
        argument("advertise-address", &"127.0.0.1");
        argument("endpoint-reconciler-type", &"none");
        argument("etcd-servers", &format!("http://{}", self.etcd_address));
        argument("etcd-compaction-interval", &"0");
        argument("service-cluster-ip-range", &SERVICE_RANGE);
        argument("authorization-mode", &"RBAC");
        argument("client-ca-file", &authority.certificate());
        argument("tls-cert-file", &server.certificate);
        argument("tls-private-key-file", &server.key);
        argument("kubelet-client-certificate", &admin.certificate);
        argument("kubelet-client-key", &admin.key);
        // By the certificate: it reads a public key out of that, but not out of a PKCS#8 private key.
        argument("service-account-key-file", &service_accounts.certificate);
        argument("service-account-signing-key-file", &service_accounts.key);
        argument("service-account-issuer", &"https://kubernetes.default.svc.cluster.local");
        argument("watch-cache", &self.options.watch_cache.to_string());
        argument("profiling", &"false");
        command.args(&self.options.arguments);
        Ok(command)
    }
}

impl Debug for ApiServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiServer({})", self.address)
    }
}

/// The kinds of objects that suites write: they have a namespace, and a type of their own.
pub trait Object:
    Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Serialize + DeserializeOwned + Clone + Debug
{
}

impl<K> Object for K where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Serialize + DeserializeOwned + Clone + Debug
{
}

impl Files {
    fn new(directory: &Path) -> Result<Self> {
        let authority = Authority::new(directory)?;
        let hosts = ["localhost", "kubernetes.default.svc", "127.0.0.1", "::1", "10.96.0.1"];
        Ok(Self {
            server: authority.sign("server", "kube-apiserver", None, &hosts)?,
            admin: authority.sign("admin", "admin", Some("system:masters"), &[])?,
            service_accounts: authority.sign("service-accounts", "service-accounts", None, &[])?,
            authority,
        })
    }
}

fn start_etcd(directory: &Path, client: SocketAddr, peer: SocketAddr) -> Result<Process> {
    let mut command = Command::new(program("etcd")?);
    command.arg("--data-dir").arg(directory.join("etcd"));
    for (name, address) in [
        ("listen-client-urls", client),
        ("advertise-client-urls", client),
        ("listen-peer-urls", peer),
        ("initial-advertise-peer-urls", peer),
    ] {
        command.arg(format!("--{name}=http://{address}"));
    }
    command.args(["--name=local", "--log-level=warn", "--unsafe-no-fsync"]);
    command.arg(format!("--initial-cluster=local=http://{peer}"));
    let log = directory.join("etcd.log");
    Process::start(command, &Place::default(), Some(&log))
}

/// The rules of the `ClusterRole` in `kind/deploy`.
fn rules() -> Result<Vec<PolicyRule>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kind/deploy/rbac.yaml");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut objects = text.split("\n---\n").map(serde_saphyr::from_str::<serde_json::Value>);
    let role = objects.find_map(|object| object.ok().filter(|object| object["kind"] == "ClusterRole"));
    Ok(serde_json::from_value(role.with_context(|| path.display().to_string())?["rules"].take())?)
}

/// A kubeconfig by files; they and it are gone with the server.
fn write_kubeconfig(path: &Path, server: SocketAddr, authority: &Path, user: &Identity) -> Result<()> {
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "lab", "cluster": {
            "server": format!("https://{server}"), "certificate-authority": authority,
        }}],
        "users": [{ "name": "admin", "user": {
            "client-certificate": user.certificate, "client-key": user.key,
        }}],
        "contexts": [{ "name": "lab", "context": { "cluster": "lab", "user": "admin" }}],
        "current-context": "lab",
    });
    // JSON is YAML.
    fs::write(path, format!("{config:#}\n")).with_context(|| path.display().to_string())
}

async fn connect(kubeconfig: &Path) -> Result<Client> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    // Whatever the environment says: this is loopback.
    config.proxy_url = None;
    Ok(Client::try_from(config)?)
}

async fn is_ready(client: &Client) -> bool {
    let Ok(request) = ::http::Request::get("/readyz").body(Vec::new()) else {
        return false;
    };
    let ready = tokio::time::timeout(Duration::from_secs(5), client.request_text(request)).await;
    ready.is_ok_and(|answer| answer.is_ok())
}

/// One of Kubernetes' programs, by its name.
///
/// # Errors
/// Without `KUBEBUILDER_ASSETS`, and where its directory has no such program.
pub fn program(name: &str) -> Result<PathBuf> {
    let directory = std::env::var_os(ASSETS).with_context(|| {
        format!(
            "{ASSETS} is not set: it names the directory of etcd and kube-apiserver, which `cargo xtask test` builds"
        )
    })?;
    let path = PathBuf::from(directory).join(name);
    ensure!(path.is_file(), "{}: no such file; {ASSETS} should name its directory", path.display());
    Ok(fs::canonicalize(path)?)
}

fn name_of<K: Object>(object: &K) -> Result<(&str, &str)> {
    let meta = object.meta();
    let name = meta.name.as_deref().context("an object without a name")?;
    Ok((meta.namespace.as_deref().context("an object without a namespace")?, name))
}

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Ports that nothing listens on; held together until all are chosen, so that they differ.
fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let mut ports = [0; N];
    let mut held = Vec::new();
    for port in &mut ports {
        let listener = TcpListener::bind(loopback(0))?;
        *port = listener.local_addr()?.port();
        held.push(listener);
    }
    Ok(ports)
}
