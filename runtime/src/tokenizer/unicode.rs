//! Code points and their classes, as far as pre-tokenizers ask: letter, mark, number, punctuation,
//! symbol, white space. No case mapping, no normalization.

use super::unicode_table::{END, LEAF, MARKS, MID, TOP};

/// First letter of the general category; white space is the property `White_Space`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Controls, unassigned and private code points, surrogates.
    Other,
    Letter,
    Mark,
    Number,
    Punctuation,
    Symbol,
    Space,
}

impl Class {
    /// Neither white space nor letter nor number: what `[^\s\p{L}\p{N}]` matches.
    pub(super) fn is_rest(self) -> bool {
        !matches!(self, Self::Space | Self::Letter | Self::Number)
    }
}

static ASCII: [Class; 128] = {
    let mut classes = [Class::Other; 128];
    let mut point = 0;
    while point < 128 {
        classes[point] = look_up(point as u32);
        point += 1;
    }
    classes
};

const fn look_up(point: u32) -> Class {
    if point >= END {
        return if MARKS.start <= point && point < MARKS.end { Class::Mark } else { Class::Other };
    }
    let point = point as usize;
    let mid = TOP[point >> 8] as usize * 16 + (point >> 4 & 15);
    let leaf = MID[mid] as usize * 16 + (point & 15);
    match LEAF[leaf / 2] >> (leaf % 2 * 4) & 15 {
        1 => Class::Letter,
        2 => Class::Mark,
        3 => Class::Number,
        4 => Class::Punctuation,
        5 => Class::Symbol,
        6 => Class::Space,
        _ => Class::Other,
    }
}

/// A code point in a text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    /// Its number; U+FFFD for a byte that belongs to no valid character.
    pub(super) value: u32,
    pub(super) class: Class,
    /// Bytes that it takes in the text, at least 1.
    pub(super) len: usize,
}

/// The code point at the start of `text`; `None` at its end.
///
/// A byte that starts no valid UTF-8 character counts alone, as U+FFFD.
pub(super) fn first(text: &[u8]) -> Option<Point> {
    let lead = *text.first()?;
    if lead < 128 {
        return Some(Point { value: u32::from(lead), class: ASCII[usize::from(lead)], len: 1 });
    }
    let (value, len) = character(text).unwrap_or((0xFFFD, 1));
    Some(Point { value, class: look_up(value), len })
}

/// The character at the start of `text` and how many bytes it has; `None` at the end, and where no valid
/// UTF-8 character starts.
pub(super) fn character(text: &[u8]) -> Option<(u32, usize)> {
    let lead = *text.first()?;
    if lead < 128 { Some((u32::from(lead), 1)) } else { multibyte(text, lead) }
}

/// A character of two to four bytes, by table 3-7 of the Unicode standard (well-formed UTF-8).
fn multibyte(text: &[u8], lead: u8) -> Option<(u32, usize)> {
    let (len, second) = match lead {
        0xC2..=0xDF => (2, 0x80..=0xBF),
        0xE0 => (3, 0xA0..=0xBF),
        0xED => (3, 0x80..=0x9F),
        0xE1..=0xEF => (3, 0x80..=0xBF),
        0xF0 => (4, 0x90..=0xBF),
        0xF1..=0xF3 => (4, 0x80..=0xBF),
        0xF4 => (4, 0x80..=0x8F),
        _ => return None,
    };
    let tail = text.get(1..len)?;
    if !second.contains(&tail[0]) || tail[1..].iter().any(|byte| byte & 0xC0 != 0x80) {
        return None;
    }
    let lead_bits = u32::from(lead) & (0x7F >> len);
    Some((tail.iter().fold(lead_bits, |value, byte| value << 6 | u32::from(byte & 0x3F)), len))
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    #[test]
    fn classes_of_known_code_points() {
        for (char, class) in [
            ('a', Class::Letter),
            ('7', Class::Number),
            ('½', Class::Number),
            (' ', Class::Space),
            ('\u{85}', Class::Space),
            ('\u{200B}', Class::Other),
            ('\u{3000}', Class::Space),
            ('\u{300}', Class::Mark),
            ('漢', Class::Letter),
            ('가', Class::Letter),
            ('\u{31350}', Class::Letter),
            ('।', Class::Punctuation),
            ('€', Class::Symbol),
            ('😀', Class::Symbol),
            ('\u{E000}', Class::Other),
            ('\u{E0100}', Class::Mark),
            ('\u{10FFFF}', Class::Other),
        ] {
            assert_eq!(look_up(char as u32), class, "{char:?}");
        }
    }

    /// The standard library's own tables: alphabetic and numeric are other properties, but these hold
    /// for every code point that both versions of Unicode know.
    #[test]
    fn agrees_with_the_standard_library() {
        for char in '\0'..=char::MAX {
            let class = look_up(char as u32);
            assert_eq!(class == Class::Space, char.is_whitespace(), "{char:?}");
            assert!(class != Class::Number || char.is_numeric(), "{char:?}");
            assert!(class != Class::Letter || char.is_alphabetic(), "{char:?}");
            if char.is_ascii() {
                assert_eq!(class == Class::Letter, char.is_ascii_alphabetic(), "{char:?}");
                let mark = matches!(class, Class::Punctuation | Class::Symbol);
                assert_eq!(mark, char.is_ascii_punctuation(), "{char:?}");
            }
        }
    }

    #[test]
    fn reads_every_character_and_no_malformed_one() {
        let mut bytes = [0; 4];
        for char in '\0'..=char::MAX {
            let text = char.encode_utf8(&mut bytes).as_bytes();
            let point = first(text).unwrap();
            assert_eq!((point.value, point.len), (char as u32, text.len()));
            if text.len() > 1 {
                assert_eq!(first(&text[..text.len() - 1]).unwrap().len, 1);
            }
        }
        let malformed: [&[u8]; 8] = [
            b"\x80",
            b"\xC0\x80",
            b"\xE0\x80\x80",
            b"\xED\xA0\x80",
            b"\xF0\x80\x80\x80",
            b"\xF4\x90\x80\x80",
            b"\xF5\x80\x80\x80",
            b"\xE2\x82a",
        ];
        for text in malformed {
            let point = first(text).unwrap();
            assert_eq!((point.value, point.len), (0xFFFD, 1), "{text:x?}");
        }
        assert!(first(b"").is_none());
    }
}
