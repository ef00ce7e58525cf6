//! Words of a packet, wherever they lie: the compiler takes an address of no known alignment apart into bytes, the
//! verifier lets the instruction pass where the machine does.
//!
//! The caller has compared the address with the packet's end; the verifier checks that.

macro_rules! words {
    ($($bits:literal: $load:ident, $store:ident, $ty:ty;)+) => {$(
        /// Reads a word of the packet, in the machine's byte order.
        #[inline(always)]
        pub fn $load(at: usize) -> $ty {
            let word: u64;
            // SAFETY: the verifier has checked that the word is the packet's; the instruction touches nothing else.
            unsafe {
                core::arch::asm!(
                    concat!("{word} = *(u", $bits, " *)({at} + 0)"),
                    word = out(reg) word, at = in(reg) at, options(readonly, nostack),
                );
            }
            word as $ty
        }

        /// Writes a word of the packet, in the machine's byte order.
        #[inline(always)]
        pub fn $store(at: usize, word: $ty) {
            // SAFETY: as above.
            unsafe {
                core::arch::asm!(
                    concat!("*(u", $bits, " *)({at} + 0) = {word}"),
                    word = in(reg) u64::from(word), at = in(reg) at, options(nostack),
                );
            }
        }
    )+};
}

words! {
    "16": load_u16, store_u16, u16;
    "32": load_u32, store_u32, u32;
    "64": load_u64, store_u64, u64;
}
