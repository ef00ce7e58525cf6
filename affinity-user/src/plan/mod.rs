//! From the model of one service to what the datapath ought to hold for it: a pure step, without ids.
//!
//! The same model gives the same plan on every node, but for what traffic policies and topology hints keep to some of them:
//! backends are in canonical order, and what spreads clients over them ([`maglev`], [`PortPlan::seed`]) depends on names and
//! addresses alone.

mod endpoints;
mod kept;
pub mod maglev;
#[cfg(test)]
mod tests;

use std::fmt;

use affinity_common::{
    abi::frontends::{CLUSTER, LOCAL},
    family::{Family, V4, V6},
    types::{Port, Proto, Seconds},
};

pub use self::kept::Kept;
use crate::model::{
    AffinityScope, FrontendAddress, ServiceName, ServicePortName, ServiceView, SessionAffinity, Text, TrafficPolicy,
};

/// What the datapath ought to hold for a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePlan {
    /// The service.
    pub name: ServiceName,
    /// Its ports, in the order of their names: those that have a frontend.
    pub ports: Vec<PortPlan>,
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
    /// Which endpoints its frontends lead to.
    pub scope: Scope,
    /// The IPv4 part.
    pub v4: FamilyPlan<V4>,
    /// The IPv6 part.
    pub v6: FamilyPlan<V6>,
}

/// Which endpoints frontends lead to. Clients have an affinity of their own in each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All that the node's topology allows.
    Cluster,
    /// Those on this node.
    Local,
}

impl Scope {
    /// What stands for it in maps.
    pub const fn number(self) -> u16 {
        match self {
            Self::Cluster => CLUSTER,
            Self::Local => LOCAL,
        }
    }
}

/// The part of a service port that is of one address family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FamilyPlan<F: Family> {
    /// What clients send to, in order. Without any there are no backends either.
    pub frontends: Vec<FrontendPlan<F>>,
    /// Where that leads, in order of address and port, each once; those that are not eligible too, since they keep
    /// the flows that they have.
    pub backends: Vec<BackendPlan<F>>,
    /// Whether there are endpoints that answer, though none of them is eligible here: clients are dropped, not refused.
    pub others: bool,
}

/// An address and port that clients send to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FrontendPlan<F: Family> {
    /// The address.
    pub addr: F::Addr,
    /// The port.
    pub port: Port,
    /// The protocol.
    pub proto: Proto,
}

/// A backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendPlan<F: Family> {
    /// The pod's address.
    pub addr: F::Addr,
    /// The target port.
    pub port: Port,
    /// Takes new sessions and keeps those it has; if not, it keeps its established flows only.
    pub eligible: bool,
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

    /// The slots of family `F`: indices into its [`FamilyPlan::backends`], of eligible ones alone, and none if no
    /// backend is eligible. With affinity a Maglev table, without it each eligible backend once, in order.
    ///
    /// Where affinity is shared, target ports play no part in it, so that every port of the service chooses the same pod.
    ///
    /// Computed on each call: it depends on the addresses and ports of the eligible backends alone, so a table that
    /// was made for the same ones is still right.
    pub fn slots<F: PlanFamily>(&self) -> Vec<u32> {
        let family = self.family::<F>();
        let (eligible, keys): (Vec<u32>, Vec<_>) = (0..)
            .zip(&family.backends)
            .filter(|(_, b)| b.eligible)
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

impl<F: Family> Default for FamilyPlan<F> {
    fn default() -> Self {
        Self { frontends: Vec::new(), backends: Vec::new(), others: false }
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
    let scope = match service.internal_policy {
        TrafficPolicy::Cluster => Scope::Cluster,
        TrafficPolicy::Local => Scope::Local,
    };
    let mut ports: Vec<_> = service
        .ports
        .iter()
        .map(|port| {
            let name = service.port_name(port);
            PortPlan {
                seed: if shares_affinity { seed(&service.name) } else { seed(&name) },
                affinity,
                shares_affinity,
                scope,
                v4: family_plan(view, &name, port.port, scope),
                v6: family_plan(view, &name, port.port, scope),
                name,
            }
        })
        .filter(|port| !port.v4.frontends.is_empty() || !port.v6.frontends.is_empty())
        .collect();
    ports.sort_by(|a, b| a.name.cmp(&b.name));
    ServicePlan { name: service.name.clone(), ports }
}

fn family_plan<F: Family>(view: &ServiceView<'_>, name: &ServicePortName, port: Port, scope: Scope) -> FamilyPlan<F> {
    let mut frontends: Vec<_> = view
        .service
        .cluster_ips
        .iter()
        .filter(|&&addr| view.holds(&FrontendAddress { addr, port, proto: name.proto }))
        .filter_map(|&addr| Some(FrontendPlan { addr: F::from_ip(addr)?, port, proto: name.proto }))
        .collect();
    if frontends.is_empty() {
        return FamilyPlan::default();
    }
    frontends.sort();
    let (backends, others) = endpoints::backends(view.slices(), &name.port, name.proto, scope, view.place);
    FamilyPlan { frontends, backends, others }
}

/// The hash of `namespace/name/port/proto`, or of `namespace/name`.
fn seed(name: &impl fmt::Display) -> u32 {
    fnv1a(name.to_string().bytes())
}

/// FNV-1a, 32 bits.
fn fnv1a(bytes: impl Iterator<Item = u8>) -> u32 {
    bytes.fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// A dump for people and tests: a line each for the port, its frontends and its backends (`+` if eligible).
impl fmt::Display for ServicePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for port in &self.ports {
            write!(f, "{} seed={:08x} affinity=", port.name, port.seed)?;
            match port.affinity {
                Some(timeout) => write!(f, "{}s", timeout.secs)?,
                None => write!(f, "none")?,
            }
            write!(f, "{}", if port.shares_affinity { " shared" } else { "" })?;
            writeln!(f, "{}", if port.scope == Scope::Local { " scope=local" } else { "" })?;
            port.v4.fmt(f)?;
            port.v6.fmt(f)?;
        }
        Ok(())
    }
}

impl<F: Family> fmt::Display for FamilyPlan<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for FrontendPlan { addr, port, proto } in &self.frontends {
            let addr = F::to_ip(addr);
            writeln!(f, "  frontend {}", FrontendAddress { addr, port: *port, proto: *proto })?;
        }
        for BackendPlan { addr, port, eligible, target } in &self.backends {
            let addr = std::net::SocketAddr::new(F::to_ip(addr), port.get());
            let target = target.as_deref().unwrap_or("-");
            writeln!(f, "  backend {}{addr} {target}", if *eligible { '+' } else { '-' })?;
        }
        if self.others {
            writeln!(f, "  others")?;
        }
        Ok(())
    }
}
