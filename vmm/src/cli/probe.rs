//! `halyard probe`.

use std::process::ExitCode;

use api::HostReport;

use super::{HOST_FAILED, print, print_json};
use crate::logging::Format;

/// Prints what this host can do.
pub fn probe(json: bool, format: Format) -> ExitCode {
    let report = vmm::host::probe();
    let code = if report.can_run() { ExitCode::SUCCESS } else { HOST_FAILED.into() };
    if json { print_json(&report, code, format) } else { print(&text(&report), code, format) }
}

/// The report for people: a line for each thing, with yes or no, what was found, and what would help.
pub fn text(report: &HostReport) -> String {
    let verdict = if report.can_run() { "can run here" } else { "cannot run here" };
    let mut text = format!("Halyard {}: virtual machines {verdict}.\n\nHost\n", report.version);
    for check in &report.checks {
        let detail =
            if check.remedy.is_empty() { check.detail.clone() } else { format!("{}; {}", check.detail, check.remedy) };
        text += &line(&check.name, if check.ok { "yes" } else { "no" }, &detail);
    }
    text += "\nKinds of virtual machine\n";
    for kind in &report.kinds {
        text += &line(kind.kind.as_str(), if kind.available { "yes" } else { "no" }, &kind.reason);
    }
    text += "\nLimits of a virtual machine\n";
    let known = |value: Option<String>| value.unwrap_or_else(|| "unknown".to_owned());
    let dirty = report.dirty_tracking.join(", ");
    for (name, value) in [
        ("hypervisor", known(report.hypervisor.clone())),
        ("vCPUs", known(report.max_vcpus.map(|count| format!("up to {count}")))),
        ("address space", known(report.physical_address_bits.map(|bits| format!("{bits} bits")))),
        ("memory", known(report.max_memory.map(|bytes| format!("up to {}", human(bytes))))),
        ("dirty page tracking", if dirty.is_empty() { "none".to_owned() } else { dirty }),
    ] {
        text += &line(name, &value, "");
    }
    text
}

/// A line of a table: two columns of fixed width and the rest.
fn line(name: &str, value: &str, rest: &str) -> String {
    let line = format!("  {name:<26}{value:<5}{rest}");
    format!("{}\n", line.trim_end())
}

/// A size with one decimal, rounded down.
fn human(bytes: u64) -> String {
    let (unit, shift) = if bytes >> 40 > 0 { ("TiB", 40) } else { ("GiB", 30) };
    let tenths = (u128::from(bytes) * 10) >> shift;
    format!("{}.{} {unit}", tenths / 10, tenths % 10)
}
