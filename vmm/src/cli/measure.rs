//! `halyard measure`: what a trust domain's measurements will be, on any machine.

use std::fmt::Write;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Deref;
use std::path::Path;
use std::process::ExitCode;
use std::slice;

use api::{HostFacts, Problem, Problems, VmConfig};
use arch::firmware::GivenKernel;
use arch::layout;
use arch::tdx::events::{self, EventError, MeasuredKernel};
use arch::tdx::measure::{self, Event};
use arch::tdx::{LaunchPlan, LaunchRegion, authority, corim};
use hal::GpaRange;
use nix::libc;
use serde::Serialize;
use vm_memory::{FileOffset, MmapRegion};
use vmm::Failure;

use super::args::{DomainArgs, MeasureArgs, RunArgs};
use super::event_log::{self, ReportedLog};
use super::run::Source;
use super::{DIFFERS, HOST_FAILED, complain, print, print_json};
use crate::logging::Format;

/// One more byte than any firmware has, and than any IGVM file may have.
const MAX_FIRMWARE: u64 = (64 << 20) + 1;
const MAX_IGVM: u64 = (256 << 20) + 1;
/// Why RTMR0 to 2 are not foretold.
const OF_DISK: &str = "firmware that is given no kernel (--kernel) goes on by what it finds on the disks: boot options (RTMR0), partition \
                       tables and loaders (RTMR1), and what those load and do (RTMR2)";
const OF_IGVM: &str = "what the code in an IGVM file extends them with is its own";

/// All events until the kernel runs, or why they are not foretold.
type Foretold = Result<Vec<Event>, &'static str>;

