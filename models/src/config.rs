//! The one door through which hyper-parameters come in, whatever the file format.

use core::fmt;

/// A source of hyper-parameters: Hugging Face `config.json` or GGUF metadata.
///
/// Keys of a Hugging Face configuration are given as dotted paths (`rope_parameters.rope_theta`).
/// Keys of a GGUF file are given without the architecture prefix (`block_count` is looked up as
/// `llama.block_count`). An element of a list is addressed by its number (`layer_types.0`).
pub trait Config {
    /// The key is there, whatever its value.
    fn has(&self, key: &str) -> bool;
    /// The key as a non-negative integer; `None` if it is absent, null or of another kind.
    fn uint(&self, key: &str) -> Option<u64>;
    /// The key as a number; integers are converted.
    fn float(&self, key: &str) -> Option<f64>;
    /// The key as a truth value.
    fn bool(&self, key: &str) -> Option<bool>;
    /// The key as text.
    fn text(&self, key: &str) -> Option<&str>;
    /// `[rows, columns]` of a tensor in the same file (a vector has one row); `None` if it is absent.
    /// A `config.json` knows no tensors and always answers `None`.
    fn tensor_shape(&self, name: &str) -> Option<[u64; 2]>;
}

/// Why a configuration is not a model that this toolchain knows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SpecError {
    /// A key without which the model has no meaning is absent.
    Missing {
        /// The key.
        key: &'static str,
    },
    /// A hyper-parameter lies outside what any real model has.
    OutOfRange {
        /// The key.
        key: &'static str,
        /// What the file says.
        found: f64,
        /// Smallest accepted value.
        min: f64,
        /// Largest accepted value.
        max: f64,
    },
    /// The configuration asks for something that is not implemented.
    Unsupported {
        /// The key.
        key: &'static str,
        /// What would be accepted.
        expected: &'static str,
    },
}

impl SpecError {
    /// The message with `prefix` before the key, such as `llama.` for GGUF files of that architecture.
    pub fn behind<'a>(&'a self, prefix: &'a str) -> impl fmt::Display + 'a {
        Behind { prefix, error: self }
    }
}

struct Behind<'a> {
    prefix: &'a str,
    error: &'a SpecError,
}

impl fmt::Display for Behind<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = self.prefix;
        match self.error {
            SpecError::Missing { key } => write!(f, "key `{prefix}{key}` is missing"),
            SpecError::OutOfRange { key, found, min, max } => {
                write!(f, "key `{prefix}{key}` is {found}, expected {min} to {max}")
            }
            SpecError::Unsupported { key, expected } => {
                write!(f, "key `{prefix}{key}` asks for something unsupported, expected {expected}")
            }
        }
    }
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.behind("").fmt(f)
    }
}

impl core::error::Error for SpecError {}
