//! The coarse monotonic clock at the price of a load: a packet reads jiffies, which the verifier makes an inline load of,
//! and asks the kernel's clock only where they have moved on. That is once a jiffy, when the kernel's clock moves too.

use core::cell::UnsafeCell;

use affinity_common::types::Nanos;
use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_coarse_ns};

/// Bits of a reading that are jiffies. The rest is nanoseconds, by the millisecond: as coarse as the clock is anyway.
const JIFFIES: u64 = (1 << 20) - 1;

/// The last reading, of whatever CPU: one word, so that it is seen whole. A CPU that is late with its writing (by a
/// halted virtual machine, say) leaves jiffies of long ago with it, and is not believed. After 2^20 jiffies (17 minutes at
/// 1,000 Hz) without a packet there is a chance of one in a million that it is, for as long as a jiffy: the time is then that
/// old, which [`Ticks`](affinity_common::types::Ticks) take for no age at all.
struct Reading(UnsafeCell<u64>);

// SAFETY: read and written as a whole only, by one instruction.
unsafe impl Sync for Reading {}

static LAST: Reading = Reading(UnsafeCell::new(0));

/// `CLOCK_MONOTONIC_COARSE`, at most two jiffies late.
#[inline(always)]
pub fn now() -> Nanos {
    // SAFETY: takes nothing, returns a number.
    let jiffies = unsafe { bpf_jiffies64() } & JIFFIES;
    // SAFETY: an aligned word of ours.
    let last = unsafe { LAST.0.get().read_volatile() };
    if last & JIFFIES == jiffies && last != 0 {
        return Nanos(last & !JIFFIES);
    }
    // SAFETY: takes nothing, returns a number.
    let nanos = unsafe { bpf_ktime_get_coarse_ns() } & !JIFFIES;
    // SAFETY: as above.
    unsafe { LAST.0.get().write_volatile(nanos | jiffies) };
    Nanos(nanos)
}
