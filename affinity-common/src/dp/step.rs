//! What a program does with a packet when it is done with it.

use super::Packet;
use crate::{abi::tail_calls::Stage, reason::Reason};

/// The last step of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The packet has its verdict.
    Ends(Reason),
    /// Another program goes on with it.
    HandsOver(Stage),
}

impl From<Reason> for Step {
    #[inline(always)]
    fn from(reason: Reason) -> Self {
        Self::Ends(reason)
    }
}

/// Hands a packet over to another program.
#[inline(always)]
pub fn hand_over<P: Packet>(packet: &mut P, stage: Stage) -> Step {
    packet.leave_note(0);
    Step::HandsOver(stage)
}

/// Hands a packet over to another program, and tells it the reason: see [`is_for`].
#[inline(always)]
pub fn hand_over_for<P: Packet>(packet: &mut P, stage: Stage, reason: Reason) -> Step {
    packet.leave_note(reason as u32 + 1);
    Step::HandsOver(stage)
}

/// Hands a packet over to a program that goes on in rounds, which does so to itself, and tells it which one is next.
#[inline(always)]
pub fn hand_over_again<P: Packet>(packet: &mut P, stage: Stage, round: u32) -> Step {
    packet.leave_note(round);
    Step::HandsOver(stage)
}

/// Which round it is, from 0 on: see [`hand_over_again`].
#[inline(always)]
pub fn round<P: Packet>(packet: &P) -> u32 {
    packet.note()
}

/// Whether a packet was handed over for this reason.
#[inline(always)]
pub fn is_for<P: Packet>(packet: &P, reason: Reason) -> bool {
    packet.note() == reason as u32 + 1
}

/// A reason, as one that the verifier knows nothing of: it would follow each on a way of its own.
#[inline(always)]
pub fn any_reason<P: Packet>(packet: &P, reason: Reason) -> Reason {
    #[expect(clippy::cast_possible_truncation, reason = "what was a reason is one yet")]
    let number = packet.unknown(reason as usize) as u8;
    Reason::from_number(number).unwrap_or(Reason::Hashed)
}
