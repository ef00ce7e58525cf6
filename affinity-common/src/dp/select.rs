//! Which backend a new connection gets.

use super::{Env, affinity, hash, parse::Headers};
use crate::{
    abi::{
        backends::{Backend, BackendKey},
        frontends::Frontend,
    },
    family::Family,
    reason::Reason,
    types::{BackendId, Nanos},
};

/// A choice, and how it came about.
#[derive(Clone, Copy, Debug)]
pub struct Choice<F: Family> {
    /// The backend.
    pub id: BackendId,
    /// Where it is.
    pub backend: Backend<F>,
    /// The backend that the client had before, or none (0).
    pub previous: BackendId,
    /// How it was chosen: [`Reason::is_selection`].
    pub reason: Reason,
}

/// The backend of a packet that no conntrack entry stands for: of a new connection or, where the packet opens none, of
/// one whose entry was evicted.
#[inline(always)]
pub fn choose<F: Family, E: Env<F>>(
    env: &E,
    frontend: &Frontend,
    headers: &Headers<F>,
    now: Nanos,
) -> Result<Choice<F>, Reason> {
    let in_the_middle = headers.is_tcp() && !headers.opens();
    let mut choice = if !frontend.has_affinity() {
        let (id, backend) = by_connection(env, frontend, headers)?;
        Choice { id, backend, previous: BackendId::default(), reason: Reason::Hashed }
    } else if in_the_middle && let Some((id, backend)) = affinity::recall(env, frontend, &headers.src) {
        Choice { id, backend, previous: id, reason: Reason::Rebuilt }
    } else {
        affinity::choose(env, frontend, &headers.src, now)?
    };
    if in_the_middle {
        choice.reason = Reason::Rebuilt;
    }
    Ok(choice)
}

/// Without affinity: by the connection, so that an evicted conntrack entry is rebuilt on the same backend.
#[inline(always)]
fn by_connection<F: Family, E: Env<F>>(
    env: &E,
    frontend: &Frontend,
    h: &Headers<F>,
) -> Result<(BackendId, Backend<F>), Reason> {
    at(env, frontend, hash::connection::<F>(&h.src, h.src_port, &h.dst, h.dst_port, h.proto, frontend.seed))
}

/// A client's first choice: by client and service, the same on every node.
#[inline(always)]
pub fn first_choice<F: Family, E: Env<F>>(
    env: &E,
    frontend: &Frontend,
    client: &F::Addr,
) -> Result<(BackendId, Backend<F>), Reason> {
    at(env, frontend, hash::client::<F>(client, frontend.seed))
}

/// A random choice.
#[inline(always)]
pub fn fresh_choice<F: Family, E: Env<F>>(env: &E, frontend: &Frontend) -> Result<(BackendId, Backend<F>), Reason> {
    at(env, frontend, env.random())
}

#[inline(always)]
fn at<F: Family, E: Env<F>>(env: &E, frontend: &Frontend, hash: u32) -> Result<(BackendId, Backend<F>), Reason> {
    if frontend.slot_count == 0 {
        return Err(Reason::NoBackend);
    }
    let slot = frontend.first_slot.wrapping_add(hash::place(hash, frontend.slot_count));
    let id = env.slot(slot).ok_or(Reason::BackendGone)?;
    let backend = env.backend(&BackendKey { service: frontend.service, backend: id }).ok_or(Reason::BackendGone)?;
    Ok((id, backend))
}
