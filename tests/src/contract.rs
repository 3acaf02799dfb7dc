//! schemathesis against the API: it tries what the description allows and what it does not.

use std::time::Duration;

use api::VmConfig;
use nix::sys::signal::Signal;

use crate::python::{file, port_to, program};
use crate::tiny::{Running, Served};

/// How long schemathesis may take: far more than it does.
const PATIENCE: Duration = Duration::from_secs(3600);
/// The description.
pub const DESCRIPTION: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/openapi.json");

/// Has schemathesis try so many examples for each operation in all its phases, with a guest of this configuration that
/// runs but for what it has just been asked. The monitor, and schemathesis' lines with figures.
///
/// # Panics
/// Where it finds something, or leaves a phase out.
pub fn try_all(served: Served, config: &VmConfig, examples: &str) -> (Served, Vec<String>) {
    let vm = served.path("vm.json");
    std::fs::write(&vm, serde_json::to_vec(config).expect("JSON")).expect("a file");
    let port = port_to(&served.path("api")).unwrap_or_else(|error| panic!("{error:#}"));
    let mut command = program("schemathesis").unwrap_or_else(|error| panic!("{error:#}"));
    command.env("SCHEMATHESIS_HOOKS", file("hooks.py")).env("HALYARD_CONFIG", vm);
    command.arg("--config-file").arg(file("schemathesis.toml")).args(["run", "--url", &format!("http://{port}")]);
    command.args(["--max-examples", examples, "--seed", "1", "--generation-database", "none", "--no-color"]);
    command.arg(DESCRIPTION).current_dir(served.path(""));
    let run = Running::start(command, PATIENCE).finish();
    if run.code() != Some(0) {
        let pid = served.pid();
        // Where it is gone, its last words say why.
        served.signal(Signal::SIGTERM);
        panic!("schemathesis found something\n{run}\n--- halyard {pid}\n{}", served.finish());
    }
    let phases = ["Coverage", "Fuzzing", "Stateful"].map(|phase| run.output().contains(&format!("✅ {phase}")));
    assert_eq!(phases, [true; 3], "each phase ran\n{run}");
    let output = run.output();
    let figures = output.lines().filter(|line| line.contains("generated") || line.contains("Tested"));
    let figures = figures.map(|line| line.trim().to_owned()).collect();
    (served, figures)
}
