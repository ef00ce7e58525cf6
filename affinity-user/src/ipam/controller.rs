//! Writes who has which address into the status of services and pools.
//!
//! An address goes to a service in three steps, so that it never goes to two, whatever becomes of who gives it, and also
//! where two give at once for a moment:
//!
//! 1. it is reserved in its pool's status, by a replacement that the pool's version guards: of two who give from one pool
//!    one is refused, and looks again;
//! 2. all services are listed, which shows what had been reserved, given and forgotten as a reservation before;
//! 3. it is written into the service's status, by a replacement that the service's version guards.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{LoadBalancerIngress, LoadBalancerStatus, ObjectReference, Service, ServiceStatus};
use kube::api::{ListParams, PostParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::runtime::watcher;
use kube::{Api, Client, Resource, ResourceExt as _};
use thiserror::Error;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::SERVICE_CONDITION;
use super::allocate::{Allocation, Outcome, Pool, PoolOutcome, allocate};
use super::pool::LoadBalancerPool;
use super::report::{self, Verdict};
use super::request::LbService;
use crate::causes::in_full;
use crate::duties::{Board, PoolStatus};
use crate::lease::{Claim, Election, Timing};
use crate::mirror::{Mirror, Phase};
use crate::model::{ObjectName, ServiceName};

/// The Lease of the daemon that gives addresses.
pub const LEASE: &str = "affinity-ipam";
/// What a Lease of that kind is for.
const PURPOSE: &str = "ipam";
/// Which services have load balancer addresses, as a field selector.
pub const BALANCERS: &str = "spec.type=LoadBalancer";
/// Those that are not any more, or never were.
const OTHERS: &str = "spec.type!=LoadBalancer";
/// How many objects are listed at once.
const PAGE: u32 = 500;
/// What comes together is seen to together.
const TOGETHER: Duration = Duration::from_millis(50);
/// How long after a failure everything is looked at again.
const RETRY: Duration = Duration::from_secs(1);
/// How often everything is looked at anyway.
const AUDIT: Duration = Duration::from_mins(2);

/// Why not all has been written.
#[derive(Debug, Error)]
enum PassError {
    /// Somebody has written to what was looked at.
    #[error("{0} has changed meanwhile")]
    Conflict(String),
    /// The API server refuses, or can't be reached.
    #[error("{what}: {}", in_full(source))]
    Api { what: String, source: kube::Error },
}

fn refused(what: impl std::fmt::Display, error: kube::Error) -> PassError {
    match error {
        kube::Error::Api(status) if status.code == 409 => PassError::Conflict(what.to_string()),
        source => PassError::Api { what: what.to_string(), source },
    }
}

/// Gives addresses for as long as it holds the Lease [`LEASE`] in a namespace, under the node's name, until it is stopped; then
/// it gives the Lease up. Where the custom resource is not installed, it does nothing, and looks again now and then.
pub async fn run(
    client: Client,
    namespace: &str,
    node: &str,
    timing: Timing,
    board: &Arc<Board>,
    stop: &CancellationToken,
) {
    let changed = Arc::new(Notify::new());
    let pools = follow_pools(&client, &changed);
    let election = Election::start(Api::namespaced(client.clone(), namespace), PURPOSE, node, timing);
    let mut controller = None;
    let elections = election.run(|| changed.notify_one());
    let work = async {
        loop {
            let is_installed = pools.phase() == Phase::Ready;
            let claims = is_installed.then(|| (LEASE.to_owned(), Claim::default()));
            election.want(claims.into_iter().collect(), |_| true);
            let mut wait = AUDIT;
            if is_installed && election.holds(LEASE) {
                let controller = controller.get_or_insert_with(|| {
                    tracing::info!("gives load balancer addresses: this node holds the Lease {LEASE}");
                    board.tell(|status| status.gives_addresses = true);
                    Controller::start(client.clone(), node, &changed, board)
                });
                wait = controller.work(&pools, &|| election.holds(LEASE)).await;
            } else if controller.take().is_some() {
                tracing::info!("another node gives load balancer addresses");
                board.tell(|status| {
                    status.gives_addresses = false;
                    status.pools.clear();
                    status.unmet.clear();
                });
            }
            let _ = tokio::time::timeout(wait, changed.notified()).await;
            tokio::time::sleep(TOGETHER).await;
        }
    };
    stop.run_until_cancelled(futures::future::join(elections, work)).await;
    election.resign().await;
}

/// Gives addresses without asking who else does, until it is dropped: what keeps two of these apart is what they write.
pub async fn give(client: Client, node: &str) {
    let changed = Arc::new(Notify::new());
    let pools = follow_pools(&client, &changed);
    let mut controller = Controller::start(client, node, &changed, &Arc::default());
    loop {
        let wait = controller.work(&pools, &|| true).await;
        let _ = tokio::time::timeout(wait, changed.notified()).await;
    }
}

/// Pools as they are.
type Pools = Mirror<LoadBalancerPool, LoadBalancerPool>;

fn follow_pools(client: &Client, changed: &Arc<Notify>) -> Pools {
    let read = |pool: &LoadBalancerPool, _: Option<&LoadBalancerPool>| Some(pool.clone());
    Mirror::start(Api::all(client.clone()), watcher::Config::default(), read, changed)
}

struct Controller {
    client: Client,
    services: Mirror<Service, LbService>,
    recorder: Recorder,
    board: Arc<Board>,
    /// The services of the last time.
    known: Option<BTreeSet<ServiceName>>,
}

impl Controller {
    fn start(client: Client, node: &str, changed: &Arc<Notify>, board: &Arc<Board>) -> Self {
        let config = watcher::Config::default().fields(BALANCERS);
        let read = |service: &Service, _: Option<&LbService>| Some(LbService::read(service)?.1);
        let services = Mirror::start(Api::all(client.clone()), config, read, changed);
        let reporter = Reporter { controller: "affinity".into(), instance: Some(node.to_owned()) };
        let recorder = Recorder::new(client.clone(), reporter);
        Self { recorder, client, services, board: board.clone(), known: None }
    }

    /// Brings everything to what it ought to be, as far as it is known; returns after which time to look again anyway.
    async fn work(&mut self, pools: &Pools, holds: &(dyn Fn() -> bool + Sync)) -> Duration {
        match self.pass(pools, holds).await {
            Ok(()) => AUDIT,
            Err(error @ PassError::Conflict(_)) => {
                tracing::debug!(%error, "looks again");
                RETRY
            }
            Err(error) => {
                tracing::warn!(%error, "load balancer addresses can't be given");
                RETRY
            }
        }
    }

    async fn pass(&mut self, pools: &Pools, holds: &(dyn Fn() -> bool + Sync)) -> Result<(), PassError> {
        let (Some(mut objects), Some(mut services)) = (pools.all(), self.services.all()) else { return Ok(()) };
        self.clean(services.keys().cloned().collect()).await?;
        let mut read: Vec<Pool> = objects.values().map(Pool::read).collect();
        if read.iter().flat_map(|pool| &pool.reserved).any(|(_, name)| !services.contains_key(name)) {
            services = self.list().await?;
            for pool in &mut read {
                pool.reserved.retain(|(_, name)| services.contains_key(name));
            }
        }
        let allocation = allocate(&read, &services);
        for pool in &read {
            let Some(object) = objects.get_mut(&ObjectName::new("", pool.name.as_str())) else { continue };
            if holds() && self.write_pool(pool, object, &allocation).await? {
                pools.put(object);
            }
        }
        let is_safe = |allocation: &Allocation| {
            allocation.services.values().flat_map(|outcome| &outcome.shares).all(|share| share.is_safe)
        };
        let mut allocation = allocation;
        if !is_safe(&allocation) {
            services = self.list().await?;
            let read: Vec<Pool> = objects.values().map(Pool::read).collect();
            allocation = allocate(&read, &services);
        }
        self.tell_of(&allocation);
        let mut conflict = None;
        for (name, outcome) in &allocation.services {
            if !holds() {
                return Ok(());
            }
            match self.write_service(name, &services[name], outcome).await {
                Err(PassError::Conflict(what)) => conflict = Some(what),
                done => done?,
            }
        }
        match conflict {
            Some(what) => Err(PassError::Conflict(what)),
            // There was not room enough for all reservations.
            None if !is_safe(&allocation) => Err(PassError::Conflict("what is reserved".to_owned())),
            None => Ok(()),
        }
    }

    fn tell_of(&self, allocation: &Allocation) {
        let pools = allocation.pools.iter().map(|(name, outcome)| {
            let PoolOutcome { ipv4, ipv6, .. } = outcome;
            (name.clone(), PoolStatus { ipv4: *ipv4, ipv6: *ipv6 })
        });
        let mut unmet: BTreeMap<String, u64> = BTreeMap::new();
        for problem in allocation.services.values().filter_map(|outcome| outcome.problems.first()) {
            *unmet.entry(problem.reason().to_owned()).or_default() += 1;
        }
        self.board.tell(|status| {
            status.pools = pools.collect();
            status.unmet = unmet;
        });
    }

    /// All services of the type, as they are at this moment.
    async fn list(&self) -> Result<BTreeMap<ServiceName, LbService>, PassError> {
        let objects = list(&self.client, BALANCERS).await?;
        self.services.put_all(&objects);
        Ok(self.services.all().unwrap_or_default())
    }

    async fn write_pool(
        &self,
        pool: &Pool,
        object: &mut LoadBalancerPool,
        allocation: &Allocation,
    ) -> Result<bool, PassError> {
        let outcome = &allocation.pools[&pool.name];
        let before = object.status.clone().unwrap_or_default();
        let status = report::status(pool, outcome, &before, object.metadata.generation);
        if object.status.as_ref() == Some(&status) {
            return Ok(false);
        }
        let what = format!("LoadBalancerPool {}", pool.name);
        let api: Api<LoadBalancerPool> = Api::all(self.client.clone());
        let new = LoadBalancerPool { status: Some(status), ..object.clone() };
        *object = api.replace_status(&pool.name, &PostParams::default(), &new).await.map_err(|e| refused(&what, e))?;
        for (type_, verdict) in Verdict::of_pool(pool, outcome) {
            let told = before.conditions.iter().any(|it| it.type_ == type_ && it.message == verdict.message);
            if verdict.is_warning && !told {
                self.tell(&object.object_ref(&()), verdict.reason, &verdict.message).await;
            }
        }
        Ok(true)
    }

    async fn write_service(&self, name: &ServiceName, service: &LbService, outcome: &Outcome) -> Result<(), PassError> {
        if outcome.shares.iter().any(|share| !share.is_safe) {
            return Ok(());
        }
        let verdict = Verdict::of_service(outcome);
        let addresses: BTreeSet<_> = outcome.shares.iter().map(|share| share.address).collect();
        let is_told = service.condition.as_ref().is_some_and(|(status, reason, message)| {
            (status.as_str(), reason.as_str(), message) == (verdict.status, verdict.reason, &verdict.message)
        });
        let has_all = service.has.len() == addresses.len() && service.has.iter().all(|ip| addresses.contains(ip));
        if is_told && has_all {
            return Ok(());
        }
        let what = format!("Service {name}");
        let api: Api<Service> = Api::namespaced(self.client.clone(), &name.namespace);
        let mut object = match api.get(&name.name).await {
            Ok(object) => object,
            // Its end will be told.
            Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(()),
            Err(error) => return Err(refused(&what, error)),
        };
        if object.metadata.resource_version.as_deref() != Some(&service.version) {
            self.services.put(&object);
            return Err(PassError::Conflict(what));
        }
        let generation = object.metadata.generation;
        let status = object.status.get_or_insert_default();
        if !has_all {
            let ingress = outcome.shares.iter().map(|share| LoadBalancerIngress {
                ip: Some(share.address.to_string()),
                ip_mode: Some("VIP".to_owned()),
                ..LoadBalancerIngress::default()
            });
            status.load_balancer = Some(LoadBalancerStatus { ingress: Some(ingress.collect()) });
        }
        let conditions = status.conditions.get_or_insert_default();
        let condition = verdict.condition(SERVICE_CONDITION, conditions, generation);
        conditions.retain(|condition| condition.type_ != SERVICE_CONDITION);
        conditions.push(condition);
        let params = PostParams::default();
        let object = api.replace_status(&name.name, &params, &object).await.map_err(|error| refused(&what, error))?;
        self.services.put(&object);
        tracing::info!(service = %name, "load balancer addresses: {}", verdict.message);
        if verdict.is_warning && !is_told {
            self.tell(&object.object_ref(&()), verdict.reason, &verdict.message).await;
        }
        Ok(())
    }

    /// Takes what was written here from services that are of another type by now.
    async fn clean(&mut self, names: BTreeSet<ServiceName>) -> Result<(), PassError> {
        let mut gone = Vec::new();
        match &self.known {
            None => gone = list(&self.client, OTHERS).await?,
            Some(known) => {
                for name in known.difference(&names) {
                    let api: Api<Service> = Api::namespaced(self.client.clone(), &name.namespace);
                    gone.extend(api.get_opt(&name.name).await.map_err(|e| refused(format!("Service {name}"), e))?);
                }
            }
        }
        for mut service in gone {
            let is_balancer = service.spec.as_ref().and_then(|spec| spec.type_.as_deref()) == Some("LoadBalancer");
            if !is_balancer && strip(service.status.as_mut()) {
                let (name, namespace) = (service.name_any(), service.namespace().unwrap_or_default());
                let api: Api<Service> = Api::namespaced(self.client.clone(), &namespace);
                let written = api.replace_status(&name, &PostParams::default(), &service).await;
                written.map_err(|error| refused(format!("Service {namespace}/{name}"), error))?;
            }
        }
        self.known = Some(names);
        Ok(())
    }

    async fn tell(&self, object: &ObjectReference, reason: &str, message: &str) {
        let event = Event {
            type_: EventType::Warning,
            reason: reason.to_owned(),
            note: Some(message[..message.floor_char_boundary(1024)].to_owned()),
            action: "GiveAddress".to_owned(),
            secondary: None,
        };
        if let Err(error) = self.recorder.publish(&event, object).await {
            tracing::debug!(error = in_full(&error), reason, message, "no event");
        }
    }
}

/// Takes the condition out, and the addresses that came with it; returns whether there was one.
fn strip(status: Option<&mut ServiceStatus>) -> bool {
    let Some(status) = status else { return false };
    let conditions = status.conditions.get_or_insert_default();
    let before = conditions.len();
    conditions.retain(|condition| condition.type_ != SERVICE_CONDITION);
    let is_ours = conditions.len() < before;
    if is_ours {
        status.load_balancer = None;
    }
    is_ours
}

/// All services that fields select, as they are at this moment.
async fn list(client: &Client, fields: &str) -> Result<Vec<Service>, PassError> {
    let api: Api<Service> = Api::all(client.clone());
    let mut params = ListParams::default().fields(fields).limit(PAGE);
    let mut all = Vec::new();
    loop {
        let page = api.list(&params).await.map_err(|error| refused("Services", error))?;
        all.extend(page.items);
        match page.metadata.continue_.filter(|next| !next.is_empty()) {
            Some(next) => params = params.continue_token(&next),
            None => return Ok(all),
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

    use super::*;

    #[test]
    fn only_what_was_written_here_is_taken_away() {
        let condition = Verdict::of_service(&Outcome::default()).condition(SERVICE_CONDITION, &[], None);
        let other = Condition { type_: "other".to_owned(), ..condition.clone() };
        let addresses = LoadBalancerStatus { ingress: Some(vec![LoadBalancerIngress::default()]) };
        let status = |conditions: Vec<Condition>| ServiceStatus {
            conditions: Some(conditions),
            load_balancer: Some(addresses.clone()),
        };
        let mut ours = status(vec![condition, other.clone()]);
        assert!(strip(Some(&mut ours)));
        assert_eq!(ours, ServiceStatus { conditions: Some(vec![other.clone()]), load_balancer: None });
        let mut others = status(vec![other]);
        assert!(!strip(Some(&mut others)) && others.load_balancer.is_some());
        assert!(!strip(None));
    }
}
