//! What the tests of the whole toolchain share. The tests themselves live in the folders beside `src`.

mod edgec;
pub mod server;
mod tiny;
mod tools;

pub use edgec::{Ran, edgec, kill, kill_when, teacher, text, wide_teacher};
pub use tiny::{TinyAdapter, TinyModel};
pub use tools::{
    build, command, require_mpi, require_python, require_smollm2, require_tool, run, skip, target_folder,
    workspace,
};
