//! The cluster as the datapath sees it: services and endpoints without Kubernetes' types.
//!
//! The [`Model`] takes validated versions of objects, keeps the last good one of each, settles which service has an
//! address that several want, and says which services a change touches, so that only those are planned again.

mod claims;
mod endpoints;
mod externals;
mod frontend;
mod names;
mod node;
mod node_addresses;
mod notice;
mod place;
mod pod;
mod problem;
mod service;
mod shared_text;
mod slice;
mod store;
#[cfg(test)]
mod tests;
mod trigger;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use jiff::Timestamp;

use self::{
    claims::{Claims, Contest, Outcome},
    externals::{Externals, PodsAddress},
    frontend::Source,
    node_addresses::NodeAddresses,
    store::{Store, Transition},
};
pub use self::{
    endpoints::Endpoints,
    frontend::{FrontendAddress, FrontendKind},
    names::{Kind, ObjectName, PodName, ServiceName, ServicePortName, SliceName, Subject},
    node::Node,
    node_addresses::{NoNodePortAddresses, NodePortAddresses},
    notice::{Matter, Notice},
    place::{Hints, Place},
    pod::Pod,
    problem::{Fault, Problem, Rejection},
    service::{
        AffinityScope, External, ListedAddress, Service, ServicePort, SessionAffinity, SourceRanges, TrafficPolicy,
    },
    shared_text::{Text, shared},
    slice::{Endpoint, EndpointSlice, TargetPort},
    store::{Checked, Object},
    trigger::Trigger,
};

/// All services and their endpoints, and what there is to know of this node.
#[derive(Default)]
pub struct Model {
    node_name: Text,
    services: Store<Service>,
    slices: Store<EndpointSlice>,
    nodes: Store<Node>,
    pods: Store<Pod>,
    /// What the source could not be asked for.
    unheard: BTreeSet<Kind>,
    /// In the order of their names. Most services have one.
    by_service: HashMap<ServiceName, Vec<Arc<EndpointSlice>>>,
    claims: Claims,
    /// The services that are reached from outside.
    outward: BTreeSet<ServiceName>,
    externals: Externals,
    addresses: NodeAddresses,
    files: BTreeMap<PathBuf, Vec<Problem>>,
    changes: Changes,
}

/// What has happened since it was last asked.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// The services to plan again; those that the model has no more are gone.
    pub dirty: BTreeSet<ServiceName>,
    /// When the oldest of the events happened that the changes of a service's slices answer, where they say.
    pub triggers: BTreeMap<ServiceName, Timestamp>,
    /// How many changes of slices say so in no words that can be read.
    pub unreadable_triggers: u64,
    /// Whether a pod of this node has come, changed or gone.
    pub pods: bool,
    /// Whether something else is known of this node's Node than was.
    pub node: bool,
    /// Whether services have other node ports than they had, or have them at other addresses.
    pub node_ports: bool,
    /// New rejections, to be logged.
    pub rejected: Vec<Rejection>,
    /// What had rejections and has none of that sort any more, to be logged.
    pub accepted: BTreeSet<Subject>,
}

impl Changes {
    /// Whether nothing happened.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// All there is to know to plan one service.
#[derive(Clone, Copy)]
pub struct ServiceView<'a> {
    /// The service.
    pub service: &'a Service,
    /// Where its clients are.
    pub place: Place<'a>,
    slices: &'a [Arc<EndpointSlice>],
    model: &'a Model,
}

/// A frontend that a service has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldFrontend {
    /// Where it is.
    pub at: FrontendAddress,
    /// Which of the service's addresses that is.
    pub kind: FrontendKind,
    /// Whether the address is somebody else's too, the node's own or an endpoint's: what is sent to its other ports is no
    /// matter of the service's.
    pub port_alone: bool,
}

impl<'a> ServiceView<'a> {
    /// Its slices, by name.
    pub fn slices(&self) -> impl Iterator<Item = &'a EndpointSlice> + use<'a> {
        self.slices.iter().map(Arc::as_ref)
    }

