//! What it takes to launch a trust domain, beside a real QEMU: both behind the recorder, which plays a host with Intel TDX and
//! digests nothing here, so that the monitor's own work is what is left.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::time::{ClockId, clock_gettime};
use tempfile::TempDir;

use super::{Finding, Series};
use crate::firmware;
use crate::kernels::Kernel;
use crate::recorder::Recorder;

/// The most that Halyard may take, as a multiple of QEMU's time.
const LIMIT: f64 = 0.3;
/// The most calls of KVM that it may make, as a multiple of QEMU's.
const CALLS_LIMIT: f64 = 1.0;
/// Rounds that are not counted: they fill the page cache.
const WARM_UP: usize = 2;

/// A launch: milliseconds from exec until the guest is sealed, and until it first runs; calls of KVM until then.
struct Launch {
    sealed: f64,
    runs: f64,
    calls: f64,
}

/// Measures launches with Debian's firmware and 2 GiB, with 1 vCPU and with 8. Halyard is given a kernel, too, and keeps its
/// sandbox; QEMU is given none, and so need not read one.
///
/// # Errors
/// Where QEMU or the recorder is missing, or a launch fails.
pub fn measure(rounds: usize) -> Result<Vec<Finding>> {
    let (recorder, folder) = (Recorder::build()?, TempDir::new()?);
    let (firmware, kernel) = (firmware::path()?, Kernel::Debian6_12Cloud.bzimage()?);
    let mut findings = Vec::new();
    for cpus in [1_u8, 8] {
        let (mut own, mut other) = (Vec::new(), Vec::new());
        for round in 0..WARM_UP + rounds {
            let mut halyard = recorder.halyard();
            halyard.args(["run", "--confidential", "tdx", "--memory", "2G", "--serial", "off", "--firmware"]);
            halyard.arg(&firmware).arg("--kernel").arg(&kernel).args(["--cpus", &cpus.to_string()]);
            let launches = (launch(&mut halyard, &folder)?, launch(&mut recorder.qemu(cpus, None)?, &folder)?);
            if round >= WARM_UP {
                own.push(launches.0);
                other.push(launches.1);
            }
        }
        let compared = |what: &str, unit, of: fn(&Launch) -> f64, limit| {
            let series = [("halyard", &own), ("qemu", &other)];
            let series = series.map(|(name, launches)| Series::new(name, launches.iter().map(of).collect()));
            Finding::ratio(format!("Launch of a trust domain, 2 GiB, {cpus} vCPUs: {what}"), unit, series.into(), limit)
        };
        findings.extend([
            compared("from exec until it is sealed", "ms", |launch| launch.sealed, LIMIT),
            compared("from exec until it runs", "ms", |launch| launch.runs, LIMIT),
            compared("calls of KVM until it runs", "calls", |launch| launch.calls, CALLS_LIMIT),
        ]);
    }
    Ok(findings)
}

/// Has a monitor launch one, until its recorder ends it.
fn launch(command: &mut Command, folder: &TempDir) -> Result<Launch> {
    let (times, messages) = (folder.path().join("times"), folder.path().join("messages"));
    fs::write(&times, "")?;
    command.env("RECORDER_TIMES", &times);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&messages)?);
    let started = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    command.status().with_context(|| command.get_program().display().to_string())?;
    let times = fs::read_to_string(&times)?;
    let since = |what: &'static str| -> Result<(f64, f64)> {
        let words: Vec<&str> = times.lines().find(|line| line.starts_with(what)).context(what)?.split(' ').collect();
        let [_, "at", time, "after", calls, "calls"] = words[..] else { bail!("{times}") };
        let took = Duration::from_nanos(time.parse()?).checked_sub(started.into()).context("a clock that goes back")?;
        Ok((took.as_secs_f64() * 1000.0, calls.parse()?))
    };
    let told = || fs::read_to_string(&messages).unwrap_or_default();
    let ((sealed, _), (runs, calls)) =
        since("FINALIZE_VM ").and_then(|sealed| Ok((sealed, since("KVM_RUN ")?))).with_context(told)?;
    Ok(Launch { sealed, runs, calls })
}
