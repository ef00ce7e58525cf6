//! Which backend a new connection gets.

use super::{Env, affinity, choice::Choice, parse::Headers, slots};
use crate::{
    abi::{frontends::Frontend, source_ranges::RangeKey},
    family::Family,
    reason::Reason,
    types::{BackendId, Nanos},
};

/// The backend of a packet that no conntrack entry stands for: of a new connection or, where the packet opens none, of
/// one whose entry was evicted.
#[inline(always)]
pub fn choose<F: Family, E: Env<F>>(
    env: &E,
    frontend: &Frontend,
    headers: &Headers<F>,
    now: Nanos,
) -> Result<Choice<F>, Reason> {
    if frontend.has_ranges() && !env.lets_in(&RangeKey::of_client(frontend.service, headers.src)) {
        return Err(Reason::NotAllowed);
    }
    let in_the_middle = headers.is_tcp() && !headers.opens();
    let mut choice = if !frontend.has_affinity() {
        let (id, backend) = slots::by_connection(env, frontend, headers)?;
        Choice { id, backend, previous: BackendId::default(), used: now.ticks(), reason: Reason::Hashed }
    } else if in_the_middle && let Some((id, backend)) = affinity::recall(env, frontend, &headers.src) {
        Choice { id, backend, previous: id, used: now.ticks(), reason: Reason::Rebuilt }
    } else {
        affinity::choose(env, frontend, &headers.src, now)?
    };
    if in_the_middle {
        choice.reason = Reason::Rebuilt;
    }
    Ok(choice)
}