/// The measurements as JSON.
#[derive(Debug, Serialize)]
pub struct Report {
    /// 96 hexadecimal digits.
    pub mrtd: String,
    /// RTMR0 to 2 when the kernel runs, 96 hexadecimal digits each; none without one that is started.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rtmr: Vec<String>,
    /// Why there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    not_foretold: Option<&'static str>,
    /// What MRTD is made of.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pages: Vec<ReportedPages>,
    /// What firmware and kernel extend the registers with, or without a kernel, what firmware does first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    events: Vec<ReportedEvent>,
    /// What a guest's event log has.
    #[serde(skip_serializing_if = "Option::is_none")]
    log: Option<ReportedLog>,
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

/// An event as JSON.
#[derive(Debug, Serialize)]
pub struct ReportedEvent {
    /// As in "rtmr0".
    pub register: String,
    /// The event's type, as in "0x8000000b".
    #[serde(rename = "type")]
    pub kind: String,
    /// What it is of.
    pub what: String,
    /// 96 hexadecimal digits.
    pub digest: String,
}

impl From<Event> for ReportedEvent {
    fn from(event: Event) -> Self {
        Self {
            register: format!("rtmr{}", event.register),
            kind: format!("{:#010x}", event.kind),
            what: event.what.into_owned(),
            digest: hex(&event.digest),
        }
    }
}

/// Prints the measurements of a trust domain.
pub fn measure(args: &MeasureArgs, format: Format) -> ExitCode {
    let report = match foretell(args, format) {
        Ok((_, report)) => report,
        Err(code) => return code,
    };
    let differs = report.log.as_ref().is_some_and(|log| !log.matches);
    let code = if differs { DIFFERS.into() } else { ExitCode::SUCCESS };
    if args.json { print_json(&report, code, format) } else { print(&text(&report), code, format) }
}

/// The measurements of a trust domain, and its configuration, of which an IGVM file has none; or the exit code, after what is
/// wrong was told.
pub fn foretell(args: &MeasureArgs, format: Format) -> Result<(Option<VmConfig>, Report), ExitCode> {
    let source = Source::read(&domain(&args.domain));
    let foretold = match &args.domain.igvm {
        Some(path) => of_igvm(path, args).map(|report| (None, report)),
        None => of_firmware(&source, args).map(|(config, report)| (Some(config), report)),
    };
    foretold.map_err(|failure| match failure {
        Failure::BadInput(Problems(problems)) => source.refuse(problems, format),
        Failure::Host(problem) => {
            complain(format, "", &problem);
            HOST_FAILED.into()
        }
    })
}

/// The measurement of an IGVM file.
fn of_igvm(path: &Path, args: &MeasureArgs) -> Result<Report, Failure> {
    let file = read(path, MAX_IGVM).map_err(|error| bad("--igvm", path, &error))?;
    let plan = LaunchPlan::from_igvm(&file).map_err(|error| bad("--igvm", path, &error))?;
    report(&plan, Err(OF_IGVM), args)
}

/// The measurements of a firmware, and of the kernel that it is given, if any.
fn of_firmware(source: &Source, args: &MeasureArgs) -> Result<(VmConfig, Report), Failure> {
    let check = |config: &VmConfig| {
        let mut problems = api::validate(config, &HostFacts::unlimited());
        if config.firmware.is_none() {
            problems.push(Problem::new("firmware", "no firmware is named", "give --firmware FILE, or --igvm FILE"));
        }
        problems
    };
    let bad_input = |problems| Failure::BadInput(Problems(problems));
    let config = source.config(check).map_err(bad_input)?;
    let problems = check(&config);
    if !problems.is_empty() {
        return Err(bad_input(problems));
    }
    let path = config.firmware.as_ref().map(|firmware| firmware.path.clone()).unwrap_or_default();
    let file = read(&path, MAX_FIRMWARE).map_err(|error| bad("firmware.path", &path, &error))?;
    let ram = layout::ram_ranges(config.memory.size.bytes());
    let plan = LaunchPlan::from_firmware(&file, &ram).map_err(|error| bad("firmware.path", &path, &error))?;
    let events = if config.kernel.is_none() { Err(OF_DISK) } else { all_events(&config, &plan, &ram)? };
    report(&plan, events, args).map(|report| (config, report))
}

/// What is told of a plan, and of its events.
fn report(plan: &LaunchPlan, events: Foretold, args: &MeasureArgs) -> Result<Report, Failure> {
    let mrtd = hex(&measure::mrtd(plan));
    let not_foretold = events.as_ref().err().copied();
    let (pages, rtmr) = (Vec::new(), Vec::new());
    let mut report = Report { mrtd, rtmr, not_foretold, pages, events: Vec::new(), log: None };
    let registers = events.as_deref().ok().map(events::registers);
    report.rtmr = registers.iter().flatten().map(|register| hex(register)).collect();
    if let Some(path) = &args.event_log {
        let nothing = |why: &&str| bad("--event-log", path, &format!("what it is to have is not foretold: {why}"));
        let events = events.as_deref().map_err(nothing)?;
        report.log = Some(event_log::compare(path, events)?);
    }
    if args.events {
        report.pages = plan.regions.iter().map(Into::into).collect();
        let first = |_| if args.domain.igvm.is_some() { Vec::new() } else { measure::first_events(plan) };
        report.events = events.unwrap_or_else(first).into_iter().map(Into::into).collect();
    }
    if let Some(path) = &args.corim {
        let document =
            corim::document(plan, registers.as_ref()).map_err(|error| Failure::Host(format!("CoRIM: {error}")))?;
        std::fs::write(path, document).map_err(|error| bad("--corim", path, &error))?;
    }
    Ok(report)
}

/// The flags as those of a run.
fn domain(args: &DomainArgs) -> RunArgs {
    RunArgs {
        config: args.config.clone(),
        firmware: args.firmware.clone(),
        kernel: args.kernel.clone(),
        initramfs: args.initramfs.clone(),
        cmdline: args.cmdline.clone(),
        cpus: args.cpus.clone(),
        memory: args.memory.clone(),
        ..RunArgs::default()
    }
}

/// Something about a file that a field or a flag names.
pub fn bad(field: &str, path: &Path, problem: &dyn std::fmt::Display) -> Failure {
    Failure::BadInput(Problems(vec![Problem::new(field, format!("{}: {problem}", path.display()), "")]))
}

/// What the registers are extended with until the kernel runs.
fn all_events(config: &VmConfig, plan: &LaunchPlan, ram: &[GpaRange]) -> Result<Foretold, Failure> {
    let kernel_path = &config.kernel.path;
    let kernel = File::open(kernel_path).map_err(|error| bad("kernel.path", kernel_path, &error))?;
    let open = |path| File::open(path).map_err(|error| bad("kernel.initramfs", path, &error));
    let initramfs = config.kernel.initramfs.as_deref().map(open).transpose()?;
    let (initramfs, cmdline) = (initramfs.as_ref(), config.cmdline());
    let verdict = authority::of(&events::variables(plan), &kernel);
    let verdict = verdict.map_err(|error| bad("kernel.path", kernel_path, &error))?;
    if let Some(problem) = verdict.problem() {
        return Ok(Err(problem));
    }
    // As for a host with the most address bits that there are: the tables do not depend on them.
    let (platform, _) = vmm::boot::platform(config, 52)?;
    let given = GivenKernel { kernel: &kernel, initramfs, cmdline: &cmdline, unsigned: false };
    let items = arch::firmware::items(&platform, ram, Some(&given));
    let items = items.map_err(|error| vmm::boot::bad_boot(config, &error))?;
    let mut events = events::of_firmware(plan, &items, verdict.measured());
    let given = MeasuredKernel { kernel: &kernel, initramfs, cmdline: &cmdline };
    events.extend(events::of_kernel(&given).map_err(|error| match error {
        EventError::Kernel(_) => bad("kernel.path", kernel_path, &error),
        EventError::Initramfs(_) => {
            bad("kernel.initramfs", config.kernel.initramfs.as_deref().unwrap_or(Path::new("")), &error)
        }
    })?);
    Ok(Ok(events))
}

/// What a file holds.
pub enum Contents {
    /// It is mapped.
    Mapped(MmapRegion),
    /// It was read, which a pipe has to be.
    Read(Vec<u8>),
}

impl Deref for Contents {
    type Target = [u8];

