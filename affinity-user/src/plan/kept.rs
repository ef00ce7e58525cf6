//! Plans as they are kept: there is one for each service, and most of the time nobody looks at it.

use affinity_common::{
    family::{Family, V4, V6},
    types::{Port, Proto, Seconds},
};

use super::{BackendPlan, FamilyPlan, FrontendPlan, PortPlan, Scope, ServicePlan};
use crate::{
    model::{ServiceName, ServicePortName, shared},
    packed::{Packing, Unpacking, flags},
};

/// All of a [`ServicePlan`] but the service's name: the names of the ports, then the ports.
pub struct Kept(Box<[u8]>);

const AFFINITY: u8 = 1;
const SHARED: u8 = 2;
const LOCAL: u8 = 4;
const OTHERS_V4: u8 = 8;
const OTHERS_V6: u8 = 16;

const ELIGIBLE: u8 = 1;
const NAMED: u8 = 2;
/// The target port is that of the backend before.
const SAME_PORT: u8 = 4;

impl Kept {
    /// Packs a plan.
    pub fn pack(plan: &ServicePlan) -> Self {
        let mut packing = Packing::default();
        packing.number(plan.ports.len());
        for PortPlan { name, .. } in &plan.ports {
            packing.text(&name.port);
            packing.bytes(&[name.proto.number]);
        }
        for port in &plan.ports {
            pack_port(&mut packing, port);
        }
        Self(packing.into())
    }

    /// The plan of the service of this name.
    pub fn unpack(&self, service: &ServiceName) -> ServicePlan {
        let (names, mut unpacking) = self.begin(service);
        let ports = names.into_iter().map(|name| unpack_port(&mut unpacking, name));
        ServicePlan { name: service.clone(), ports: ports.collect() }
    }

    /// The names of its ports; `service` is the service's name.
    pub fn port_names(&self, service: &ServiceName) -> Vec<ServicePortName> {
        self.begin(service).0
    }

    fn begin(&self, service: &ServiceName) -> (Vec<ServicePortName>, Unpacking<'_>) {
        let mut unpacking = Unpacking::new(&self.0);
        let ports = unpacking.number();
        let names = (0..ports).map(|_| {
            let (port, [number]) = (shared(unpacking.text()), unpacking.bytes());
            ServicePortName { service: service.clone(), port, proto: Proto { number } }
        });
        (names.collect(), unpacking)
    }
}

fn pack_port(packing: &mut Packing, port: &PortPlan) {
    let PortPlan { name: _, seed, affinity, shares_affinity, scope, v4, v6 } = port;
    packing.bytes(&[flags([
        (affinity.is_some(), AFFINITY),
        (*shares_affinity, SHARED),
        (*scope == Scope::Local, LOCAL),
        (v4.others, OTHERS_V4),
        (v6.others, OTHERS_V6),
    ])]);
    packing.bytes(&seed.to_ne_bytes());
    packing.bytes(&affinity.unwrap_or(Seconds::new(0)).secs.to_ne_bytes());
    pack_family(packing, v4);
    pack_family(packing, v6);
}

fn pack_family<F: Family>(packing: &mut Packing, family: &FamilyPlan<F>) {
    let FamilyPlan { frontends, backends, others: _ } = family;
    packing.number(frontends.len());
    for FrontendPlan { addr, port, proto } in frontends {
        packing.bytes(addr.as_ref());
        packing.bytes(&port.be);
        packing.bytes(&[proto.number]);
    }
    packing.number(backends.len());
    let mut last = Port::default();
    for BackendPlan { addr, port, eligible, target } in backends {
        let is_same = *port == last;
        packing.bytes(&[flags([(*eligible, ELIGIBLE), (target.is_some(), NAMED), (is_same, SAME_PORT)])]);
        packing.bytes(addr.as_ref());
        if !is_same {
            packing.bytes(&port.be);
            last = *port;
        }
        if let Some(target) = target {
            packing.text(target);
        }
    }
}

