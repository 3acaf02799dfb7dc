//! The command line: what is asked, done, printed and returned as the exit code.

mod args;
mod complete;
mod ctl;
mod event_log;
mod flags;
mod help;
mod keys;
mod man;
mod measure;
mod probe;
mod quick;
mod run;
mod safety;
#[cfg(test)]
mod tests;
mod verify;

use std::io::{self, Write};
use std::process::ExitCode;

use api::SCHEMA_JSON;
use serde::Serialize;

use crate::logging::Format;
use args::{Action, Cli};

/// The host failed.
const HOST_FAILED: u8 = 1;
/// A flag, the configuration, or a file that it names cannot be used.
const BAD_INPUT: u8 = 2;
/// A quote, or an event log, is not the one that was wanted.
const DIFFERS: u8 = 9;

/// Does what the command line says.
pub fn main() -> ExitCode {
    let cli = quick::read(std::env::args_os())
        .unwrap_or_else(|| Cli::read(std::env::args_os()).unwrap_or_else(|error| error.exit()));
    let format = cli.log.format;
    crate::logging::start(cli.log.level, format);
    match &cli.action {
        Action::Run(args, service) => run::run(args, service, format),
        Action::Serve(args) => run::serve(args, format),
        Action::Validate(args) => run::validate(args, format),
        Action::Probe(args) => probe::probe(args.json, format),
        Action::Measure(args) => measure::measure(args, format),
        Action::Verify(args) => verify::verify(args, format),
        Action::Ctl(args) => ctl::ctl(args, format),
        Action::Complete(args) => complete::complete(args, format),
        Action::Man(args) => man::write(&args.folder, format),
        Action::Schema => print(SCHEMA_JSON, ExitCode::SUCCESS, format),
    }
}

/// Prints to standard output. A reader that has gone away, as `head` does, is no failure.
fn print(text: &str, code: ExitCode, format: Format) -> ExitCode {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            complain(format, "", &format!("standard output: {error}"));
            HOST_FAILED.into()
        }
        _ => code,
    }
}

/// Prints a report as JSON.
fn print_json(report: &impl Serialize, code: ExitCode, format: Format) -> ExitCode {
    match serde_json::to_string_pretty(report) {
        Ok(text) => print(&(text + "\n"), code, format),
        Err(error) => {
            complain(format, "", &format!("the report cannot be written: {error}"));
            HOST_FAILED.into()
        }
    }
}

/// Says why the program ends: to a person as a line that begins with its name, to a program as a line of the log.
fn complain(format: Format, field: &str, message: &str) {
    match format {
        // Where standard error is closed, there is nobody to tell.
        Format::Text => drop(writeln!(io::stderr(), "halyard: {message}")),
        Format::Json => tracing::error!(field, "{message}"),
    }
}
