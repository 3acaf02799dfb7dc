//! The program as it is started: what it prints where, and how it ends, as far as no virtual machine is needed.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use api::{HostReport, SCHEMA_JSON, VmConfig};

fn halyard(line: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_halyard"));
    command.args(line).stdin(Stdio::null());
    command
}

fn run(line: &[&str]) -> Output {
    halyard(line).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn version_and_help_go_to_standard_output() {
    let version = run(&["--version"]);
    assert_eq!(
        (version.status.code(), text(&version.stdout)),
        (Some(0), concat!("halyard ", env!("CARGO_PKG_VERSION"), "\n"))
    );
    let help = run(&["run", "--help"]);
    assert_eq!(help.status.code(), Some(0));
    assert!(text(&help.stdout).contains("Exit codes:") && help.stderr.is_empty());
}

#[test]
fn the_schema_is_the_committed_one() {
    let schema = run(&["schema"]);
    assert_eq!((schema.status.code(), text(&schema.stdout)), (Some(0), SCHEMA_JSON));
}

#[test]
fn bad_input_ends_with_two_and_every_problem() {
    let line = ["run", "--kernel", "/nonexistent/vmlinuz", "--cpus", "300", "--memory", "lots", "--disk", "a,b=c"];
    let refused = run(&line);
    assert_eq!(refused.status.code(), Some(2));
    assert!(refused.stdout.is_empty());
    let lines: Vec<&str> = text(&refused.stderr).lines().collect();
    assert!(lines.iter().all(|line| line.starts_with("halyard: --")), "{lines:#?}");
    for flag in ["--kernel /nonexistent/vmlinuz: ", "--cpus 300: ", "--memory lots: ", "--disk a,b=c: "] {
        assert!(lines.iter().any(|line| line.contains(flag)), "{flag} is missing in {lines:#?}");
    }
    assert_eq!(run(&["run", "--no-such-flag"]).status.code(), Some(2));
    assert_eq!(run(&["run", "--config", "/nonexistent/vm.yaml"]).status.code(), Some(2));
}

#[test]
fn problems_are_json_where_the_log_is() {
    let refused = run(&["--log-format", "json", "run", "--kernel", "k", "--cpus", "0", "--memory", "0"]);
    assert_eq!(refused.status.code(), Some(2));
    let fields: Vec<String> = text(&refused.stderr)
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["field"].as_str().unwrap().to_owned())
        .collect();
    for field in ["cpus.count", "memory.size"] {
        assert!(fields.iter().any(|found| found == field), "{field} is missing in {fields:?}");
    }
}

#[test]
fn a_configuration_comes_from_standard_input_too() {
    let mut child = halyard(&["validate", "--config", "-", "--cpus", "2"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"kernel: {path: k}\nmemory: {size: 1G}\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
    let config: VmConfig = api::parse(text(&output.stdout)).unwrap();
    assert_eq!((config.cpus.count, config.memory.size.to_string().as_str()), (2, "1G"));
    assert_eq!(config.kernel.cmdline.as_deref(), Some("console=ttyS0"));
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = halyard(&["schema"]).stdout(writer).status().unwrap();
    assert_eq!(status.code(), Some(0));
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = halyard(&["schema"]).stdout(full).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).starts_with("halyard: standard output: "), "{}", text(&output.stderr));
}

#[test]
fn probe_says_the_same_to_people_and_programs() {
    let json = run(&["probe", "--json"]);
    let report: HostReport = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json.status.code(), Some(if report.can_run() { 0 } else { 1 }));
    let people = run(&["probe"]);
    assert_eq!(people.status.code(), json.status.code());
    for check in &report.checks {
        assert!(text(&people.stdout).contains(&check.name), "{} is missing", check.name);
    }
}
