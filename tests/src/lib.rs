//! What the tests of the whole toolchain share. The tests themselves live in the folders beside `src`.

mod tiny;
mod tools;

pub use tiny::TinyModel;
pub use tools::{build, command, require_tool, run, target_folder, workspace};
