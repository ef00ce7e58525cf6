//! Plain data, packed: what there is much of, and what is seldom looked at.

use unsigned_varint::{decode, encode};

/// Data that is being packed.
#[derive(Default)]
pub(crate) struct Packing {
    bytes: Vec<u8>,
    /// The text that was packed last.
    last: String,
}

impl Packing {
    /// Bytes, as they are.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// A number: a byte where it is below 128, two where it is below 16,384.
    pub fn number(&mut self, number: usize) {
        self.bytes.extend(encode::usize(number, &mut encode::usize_buffer()));
    }

    /// A text: as far as it begins like the one before, by a number. Pods' names mostly do.
    pub fn text(&mut self, text: &str) {
        let common = self.last.bytes().zip(text.bytes()).take_while(|(a, b)| a == b).count();
        let (common, rest) = text.split_at(text.floor_char_boundary(common));
        self.number(common.len());
        self.number(rest.len());
        self.bytes(rest.as_bytes());
        self.last.truncate(common.len());
        self.last.push_str(rest);
    }
}

/// The flags that are set, as one.
pub(crate) fn flags<const N: usize>(flags: [(bool, u8); N]) -> u8 {
    flags.into_iter().filter(|(is_set, _)| *is_set).fold(0, |all, (_, flag)| all | flag)
}

impl From<Packing> for Box<[u8]> {
    fn from(Packing { bytes, .. }: Packing) -> Self {
        bytes.into()
    }
}

/// What was packed, from its beginning on. It is read as it was written; at the end there is nothing but zeroes.
#[derive(Clone)]
pub(crate) struct Unpacking<'a> {
    bytes: &'a [u8],
    /// The text that was unpacked last.
    last: String,
}

impl<'a> Unpacking<'a> {
    /// Begins.
    pub fn new(packed: &'a [u8]) -> Self {
        Self { bytes: packed, last: String::new() }
    }

    /// Whether that was all.
    pub fn is_over(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The next bytes.
    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let Some((next, rest)) = self.bytes.split_first_chunk() else { return [0; N] };
        self.bytes = rest;
        *next
    }

    /// The next number.
    pub fn number(&mut self) -> usize {
        let Ok((number, rest)) = decode::usize(self.bytes) else { return 0 };
        self.bytes = rest;
        number
    }

    /// The next text.
    pub fn text(&mut self) -> &str {
        let (common, more) = (self.number(), self.number());
        let (next, rest) = self.bytes.split_at_checked(more).unwrap_or_default();
        self.bytes = rest;
        self.last.truncate(common);
        self.last.push_str(str::from_utf8(next).unwrap_or_default());
        &self.last
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A number of any size, bytes, and a text that begins like others.
    fn item() -> impl Strategy<Value = (usize, [u8; 3], String)> {
        let number = (any::<usize>(), 0..usize::BITS).prop_map(|(number, shift)| number >> shift);
        (number, any::<[u8; 3]>(), "(web)?(-0)?[é☃ab]{0,3}")
    }

    proptest! {
        #[test]
        fn what_is_packed_is_there(items in prop::collection::vec(item(), 0..9)) {
            let mut packing = Packing::default();
            for (number, bytes, text) in &items {
                packing.number(*number);
                packing.bytes(bytes);
                packing.text(text);
            }
            let packed: Box<[u8]> = packing.into();
            let mut unpacking = Unpacking::new(&packed);
            for (number, bytes, text) in items {
                prop_assert!(!unpacking.is_over());
                prop_assert_eq!((unpacking.number(), unpacking.bytes()), (number, bytes));
                prop_assert_eq!(unpacking.text(), text);
            }
            prop_assert!(unpacking.is_over());
            prop_assert_eq!((unpacking.number(), unpacking.bytes()), (0, [0; 3]));
            prop_assert_eq!(unpacking.text(), "");
        }
    }

    #[test]
    fn small_numbers_and_texts_with_a_common_beginning_take_little() {
        for (number, bytes) in [(0, 1), (127, 1), (128, 2), (16_383, 2), (16_384, 3)] {
            let mut packing = Packing::default();
            packing.number(number);
            assert_eq!(packing.bytes.len(), bytes, "{number}");
        }
        let mut packing = Packing::default();
        packing.text("web-7d4b9c6f5d-x7k2p");
        packing.text("web-7d4b9c6f5d-q9c4d");
        assert_eq!(packing.bytes.len(), (2 + 20) + (2 + 5));
    }
}
