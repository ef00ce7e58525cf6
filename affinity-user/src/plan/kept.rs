//! Plans as they are kept: there is one for each service, and most of the time nobody looks at it.

use affinity_common::{
    family::{Family, V4, V6},
    types::{Port, Proto, Seconds},
};

use super::{
    BackendPlan, FamilyPlan, FrontendPlan, HealthCheck, Origin, PortPlan, RangePlan, Scope, Scopes, ServicePlan,
};
use crate::{
    model::{FrontendKind, ServiceName, ServicePortName, shared},
    packed::{Packing, Unpacking, flags},
};

/// All of a [`ServicePlan`] but the service's name: how many ports there are and whether there is a health check, the names
/// of the ports, the ports, and the health check.
pub struct Kept(Box<[u8]>);

/// Flags of a port; those of a family are IPv4's, and shifted by one for IPv6's.
const AFFINITY: u8 = 1;
const SHARED: u8 = 2;
const OTHERS: u8 = 4;
const OTHERS_LOCAL: u8 = 16;
const RANGES: u8 = 64;

/// Flags of a frontend.
const OUTSIDERS: u8 = 1;
const LOCAL: u8 = 2;
const PARTS: u8 = 4;
const HAS_RANGES: u8 = 8;
const PORT_ALONE: u8 = 16;
/// Two bits for its kind.
const KIND: u8 = 32;

/// Flags of a backend.
const ELIGIBLE: u8 = 1;
const NAMED: u8 = 2;
/// The target port is that of the backend before.
const SAME_PORT: u8 = 4;
const ELIGIBLE_LOCAL: u8 = 8;

impl Kept {
    /// Packs a plan.
    pub fn pack(plan: &ServicePlan) -> Self {
        let mut packing = Packing::default();
        packing.number(plan.ports.len() << 1 | usize::from(plan.health.is_some()));
        for PortPlan { name, .. } in &plan.ports {
            packing.text(&name.port);
            packing.bytes(&[name.proto.number]);
        }
        for port in &plan.ports {
            pack_port(&mut packing, port);
        }
        if let Some(HealthCheck { port, local_endpoints }) = &plan.health {
            packing.bytes(&port.be);
            packing.bytes(&local_endpoints.to_ne_bytes());
        }
        Self(packing.into())
    }

    /// The plan of the service of this name.
    pub fn unpack(&self, service: &ServiceName) -> ServicePlan {
        let (names, has_health, mut unpacking) = self.begin(service);
        let ports = names.into_iter().map(|name| unpack_port(&mut unpacking, name)).collect();
        let health = has_health.then(|| HealthCheck {
            port: Port { be: unpacking.bytes() },
            local_endpoints: u32::from_ne_bytes(unpacking.bytes()),
        });
        ServicePlan { name: service.clone(), ports, health }
    }

    /// The names of its ports; `service` is the service's name.
    pub fn port_names(&self, service: &ServiceName) -> Vec<ServicePortName> {
        self.begin(service).0
    }

    fn begin(&self, service: &ServiceName) -> (Vec<ServicePortName>, bool, Unpacking<'_>) {
        let mut unpacking = Unpacking::new(&self.0);
        let number = unpacking.number();
        let names = (0..number >> 1).map(|_| {
            let (port, [number]) = (shared(unpacking.text()), unpacking.bytes());
            ServicePortName { service: service.clone(), port, proto: Proto { number } }
        });
        (names.collect(), number & 1 != 0, unpacking)
    }
}

fn pack_port(packing: &mut Packing, port: &PortPlan) {
    let PortPlan { name: _, seed, affinity, shares_affinity, v4, v6 } = port;
    packing.bytes(&[flags([(affinity.is_some(), AFFINITY), (*shares_affinity, SHARED)])
        | flags_of(v4)
        | flags_of(v6) << 1]);
    packing.bytes(&seed.to_ne_bytes());
    packing.bytes(&affinity.unwrap_or(Seconds::new(0)).secs.to_ne_bytes());
    pack_family(packing, v4);
    pack_family(packing, v6);
}

/// A port's flags that are of a family, as IPv4 has them.
fn flags_of<F: Family>(FamilyPlan { others, ranges, .. }: &FamilyPlan<F>) -> u8 {
    flags([(others.cluster, OTHERS), (others.local, OTHERS_LOCAL), (!ranges.is_empty(), RANGES)])
}

