//! From the model of one service to what the datapath ought to hold for it: a pure step, without ids.
//!
//! The same model gives the same plan on every node, but for what traffic policies and topology hints keep to some of them:
//! backends are in canonical order, and what spreads clients over them ([`maglev`], [`PortPlan::seed`]) depends on names and
//! addresses alone.

mod endpoints;
mod frontends;
mod health;
mod kept;
pub mod maglev;
mod scopes;
#[cfg(test)]
mod tests;

use std::fmt;

use affinity_common::{
    family::{Family, V4, V6},
    types::{Port, Seconds},
};

pub use self::{
    frontends::{FrontendPlan, Origin, RangePlan},
    health::HealthCheck,
    kept::Kept,
    scopes::{Scope, Scopes},
};
use crate::model::{AffinityScope, ServiceName, ServicePort, ServicePortName, ServiceView, SessionAffinity, Text};

/// What the datapath ought to hold for a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePlan {
    /// The service.
    pub name: ServiceName,
    /// Its ports, in the order of their names: those that have a frontend.
    pub ports: Vec<PortPlan>,
    /// What load balancers are to be told of the service's endpoints on this node, and where they ask.
    pub health: Option<HealthCheck>,
}

/// What the datapath ought to hold for a service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortPlan {
    /// The service port.
    pub name: ServicePortName,
    /// What makes its choices its own: a hash of its name, or of the service's where affinity is shared, so the same on
    /// every node.
    pub seed: u32,
    /// How long a client stays with its backend; `None` where it does not.
    pub affinity: Option<Seconds>,
    /// Whether a client that has affinity here has it on all ports of the service, to the same pod.
    pub shares_affinity: bool,
    /// The IPv4 part.
    pub v4: FamilyPlan<V4>,
    /// The IPv6 part.
    pub v6: FamilyPlan<V6>,
}

/// The part of a service port that is of one address family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FamilyPlan<F: Family> {
    /// What clients send to, in order. Without any there are no backends either.
    pub frontends: Vec<FrontendPlan<F>>,
    /// Where that leads, in order of address and port, each once; those that are not eligible too, since they keep
    /// the flows that they have.
    pub backends: Vec<BackendPlan<F>>,
    /// In which scopes there are endpoints that answer, though none of them is eligible here: clients are dropped, not
    /// refused.
    pub others: Scopes,
    /// Who is let in by those frontends that let in some clients only, in order, each once.
    pub ranges: Vec<RangePlan<F>>,
}

/// A backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendPlan<F: Family> {
    /// The pod's address.
    pub addr: F::Addr,
    /// The target port.
    pub port: Port,
    /// In which scopes it takes new sessions and keeps those it has; without any it keeps its established flows only.
    pub eligible: Scopes,
    /// The pod's name, where there is a pod.
    pub target: Option<Text>,
}

/// A family that plans are made for: the way from a family's type to its part of a plan.
pub trait PlanFamily: Family {
    /// The part of a service port that is of this family.
    fn of(port: &PortPlan) -> &FamilyPlan<Self>;
}

impl PlanFamily for V4 {
    fn of(port: &PortPlan) -> &FamilyPlan<Self> {
        &port.v4
    }
}

impl PlanFamily for V6 {
    fn of(port: &PortPlan) -> &FamilyPlan<Self> {
        &port.v6
    }
}

impl PortPlan {
    /// The part that is of family `F`.
    pub fn family<F: PlanFamily>(&self) -> &FamilyPlan<F> {
        F::of(self)
    }

    /// The slots of family `F` and a scope: indices into its [`FamilyPlan::backends`], of eligible ones alone, and none if no
    /// backend is eligible. With affinity a Maglev table, without it each eligible backend once, in order.
    ///
    /// Where affinity is shared, target ports play no part in it, so that every port of the service chooses the same pod.
    ///
    /// Computed on each call: it depends on the addresses and ports of the eligible backends alone, so a table that
    /// was made for the same ones is still right.
    pub fn slots<F: PlanFamily>(&self, scope: Scope) -> Vec<u32> {
        let family = self.family::<F>();
        let (eligible, keys): (Vec<u32>, Vec<_>) = (0..)
            .zip(&family.backends)
            .filter(|(_, b)| b.eligible.has(scope))
            .map(|(i, b)| (i, (b.addr, self.key_port(b))))
            .unzip();
        if self.affinity.is_none() {
            return eligible;
        }
        maglev::table::<F>(&keys).into_iter().filter_map(|slot| eligible.get(slot as usize).copied()).collect()
    }
}

