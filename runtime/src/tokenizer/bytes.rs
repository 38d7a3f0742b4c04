//! The byte-level alphabet: byte-level BPE stores each byte of a token as one printable character.
//!
//! From GPT-2's `encoder.py` (`bytes_to_unicode`): the printable bytes of Latin-1 stand for themselves,
//! the others, in order, for U+0100 and following.

use super::unicode;

/// First characters of the three runs of bytes that have none of their own, and where they begin.
const CONTROLS: u32 = 0x100;
const DELETES: u32 = CONTROLS + 0x21;
const SOFT_HYPHEN: u32 = DELETES + 0x22;

/// The character that stands for a byte.
fn char_of(byte: u8) -> u32 {
    let value = u32::from(byte);
    match byte {
        0..=0x20 => CONTROLS + value,
        0x7F..=0xA0 => DELETES + value - 0x7F,
        0xAD => SOFT_HYPHEN,
        _ => value,
    }
}

/// The byte that a character stands for.
fn byte_of(char: u32) -> Option<u8> {
    let value = match char {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => char,
        CONTROLS..DELETES => char - CONTROLS,
        DELETES..SOFT_HYPHEN => char - DELETES + 0x7F,
        SOFT_HYPHEN => 0xAD,
        _ => return None,
    };
    u8::try_from(value).ok()
}

/// The UTF-8 bytes of the character that stands for `byte`, and how many they are.
pub(super) fn encode(byte: u8) -> ([u8; 2], usize) {
    let char = char_of(byte);
    if char < 0x80 {
        ([char as u8, 0], 1)
    } else {
        ([0xC0 | (char >> 6) as u8, 0x80 | (char & 0x3F) as u8], 2)
    }
}

/// The bytes that a token's text stands for, handed to `write` run by run.
///
/// A character outside the alphabet, as added tokens have them, stands for itself.
pub(super) fn decode(mut text: &[u8], mut write: impl FnMut(&[u8])) {
    while let Some(point) = unicode::first(text) {
        let (char, rest) = text.split_at(point.len);
        match byte_of(point.value) {
            Some(byte) => write(&[byte]),
            None => write(char),
        }
        text = rest;
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    #[test]
    fn every_byte_has_its_own_printable_character() {
        let mut seen = Vec::new();
        for byte in 0..=255 {
            let (text, len) = encode(byte);
            let mut back = Vec::new();
            decode(&text[..len], |bytes| back.extend_from_slice(bytes));
            assert_eq!(back, [byte]);
            let char = core::str::from_utf8(&text[..len]).unwrap().chars().next().unwrap();
            assert!(!char.is_control() && !char.is_whitespace());
            seen.push(char);
        }
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 256);
        assert_eq!(encode(b' ').0, "Ġ".as_bytes());
        assert_eq!(encode(b'\n').0, "Ċ".as_bytes());
    }

    #[test]
    fn other_characters_stand_for_themselves() {
        let mut out = Vec::new();
        decode("<｜end▁ Ġx\u{100}".as_bytes(), |bytes| out.extend_from_slice(bytes));
        assert_eq!(out, "<｜end▁  x\0".as_bytes());
        out.clear();
        decode(b"\xFFa", |bytes| out.extend_from_slice(bytes));
        assert_eq!(out, b"\xFFa");
    }
}
