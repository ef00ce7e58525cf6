//! Random sequences of packets, socket calls, errors, fragments, clock steps, changes of the services, evictions and full
//! maps, held against a reference model: the plain rules of what may become of each, and plain maps of what there ought to
//! be after it.
//!
//! The model knows the rules and no code of the datapath's: no hashes (a first choice may be any slot's, but must be the
//! same for the same client), no times of the next look (a use that is older than its bound is recorded anew within two
//! ticks), no order of writes. What it foretells in full: affinity, the notes on fragments and sockets, the counts of
//! connections, every byte that leaves. Of conntrack, which is evicted and rebuilt, it reads what there was before a packet,
//! and says what that may become.

mod direct;
mod errors;
mod found;
mod fragments;
mod model;
mod replies;
mod requests;
mod sockets;
mod step;
#[path = "../world/mod.rs"]
mod world;

use affinity_common::dp::parse::{ACK, SYN};
use affinity_common::family::{V4, V6};
use affinity_common::reason::Reason;
use affinity_common::testing::Wire;
use affinity_common::types::Nanos;
use model::{Model, SECOND, TICK};
use proptest::prelude::*;
use step::Step;
use world::cases::cases;

/// Room for all there is.
const ROOM: usize = 256;
/// Room for so little that entries are evicted all the time.
const NO_ROOM: usize = 12;

fn walk<F: Wire>(lru_size: usize, steps: &[Step]) {
    let mut model = Model::<F>::new(lru_size);
    for step in steps {
        model.step(step);
    }
}

/// An established flow that goes on sends its use on time: within its bound and two ticks, the record is fresh.
fn goes_on<F: Wire>(millis: u64, timeout: u32) {
    let mut model = Model::<F>::new(ROOM);
    model.world.services[0].timeout = timeout;
    model.changed(0);
    let client = ([10, 244, 0, 200], 50_000);
    let (_, place) = model.world.send(0, client, SYN);
    let bound = (u64::from(timeout) * SECOND / 16).min(SECOND);
    for _ in 0..40 {
        model.world.env.sleep(Nanos(millis * 1_000_000));
        assert_eq!(model.world.send(0, client, ACK), (Reason::Established, place));
        let entry = model.world.env.peek_affinity(&model.world.services[0].affinity_key(client.0)).expect("an entry");
        let age = entry.last_used.age(model.world.env.clock()).0;
        assert!(age <= bound + 2 * TICK, "{age} ns at a pace of {millis} ms");
    }
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn the_datapath_does_what_the_rules_say(steps in proptest::collection::vec(step::step(), 1..150)) {
        walk::<V4>(ROOM, &steps);
        walk::<V6>(ROOM, &steps);
    }

    #[test]
    fn so_it_does_while_entries_are_evicted_all_the_time(steps in proptest::collection::vec(step::step(), 1..150)) {
        walk::<V4>(NO_ROOM, &steps);
        walk::<V6>(NO_ROOM, &steps);
    }

    #[test]
    fn a_flow_that_goes_on_is_a_use_on_time(millis in 1..3_000u64, timeout in 1..40u32) {
        goes_on::<V4>(millis, timeout);
        goes_on::<V6>(millis, timeout);
    }
}
