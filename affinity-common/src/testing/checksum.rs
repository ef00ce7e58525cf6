//! The Internet checksum, of the tests' own.

/// The Internet checksum (RFC 1071), in the plainest way.
pub fn checksum(bytes: &[u8]) -> u16 {
    !sum(bytes)
}

/// The sum of big-endian words, what is over 16 bits added to them.
pub(super) fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|word| u64::from(word[0]) << 8 | u64::from(word.get(1).copied().unwrap_or(0)));
    fold(words.sum())
}

/// What is over 16 bits is added to them.
pub(super) fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or_default()
}