fn pack_family<F: Family>(packing: &mut Packing, family: &FamilyPlan<F>) {
    let FamilyPlan { frontends, backends, others: _, ranges } = family;
    packing.number(frontends.len());
    for frontend in frontends {
        pack_frontend(packing, frontend);
    }
    packing.number(backends.len());
    let mut last = Port::default();
    for BackendPlan { addr, port, eligible, target } in backends {
        let is_same = *port == last;
        packing.bytes(&[flags([
            (eligible.cluster, ELIGIBLE),
            (eligible.local, ELIGIBLE_LOCAL),
            (target.is_some(), NAMED),
            (is_same, SAME_PORT),
        ])]);
        packing.bytes(addr.as_ref());
        if !is_same {
            packing.bytes(&port.be);
            last = *port;
        }
        if let Some(target) = target {
            packing.text(target);
        }
    }
    if !ranges.is_empty() {
        packing.number(ranges.len());
        for RangePlan { addr, bits } in ranges {
            packing.bytes(addr.as_ref());
            packing.bytes(&[*bits]);
        }
    }
}

fn pack_frontend<F: Family>(packing: &mut Packing, frontend: &FrontendPlan<F>) {
    let FrontendPlan { addr, port, proto, origin, kind, scope, parts_outsiders, has_ranges, port_alone } = frontend;
    packing.bytes(addr.as_ref());
    packing.bytes(&port.be);
    let flags = flags([
        (*origin == Origin::Outsiders, OUTSIDERS),
        (*scope == Scope::Local, LOCAL),
        (*parts_outsiders, PARTS),
        (*has_ranges, HAS_RANGES),
        (*port_alone, PORT_ALONE),
    ]);
    packing.bytes(&[proto.number, flags | (number_of(*kind) * KIND)]);
}

const fn number_of(kind: FrontendKind) -> u8 {
    match kind {
        FrontendKind::ClusterIp => 0,
        FrontendKind::ExternalIp => 1,
        FrontendKind::LoadBalancer => 2,
        FrontendKind::NodePort => 3,
    }
}

const fn kind_of(number: u8) -> FrontendKind {
    match number {
        0 => FrontendKind::ClusterIp,
        1 => FrontendKind::ExternalIp,
        2 => FrontendKind::LoadBalancer,
        _ => FrontendKind::NodePort,
    }
}

fn unpack_port(unpacking: &mut Unpacking<'_>, name: ServicePortName) -> PortPlan {
    let [flags] = unpacking.bytes();
    let seed = u32::from_ne_bytes(unpacking.bytes());
    let timeout = Seconds::new(u32::from_ne_bytes(unpacking.bytes()));
    PortPlan {
        name,
        seed,
        affinity: (flags & AFFINITY != 0).then_some(timeout),
        shares_affinity: flags & SHARED != 0,
        v4: unpack_family::<V4>(unpacking, flags),
        v6: unpack_family::<V6>(unpacking, flags >> 1),
    }
}

/// `flags`: the port's, as far as they are of this family, as IPv4 has them.
fn unpack_family<F: Family>(unpacking: &mut Unpacking<'_>, flags: u8) -> FamilyPlan<F> {
    let frontends = (0..unpacking.number()).map(|_| unpack_frontend(unpacking)).collect();
    let mut port = Port::default();
    let backends = (0..unpacking.number()).map(|_| {
        let [flags] = unpacking.bytes();
        let addr = unpack_address::<F>(unpacking);
        if flags & SAME_PORT == 0 {
            port = Port { be: unpacking.bytes() };
        }
        let target = (flags & NAMED != 0).then(|| unpacking.text().into());
        let eligible = Scopes { cluster: flags & ELIGIBLE != 0, local: flags & ELIGIBLE_LOCAL != 0 };
        BackendPlan { addr, port, eligible, target }
    });
    let backends = backends.collect();
    let ranges = if flags & RANGES != 0 { unpacking.number() } else { 0 };
    let ranges = (0..ranges).map(|_| {
        let (addr, [bits]) = (unpack_address::<F>(unpacking), unpacking.bytes());
        RangePlan { addr, bits }
    });
    let others = Scopes { cluster: flags & OTHERS != 0, local: flags & OTHERS_LOCAL != 0 };
    FamilyPlan { frontends, backends, others, ranges: ranges.collect() }
}

