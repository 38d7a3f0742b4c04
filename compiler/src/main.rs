//! `edgec`: from a teacher to a student on a device, with one command.

mod cli;
mod memory;

use std::process::ExitCode;

fn main() -> ExitCode {
    memory::keep();
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("edgec: {}", cli::one_line(&error));
            ExitCode::FAILURE
        }
    }
}
