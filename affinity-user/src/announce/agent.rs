//! Takes part in the election of who answers for each address, and answers for those that are won.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ObjectReference, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::runtime::watcher;
use kube::{Api, Client, Resource as _};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::announcer::{Announcement, Announcer, Place};
use super::candidates::{Candidates, Nodes, SERVICE_LABEL, candidates, delay, has_endpoints, lease_name};
use super::resource::L2Announcement;
use super::{ADDRESS_ANNOTATION, INTERFACES_ANNOTATION, PURPOSE, SERVICE_ANNOTATION};
use crate::causes::in_full;
use crate::ipam::controller::BALANCERS;
use crate::ipam::request::LbService;
use crate::lease::{Claim, Election, Timing};
use crate::mirror::{Mirror, Phase, Selected};
use crate::model::{ObjectName, ServiceName};
use crate::sources::trimmed::Node;

/// How often interfaces and addresses of the node are looked at, beside when something in the cluster has changed.
const LOOK: Duration = Duration::from_secs(5);
/// What comes together is seen to together.
const TOGETHER: Duration = Duration::from_millis(20);
/// How many services' slices are asked for by their names; of more, all slices are.
const NAMED: usize = 50;
/// How long nobody has wanted a Lease that is then deleted.
const UNUSED: Duration = Duration::from_mins(10);

/// Resources as they are.
type Resources = Mirror<L2Announcement, L2Announcement>;

/// Takes part as a node until it is stopped; then others have what it held, at once. Where the custom resource is not installed,
/// or there is none, it answers for nothing.
pub async fn run(
    client: Client,
    namespace: &str,
    node: &str,
    timing: Timing,
    announcer: &mut dyn Announcer,
    stop: &CancellationToken,
) {
    let changed = Arc::new(Notify::new());
    let read = |resource: &L2Announcement, _: Option<&L2Announcement>| Some(resource.clone());
    let resources: Resources = Mirror::start(Api::all(client.clone()), watcher::Config::default(), read, &changed);
    // What an earlier life has left is its own for as long as that would have held it.
    let inherited = Instant::now() + timing.deadline();
    while !stop.is_cancelled() {
        let is_any = resources.all().is_some_and(|all| !all.is_empty());
        if is_any {
            let api = Api::namespaced(client.clone(), namespace);
            let election = Election::start(api, PURPOSE, node, timing);
            let session = Session::new(client.clone(), node, &election, &changed, inherited);
            let elections = election.run(|| changed.notify_one());
            tokio::select! {
                () = stop.cancelled() => {}
                () = elections => {}
                () = session.work(&resources, announcer) => {}
            }
            announcer.set(&[]);
            election.resign().await;
            continue;
        }
        if resources.phase() != Phase::Waiting || Instant::now() > inherited {
            announcer.set(&[]);
        }
        tokio::select! {
            () = stop.cancelled() => {}
            _ = tokio::time::timeout(LOOK, changed.notified()) => {}
        }
    }
}

/// While there are resources.
struct Session<'a> {
    client: Client,
    node: &'a str,
    election: &'a Election,
    changed: &'a Arc<Notify>,
    inherited: Instant,
    labels: Mirror<Node, BTreeMap<String, String>>,
    services: Selected<Service, LbService>,
    slices: Selected<EndpointSlice, Nodes>,
    recorder: Recorder,
    place: Place,
    /// What is answered for.
    answered: BTreeSet<IpAddr>,
    /// What was told of already.
    told: BTreeSet<String>,
}

impl<'a> Session<'a> {
    fn new(
        client: Client,
        node: &'a str,
        election: &'a Election,
        changed: &'a Arc<Notify>,
        inherited: Instant,
    ) -> Self {
        let own = watcher::Config::default().fields(&format!("metadata.name={node}"));
        let read =
            |node: &Node, _: Option<&BTreeMap<String, String>>| Some(node.metadata.labels.clone().unwrap_or_default());
        let reporter = Reporter { controller: "affinity".into(), instance: Some(node.to_owned()) };
        Self {
            labels: Mirror::start(Api::all(client.clone()), own, read, changed),
            services: Selected::default(),
            slices: Selected::default(),
            recorder: Recorder::new(client.clone(), reporter),
            place: Place::default(),
            answered: BTreeSet::new(),
            told: BTreeSet::new(),
            client,
            node,
            election,
            changed,
            inherited,
        }
    }

    /// Goes on until there is no resource any more.
    async fn work(mut self, resources: &Resources, announcer: &mut dyn Announcer) {
        loop {
            let all = resources.all().unwrap_or_default();
            if all.is_empty() {
                return;
            }
            match announcer.place() {
                Ok(place) => self.place = place,
                Err(error) => tracing::warn!(%error, "the node's interfaces can't be looked at"),
            }
            if let Some(found) = self.find(&all) {
                self.take_part(&found);
                self.answer(&found, announcer);
                self.complain(&all, &found).await;
                let needed: BTreeSet<String> = found.known.iter().copied().map(lease_name).collect();
                self.election.sweep(|name| needed.contains(name), UNUSED).await;
            } else if Instant::now() > self.inherited && self.answered.is_empty() {
                announcer.set(&[]);
            }
            let _ = tokio::time::timeout(LOOK, self.changed.notified()).await;
            tokio::time::sleep(TOGETHER).await;
        }
    }

