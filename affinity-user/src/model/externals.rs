//! Services' addresses that are not the cluster's own, and which of them somebody else has too.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::{EndpointSlice, Service, ServiceName};

/// The external and load balancers' addresses of services. An endpoint may have one of them as its own: then the service
/// has its ports there and no others.
#[derive(Default)]
pub(super) struct Externals {
    services: BTreeMap<IpAddr, BTreeSet<ServiceName>>,
    /// Those that are an endpoint's own.
    endpoints: BTreeSet<IpAddr>,
    /// Those of which it is to be found out anew whether they are.
    unchecked: BTreeSet<IpAddr>,
}

impl Externals {
    /// A service is another one than it was.
    pub fn replace(&mut self, old: Option<&Service>, new: Option<&Service>) {
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
    service.external.iter().flat_map(move |external| external.addresses().map(move |addr| (service, addr)))
}
