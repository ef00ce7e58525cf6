//! A backend from a service's slots: by connection, by client, or by chance.

use super::{Env, hash, parse::Headers};
use crate::{
    abi::{
        backends::{Backend, BackendKey},
        frontends::Frontend,
    },
    family::Family,
    reason::Reason,
    types::BackendId,
};

/// Without affinity: by the connection, so that an evicted conntrack entry is rebuilt on the same backend.
#[inline(always)]
pub fn by_connection<F: Family, E: Env<F>>(
    env: &E,
    frontend: &Frontend,
    h: &Headers<F>,
) -> Result<(BackendId, Backend<F>), Reason> {
    at(env, frontend, hash::connection::<F>(&h.src, h.src_port, &h.dst, h.dst_port, h.proto, frontend.seed))
}

/// The backend of the slot that a hash falls on.
#[inline(always)]
pub fn at<F: Family, E: Env<F>>(env: &E, frontend: &Frontend, hash: u32) -> Result<(BackendId, Backend<F>), Reason> {
    if frontend.slot_count == 0 {
        return Err(if frontend.has_others() { Reason::NoLocalBackend } else { Reason::NoBackend });
    }
    let slot = frontend.first_slot.wrapping_add(hash::place(hash, frontend.slot_count));
    let id = env.slot(slot).ok_or(Reason::BackendGone)?;
    let backend = env.backend(&BackendKey { service: frontend.service, backend: id }).ok_or(Reason::BackendGone)?;
    Ok((id, backend))
}
