//! `edgec`: from a teacher to a student on a device, with one command.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line, whatever the causes are: `{:#}` joins them.
            eprintln!("edgec: {error:#}");
            ExitCode::FAILURE
        }
    }
}