    /// What a port of it is reached by: what no older service has, and no pod.
    pub fn frontends(&self, port: &'a ServicePort) -> impl Iterator<Item = HeldFrontend> + use<'a> {
        let Self { service, model, .. } = *self;
        let Model { claims, addresses, externals, .. } = model;
        let wanted = service.frontends(port, addresses.node_ports());
        let is_held = |at: &FrontendAddress, source: Source| {
            claims.holds(&service.name, at, source) && !(source.kind.is_listed() && externals.is_pods(at.addr))
        };
        wanted.filter(move |(at, source)| is_held(at, *source)).map(|(at, source)| HeldFrontend {
            at,
            kind: source.kind,
            port_alone: match source.kind {
                FrontendKind::ClusterIp => false,
                FrontendKind::ExternalIp | FrontendKind::LoadBalancer => {
                    addresses.has(at.addr) || externals.is_endpoints(at.addr)
                }
                FrontendKind::NodePort => true,
            },
        })
    }
}

impl Model {
    /// The model of the node of this name; a default one is of a node that has none.
    pub fn new(node_name: impl Into<Text>) -> Self {
        Self { node_name: node_name.into(), ..Self::default() }
    }

    /// The same with node ports at other addresses than [`NodePortAddresses::Primary`]: at all that one of these names.
    #[must_use]
    pub fn with_node_port_addresses(mut self, settings: Vec<NodePortAddresses>) -> Self {
        let addresses = self.addresses.clone().with_settings(settings);
        self.addresses_changed(addresses);
        self
    }

    /// The addresses of the node's interfaces are these.
    pub fn set_node_addresses(&mut self, own: BTreeSet<IpAddr>) {
        let addresses = self.addresses.clone().with_own(own);
        self.addresses_changed(addresses);
    }

    /// A list of all objects of a kind begins: versions that come from now on take effect when it is complete, all at
    /// once. A list that was under way is dropped.
    pub fn begin(&mut self, kind: Kind) {
        match kind {
            Kind::Service => self.services.begin(),
            Kind::EndpointSlice => self.slices.begin(),
            Kind::Node => self.nodes.begin(),
            Kind::Pod => self.pods.begin(),
        }
    }

    /// The list is complete: it takes effect, and what it did not contain is deleted.
    pub fn finish(&mut self, kind: Kind) {
        match kind {
            Kind::Service => {
                for transition in self.services.finish() {
                    self.service_changed(transition);
                }
            }
            Kind::EndpointSlice => {
                for transition in self.slices.finish() {
                    self.slice_changed(transition);
                }
            }
            Kind::Node => {
                for transition in self.nodes.finish() {
                    self.node_changed(transition);
                }
            }
            Kind::Pod => {
                for transition in self.pods.finish() {
                    self.pod_changed(transition);
                }
            }
        }
    }

    /// A service is there, or has changed.
    pub fn apply_service(&mut self, version: Checked<Service>) {
        if let Some(transition) = self.services.apply(version) {
            self.service_changed(transition);
        }
    }

    /// A slice is there, or has changed. Of the nodes that its endpoints are on, the model keeps this one.
    pub fn apply_slice(&mut self, mut version: Checked<EndpointSlice>) {
        if let Some(slice) = &mut version.object
            && slice.endpoints.are_elsewhere(&self.node_name)
        {
            Arc::make_mut(slice).endpoints.keep_node(&self.node_name);
        }
        if let Some(transition) = self.slices.apply(version) {
            self.slice_changed(transition);
        }
    }

    /// A node is there, or has changed. Those that are not this one's are left out.
    pub fn apply_node(&mut self, version: Checked<Node>) {
        if version.name.name == self.node_name
            && let Some(transition) = self.nodes.apply(version)
        {
            self.node_changed(transition);
        }
    }

    /// A pod is there, or has changed. Those of other nodes are left out.
    pub fn apply_pod(&mut self, version: Checked<Pod>) {
        if version.object.as_ref().is_some_and(|pod| pod.node != self.node_name) {
            // It may have been here under the same name.
            self.delete(Kind::Pod, &version.name);
        } else if let Some(transition) = self.pods.apply(version) {
            self.pod_changed(transition);
        }
    }