fn unpack_frontend<F: Family>(unpacking: &mut Unpacking<'_>) -> FrontendPlan<F> {
    let addr = unpack_address::<F>(unpacking);
    let (be, [number, flags]) = (unpacking.bytes(), unpacking.bytes());
    let has = |flag| flags & flag != 0;
    FrontendPlan {
        addr,
        port: Port { be },
        proto: Proto { number },
        origin: if has(OUTSIDERS) { Origin::Outsiders } else { Origin::Anybody },
        kind: kind_of((flags / KIND) & 3),
        scope: if has(LOCAL) { Scope::Local } else { Scope::Cluster },
        parts_outsiders: has(PARTS),
        has_ranges: has(HAS_RANGES),
        port_alone: has(PORT_ALONE),
    }
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

    fn scopes() -> impl Strategy<Value = Scopes> {
        any::<(bool, bool)>().prop_map(|(cluster, local)| Scopes { cluster, local })
    }

    fn frontend<F: Family>(addr: impl Strategy<Value = F::Addr>) -> impl Strategy<Value = FrontendPlan<F>> {
        let flags = any::<(bool, bool, bool, bool, bool)>();
        (addr, any::<u16>(), any::<u8>(), 0..4_u8, flags).prop_map(
            |(addr, port, number, kind, (outsiders, local, parts_outsiders, has_ranges, port_alone))| FrontendPlan {
                addr,
                port: Port::new(port),
                proto: Proto { number },
                origin: if outsiders { Origin::Outsiders } else { Origin::Anybody },
                kind: kind_of(kind),
                scope: if local { Scope::Local } else { Scope::Cluster },
                parts_outsiders,
                has_ranges,
                port_alone,
            },
        )
    }

    fn family<F: Family>(addr: impl Strategy<Value = F::Addr> + Clone) -> impl Strategy<Value = FamilyPlan<F>> {
        let backend = (addr.clone(), 0..3_u16, scopes(), prop::option::of("(web)?[a-z]{0,5}")).prop_map(
            |(addr, port, eligible, target)| BackendPlan {
                addr,
                port: Port::new(port),
                eligible,
                target: target.map(Into::into),
            },
        );
        let range = (addr.clone(), any::<u8>()).prop_map(|(addr, bits)| RangePlan { addr, bits });
        let frontends = prop::collection::vec(frontend(addr), 0..3);
        let backends = prop::collection::vec(backend, 0..6);
        let ranges = prop::collection::vec(range, 0..3);
        (frontends, backends, scopes(), ranges).prop_map(|(frontends, backends, others, ranges)| FamilyPlan {
            frontends,
            backends,
            others,
            ranges,
        })
    }

    fn port() -> impl Strategy<Value = PortPlan> {
        let names = ("[a-z]{0,8}", any::<u8>());
        let rest = (any::<u32>(), prop::option::of(any::<u32>()), any::<bool>());
        (names, rest, family::<V4>(any::<[u8; 4]>()), family::<V6>(any::<[u8; 16]>())).prop_map(
            |((port, number), (seed, affinity, shares_affinity), v4, v6)| PortPlan {
                name: ServicePortName {
                    service: ServiceName::new("default", "web"),
                    port: port.into(),
                    proto: Proto { number },
                },
                seed,
                affinity: affinity.map(Seconds::new),
                shares_affinity,
                v4,
                v6,
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_kept_is_the_plan(
            ports in prop::collection::vec(port(), 0..4),
            health in prop::option::of(any::<(u16, u32)>()),
        ) {
            let health = health.map(|(port, local_endpoints)| HealthCheck { port: Port::new(port), local_endpoints });
            let plan = ServicePlan { name: ServiceName::new("default", "web"), ports, health };
            let kept = Kept::pack(&plan);
            let names: Vec<_> = plan.ports.iter().map(|port| port.name.clone()).collect();
            prop_assert_eq!(kept.port_names(&plan.name), names);
            prop_assert_eq!(kept.unpack(&plan.name), plan);
        }
    }

    #[test]
    fn a_plain_service_takes_little() {
        let frontend = FrontendPlan::<V4> {
            addr: [10, 96, 0, 1],
            port: Port::new(80),
            proto: Proto::TCP,
            origin: Origin::Anybody,
            kind: FrontendKind::ClusterIp,
            scope: Scope::Cluster,
            parts_outsiders: false,
            has_ranges: false,
            port_alone: false,
        };
        let name = ServicePortName { service: ServiceName::new("default", "web"), port: "".into(), proto: Proto::TCP };
        let port = PortPlan {
            name,
            seed: 7,
            affinity: None,
            shares_affinity: false,
            v4: FamilyPlan { frontends: vec![frontend], ..FamilyPlan::default() },
            v6: FamilyPlan::default(),
        };
        let plan = ServicePlan { name: ServiceName::new("default", "web"), ports: vec![port], health: None };
        // Their number; the name, the protocol; flags, seed and timeout; the frontend between the numbers of all.
        assert_eq!(Kept::pack(&plan).0.len(), 1 + (2 + 1) + (1 + 4 + 4) + (1 + 8 + 1) + 2);
    }
}
