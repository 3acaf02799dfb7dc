//! `halyard man`: the manual's pages, made from the command line's own description.

use std::path::Path;
use std::process::ExitCode;

use super::{HOST_FAILED, args, complain};
use crate::logging::Format;

/// Writes a page for each command, in roff, to files in `folder`.
pub fn write(folder: &Path, format: Format) -> ExitCode {
    match clap_mangen::generate_to(args::command(), folder) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(format, "", &format!("{}: {error}", folder.display()));
            HOST_FAILED.into()
        }
    }
}