fn unpack_port(unpacking: &mut Unpacking<'_>, name: ServicePortName) -> PortPlan {
    let [flags] = unpacking.bytes();
    let seed = u32::from_ne_bytes(unpacking.bytes());
    let timeout = Seconds::new(u32::from_ne_bytes(unpacking.bytes()));
    let has = |flag| flags & flag != 0;
    PortPlan {
        name,
        seed,
        affinity: has(AFFINITY).then_some(timeout),
        shares_affinity: has(SHARED),
        scope: if has(LOCAL) { Scope::Local } else { Scope::Cluster },
        v4: unpack_family::<V4>(unpacking, has(OTHERS_V4)),
        v6: unpack_family::<V6>(unpacking, has(OTHERS_V6)),
    }
}

fn unpack_family<F: Family>(unpacking: &mut Unpacking<'_>, others: bool) -> FamilyPlan<F> {
    let frontends = (0..unpacking.number()).map(|_| {
        let addr = unpack_address::<F>(unpacking);
        let (be, [number]) = (unpacking.bytes(), unpacking.bytes());
        FrontendPlan { addr, port: Port { be }, proto: Proto { number } }
    });
    let frontends = frontends.collect();
    let mut port = Port::default();
    let backends = (0..unpacking.number()).map(|_| {
        let [flags] = unpacking.bytes();
        let addr = unpack_address::<F>(unpacking);
        if flags & SAME_PORT == 0 {
            port = Port { be: unpacking.bytes() };
        }
        let target = (flags & NAMED != 0).then(|| unpacking.text().into());
        BackendPlan { addr, port, eligible: flags & ELIGIBLE != 0, target }
    });
    FamilyPlan { frontends, backends: backends.collect(), others }
}

fn unpack_address<F: Family>(unpacking: &mut Unpacking<'_>) -> F::Addr {
    let mut addr = F::Addr::default();
    for byte in bytemuck::bytes_of_mut(&mut addr) {
        [*byte] = unpacking.bytes();
    }
    addr
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn family<F: Family>(addr: impl Strategy<Value = F::Addr> + Clone) -> impl Strategy<Value = FamilyPlan<F>> {
        let frontend = (addr.clone(), any::<u16>(), any::<u8>());
        let backend = (addr, 0..3_u16, any::<bool>(), prop::option::of("(web)?[a-z]{0,5}"));
        let frontends = prop::collection::vec(frontend, 0..3);
        let backends = prop::collection::vec(backend, 0..6);
        (frontends, backends, any::<bool>()).prop_map(|(frontends, backends, others)| {
            let frontends = frontends.into_iter().map(|(addr, port, number)| FrontendPlan {
                addr,
                port: Port::new(port),
                proto: Proto { number },
            });
            let backends = backends.into_iter().map(|(addr, port, eligible, target)| BackendPlan {
                addr,
                port: Port::new(port),
                eligible,
                target: target.map(Into::into),
            });
            FamilyPlan { frontends: frontends.collect(), backends: backends.collect(), others }
        })
    }

    fn port() -> impl Strategy<Value = PortPlan> {
        let names = ("[a-z]{0,8}", any::<u8>());
        let rest = (any::<u32>(), prop::option::of(any::<u32>()), any::<bool>(), any::<bool>());
        (names, rest, family::<V4>(any::<[u8; 4]>()), family::<V6>(any::<[u8; 16]>())).prop_map(
            |((port, number), (seed, affinity, shares_affinity, local), v4, v6)| PortPlan {
                name: ServicePortName {
                    service: ServiceName::new("default", "web"),
                    port: port.into(),
                    proto: Proto { number },
                },
                seed,
                affinity: affinity.map(Seconds::new),
                shares_affinity,
                scope: if local { Scope::Local } else { Scope::Cluster },
                v4,
                v6,
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_kept_is_the_plan(ports in prop::collection::vec(port(), 0..4)) {
            let plan = ServicePlan { name: ServiceName::new("default", "web"), ports };
            let kept = Kept::pack(&plan);
            let names: Vec<_> = plan.ports.iter().map(|port| port.name.clone()).collect();
            prop_assert_eq!(kept.port_names(&plan.name), names);
            prop_assert_eq!(kept.unpack(&plan.name), plan);
        }
    }
}
