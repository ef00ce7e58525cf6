//! The datapath's programs, which hand packets over to one another.

use super::{FakeEnv, FakePacket, Wire};
use crate::{
    abi::tail_calls::Stage,
    dp::{step::Step, tc},
    reason::{Program, Reason},
};

/// Runs a program, and those that it hands the packet over to.
///
/// # Panics
/// Where they hand it round in a ring, and for programs that see no packets.
pub fn run<F: Wire>(env: &FakeEnv<F>, program: Program, packet: &mut FakePacket) -> Reason {
    let step = match program {
        Program::Ingress => tc::ingress(env, packet),
        Program::Egress => tc::egress(env, packet),
        other => panic!("{} sees no packets", other.name()),
    };
    finish(env, step, packet)
}

/// Runs a program that others hand packets over to, whatever this one is, and those that it hands it over to in turn.
///
/// # Panics
/// Where they hand it round in a ring.
pub fn run_stage<F: Wire>(env: &FakeEnv<F>, stage: Stage, packet: &mut FakePacket) -> Reason {
    finish(env, Step::HandsOver(stage), packet)
}

fn finish<F: Wire>(env: &FakeEnv<F>, mut step: Step, packet: &mut FakePacket) -> Reason {
    /// No packet needs more: a fragment, a packet whose both ends are translated, one that is refused; or one that all ports are
    /// tried for.
    const MOST: usize = 20;
    for _ in 0..MOST {
        match step {
            Step::Ends(reason) => return reason,
            Step::HandsOver(stage) => step = tc::go_on(env, packet, stage),
        }
    }
    match step {
        Step::Ends(reason) => reason,
        Step::HandsOver(stage) => panic!("handed over to {stage:?} after {MOST} others"),
    }
}
