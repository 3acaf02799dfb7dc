//! Measures Halyard's speed and memory beside others, prints a table and writes it as JSON.
//!
//! Usage: `bench [startup] [memory] [api] [many] [measure] [launch] [boot] [boot-trace] [share] [hotadd]`, all of them where none is named. A missed limit is said, but is no failure:
//! the exit code is 1 only where something could not be measured.
//!
//! Environment: `HALYARD_BIN` names the program (else what lies beside this one), `HALYARD_BENCH_ROUNDS` and
//! `HALYARD_BENCH_BOOTS` say how often (31 and 5), `HALYARD_BENCH_GUESTS` how many share (10), `HALYARD_BENCH_VMS` how many VMs there are one after another (1000), `HALYARD_BENCH_JSON` names the file (`bench-results.json`).

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use halyard_tests::bench::{Finding, api, boot, boot_trace, hotadd, launch, many, measure, memory, share, startup};
use halyard_tests::vm;
use serde::Serialize;

/// What can be measured, by name.
const ALL: [&str; 10] =
    ["startup", "memory", "api", "many", "measure", "launch", "boot", "boot-trace", "share", "hotadd"];

#[derive(Serialize)]
struct Report {
    /// The program that was measured.
    program: String,
    /// The host's kernel.
    host: String,
    /// The host's processor.
    processor: String,
    findings: Vec<Finding>,
    /// Where the time and the exits of a boot go, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    boot_trace: Option<boot_trace::Table>,
}

fn main() -> Result<()> {
    let mut wanted: Vec<String> = std::env::args().skip(1).collect();
    if let Some(unknown) = wanted.iter().find(|name| !ALL.contains(&name.as_str())) {
        anyhow::bail!("{unknown} cannot be measured; {} can", ALL.join(", "));
    }
    if wanted.is_empty() {
        wanted = ALL.map(str::to_owned).to_vec();
    }
    let wants = |name: &str| wanted.iter().any(|wanted| wanted == name);
    let program = vm::halyard()?;
    ensure!(memory::is_stripped(&program)?, "{} is no release build: it has a symbol table", program.display());
    println!("Measuring {}\n", program.display());

    let mut findings = Vec::new();
    let mut found = |finding: Finding| {
        println!("{finding}");
        findings.push(finding);
    };
    if wants("startup") {
        for sandbox in ["on", "off"] {
            found(startup::measure(count("HALYARD_BENCH_ROUNDS", 31)?, sandbox)?);
        }
    }
    if wants("memory") {
        found(memory::private()?);
        found(memory::size()?);
    }
    if wants("api") {
        api::measure(count("HALYARD_BENCH_ROUNDS", 31)?)?.into_iter().for_each(&mut found);
    }
    if wants("many") {
        many::measure(count("HALYARD_BENCH_VMS", 1000)?)?.into_iter().for_each(&mut found);
    }
    if wants("measure") {
        measure::measure(count("HALYARD_BENCH_ROUNDS", 31)?)?.into_iter().for_each(&mut found);
    }
    if wants("launch") {
        launch::measure(count("HALYARD_BENCH_ROUNDS", 31)?)?.into_iter().for_each(&mut found);
    }
    if wants("boot") {
        boot::measure(count("HALYARD_BENCH_BOOTS", 5)?)?.into_iter().for_each(&mut found);
    }
    if wants("hotadd") {
        found(hotadd::measure()?);
    }
    let mut boot_trace = None;
    if wants("boot-trace") {
        let table = boot_trace::measure()?;
        println!("{table}");
        found(table.exits());
        boot_trace = Some(table);
    }
    if wants("share") {
        share::measure(count("HALYARD_BENCH_GUESTS", 10)?)?.into_iter().for_each(&mut found);
    }
    let program = program.display().to_string();
    write(&Report { program, host: host()?, processor: processor()?, findings, boot_trace })
}

/// A number from the environment, at least 1.
fn count(name: &str, default: usize) -> Result<usize> {
    let Ok(text) = std::env::var(name) else { return Ok(default) };
    text.parse().ok().filter(|count| *count > 0).with_context(|| format!("{name} is {text:?}, and no number from 1 on"))
}

fn host() -> Result<String> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("/proc/sys/kernel/osrelease")?;
    Ok(format!("Linux {}", release.trim_end()))
}

fn processor() -> Result<String> {
    let facts = std::fs::read_to_string("/proc/cpuinfo").context("/proc/cpuinfo")?;
    let name = facts.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": unknown");
    Ok(name.trim_start_matches([' ', '\t', ':']).to_owned())
}

fn write(report: &Report) -> Result<()> {
    let path = std::env::var_os("HALYARD_BENCH_JSON").map_or_else(|| "bench-results.json".into(), PathBuf::from);
    let json = serde_json::to_string_pretty(report)? + "\n";
    std::fs::write(&path, json).with_context(|| path.display().to_string())?;
    let missed = report.findings.iter().filter(|finding| !finding.met).count();
    println!("{} limits missed of {}; written to {}", missed, report.findings.len(), path.display());
    Ok(())
}
