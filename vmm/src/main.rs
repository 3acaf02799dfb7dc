//! The `halyard` program: its command line around the machine.

mod cli;
mod logging;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
