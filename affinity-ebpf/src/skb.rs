//! A packet by the kernel's helpers.
#![expect(
    clippy::cast_possible_truncation,
    reason = "offsets and lengths within a packet: the helpers take them as u32"
)]

use core::{
    mem::{MaybeUninit, offset_of},
    ptr,
};

use affinity_common::dp::{Checksum, Packet, RewriteError};
use aya_ebpf::{
    EbpfContext,
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    helpers::generated::{
        bpf_csum_diff, bpf_l4_csum_replace, bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes,
    },
    programs::TcContext,
};

/// Of `bpf_l4_csum_replace`: the address is IPv6's, whose header has no checksum to make up for it in `skb->csum` (Linux
/// 6.16, commit ead7f9b8de65, and what it was ported back to).
const BPF_F_IPV6: u64 = 1 << 7;

/// The packet of a TC program.
pub struct Skb {
    ctx: TcContext,
}

impl Skb {
    /// The packet of a context.
    #[inline(always)]
    pub fn new(ctx: TcContext) -> Self {
        Self { ctx }
    }
}

/// Where the packet's linear part begins and ends.
///
/// Read by instructions of our own: the compiler knows two 32-bit fields, joins what it has read of them on several
/// ways, and widens the result; the verifier takes that for a number, no longer for the packet's end.
#[inline(always)]
pub fn bounds(ctx: &TcContext) -> (usize, usize) {
    let (start, end);
    // SAFETY: reads two fields of the context and touches nothing else.
    unsafe {
        core::arch::asm!(
            "{start} = *(u32 *)({ctx} + {start_at})",
            "{end} = *(u32 *)({ctx} + {end_at})",
            start = out(reg) start, end = lateout(reg) end, ctx = in(reg) ctx.as_ptr(),
            start_at = const offset_of!(__sk_buff, data), end_at = const offset_of!(__sk_buff, data_end),
            options(readonly, nostack),
        );
    }
    (start, end)
}

/// Reads words of a packet, at offsets from an address. The caller has checked that they lie within the packet.
macro_rules! words {
    ($load:literal, $word:ty, $at:ident: $($offset:literal)+) => {
        [$({
            let word: u64;
            // SAFETY: reads a word that lies between the packet's start and its end, as the verifier checks, and touches
            // nothing else. The instruction may be given any address.
            unsafe {
                core::arch::asm!(
                    concat!("{word} = *(", $load, " *)({at} + ", $offset, ")"),
                    word = lateout(reg) word, at = in(reg) $at, options(pure, readonly, nostack),
                );
            }
            word as $word
        }),+]
    };
}

/// `N` octets of a packet from an address on, all of which lie between the packet's start and its end.
///
/// Headers are read by words: an array of octets has no alignment, so that the compiler would read it octet by octet, 40 for
/// an IPv6 header, and put its addresses together by shifts. The verifier takes such words for what they are, for a packet
/// has room before its Ethernet header that aligns what comes behind, and the machines where that is not so read them anyway.
#[inline(always)]
fn octets<const N: usize>(start: usize) -> [u8; N] {
    let mut out = [0; N];
    match N {
        2 => out.copy_from_slice(bytemuck::bytes_of(&words!("u16", u16, start: 0))),
        4 => out.copy_from_slice(bytemuck::bytes_of(&words!("u32", u32, start: 0))),
        8 => out.copy_from_slice(bytemuck::bytes_of(&words!("u32", u32, start: 0 4))),
        20 => out.copy_from_slice(bytemuck::bytes_of(&words!("u32", u32, start: 0 4 8 12 16))),
        40 => out.copy_from_slice(bytemuck::bytes_of(&words!("u64", u64, start: 0 8 16 24 32))),
        // SAFETY: the octets lie between the packet's start and its end; any bit pattern is an array of them.
        _ => out = unsafe { *(start as *const [u8; N]) },
    }
    out
}

#[inline(always)]
fn done(result: i64) -> Result<(), RewriteError> {
    if result == 0 { Ok(()) } else { Err(RewriteError) }
}

impl Packet for Skb {
    #[inline(always)]
    fn frame_len(&self) -> usize {
        self.ctx.len() as usize
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: a field of the context.
        unsafe { (*self.ctx.skb.skb).ifindex }
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let (start, end) = bounds(&self.ctx);
        let start = start + offset;
        if start + N <= end {
            return Some(octets(start));
        }
        // The headers may lie outside the linear part of a packet made of pages.
        let mut out = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the helper writes `N` bytes to `out`, which has room for them, or fails.
        let result = unsafe { bpf_skb_load_bytes(self.ctx.as_ptr(), offset as u32, out.as_mut_ptr().cast(), N as u32) };
        // SAFETY: the helper has written all of it.
        (result == 0).then(|| unsafe { out.assume_init() })
    }

    #[inline(always)]
    fn unknown(&self, number: usize) -> usize {
        let mut out = number;
        // SAFETY: touches nothing but the register, and leaves in it what was there.
        unsafe {
            core::arch::asm!(
                "{out} ^= {any}", "{out} ^= {any}",
                out = inout(reg) out, any = in(reg) u64::from(self.ctx.len()), options(pure, nomem, nostack),
            );
        }
        out
    }

