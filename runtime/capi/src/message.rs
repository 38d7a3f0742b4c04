//! Texts as C strings.

use core::ffi::CStr;
use core::fmt::{self, Write};

/// A text for an error number, negated or not.
pub(crate) fn text(code: i32) -> &'static CStr {
    match code.unsigned_abs() {
        0 => c"no error",
        1 => c"the file ends before what it announces",
        2 => c"neither a GGUF file nor a pack",
        3 => c"a version of the format that is not read",
        4 => c"a count beyond what the file can hold",
        5 => c"a metadata value of an unknown type",
        6 => c"text that is not UTF-8",
        7 => c"a tensor with an impossible shape",
        8 => c"a tensor type without a kernel",
        9 => c"a tensor outside the file",
        10 => c"a misaligned offset or pointer",
        11 => c"a metadata key is absent",
        12 => c"a metadata key has the wrong type",
        13 => c"a number outside its range",
        14 => c"a tensor is absent",
        15 => c"a tensor has another shape than the model says",
        16 => c"a model family that is not implemented",
        17 => c"a feature that is not implemented",
        18 => c"the arena is smaller than the plan",
        19 => c"the context window is full",
        20 => c"a token beyond the vocabulary",
        21 => c"the caller's buffer is too small",
        22 => c"an argument that makes no sense",
        23 => c"the vocabulary contradicts itself",
        24 => c"a cut further back than sliding windows remember",
        25 => c"a saved session of another model, version or cache type",
        26 => c"a saved session that was damaged",
        27 => c"two models whose vocabularies differ",
        28 => c"an adapter that was made for another model file",
        _ => c"an unknown error",
    }
}

/// Writes text into a buffer, keeps room for the final 0, and counts what did not fit.
pub(crate) struct Message<'b> {
    buffer: &'b mut [u8],
    length: usize,
}

impl Message<'_> {
    /// Writes `text` as a C string, cut at a character boundary if need be; returns its whole length
    /// without the final 0.
    pub(crate) fn write(text: &dyn fmt::Display, buffer: &mut [u8]) -> i32 {
        let mut message = Message { buffer, length: 0 };
        // Writing into memory cannot fail.
        let _ = write!(message, "{text}");
        let length = message.length;
        let last = message.buffer.len().saturating_sub(1);
        let mut end = length.min(last);
        // A continuation byte at the cut means that its character is cut: leave that out as a whole.
        while end < length && end > 0 && message.buffer.get(end).is_some_and(|byte| byte & 0xC0 == 0x80) {
            end -= 1;
        }
        if let Some(end) = message.buffer.get_mut(end) {
            *end = 0;
        }
        i32::try_from(length).unwrap_or(i32::MAX)
    }
}

impl Write for Message<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            if let Some(place) = self.buffer.get_mut(self.length) {
                *place = byte;
            }
            self.length += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use edge_runtime::{Code, Error};

    #[test]
    fn a_message_is_cut_at_a_character_and_ended() {
        let error = Error::new(Code::MissingKey, "schlüssel");
        let whole = std::format!("{error}");
        for capacity in 0..whole.len() + 3 {
            let mut buffer = std::vec![0xFF; capacity];
            assert_eq!(Message::write(&error, &mut buffer), whole.len() as i32);
            let Ok(text) = CStr::from_bytes_until_nul(&buffer) else {
                assert_eq!(capacity, 0);
                continue;
            };
            let text = text.to_str().expect("UTF-8");
            assert!(whole.starts_with(text) && text.len() + 2 >= capacity.min(whole.len() + 1));
        }
    }

    #[test]
    fn every_code_has_a_text() {
        for code in 1..=28 {
            assert_ne!(text(code), c"an unknown error");
            assert_eq!(text(code), text(-code));
        }
        assert_eq!(text(29), c"an unknown error");
        assert_eq!(text(i32::MIN), c"an unknown error");
    }
}