    /// What this node may answer for, if that is known.
    fn find(&mut self, resources: &BTreeMap<ObjectName, L2Announcement>) -> Option<Candidates> {
        let is_external = resources.values().any(|resource| resource.spec.external_ips);
        let fields = if is_external { "" } else { BALANCERS };
        self.services.select(fields, || {
            let config = watcher::Config::default().fields(fields);
            Mirror::start(Api::all(self.client.clone()), config, with_addresses, self.changed)
        });
        let services = self.services.all()?;
        // Of a node that may not be looked at there are no labels.
        let labels = match self.labels.phase() {
            Phase::Waiting => return None,
            Phase::Missing => BTreeMap::new(),
            Phase::Ready => self.labels.get(&ObjectName::new("", self.node)).unwrap_or_default(),
        };
        let local: BTreeSet<&str> =
            services.iter().filter(|(_, service)| service.is_local).map(|(name, _)| &*name.name).collect();
        let slices = if local.is_empty() {
            self.slices = Selected::default();
            BTreeMap::new()
        } else {
            let selector = if local.len() <= NAMED {
                format!("{SERVICE_LABEL} in ({})", local.into_iter().collect::<Vec<_>>().join(","))
            } else {
                SERVICE_LABEL.to_owned()
            };
            self.slices.select(&selector, || {
                let config = watcher::Config::default().labels(&selector);
                Mirror::start(Api::all(self.client.clone()), config, Nodes::read, self.changed)
            });
            self.slices.all()?
        };
        let is_here = |service: &ServiceName| {
            let own = slices
                .iter()
                .filter(|(name, nodes)| name.namespace == service.namespace && nodes.service == service.name);
            has_endpoints(self.node, own.map(|(_, nodes)| nodes))
        };
        let specs = resources.iter().map(|(name, it)| (name.name.to_string(), it.spec.clone())).collect();
        Some(candidates(&specs, &labels, &services, is_here, &self.place))
    }

    fn take_part(&self, found: &Candidates) {
        let claims = found.addresses.iter().map(|(address, candidate)| {
            let interfaces: Vec<&str> = candidate.interfaces.values().map(String::as_str).collect();
            let annotations = [
                (ADDRESS_ANNOTATION, address.to_string()),
                (SERVICE_ANNOTATION, candidate.service.to_string()),
                (INTERFACES_ANNOTATION, interfaces.join(",")),
            ];
            let annotations = annotations.map(|(key, value)| (key.to_owned(), value)).into();
            (lease_name(*address), Claim { delay: delay(*address, self.node), annotations })
        });
        let needed: BTreeSet<String> = found.known.iter().copied().map(lease_name).collect();
        self.election.want(claims.collect(), |name| needed.contains(name));
    }

    fn answer(&mut self, found: &Candidates, announcer: &mut dyn Announcer) {
        // Before it is known who holds what, what an earlier life has left stays for a while.
        if self.election.leases().is_none() && Instant::now() < self.inherited {
            return;
        }
        let held = self.election.held();
        let won = found.addresses.iter().filter(|(address, _)| held.contains(&lease_name(**address)));
        let announcements: Vec<Announcement> = won
            .map(|(address, candidate)| Announcement {
                addr: *address,
                interfaces: candidate.interfaces.keys().copied().collect(),
            })
            .collect();
        announcer.set(&announcements);
        let now: BTreeSet<IpAddr> = announcements.iter().map(|one| one.addr).collect();
        for address in now.difference(&self.answered) {
            tracing::info!(%address, service = %found.addresses[address].service, "answers for an address");
        }
        for address in self.answered.difference(&now) {
            tracing::info!(%address, "no longer answers for an address");
        }
        self.answered = now;
    }

    /// Tells, once, of what is asked for and can't be.
    async fn complain(&mut self, resources: &BTreeMap<ObjectName, L2Announcement>, found: &Candidates) {
        let mut complaints = Vec::new();
        for name in &found.without_interface {
            let message = format!("node {} has no uplink that this selects", self.node);
            if let Some(resource) = resources.get(&ObjectName::new("", name.as_str())) {
                complaints.push(("NoInterface", format!("L2Announcement {name}"), message, resource.object_ref(&())));
            }
        }
        for (address, service) in &found.own {
            let message = format!("{address} is an address of node {} itself: that answers for it anyway", self.node);
            let uid = self.services.get(service).map(|service| service.uid);
            let reference = ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Service".to_owned()),
                name: Some(service.name.to_string()),
                namespace: Some(service.namespace.to_string()),
                uid,
                ..ObjectReference::default()
            };
            complaints.push(("NodesOwnAddress", format!("Service {service}"), message, reference));
        }
        let now: BTreeSet<String> =
            complaints.iter().map(|(_, object, message, _)| format!("{object}: {message}")).collect();
        for (reason, object, message, reference) in complaints {
            if self.told.contains(&format!("{object}: {message}")) {
                continue;
            }
            tracing::warn!(object, "not announced: {message}");
            let event = Event {
                type_: EventType::Warning,
                reason: reason.to_owned(),
                note: Some(message),
                action: "Announce".to_owned(),
                secondary: None,
            };
            if let Err(error) = self.recorder.publish(&event, &reference).await {
                tracing::debug!(error = in_full(&error), object, "no event");
            }
        }
        self.told = now;
    }
}

/// A service, if it has an address that may be answered for.
fn with_addresses(service: &Service, _: Option<&LbService>) -> Option<LbService> {
    let (_, service) = LbService::read(service)?;
    (!service.vips.is_empty() || !service.external_ips.is_empty()).then_some(service)
}
