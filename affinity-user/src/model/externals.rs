//! Services' addresses that are not the cluster's own, and which of them somebody else has too.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::{EndpointSlice, Pod, PodName, Service, ServiceName};

/// The external and load balancers' addresses of services. An endpoint may have one of them as its own: then the service
/// has its ports there and no others. One that a pod of this node has as its own no service has: endpoints may be nodes,
/// which services are given addresses of on purpose, but a pod is nothing else.
#[derive(Default)]
pub(super) struct Externals {
    services: BTreeMap<IpAddr, BTreeSet<ServiceName>>,
    /// The pods of this node that have an address of their own.
    pods: BTreeMap<IpAddr, PodName>,
    /// Which services want an address that is a pod's, as it was found last.
    pods_wanted: BTreeSet<PodsAddress>,
    /// Whether that is to be found out anew.
    pods_unchecked: bool,
    /// Those that are an endpoint's own.
    endpoints: BTreeSet<IpAddr>,
    /// Those of which it is to be found out anew whether they are.
    unchecked: BTreeSet<IpAddr>,
}

/// A service that wants an address which is a pod's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PodsAddress {
    pub service: ServiceName,
    pub address: IpAddr,
    pub pod: PodName,
}

impl Externals {
    /// A service is another one than it was.
    pub fn replace(&mut self, old: Option<&Service>, new: Option<&Service>) {
        self.pods_unchecked |= old.into_iter().chain(new).flat_map(addresses_of).next().is_some();
        for (service, addr) in old.into_iter().flat_map(addresses_of) {
            if let Some(services) = self.services.get_mut(&addr) {
                services.remove(&service.name);
                if services.is_empty() {
                    self.services.remove(&addr);
                    self.endpoints.remove(&addr);
                    self.unchecked.remove(&addr);
                }
            }
        }
        for (service, addr) in new.into_iter().flat_map(addresses_of) {
            if !self.services.contains_key(&addr) {
                self.unchecked.insert(addr);
            }
            self.services.entry(addr).or_default().insert(service.name.clone());
        }
    }

    /// A slice has come or gone.
    pub fn slice_changed(&mut self, slice: &EndpointSlice) {
        if !self.services.is_empty() {
            let addresses = slice.endpoints.iter().map(|endpoint| endpoint.address);
            self.unchecked.extend(addresses.filter(|addr| self.services.contains_key(addr)));
        }
    }

    /// A pod of this node is another one than it was.
    pub fn pod_changed(&mut self, old: Option<&Pod>, new: Option<&Pod>) {
        for (pod, addr) in old.into_iter().flat_map(own_addresses_of) {
            if self.pods.get(&addr) == Some(&pod.name) {
                self.pods.remove(&addr);
                self.pods_unchecked = true;
            }
        }
        for (pod, addr) in new.into_iter().flat_map(own_addresses_of) {
            self.pods.insert(addr, pod.name.clone());
            self.pods_unchecked = true;
        }
    }

    /// Finds out which services want an address that is a pod's. Returns those that want one no more, and those that do now.
    pub fn check_pods(&mut self) -> (Vec<PodsAddress>, Vec<PodsAddress>) {
        if !std::mem::take(&mut self.pods_unchecked) {
            return Default::default();
        }
        let wanted: BTreeSet<_> = self
            .pods
            .iter()
            .flat_map(|(address, pod)| self.wanting(*address).map(move |service| (service, *address, pod)))
            .map(|(service, address, pod)| PodsAddress { service: service.clone(), address, pod: pod.clone() })
            .collect();
        let before = std::mem::replace(&mut self.pods_wanted, wanted);
        let now = &self.pods_wanted;
        (before.difference(now).cloned().collect(), now.difference(&before).cloned().collect())
    }

    /// Which services want an address that is a pod's, as it was found last.
    pub fn pods_wanted(&self) -> impl Iterator<Item = &PodsAddress> {
        self.pods_wanted.iter()
    }

    /// Whether an address is a pod's own.
    pub fn is_pods(&self, addr: IpAddr) -> bool {
        self.pods.contains_key(&addr)
    }

    /// The services that want an address.
    pub fn wanting(&self, addr: IpAddr) -> impl Iterator<Item = &ServiceName> {
        self.services.get(&addr).into_iter().flatten()
    }

    /// Finds out what is to be found out, by all slices. Returns the services that it makes a difference to.
    pub fn check<'a>(&mut self, slices: impl Iterator<Item = &'a EndpointSlice>) -> BTreeSet<ServiceName> {
        if self.unchecked.is_empty() {
            return BTreeSet::new();
        }
        let addresses = slices.flat_map(|slice| slice.endpoints.iter()).map(|endpoint| endpoint.address);
        let found: BTreeSet<_> = addresses.filter(|addr| self.unchecked.contains(addr)).collect();
        let mut touched = BTreeSet::new();
        for addr in std::mem::take(&mut self.unchecked) {
            let changed =
                if found.contains(&addr) { self.endpoints.insert(addr) } else { self.endpoints.remove(&addr) };
            if changed {
                touched.extend(self.services.get(&addr).into_iter().flatten().cloned());
            }
        }
        touched
    }

    /// Whether an address of a service is also an endpoint's own.
    pub fn is_endpoints(&self, addr: IpAddr) -> bool {
        self.endpoints.contains(&addr)
    }
}

fn addresses_of(service: &Service) -> impl Iterator<Item = (&Service, IpAddr)> {
    service.listed().map(move |(_, it)| (service, it.addr))
}

/// What a pod of its own network namespace has, as long as it runs.
fn own_addresses_of(pod: &Pod) -> impl Iterator<Item = (&Pod, IpAddr)> {
    let has_own = !pod.host_network && !pod.finished;
    pod.addresses.iter().filter(move |_| has_own).map(move |addr| (pod, *addr))
}