    /// An object is gone.
    pub fn delete(&mut self, kind: Kind, name: &ObjectName) {
        match kind {
            Kind::Service => {
                if let Some(transition) = self.services.delete(name) {
                    self.service_changed(transition);
                }
            }
            Kind::EndpointSlice => {
                if let Some(transition) = self.slices.delete(name) {
                    self.slice_changed(transition);
                }
            }
            Kind::Node => {
                if let Some(transition) = self.nodes.delete(name) {
                    self.node_changed(transition);
                }
            }
            Kind::Pod => {
                if let Some(transition) = self.pods.delete(name) {
                    self.pod_changed(transition);
                }
            }
        }
    }

    /// What is wrong with a file, in place of what was; nothing, if it is empty.
    pub fn report_file(&mut self, path: &Path, problems: Vec<Problem>) {
        let had = self.files.get(path).map_or(&[][..], Vec::as_slice);
        if had == problems {
            return;
        }
        self.changes.note(&Subject::File(path.to_owned()), &problems);
        if problems.is_empty() {
            self.files.remove(path);
        } else {
            self.files.insert(path.to_owned(), problems);
        }
    }

    /// The source has said that it can't follow a kind, for now.
    pub fn give_up(&mut self, kind: Kind) {
        self.unheard.insert(kind);
    }

    /// Whether all objects of a kind have been seen once; of one that [is not essential](Kind::is_essential) it is enough
    /// that the source has said that it can't be had: a proxy that may not list pods serves all the same.
    pub fn is_heard(&self, kind: Kind) -> bool {
        self.is_listed(kind) || !kind.is_essential() && self.unheard.contains(&kind)
    }

    /// Whether all objects of the kinds have been seen once without which services can't be served.
    pub fn has_essentials(&self) -> bool {
        Kind::ALL.into_iter().all(|kind| !kind.is_essential() || self.is_listed(kind))
    }

    /// Whether all objects of a kind have been seen once.
    pub fn is_listed(&self, kind: Kind) -> bool {
        match kind {
            Kind::Service => self.services.is_synced(),
            Kind::EndpointSlice => self.slices.is_synced(),
            Kind::Node => self.nodes.is_synced(),
            Kind::Pod => self.pods.is_synced(),
        }
    }

    /// Whether every kind was heard out. Before that, what is missing may just not have come.
    pub fn is_synced(&self) -> bool {
        Kind::ALL.into_iter().all(|kind| self.is_heard(kind))
    }

    /// What has happened since the last call.
    pub fn take_changes(&mut self) -> Changes {
        let slices = self.by_service.values().flatten().map(Arc::as_ref);
        self.changes.dirty.extend(self.externals.check(slices));
        let (settled, new) = self.externals.check_pods();
        for PodsAddress { service, .. } in settled {
            if !self.externals.pods_wanted().any(|it| it.service == service) {
                self.changes.accepted.insert(Subject::Object(Kind::Service, service.clone()));
            }
            self.changes.dirty.insert(service);
        }
        for wanted in new {
            self.changes.rejected.extend(self.pods_address(&wanted));
            self.changes.dirty.insert(wanted.service);
        }
        std::mem::take(&mut self.changes)
    }

    /// A service with its slices; `None` if there is none to be programmed.
    pub fn service(&self, name: &ServiceName) -> Option<ServiceView<'_>> {
        self.services.get(name).map(|service| self.view(service))
    }

    /// The node that this is of, by its name.
    pub fn node_name(&self) -> &str {
        &self.node_name
    }

    /// What is known of that node; `None` if there is no such object, or it can't be had.
    pub fn node(&self) -> Option<&Node> {
        self.nodes.objects().next().map(Arc::as_ref)
    }

