//! A guest's event log beside what is foretold: which event makes a register another than it was to be.

use std::fmt::Write;
use std::path::Path;

use arch::tdx::events;
use arch::tdx::log::{self, Found};
use arch::tdx::measure::Event;
use serde::Serialize;
use vmm::Failure;

use super::measure::{ReportedEvent, bad, hex, read};

/// What a log says, as JSON.
#[derive(Debug, Serialize)]
pub struct ReportedLog {
    /// It has the events that were foretold, and no others.
    pub matches: bool,
    /// RTMR0 to 2 after its events.
    rtmr: Vec<String>,
    /// Its events, and those that it was to have.
    events: Vec<Finding>,
}

#[derive(Debug, Serialize)]
struct Finding {
    /// "both", "foretold" where it is not in the log, "logged" where it was not foretold.
    found: &'static str,
    #[serde(flatten)]
    event: ReportedEvent,
}

/// Reads a log and compares it.
///
/// # Errors
/// [`Failure::BadInput`] where it is none.
pub fn compare(path: &Path, foretold: &[Event]) -> Result<ReportedLog, Failure> {
    let wrong = |problem: &dyn std::fmt::Display| bad("--event-log", path, problem);
    // One more byte shows that it is too long.
    let bytes = read(path, log::MAX_LOG as u64 + 1).map_err(|error| wrong(&error))?;
    if bytes.len() > log::MAX_LOG {
        return Err(wrong(&format!("it is longer than the {} bytes that a log may have", log::MAX_LOG)));
    }
    let logged = log::read(&bytes).map_err(|error| wrong(&error))?;
    let name = |found| match found {
        Found::Both => "both",
        Found::Foretold => "foretold",
        Found::Logged => "logged",
    };
    let compared = log::compare(foretold, &logged);
    Ok(ReportedLog {
        matches: compared.iter().all(|(_, found)| *found == Found::Both),
        rtmr: events::registers(&logged).iter().map(|register| hex(register)).collect(),
        events: compared
            .into_iter()
            .map(|(event, found)| Finding { found: name(found), event: event.clone().into() })
            .collect(),
    })
}

/// The log for people: what both have, what is missing in it, and what it has beside that.
pub fn tell(log: &ReportedLog, foretold: &[String], text: &mut String) {
    // Writing to a text never fails.
    for (number, register) in log.rtmr.iter().enumerate() {
        let verdict = if foretold.get(number) == Some(register) { "as foretold" } else { "not as foretold" };
        let _ = writeln!(text, "log   RTMR{number} {register} {verdict}");
    }
    for Finding { found, event: ReportedEvent { register, kind, what, digest } } in &log.events {
        let (sign, note) = match *found {
            "foretold" => ('-', ", which is not in the log"),
            "logged" => ('+', ", which was not foretold"),
            _ => (' ', ""),
        };
        let _ = writeln!(text, "log {sign} {register} {kind} {digest} {what}{note}");
    }
}