    #[expect(unsafe_code, reason = "a mapped file is read where it lies")]
    fn deref(&self) -> &[u8] {
        match self {
            // SAFETY: the mapping is as long, and lives as long as this does. Nobody writes to it here; who writes to the file or
            // cuts it short meanwhile has other measurements told, or this program ended, which holds nothing.
            Self::Mapped(mapping) => unsafe { slice::from_raw_parts(mapping.as_ptr(), mapping.size()) },
            Self::Read(bytes) => bytes,
        }
    }
}

/// Takes a file; no more of it than shows that it is too long. A copy would take a quarter as long as its measurement.
///
/// # Errors
/// It cannot be read.
pub fn read(path: &Path, too_long: u64) -> io::Result<Contents> {
    let file = File::open(path)?;
    let (metadata, flags) = (file.metadata()?, libc::MAP_PRIVATE | libc::MAP_POPULATE);
    if metadata.is_file() {
        let len = usize::try_from(metadata.len().min(too_long)).unwrap_or(usize::MAX);
        let place = FileOffset::new(file.try_clone()?, 0);
        // An empty file has no mapping, nor have those of some file systems.
        if let Ok(mapping) = MmapRegion::build(Some(place), len, libc::PROT_READ, flags) {
            return Ok(Contents::Mapped(mapping));
        }
    }
    let mut bytes = Vec::new();
    file.take(too_long).read_to_end(&mut bytes)?;
    Ok(Contents::Read(bytes))
}

fn text(report: &Report) -> String {
    let mut text = format!("MRTD {}\n", report.mrtd);
    // Writing to a text never fails.
    for (number, register) in report.rtmr.iter().enumerate() {
        let _ = writeln!(text, "RTMR{number} {register}");
    }
    if let Some(why) = report.not_foretold {
        let _ = writeln!(text, "RTMR0 to 2 are not foretold: {why}");
    }
    for ReportedPages { start, count, what, measured, sha384 } in &report.pages {
        let how = if *measured { "measured" } else { "added" };
        let _ = writeln!(text, "mrtd  {start:>10} {sha384} {count} pages {how}: {what}");
    }
    for ReportedEvent { register, kind, what, digest } in &report.events {
        let _ = writeln!(text, "{register} {kind} {digest} {what}");
    }
    if let Some(log) = &report.log {
        event_log::tell(log, &report.rtmr, &mut text);
    }
    text
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