    #[inline(always)]
    fn write<const N: usize>(&mut self, offset: usize, bytes: &[u8; N]) -> Result<(), RewriteError> {
        // SAFETY: the helper reads `N` bytes of `bytes`, and checks the offset.
        done(unsafe {
            bpf_skb_store_bytes(self.ctx.as_ptr().cast(), offset as u32, bytes.as_ptr().cast(), N as u32, 0)
        })
    }

    #[inline(always)]
    fn update_checksum_by_address(&mut self, sum: Checksum, from: &[u8], to: &[u8]) -> Result<(), RewriteError> {
        let flags = u64::from(BPF_F_PSEUDO_HDR) | zero_flag(sum);
        let ctx = self.ctx.as_ptr().cast();
        if let (Ok(from), Ok(to)) = (<[u8; 4]>::try_from(from), <[u8; 4]>::try_from(to)) {
            let (from, to) = (u32::from_ne_bytes(from), u32::from_ne_bytes(to));
            // SAFETY: the helper checks the offset.
            return done(unsafe { bpf_l4_csum_replace(ctx, sum.at as u32, from.into(), to.into(), flags | 4) });
        }
        let diff = difference(from, to);
        // SAFETY: the helper checks the offset.
        let updated = done(unsafe { bpf_l4_csum_replace(ctx, sum.at as u32, 0, diff, flags | BPF_F_IPV6) });
        // SAFETY: as above. A kernel that does not know the flag refuses it before it has done anything.
        updated.or_else(|_| done(unsafe { bpf_l4_csum_replace(ctx, sum.at as u32, 0, diff, flags) }))
    }

    #[inline(always)]
    fn update_checksum_by_port(&mut self, sum: Checksum, from: [u8; 2], to: [u8; 2]) -> Result<(), RewriteError> {
        let (from, to) = (u16::from_ne_bytes(from), u16::from_ne_bytes(to));
        let ctx = self.ctx.as_ptr().cast();
        // SAFETY: the helper checks the offset.
        done(unsafe { bpf_l4_csum_replace(ctx, sum.at as u32, from.into(), to.into(), zero_flag(sum) | 2) })
    }

    #[inline(always)]
    fn leave_note(&mut self, note: u32) {
        // SAFETY: a field of the context that is the programs' own (`bpf_skb_cb`).
        unsafe { (*self.ctx.skb.skb).cb[0] = note };
    }

    #[inline(always)]
    fn note(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.ctx.skb.skb).cb[0] }
    }

    #[inline(always)]
    fn resize(&mut self, len: usize) -> Result<(), RewriteError> {
        // SAFETY: the helper checks the length.
        done(unsafe { bpf_skb_change_tail(self.ctx.as_ptr().cast(), len as u32, 0) })
    }

    #[inline(always)]
    fn sum(&self, bytes: &[u8]) -> u16 {
        let to = bytes.as_ptr().cast_mut().cast();
        // SAFETY: the helper reads the given number of bytes, a multiple of 4.
        let sum = unsafe { bpf_csum_diff(ptr::null_mut(), 0, to, bytes.len() as u32, 0) }.cast_unsigned() as u32;
        let sum = (sum & 0xffff) + (sum >> 16);
        u16::from_be_bytes((((sum & 0xffff) + (sum >> 16)) as u16).to_ne_bytes())
    }

    #[inline(always)]
    fn finish_checksum(&mut self, at: usize, pseudo: u16, whole: u16) -> Result<(), RewriteError> {
        // In one's complement `~(diff + ~pseudo)` is to be `~whole`. Where the checksum is left to hardware, the helper does
        // nothing about what is not of the pseudo-header.
        let diff = (u32::from(whole) + u32::from(pseudo)) % 0xffff;
        let diff = u16::from_ne_bytes((diff as u16).to_be_bytes());
        // SAFETY: the helper checks the offset.
        done(unsafe { bpf_l4_csum_replace(self.ctx.as_ptr().cast(), at as u32, 0, diff.into(), 0) })
    }
}

/// What `bpf_csum_diff` makes of two addresses, without a call: the sum of the new one's words and of the old one's complement,
/// carries added (RFC 1624). How the packet's checksum follows, only the kernel knows.
#[inline(always)]
fn difference(from: &[u8], to: &[u8]) -> u64 {
    let sum = |bytes: &[u8], flip: u32| -> u64 {
        bytes.as_chunks().0.iter().map(|word| u64::from(u32::from_ne_bytes(*word) ^ flip)).sum()
    };
    let sum = sum(from, u32::MAX) + sum(to, 0);
    // 35 bits become 33 and 32.
    let sum = (sum & u64::from(u32::MAX)) + (sum >> 32);
    (sum & u64::from(u32::MAX)) + (sum >> 32)
}

#[inline(always)]
fn zero_flag(sum: Checksum) -> u64 {
    if sum.zero_is_none { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 }
}
