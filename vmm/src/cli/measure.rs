//! `halyard measure`: what a trust domain's measurements will be, on any machine.

use std::fmt::Write;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::process::ExitCode;

use api::ByteSize;
use arch::layout;
use arch::tdx::measure::{self, Event};
use arch::tdx::{LaunchPlan, LaunchRegion};
use serde::Serialize;

use super::args::MeasureArgs;
use super::{BAD_INPUT, HOST_FAILED, complain, print};
use crate::logging::Format;

/// One more byte than any firmware has.
const TOO_LONG: u64 = (64 << 20) + 1;

/// Enough memory for each firmware.
const SOME_MEMORY: &str = "512M";

/// The measurements as JSON.
#[derive(Debug, Serialize)]
struct Report {
    /// 96 hexadecimal digits.
    mrtd: String,
    /// What MRTD is made of.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pages: Vec<ReportedPages>,
    /// What firmware extends the registers with first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    events: Vec<ReportedEvent>,
}

#[derive(Debug, Serialize)]
struct ReportedPages {
    /// The address of the first, as in "0xffc84000".
    start: String,
    /// How many of 4096 bytes.
    count: u64,
    what: &'static str,
    /// Their contents are measured, and not their addresses alone.
    measured: bool,
    /// Of their contents.
    sha384: String,
}

impl From<&LaunchRegion<'_>> for ReportedPages {
    fn from(region: &LaunchRegion) -> Self {
        Self {
            start: format!("{:#x}", region.memory.start),
            count: region.memory.len / layout::PAGE_SIZE,
            what: region.kind.name(),
            measured: region.measured,
            sha384: hex(&region.digest()),
        }
    }
}

#[derive(Debug, Serialize)]
struct ReportedEvent {
    register: String,
    /// The event's type, as in "0x8000000b".
    #[serde(rename = "type")]
    kind: String,
    what: &'static str,
    digest: String,
}

impl From<Event> for ReportedEvent {
    fn from(event: Event) -> Self {
        Self {
            register: format!("rtmr{}", event.register),
            kind: format!("{:#010x}", event.kind),
            what: event.what,
            digest: hex(&event.digest),
        }
    }
}

/// Prints the measurements of a firmware in a trust domain of some memory.
pub fn measure(args: &MeasureArgs, format: Format) -> ExitCode {
    let report = match report(args) {
        Ok(report) => report,
        Err((field, problem)) => {
            complain(format, field, &problem);
            return BAD_INPUT.into();
        }
    };
    if !args.json {
        return print(&text(&report), ExitCode::SUCCESS, format);
    }
    match serde_json::to_string_pretty(&report) {
        Ok(text) => print(&(text + "\n"), ExitCode::SUCCESS, format),
        Err(error) => {
            complain(format, "", &format!("the report cannot be written: {error}"));
            HOST_FAILED.into()
        }
    }
}

/// MRTD of a firmware, or the flag that is wrong and why. It does not depend on how much memory there is.
pub fn mrtd(firmware: &Path) -> Result<String, (&'static str, String)> {
    let args = MeasureArgs { firmware: firmware.to_owned(), memory: SOME_MEMORY.into(), events: false, json: false };
    report(&args).map(|report| report.mrtd)
}

/// The measurements, or the flag that is wrong and why.
fn report(args: &MeasureArgs) -> Result<Report, (&'static str, String)> {
    let bad_memory = |problem: &str| ("memory", format!("--memory {}: {problem}", args.memory));
    let memory: ByteSize = args.memory.parse().map_err(|error: api::UnitError| bad_memory(&error.to_string()))?;
    if memory.bytes() == 0 || !memory.bytes().is_multiple_of(layout::PAGE_SIZE) {
        return Err(bad_memory("it must be a multiple of 4096 bytes, and more than none"));
    }
    let bad_firmware = |problem: String| ("firmware", format!("{}: {problem}", args.firmware.display()));
    let file = read(&args.firmware).map_err(|error| bad_firmware(error.to_string()))?;
    let ram = layout::ram_ranges(memory.bytes());
    let plan = LaunchPlan::from_firmware(&file, &ram).map_err(|error| bad_firmware(error.to_string()))?;
    let mut report = Report { mrtd: hex(&measure::mrtd(&plan)), pages: Vec::new(), events: Vec::new() };
    if args.events {
        report.pages = plan.regions.iter().map(Into::into).collect();
        report.events = measure::first_events(&plan).into_iter().map(Into::into).collect();
    }
    Ok(report)
}

/// Reads a file that may be firmware; no more of it than shows that it is too long.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    // One more byte than there is shows the end without another round.
    let expected = file.metadata()?.len().saturating_add(1).min(TOO_LONG);
    let mut bytes = Vec::with_capacity(usize::try_from(expected).unwrap_or(0));
    file.take(TOO_LONG).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn text(report: &Report) -> String {
    let mut text = format!("MRTD {}\n", report.mrtd);
    // Writing to a text never fails.
    for ReportedPages { start, count, what, measured, sha384 } in &report.pages {
        let how = if *measured { "measured" } else { "added" };
        let _ = writeln!(text, "mrtd  {start:>10} {sha384} {count} pages {how}: {what}");
    }
    for ReportedEvent { register, kind, what, digest } in &report.events {
        let _ = writeln!(text, "{register} {kind} {digest} {what}");
    }
    text
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
