//! Numbered errors that say where, what was found and what was expected, without allocating.

use core::fmt;

/// The result of everything in this crate that can be refused.
pub type Result<T> = core::result::Result<T, Error>;

/// What went wrong. The numbers are part of the C ABI and never change their meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Code {
    /// The file ends before what it announces.
    Truncated = 1,
    /// The first four bytes are not `GGUF`.
    BadMagic = 2,
    /// A version of the format that is not read here.
    UnsupportedVersion = 3,
    /// A length, count or nesting depth beyond what the file can hold.
    BadLength = 4,
    /// A metadata value of an unknown type.
    BadValueType = 5,
    /// Text that must be UTF-8 and is not.
    BadText = 6,
    /// A tensor with an impossible shape.
    BadShape = 7,
    /// A tensor type that is unknown or has no kernel.
    UnsupportedType = 8,
    /// A tensor that lies outside the file.
    TensorOutOfBounds = 9,
    /// An offset or alignment that the format forbids.
    BadAlignment = 10,
    /// A metadata key that is needed is absent.
    MissingKey = 11,
    /// A metadata key has another type than expected.
    WrongKeyType = 12,
    /// A number outside its accepted range.
    OutOfRange = 13,
    /// A tensor that is needed is absent.
    MissingTensor = 14,
    /// A tensor has another shape than the hyper-parameters say.
    WrongShape = 15,
    /// A model family that is not implemented.
    UnknownFamily = 16,
    /// A feature of a known family or tokenizer that is not implemented.
    Unsupported = 17,
    /// The caller's arena is smaller than the plan.
    ArenaTooSmall = 18,
    /// The context window is full.
    ContextFull = 19,
    /// A token id beyond the vocabulary.
    BadToken = 20,
    /// A caller's buffer is too small.
    BufferTooSmall = 21,
    /// An argument that makes no sense.
    BadArgument = 22,
    /// The vocabulary contradicts itself.
    BadVocabulary = 23,
    /// Layers with a window no longer have the tokens before this position.
    Forgotten = 24,
    /// A saved session of another model or with another type of cache.
    ForeignSession = 25,
    /// A saved session that has changed since.
    BadChecksum = 26,
    /// Two models whose vocabularies differ.
    OtherVocabulary = 27,
    /// An adapter that was made for another model file.
    OtherBase = 28,
}

/// A short name inside an error: a key or a tensor, cut at 64 bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Name {
    bytes: [u8; 64],
    len: u8,
}

impl Name {
    /// The name, cut at a character boundary where it is longer than 64 bytes.
    pub fn new(text: &str) -> Self {
        let mut len = text.len().min(64);
        while !text.is_char_boundary(len) {
            len -= 1;
        }
        let mut bytes = [0; 64];
        bytes[..len].copy_from_slice(&text.as_bytes()[..len]);
        Self { bytes, len: len as u8 }
    }

