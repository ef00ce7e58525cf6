//! Packets in plain memory, with their checksum left to hardware or not.

use super::{
    checksum::{checksum, fold, sum},
    wire::{Segment, Upper, Wire},
};
use crate::{
    dp::{Checksum, Packet, RewriteError},
    types::Proto,
};

/// Who is to compute the transport checksum, or has: `skb->ip_summed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// Nobody: it is in the packet (`CHECKSUM_NONE`, `CHECKSUM_UNNECESSARY`).
    None,
    /// The hardware will: the field holds the sum of the pseudo-header alone (`CHECKSUM_PARTIAL`).
    Partial,
    /// The hardware has: beside the packet is the sum of it from its IP header on (`CHECKSUM_COMPLETE`).
    Complete,
}

/// `sum - from + to` in one's complement.
fn replaced(sum_of: u16, from: &[u8], to: &[u8]) -> u16 {
    fold(u64::from(sum_of) + u64::from(!sum(from)) + u64::from(sum(to)))
}

/// A packet in memory.
#[derive(Clone, Debug)]
pub struct FakePacket {
    /// The frame.
    pub bytes: Vec<u8>,
    offload: Offload,
    complete: u16,
    note: u32,
    /// The interface that it has come by, or leaves by.
    pub ifindex: u32,
    /// After so many writes, one fails.
    pub fail_after: Option<usize>,
    /// A length that differs from that of the bytes, of a packet whose payload is not modelled.
    pub said_len: Option<usize>,
    strayed: bool,
}

impl FakePacket {
    /// Any bytes.
    pub fn raw(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            offload: Offload::None,
            complete: 0,
            note: 0,
            ifindex: 0,
            fail_after: None,
            said_len: None,
            strayed: false,
        }
    }

    /// Any frame, whose sum the hardware has computed.
    pub fn summed(bytes: Vec<u8>) -> Self {
        Self { offload: Offload::Complete, complete: sum(&bytes[14..]), ..Self::raw(bytes) }
    }

    /// A segment whose checksum is as `offload` says.
    pub fn new<F: Wire>(segment: &Segment, offload: Offload) -> Self {
        let mut packet = Self { offload, ..Self::raw(segment.build::<F>()) };
        let upper = Upper::of(&packet.bytes);
        match offload {
            Offload::None => {}
            Offload::Partial => {
                let pseudo = sum(&upper.pseudo_header(&packet.bytes));
                let at = upper.checksum_at();
                packet.bytes[at..at + 2].copy_from_slice(&pseudo.to_be_bytes());
            }
            Offload::Complete => packet.complete = sum(&packet.bytes[14..]),
        }
        packet
    }

    /// Whether a write was tried that is not within the frame.
    pub fn has_strayed(&self) -> bool {
        self.strayed
    }

    /// The frame as the hardware sends it.
    ///
    /// # Panics
    /// Where what the hardware had computed does not agree with the packet any more.
    pub fn sent(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        match self.offload {
            Offload::None => {}
            Offload::Partial => {
                let upper = Upper::of(&bytes);
                // It sums up what it finds, pseudo-header included, and complements.
                let sum = checksum(&bytes[upper.at..]);
                let sum = if sum == 0 && upper.proto == Proto::UDP.number { 0xffff } else { sum };
                let at = upper.checksum_at();
                bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
            }
            Offload::Complete => {
                let right = sum(&bytes[14..]);
                assert!(self.complete == right || self.complete == !right && right == 0xffff, "CHECKSUM_COMPLETE");
            }
        }
        bytes
    }

    fn allow_write(&mut self) -> Result<(), RewriteError> {
        match &mut self.fail_after {
            Some(0) => Err(RewriteError),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Bytes to write to.
    fn place<const N: usize>(&mut self, at: usize) -> Result<&mut [u8; N], RewriteError> {
        self.strayed |= at + N > self.bytes.len();
        self.bytes.get_mut(at..at + N).and_then(|place| place.try_into().ok()).ok_or(RewriteError)
    }

    /// As `bpf_l4_csum_replace` and `inet_proto_csum_replace4` have it.
    fn replace(&mut self, sum: Checksum, from: &[u8], to: &[u8], pseudo: bool) -> Result<(), RewriteError> {
        self.allow_write()?;
        let offload = self.offload;
        let field: &mut [u8; 2] = self.place(sum.at)?;
        let held = u16::from_be_bytes(*field);
        if sum.zero_is_none && held == 0 {
            return Ok(());
        }
        let new = match offload {
            Offload::Partial if pseudo => replaced(held, from, to),
            Offload::Partial => held,
            Offload::None | Offload::Complete => !replaced(!held, from, to),
        };
        *field = if new == 0 && sum.zero_is_none { [0xff; 2] } else { new.to_be_bytes() };
        if offload == Offload::Complete && pseudo && from.len() == 4 {
            // The address is made up for twice: by the header's checksum and by this one. Of IPv6, which has only this one,
            // the sum stays as it is (`BPF_F_IPV6`).
            self.complete = replaced(self.complete, to, from);
        }
        Ok(())
    }
}

impl Packet for FakePacket {
    fn frame_len(&self) -> usize {
        self.said_len.unwrap_or(self.bytes.len())
    }

    fn ifindex(&self) -> u32 {
        self.ifindex
    }

    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
    }

    fn unknown(&self, number: usize) -> usize {
        number
    }

    fn write<const N: usize>(&mut self, offset: usize, bytes: &[u8; N]) -> Result<(), RewriteError> {
        self.allow_write()?;
        *self.place(offset)? = *bytes;
        Ok(())
    }

    fn update_checksum_by_address(&mut self, sum: Checksum, from: &[u8], to: &[u8]) -> Result<(), RewriteError> {
        self.replace(sum, from, to, true)
    }

    fn update_checksum_by_port(&mut self, sum: Checksum, from: [u8; 2], to: [u8; 2]) -> Result<(), RewriteError> {
        self.replace(sum, &from, &to, false)
    }

    fn leave_note(&mut self, note: u32) {
        self.note = note;
    }

    fn note(&self) -> u32 {
        self.note
    }

    fn resize(&mut self, len: usize) -> Result<(), RewriteError> {
        self.allow_write()?;
        self.bytes.resize(len, 0);
        Ok(())
    }

    fn sum(&self, bytes: &[u8]) -> u16 {
        sum(bytes)
    }

    fn finish_checksum(&mut self, at: usize, pseudo: u16, whole: u16) -> Result<(), RewriteError> {
        self.allow_write()?;
        let offload = self.offload;
        let field: &mut [u8; 2] = self.place(at)?;
        assert_eq!(u16::from_be_bytes(*field), pseudo);
        if offload != Offload::Partial {
            *field = (!whole).to_be_bytes();
        }
        Ok(())
    }
}
