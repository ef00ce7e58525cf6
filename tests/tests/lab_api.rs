//! The lab's API server: what the API suite rests on. Needs `KUBEBUILDER_ASSETS`, and fails without it.

use std::time::{Duration, Instant};

use affinity_tests::apiproxy::{ApiProxy, Door};
use affinity_tests::apiserver::{ApiOptions, ApiServer};
use affinity_tests::netns::Netns;
use affinity_tests::objects::{Endpoint, ServiceObject, SliceObject};
use affinity_tests::privilege::require_root;
use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Service;
use kube::api::ListParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, ResourceExt};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn objects_are_written_and_outlive_the_server() -> Result<()> {
    require_root();
    let mut api = ApiServer::start(ApiOptions::default())?;
    let web = ServiceObject::new("web").cluster_ip("10.96.0.10").tcp("http", 80, 8080);
    api.apply(&web.clone().affinity(600).build())?;
    let slice = SliceObject::of("web", "a").tcp("http", 8080).endpoint("10.244.0.101", Endpoint::Ready);
    api.apply(&slice.build())?;

    // Replaced, not merged: nothing of the affinity is left.
    let spec = api.apply(&web.build())?.spec.context("a spec")?;
    assert_eq!(spec.session_affinity.as_deref(), Some("None"));
    assert_eq!(spec.session_affinity_config, None);
    api.apply(&web.clone().affinity(0).build()).expect_err("the server validates");
    api.create_namespace("other")?;
    let other = ServiceObject::new("web").namespace("other").udp("dns", 53, 53).build();
    let given = api.apply(&other)?.spec.and_then(|spec| spec.cluster_ip).context("an address")?;
    assert!(given.starts_with("10.96."), "{given}");

    api.kill()?;
    api.get(&web.build()).expect_err("the server is dead");
    api.resume()?;
    api.get(&slice.build())?;
    api.stop()?;
    api.resume()?;
    api.delete(&web.build())?;
    api.get(&web.build()).expect_err("it has been deleted");
    Ok(())
}

/// With the watch cache: a server that was started again knows no version from before.
#[test]
fn a_watch_is_gone_after_a_new_start() -> Result<()> {
    require_root();
    let mut api = ApiServer::start(ApiOptions::default())?;
    let before = api.resource_version()?;
    api.apply(&ServiceObject::new("web").tcp("http", 80, 8080).build())?;
    api.compact()?;
    assert!(!api.watch_is_gone(&before)?, "the cache answers, whatever etcd has forgotten");
    api.stop()?;
    api.resume()?;
    assert!(api.watch_is_gone(&before)?);
    assert!(!api.watch_is_gone(&api.resource_version()?)?);
    Ok(())
}

/// Without the watch cache: etcd has forgotten.
#[test]
fn a_watch_is_gone_after_compaction() -> Result<()> {
    require_root();
    let api = ApiServer::start(ApiOptions { watch_cache: false, ..ApiOptions::default() })?;
    let before = api.resource_version()?;
    api.apply(&ServiceObject::new("web").tcp("http", 80, 8080).build())?;
    assert!(!api.watch_is_gone(&before)?);
    api.compact()?;
    assert!(api.watch_is_gone(&before)?);
    Ok(())
}

/// The door in front of it, from a namespace that has no other way out.
#[test]
fn the_door_opens_and_shuts() -> Result<()> {
    require_root();
    let api = ApiServer::start(ApiOptions::default())?;
    api.apply(&ServiceObject::new("web").tcp("http", 80, 8080).build())?;
    let netns = Netns::new("away")?;
    let (proxy, kubeconfig) = api.proxy(Some(&netns))?;
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let list = |expected: &str| -> Result<Duration> {
        let kubeconfig = kubeconfig.clone();
        let started = Instant::now();
        let result = netns.enter(|| names(kubeconfig));
        let outcome = match &result {
            Ok(names) if names.contains(&"web".to_owned()) => "listed",
            Ok(names) => anyhow::bail!("listed {names:?}"),
            Err(error) if error.is::<tokio::time::error::Elapsed>() => "nothing",
            Err(_) => "refused",
        };
        ensure!(outcome == expected, "{outcome}, not {expected}: {result:?}");
        Ok(started.elapsed())
    };
    list("listed")?;
    assert_eq!(proxy.accepted(), 1);
    proxy.set(Door::Shut);
    assert!(list("refused")? < SECOND);
    proxy.set(Door::Silent);
    list("nothing")?;
    assert!(proxy.cut() <= 1);
    proxy.set(Door::Open);
    list("listed")?;
    drop(proxy);
    list("refused")?;
    Ok(())
}

/// Lists services once, on a connection of its own.
fn names(kubeconfig: Kubeconfig) -> Result<Vec<String>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        let services: Api<Service> = Api::default_namespaced(Client::try_from(config)?);
        let params = ListParams::default();
        let list = tokio::time::timeout(3 * SECOND, services.list(&params)).await??;
        Ok(list.iter().map(ResourceExt::name_any).collect())
    })
}

/// A connection that was silent for a while goes on where it was; one that is cut ends.
#[test]
fn a_silent_connection_goes_on() -> Result<()> {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};

    let upstream = TcpListener::bind("127.0.0.1:0")?;
    let proxy = ApiProxy::start(None, upstream.local_addr()?)?;
    let mut client = TcpStream::connect(proxy.address())?;
    let (mut server, _) = upstream.accept()?;
    for end in [&client, &server] {
        end.set_read_timeout(Some(SECOND / 2))?;
    }
    let mut byte = [0];
    client.write_all(b"a")?;
    server.read_exact(&mut byte)?;
    proxy.set(Door::Silent);
    client.write_all(b"b")?;
    server.read_exact(&mut byte).expect_err("nothing passes");
    proxy.set(Door::Open);
    server.read_exact(&mut byte)?;
    assert_eq!(&byte, b"b");
    assert_eq!(proxy.cut(), 1);
    assert!(!matches!(client.read(&mut byte), Ok(1)));
    assert!(!matches!(server.read(&mut byte), Ok(1)));
    assert_eq!(proxy.connections(), 0);
    Ok(())
}
