//! Streaming detokenization: a character whose bytes come in several tokens is held back until whole.

use crate::{Code, Error, Result};

const REPLACEMENT: &[u8] = "\u{FFFD}".as_bytes();

/// Turns the pieces of tokens into UTF-8 text.
///
/// Holds at most the 3 bytes of a character that has begun. Malformed bytes become U+FFFD, one for each
/// maximal part of a character (as [`core::str::Utf8Chunks`] finds them), at once if no further byte can
/// mend them and at [`Self::finish`] if the text ends within a character.
#[derive(Clone, Copy, Debug, Default)]
pub struct Utf8Stream {
    held: [u8; 3],
    len: usize,
}

impl Utf8Stream {
    /// A stream at the beginning of a text.
    pub const fn new() -> Self {
        Self { held: [0; 3], len: 0 }
    }

    /// Bytes of `out` that always suffice for a piece of `bytes` bytes.
    pub const fn most(bytes: usize) -> usize {
        bytes.saturating_add(3).saturating_mul(3)
    }

    /// Takes a piece, writes the characters that are now whole, and returns how many bytes they are.
    ///
    /// # Errors
    /// [`Code::BufferTooSmall`] with the bytes needed; the stream is then as before.
    pub fn push(&mut self, piece: &[u8], out: &mut [u8]) -> Result<usize> {
        let mut next = *self;
        let mut sink = Sink { out, len: 0 };
        for &byte in piece {
            next.take(byte, &mut sink);
        }
        let len = sink.finish()?;
        *self = next;
        Ok(len)
    }

    /// Ends the text: a character that has begun becomes U+FFFD. The stream is then at a beginning.
    ///
    /// # Errors
    /// [`Code::BufferTooSmall`] with the bytes needed; the stream is then as before.
    pub fn finish(&mut self, out: &mut [u8]) -> Result<usize> {
        let mut sink = Sink { out, len: 0 };
        if self.len > 0 {
            sink.write(REPLACEMENT);
        }
        let len = sink.finish()?;
        *self = Self::new();
        Ok(len)
    }

    fn take(&mut self, byte: u8, sink: &mut Sink<'_>) {
        loop {
            let mut pending = [0; 4];
            pending[..self.len].copy_from_slice(&self.held[..self.len]);
            pending[self.len] = byte;
            let pending = &pending[..=self.len];
            match core::str::from_utf8(pending) {
                Ok(text) => {
                    sink.write(text.as_bytes());
                    self.len = 0;
                    return;
                }
                Err(error) if error.error_len().is_none() => {
                    // At most 3 bytes: four are a character or are malformed.
                    self.held[..pending.len()].copy_from_slice(pending);
                    self.len = pending.len();
                    return;
                }
                Err(_) => sink.write(REPLACEMENT),
            }
            // What was held could have gone on, but not with `byte`, which then begins anew.
            if core::mem::take(&mut self.len) == 0 {
                return;
            }
        }
    }
}

/// Counts what is written even beyond the end of the buffer.
struct Sink<'o> {
    out: &'o mut [u8],
    len: usize,
}

impl Sink<'_> {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(room) = self.out.get_mut(self.len..self.len + bytes.len()) {
            room.copy_from_slice(bytes);
        }
        self.len += bytes.len();
    }

    fn finish(self) -> Result<usize> {
        if self.len > self.out.len() {
            return Err(Error::new(Code::BufferTooSmall, "text")
                .found(self.out.len() as u64, self.len as u64)
                .hint("bytes"));
        }
        Ok(self.len)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::{string::String, vec, vec::Vec};

    fn stream(pieces: &[Vec<u8>]) -> Vec<u8> {
        let mut stream = Utf8Stream::new();
        let mut text = Vec::new();
        for piece in pieces {
            let mut out = vec![0; Utf8Stream::most(piece.len())];
            let len = stream.push(piece, &mut out).unwrap();
            assert!(core::str::from_utf8(&out[..len]).is_ok());
            text.extend_from_slice(&out[..len]);
        }
        let mut out = [0; 3];
        let len = stream.finish(&mut out).unwrap();
        text.extend_from_slice(&out[..len]);
        assert_eq!(stream.finish(&mut []).unwrap(), 0);
        text
    }

    #[test]
    fn holds_a_character_back_until_it_is_whole() {
        let mut stream = Utf8Stream::new();
        let mut out = [0; 16];
        assert_eq!(stream.push(b"a\xF0\x9F", &mut out).unwrap(), 1);
        assert_eq!(stream.push(b"\x98", &mut out).unwrap(), 0);
        assert_eq!(stream.push(b"\x80!", &mut out).unwrap(), 5);
        assert_eq!(&out[..5], "😀!".as_bytes());
    }

    #[test]
    fn a_small_buffer_changes_nothing() {
        let mut stream = Utf8Stream::new();
        stream.push(b"\xE2\x82", &mut []).unwrap();
        let error = stream.push(b"\xAC", &mut [0; 2]).unwrap_err();
        assert_eq!((error.code, error.found, error.expected), (Code::BufferTooSmall, 2, 3));
        let error = stream.finish(&mut []).unwrap_err();
        assert_eq!((error.code, error.expected), (Code::BufferTooSmall, 3));
        assert_eq!(stream.push(b"\xAC", &mut [0; 3]).unwrap(), 3);
    }

    proptest! {
        #[test]
        fn equals_the_standard_library(pieces in prop::collection::vec(prop::collection::vec(
            prop_oneof![any::<u8>(), prop::sample::select(vec![0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80])], 0..9), 0..9)) {
            prop_assert_eq!(stream(&pieces), String::from_utf8_lossy(&pieces.concat()).into_owned().into_bytes());
        }
    }
}
