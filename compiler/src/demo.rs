//! The teacher and the text inside this program, for a first run without any input.
//!
//! `models/demo/README.md` tells where they come from and how the teacher was made.

use std::path::Path;

use crate::profile::ModelFile;

/// A small Llama with a vocabulary of its own, trained on [`TEXT`].
static TEACHER: &[u8] = include_bytes!("../../models/demo/teacher.gguf");

/// State of the Union addresses, 1923 to 2005 (public domain), one to a line.
pub static TEXT: &str = include_str!("../../models/demo/speeches.txt");

/// The address of 2006, which the teacher has not seen.
pub static HELD_OUT: &str = include_str!("../../models/demo/held-out.txt");

/// The embedded teacher, as the runtime reads it.
pub fn teacher() -> ModelFile {
    ModelFile::from_memory(Path::new("(embedded teacher)"), TEACHER)
}
