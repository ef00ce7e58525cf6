//! The affinity entry of a client: who makes it, who replaces it, who refreshes it.
//!
//! The first writer wins. A missing entry is inserted only where there is none; an entry that has expired or whose
//! backend is no longer eligible is replaced, and a live one refreshed, by one compare-and-exchange of backend and last
//! use. Who loses looks again and adopts what it finds, so two first connections of a client meet on one backend.

use super::{AffinityEntry, Env, Refused, choice::Choice, hash, slots};
use crate::{
    abi::{
        affinity::{Affinity, AffinityKey, Pair},
        backends::{Backend, BackendKey},
        frontends::Frontend,
    },
    family::Family,
    reason::Reason,
    types::{BackendId, Nanos},
};

/// How often a packet looks again after another one was quicker. More would mean that the client's entry is replaced
/// over and over within one packet's time: then the own choice stands.
const ATTEMPTS: u32 = 3;

/// The backend of a new connection of a service with affinity.
#[inline(always)]
pub fn choose<F: Family, E: Env<F>>(
    env: &E,
    frontend: &Frontend,
    client: &F::Addr,
    now: Nanos,
) -> Result<Choice<F>, Reason> {
    let key = AffinityKey::new(*client, frontend.affinity, frontend.scope);
    for attempt in 1..=ATTEMPTS {
        let entry = env.affinity(&key);
        let pair = entry.as_ref().map_or_else(Pair::default, AffinityEntry::load);
        let live = entry.is_some() && pair.is_live(frontend.timeout, now);
        if live && let Some(backend) = eligible(env, frontend, pair.backend) {
            if let Some(entry) = &entry {
                refresh(entry, pair, frontend, now);
            }
            let used = if pair.is_stale(frontend.timeout, now) { now.ticks() } else { pair.last_used };
            let reason = if attempt > 1 { Reason::AffinityAdopted } else { Reason::AffinityHit };
            return Ok(Choice { id: pair.backend, backend, previous: pair.backend, used, reason });
        }
        let expired = entry.is_some() && !live;
        let hash = if expired { env.random() } else { hash::client::<F>(client, frontend.seed) };
        let (id, backend) = slots::at(env, frontend, hash)?;
        let at = now.ticks();
        let written = match &entry {
            None => env.affinity_insert(&key, &Affinity { backend: id, last_used: at, since: at, zero: 0 }),
            Some(entry) => {
                let replaced = entry.compare_exchange(pair, Pair { backend: id, last_used: at });
                if replaced.is_ok() {
                    entry.set_since(at);
                }
                replaced.map_err(|_| Refused::Exists)
            }
        };
        let reason = match written {
            Ok(()) if expired => Reason::AffinityExpired,
            Ok(()) if live => Reason::AffinityFailover,
            Ok(()) => Reason::AffinityNew,
            Err(Refused::Exists) if attempt < ATTEMPTS => continue,
            Err(_) => Reason::AffinityRefused,
        };
        return Ok(Choice { id, backend, previous: pair.backend, used: at, reason });
    }
    // The last attempt has returned.
    Err(Reason::AffinityRefused)
}

/// The backend that the client's entry names, for the middle of a connection whose conntrack entry is gone: eligible or
/// not, expired or not, it is where the connection most likely was.
#[inline(always)]
pub fn recall<F: Family, E: Env<F>>(env: &E, frontend: &Frontend, client: &F::Addr) -> Option<(BackendId, Backend<F>)> {
    let entry = env.affinity(&AffinityKey::new(*client, frontend.affinity, frontend.scope))?;
    let id = entry.load().backend;
    Some((id, env.backend(&BackendKey { service: frontend.service, backend: id })?))
}

/// A packet of an established flow to `backend`: refreshes the client's entry where that names the same, eligible
/// backend. Returns when the entry was last used as far as this flow knows, for the time of its next look.
#[inline(always)]
pub fn touch<F: Family, E: Env<F>>(
    env: &E,
    frontend: &Frontend,
    client: &F::Addr,
    backend: BackendId,
    now: Nanos,
) -> Nanos {
    let Some(entry) = env.affinity(&AffinityKey::new(*client, frontend.affinity, frontend.scope)) else { return now };
    let pair = entry.load();
    if pair.backend != backend {
        return now;
    }
    if !pair.is_stale(frontend.timeout, now) {
        return Nanos(now.0 - pair.last_used.age(now).0);
    }
    if eligible(env, frontend, backend).is_some() {
        refresh(&entry, pair, frontend, now);
    }
    now
}

/// Writes a stale entry's time anew. Who loses has nothing to do: another packet has refreshed or replaced it.
#[inline(always)]
fn refresh<A: AffinityEntry>(entry: &A, pair: Pair, frontend: &Frontend, now: Nanos) {
    if pair.is_stale(frontend.timeout, now) {
        let _ = entry.compare_exchange(pair, Pair { last_used: now.ticks(), ..pair });
    }
}

#[inline(always)]
fn eligible<F: Family, E: Env<F>>(env: &E, frontend: &Frontend, backend: BackendId) -> Option<Backend<F>> {
    env.backend(&BackendKey { service: frontend.service, backend }).filter(|found| found.is_eligible(frontend.scope))
}