impl PortPlan {
    fn key_port<F: Family>(&self, backend: &BackendPlan<F>) -> Port {
        if self.shares_affinity { Port::default() } else { backend.port }
    }
}

impl<F: Family> FamilyPlan<F> {
    /// The scopes that its frontends have.
    pub fn scopes(&self) -> Scopes {
        self.frontends.iter().map(|frontend| frontend.scope).collect()
    }
}

impl<F: Family> Default for FamilyPlan<F> {
    fn default() -> Self {
        Self { frontends: Vec::new(), backends: Vec::new(), others: Scopes::default(), ranges: Vec::new() }
    }
}

/// Plans a service.
pub fn plan(view: &ServiceView<'_>) -> ServicePlan {
    let service = view.service;
    let affinity = match service.session_affinity {
        SessionAffinity::None => None,
        SessionAffinity::ClientIp { timeout } => Some(timeout),
    };
    let shares_affinity = affinity.is_some() && service.affinity_scope == AffinityScope::Service;
    let mut ports: Vec<_> = service
        .ports
        .iter()
        .map(|port| {
            let name = service.port_name(port);
            PortPlan {
                seed: if shares_affinity { seed(&service.name) } else { seed(&name) },
                affinity,
                shares_affinity,
                v4: family_plan(view, port),
                v6: family_plan(view, port),
                name,
            }
        })
        .filter(|port| !port.v4.frontends.is_empty() || !port.v6.frontends.is_empty())
        .collect();
    ports.sort_by(|a, b| a.name.cmp(&b.name));
    ServicePlan { name: service.name.clone(), ports, health: health::health_check(view) }
}

fn family_plan<F: Family>(view: &ServiceView<'_>, port: &ServicePort) -> FamilyPlan<F> {
    let frontends = frontends::frontends::<F>(view, port);
    if frontends.is_empty() {
        return FamilyPlan::default();
    }
    let ranges = frontends::ranges(view.service, &frontends);
    let mut plan = FamilyPlan { frontends, ranges, ..FamilyPlan::default() };
    (plan.backends, plan.others) =
        endpoints::backends(view.slices(), &port.name, port.proto, plan.scopes(), view.place);
    plan
}

/// The hash of `namespace/name/port/proto`, or of `namespace/name`.
fn seed(name: &impl fmt::Display) -> u32 {
    fnv1a(name.to_string().bytes())
}

/// FNV-1a, 32 bits.
fn fnv1a(bytes: impl Iterator<Item = u8>) -> u32 {
    bytes.fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// A dump for people and tests: a line each for the port, its frontends, its ranges and its backends (by
/// [`Scopes::mark`]).
impl fmt::Display for ServicePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for port in &self.ports {
            write!(f, "{} seed={:08x} affinity=", port.name, port.seed)?;
            match port.affinity {
                Some(timeout) => write!(f, "{}s", timeout.secs)?,
                None => write!(f, "none")?,
            }
            writeln!(f, "{}", if port.shares_affinity { " shared" } else { "" })?;
            port.v4.fmt(f)?;
            port.v6.fmt(f)?;
        }
        if let Some(HealthCheck { port, local_endpoints }) = &self.health {
            writeln!(f, "health {port} local={local_endpoints}")?;
        }
        Ok(())
    }
}

impl<F: Family> fmt::Display for FamilyPlan<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for frontend in &self.frontends {
            writeln!(f, "  frontend {frontend}")?;
        }
        for RangePlan { addr, bits } in &self.ranges {
            writeln!(f, "  range {}/{bits}", F::to_ip(addr))?;
        }
        for BackendPlan { addr, port, eligible, target } in &self.backends {
            let addr = std::net::SocketAddr::new(F::to_ip(addr), port.get());
            writeln!(f, "  backend {}{addr} {}", eligible.mark(), target.as_deref().unwrap_or("-"))?;
        }
        if self.others.any() {
            writeln!(f, "  others {}", self.others.mark())?;
        }
        Ok(())
    }
}
