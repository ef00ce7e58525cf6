//! Plans as they are kept: there is one for each service, and most of the time nobody looks at it.

use affinity_common::{
    family::{Family, V4, V6},
    types::{Port, Proto, Seconds},
};

use super::{BackendPlan, FamilyPlan, FrontendPlan, PortPlan, Scope, ServicePlan};
use crate::model::{ServiceName, ServicePortName, TextPart};

/// All of a [`ServicePlan`] but the service's name, in two pieces of memory.
pub struct Kept {
    numbers: Box<[u8]>,
    /// The names of the ports and of their pods, in the order in which they are met.
    texts: Box<[TextPart]>,
}

const AFFINITY: u8 = 1;
const SHARED: u8 = 2;
const LOCAL: u8 = 4;
const OTHERS_V4: u8 = 8;
const OTHERS_V6: u8 = 16;

const ELIGIBLE: u8 = 1;
const NAMED: u8 = 2;

impl Kept {
    /// Packs a plan.
    pub fn pack(plan: &ServicePlan) -> Self {
        let mut packing = Packing::default();
        packing.count(plan.ports.len());
        for port in &plan.ports {
            packing.port(port);
        }
        Self { numbers: packing.numbers.into(), texts: packing.texts.into() }
    }

    /// The plan of the service of this name.
    pub fn unpack(&self, service: &ServiceName) -> ServicePlan {
        let mut unpacking = Unpacking { numbers: &self.numbers, texts: self.texts.iter() };
        let ports = unpacking.count();
        ServicePlan { name: service.clone(), ports: (0..ports).map(|_| unpacking.port(service)).collect() }
    }
}

#[derive(Default)]
struct Packing {
    numbers: Vec<u8>,
    texts: Vec<TextPart>,
}

impl Packing {
    fn count(&mut self, count: usize) {
        self.numbers.extend(u32::try_from(count).unwrap_or(u32::MAX).to_ne_bytes());
    }

    fn port(&mut self, port: &PortPlan) {
        let PortPlan { name, seed, affinity, shares_affinity, scope, v4, v6 } = port;
        let flag = |is_set, flag| if is_set { flag } else { 0 };
        let flags = flag(affinity.is_some(), AFFINITY)
            | flag(*shares_affinity, SHARED)
            | flag(*scope == Scope::Local, LOCAL)
            | flag(v4.others, OTHERS_V4)
            | flag(v6.others, OTHERS_V6);
        self.texts.push(TextPart::full(name.port.clone()));
        self.numbers.extend([name.proto.number, flags]);
        self.numbers.extend(seed.to_ne_bytes());
        self.numbers.extend(affinity.unwrap_or(Seconds::new(0)).secs.to_ne_bytes());
        self.family(v4);
        self.family(v6);
    }

    fn family<F: Family>(&mut self, FamilyPlan { frontends, backends, others: _ }: &FamilyPlan<F>) {
        self.count(frontends.len());
        for FrontendPlan { addr, port, proto } in frontends {
            self.numbers.extend(addr.as_ref());
            self.numbers.extend(port.be);
            self.numbers.push(proto.number);
        }
        self.count(backends.len());
        for BackendPlan { addr, port, eligible, target } in backends {
            self.numbers.extend(addr.as_ref());
            self.numbers.extend(port.be);
            let named = if target.is_some() { NAMED } else { 0 };
            self.numbers.push(named | if *eligible { ELIGIBLE } else { 0 });
            self.texts.extend(target.clone());
        }
    }
}

/// What was packed, from its beginning on.
struct Unpacking<'a> {
    numbers: &'a [u8],
    texts: std::slice::Iter<'a, TextPart>,
}

impl Unpacking<'_> {
    /// The next bytes. They are there, for they were packed.
    fn next<const N: usize>(&mut self) -> [u8; N] {
        let Some((next, rest)) = self.numbers.split_first_chunk() else { return [0; N] };
        self.numbers = rest;
        *next
    }

    fn count(&mut self) -> u32 {
        u32::from_ne_bytes(self.next())
    }

    fn port(&mut self, service: &ServiceName) -> PortPlan {
        let port = self.texts.next().map(|text| text.parent().clone()).unwrap_or_default();
        let [proto, flags] = self.next();
        let seed = u32::from_ne_bytes(self.next());
        let timeout = Seconds::new(u32::from_ne_bytes(self.next()));
        let has = |flag| flags & flag != 0;
        let (v4, v6) = (self.family::<V4>(has(OTHERS_V4)), self.family::<V6>(has(OTHERS_V6)));
        PortPlan {
            name: ServicePortName { service: service.clone(), port, proto: Proto { number: proto } },
            seed,
            affinity: has(AFFINITY).then_some(timeout),
            shares_affinity: has(SHARED),
            scope: if has(LOCAL) { Scope::Local } else { Scope::Cluster },
            v4,
            v6,
        }
    }

    fn address<F: Family>(&mut self) -> F::Addr {
        let mut addr = F::Addr::default();
        let bytes = bytemuck::bytes_of_mut(&mut addr);
        let (next, rest) = self.numbers.split_at(bytes.len().min(self.numbers.len()));
        bytes[..next.len()].copy_from_slice(next);
        self.numbers = rest;
        addr
    }

    fn family<F: Family>(&mut self, others: bool) -> FamilyPlan<F> {
        let frontends = (0..self.count()).map(|_| {
            let addr = self.address::<F>();
            let ([a, b], [proto]) = (self.next(), self.next());
            FrontendPlan { addr, port: Port { be: [a, b] }, proto: Proto { number: proto } }
        });
        let frontends = frontends.collect();
        let backends = (0..self.count()).map(|_| {
            let addr = self.address::<F>();
            let ([a, b], [flags]) = (self.next(), self.next());
            let target = if flags & NAMED != 0 { self.texts.next().cloned() } else { None };
            BackendPlan { addr, port: Port { be: [a, b] }, eligible: flags & ELIGIBLE != 0, target }
        });
        FamilyPlan { frontends, backends: backends.collect(), others }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn family<F: Family>(addr: impl Strategy<Value = F::Addr> + Clone) -> impl Strategy<Value = FamilyPlan<F>> {
        let frontend = (addr.clone(), any::<u16>(), any::<u8>());
        let backend = (addr, any::<u16>(), any::<bool>(), prop::option::of("[a-z]{0,5}"));
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
            prop_assert_eq!(Kept::pack(&plan).unpack(&plan.name), plan);
        }
    }
}