    fn place(&self) -> Place<'_> {
        Place { node: &self.node_name, zone: self.node().and_then(|node| node.zone.as_deref()) }
    }

    /// The pods on this node, by name; those that have finished too, as long as there is an object.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.objects().map(Arc::as_ref)
    }

    /// Whether there may be a service of this name that nothing good is known of, so that what an earlier daemon made of
    /// it should stay: it is rejected and never was good, or may be in a file that can't be understood.
    pub fn is_withheld(&self, name: &ServiceName) -> bool {
        self.services.is_withheld(name) || !self.services.has(name) && !self.files.is_empty()
    }

    /// Every service, by name.
    pub fn services(&self) -> impl Iterator<Item = ServiceView<'_>> {
        self.services.objects().map(|service| self.view(service))
    }

    /// Those that may be reached from outside, by name.
    pub fn outward_services(&self) -> impl Iterator<Item = ServiceView<'_>> {
        self.outward.iter().filter_map(|name| self.service(name))
    }

    fn view<'a>(&'a self, service: &'a Service) -> ServiceView<'a> {
        let slices = self.by_service.get(&service.name).map(Vec::as_slice).unwrap_or_default();
        ServiceView { service, place: self.place(), slices, model: self }
    }

    /// All that is not programmed, and why.
    pub fn rejections(&self) -> impl Iterator<Item = Rejection> {
        let files = self.files.iter().flat_map(|(path, problems)| {
            let file = Subject::File(path.clone());
            problems.iter().map(move |problem| Rejection { object: file.clone(), problem: problem.clone() })
        });
        let of = |kind| {
            move |(name, problem): (&ObjectName, &Problem)| Rejection {
                object: Subject::Object(kind, name.clone()),
                problem: problem.clone(),
            }
        };
        files
            .chain(self.services.problems().map(of(Kind::Service)))
            .chain(self.claims.contests().map(Rejection::from))
            .chain(self.externals.pods_wanted().filter_map(|wanted| self.pods_address(wanted)))
            .chain(self.slices.problems().map(of(Kind::EndpointSlice)))
            .chain(self.nodes.problems().map(of(Kind::Node)))
            .chain(self.pods.problems().map(of(Kind::Pod)))
    }

    fn pods_address(&self, PodsAddress { service, address, pod }: &PodsAddress) -> Option<Rejection> {
        let (address, pod) = (*address, pod.clone());
        Some(Rejection {
            object: Subject::Object(Kind::Service, service.clone()),
            problem: Problem::new(self.field_of(service, address)?, Fault::PodsAddress { address, pod }),
        })
    }

    /// Where a service says that it wants an address.
    fn field_of(&self, service: &ServiceName, address: IpAddr) -> Option<String> {
        self.services.get(service)?.source_of(address).map(Source::field)
    }

    /// What people should know of addresses that services have.
    pub fn notices(&self) -> BTreeSet<Notice> {
        let own =
            self.addresses.all().flat_map(|addr| self.externals.wanting(addr).map(move |service| (service, addr)));
        let notice = |(service, addr): (&ServiceName, IpAddr)| Notice {
            service: service.clone(),
            field: self.field_of(service, addr).unwrap_or_default(),
            matter: Matter::NodesOwnAddress(addr),
        };
        own.map(notice).collect()
    }

    fn service_changed(&mut self, transition: Transition<Service>) {
        let Transition { name, old, new, problems, .. } = transition;
        if let Some(problems) = problems {
            self.changes.note(&Subject::Object(Kind::Service, name.clone()), &problems);
        }
        if old == new {
            return;
        }
        if new.as_ref().is_some_and(|service| service.external.is_some()) {
            self.outward.insert(name.clone());
        } else {
            self.outward.remove(&name);
        }
        self.externals.replace(old.as_deref(), new.as_deref());
        let node_ports = |service: &Option<Arc<Service>>| {
            let ports = service.iter().flat_map(|service| &service.ports);
            ports.filter_map(|port| Some((port.node_port?, port.proto))).collect::<Vec<_>>()
        };
        self.changes.node_ports |= node_ports(&old) != node_ports(&new);
        let node_ports = self.addresses.node_ports();
        let claimant = |service| (service, node_ports);
        let outcome = self.claims.replace(old.as_deref().map(claimant), new.as_deref().map(claimant));
        self.changes.dirty.insert(name);
        self.changes.note_claims(outcome);
    }

    fn addresses_changed(&mut self, new: NodeAddresses) {
        if new == self.addresses {
            return;
        }
        let old = std::mem::replace(&mut self.addresses, new);
        let new = &self.addresses;
        let have_moved = old.node_ports() != new.node_ports();
        self.changes.node_ports |= have_moved;
        for name in &self.outward {
            let Some(service) = self.services.get(name) else { continue };
            let mut listed = service.listed().map(|(_, it)| it.addr);
            if listed.any(|addr| old.has(addr) != new.has(addr)) || have_moved && service.has_node_ports() {
                self.changes.dirty.insert(name.clone());
            }
            if have_moved {
                let claimant = |addresses| Some((service.as_ref(), addresses));
                let outcome = self.claims.replace(claimant(old.node_ports()), claimant(new.node_ports()));
                self.changes.note_claims(outcome);
            }
        }
    }

    fn slice_changed(&mut self, transition: Transition<EndpointSlice>) {
        let Transition { name, old, new, problems, trigger } = transition;
        if let Some(problems) = problems {
            self.changes.note(&Subject::Object(Kind::EndpointSlice, name.clone()), &problems);
        }
        if old == new {
            return;
        }
        old.iter().chain(&new).for_each(|slice| self.externals.slice_changed(slice));
        if let Some(old) = old {
            if let Some(slices) = self.by_service.get_mut(&old.service) {
                slices.retain(|slice| slice.name != name);
                if slices.is_empty() {
                    self.by_service.remove(&old.service);
                }
            }
            self.slice_touches(&old.service, trigger);
        }
        if trigger == Trigger::Unreadable {
            self.changes.unreadable_triggers += 1;
        }
        if let Some(new) = new {
            self.slice_touches(&new.service, trigger);
            let slices = self.by_service.entry(new.service.clone()).or_default();
            let place = slices.partition_point(|slice| slice.name < name);
            slices.reserve_exact(1);
            slices.insert(place, new);
        }
    }

    fn node_changed(&mut self, transition: Transition<Node>) {
        let Transition { name, old, new, problems, .. } = transition;
        if let Some(problems) = problems {
            self.changes.note(&Subject::Object(Kind::Node, name), &problems);
        }
        self.changes.node |= old != new;
        let internal = new.as_ref().map(|node| node.internal_ips.clone()).unwrap_or_default();
        let addresses = self.addresses.clone().with_internal(internal);
        self.addresses_changed(addresses);
        let zone = |node: &Option<Arc<Node>>| node.as_ref().and_then(|node| node.zone.clone());
        if zone(&old) == zone(&new) {
            return;
        }
        let depends = |slices: &[Arc<EndpointSlice>]| slices.iter().any(|slice| slice.has_zone_hints());
        let services = self.by_service.iter().filter(|(_, slices)| depends(slices)).map(|(name, _)| name);
        self.changes.dirty.extend(services.filter(|name| self.services.get(name).is_some()).cloned());
    }

    fn pod_changed(&mut self, transition: Transition<Pod>) {
        let Transition { name, old, new, problems, .. } = transition;
        if let Some(problems) = problems {
            self.changes.note(&Subject::Object(Kind::Pod, name), &problems);
        }
        self.externals.pod_changed(old.as_deref(), new.as_deref());
        self.changes.pods |= old != new;
    }

    fn slice_touches(&mut self, service: &ServiceName, trigger: Trigger) {
        if self.services.get(service).is_some() {
            self.changes.dirty.insert(service.clone());
            if let Trigger::At(time) = trigger {
                let oldest = self.changes.triggers.entry(service.clone()).or_insert(time);
                *oldest = time.min(*oldest);
            }
        }
    }
}

impl Changes {
    fn note_claims(&mut self, Outcome { touched, lost, settled }: Outcome) {
        self.dirty.extend(touched);
        self.rejected.extend(lost.into_iter().map(Rejection::from));
        self.accepted.extend(settled.into_iter().map(|name| Subject::Object(Kind::Service, name)));
    }

    fn note(&mut self, subject: &Subject, problems: &[Problem]) {
        if problems.is_empty() {
            self.accepted.insert(subject.clone());
        }
        self.rejected
            .extend(problems.iter().map(|problem| Rejection { object: subject.clone(), problem: problem.clone() }));
    }
}

impl From<Contest> for Rejection {
    fn from(Contest { frontend, loser, source, winner }: Contest) -> Self {
        let fault = if loser == winner {
            Fault::DuplicatePort(frontend.port.get(), frontend.proto)
        } else {
            Fault::Conflict { frontend, winner }
        };
        Self { object: Subject::Object(Kind::Service, loser), problem: Problem::new(source.field(), fault) }
    }
}