    /// `prefix.text`, cut likewise.
    pub fn joined(prefix: &str, text: &str) -> Self {
        let mut name = Self::new(prefix);
        for part in [".", text] {
            let tail = Self::new(part);
            let start = usize::from(name.len);
            // A character that is cut in the middle would make the whole name unreadable.
            let mut len = usize::from(tail.len).min(64 - start);
            while !tail.as_str().is_char_boundary(len) {
                len -= 1;
            }
            name.bytes[start..start + len].copy_from_slice(&tail.bytes[..len]);
            name.len += len as u8;
        }
        name
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        core::str::from_utf8(&self.bytes[..usize::from(self.len)]).unwrap_or("")
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Error {
    /// What went wrong.
    pub code: Code,
    /// The key, tensor or argument concerned; may be empty.
    pub name: Name,
    /// Byte offset in the file, where there is one.
    pub at: Option<u64>,
    /// What was found.
    pub found: u64,
    /// What was expected (a limit or a value), 0 where there is none.
    pub expected: u64,
    /// What was expected, in words; may be empty.
    pub hint: &'static str,
}

impl Error {
    /// An error about `name`.
    pub fn new(code: Code, name: &str) -> Self {
        Self { code, name: Name::new(name), at: None, found: 0, expected: 0, hint: "" }
    }

    /// With the byte offset at which it was noticed.
    #[must_use]
    pub fn at(self, offset: usize) -> Self {
        Self { at: Some(offset as u64), ..self }
    }

    /// With what was found and what was expected.
    #[must_use]
    pub fn found(self, found: u64, expected: u64) -> Self {
        Self { found, expected, ..self }
    }

    /// With what was expected, in words.
    #[must_use]
    pub fn hint(self, hint: &'static str) -> Self {
        Self { hint, ..self }
    }

    /// The number of the error, as the C ABI reports it.
    pub fn number(&self) -> u16 {
        self.code as u16
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (found, expected) = (self.found, self.expected);
        match self.code {
            Code::Truncated => write!(f, "file ends too early: {expected} bytes needed, {found} left")?,
            Code::BadMagic => write!(f, "not a GGUF file: it starts with {found:#010x}")?,
            Code::UnsupportedVersion => write!(f, "version {found} of the format, expected {expected}")?,
            Code::BadLength => write!(f, "a length of {found} where at most {expected} is possible")?,
            Code::BadValueType => write!(f, "metadata value type {found}, expected 0 to 12")?,
            Code::BadText => f.write_str("text is not UTF-8")?,
            Code::BadShape => write!(f, "impossible shape ({found}, expected {expected})")?,
            Code::UnsupportedType => write!(f, "tensor type {found} has no kernel")?,
            Code::TensorOutOfBounds => {
                write!(f, "tensor ends at byte {expected} of a file with {found} bytes")?;
            }
            Code::BadAlignment => write!(f, "bad alignment {found}, expected a multiple of {expected}")?,
            Code::MissingKey => f.write_str("metadata key is missing")?,
            Code::WrongKeyType => f.write_str("metadata key has the wrong type")?,
            Code::OutOfRange => write!(f, "{found} is out of range, expected at most {expected}")?,
            Code::MissingTensor => f.write_str("tensor is missing")?,
            Code::WrongShape => {
                write!(f, "tensor has {found} elements in a row or rows, expected {expected}")?
            }
            Code::UnknownFamily => f.write_str("unknown model family")?,
            Code::Unsupported => f.write_str("not supported")?,
            Code::ArenaTooSmall => write!(f, "arena has {found} bytes, the plan needs {expected}")?,
            Code::ContextFull => write!(f, "{found} tokens do not fit the context of {expected}")?,
            Code::BadToken => write!(f, "token id {found}, the vocabulary ends at {expected}")?,
            Code::BufferTooSmall => write!(f, "buffer holds {found}, {expected} needed")?,
            Code::BadArgument => write!(f, "bad argument {found}")?,
            Code::BadVocabulary => write!(f, "vocabulary contradicts itself at entry {found}")?,
            Code::Forgotten => {
                write!(f, "cannot go back to token {found}: windows have it from about {expected} on")?;
            }
            Code::ForeignSession => {
                write!(f, "saved with another model or cache: {found:#x}, expected {expected:#x}")?
            }
            Code::BadChecksum => write!(f, "damaged: checksum {found:#x}, expected {expected:#x}")?,
            Code::OtherVocabulary => write!(f, "vocabularies differ at {found}, expected {expected}")?,
            Code::OtherBase => {
                write!(f, "made for the file with SHA-256 {found:016x}..., not for {expected:016x}...")?;
            }
        }
        if !self.name.as_str().is_empty() {
            write!(f, ", `{}`", self.name.as_str())?;
        }
        if let Some(at) = self.at {
            write!(f, " at byte {at}")?;
        }
        if !self.hint.is_empty() {
            write!(f, " ({})", self.hint)?;
        }
        write!(f, " [E{:02}]", self.number())
    }
}

impl core::error::Error for Error {}
