//! From exec to the first byte that a tiny guest writes to its serial port.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::{Finding, Series};
use crate::{tiny, vm};

/// The most that Halyard may take, as a multiple of the floor.
const LIMIT: f64 = 1.5;
/// Rounds that are not counted: they fill the page cache.
const WARM_UP: usize = 3;

/// Measures Halyard, with its sandbox as it is told (`on` or `off`), and the floor, in turn.
///
/// # Errors
/// Where one of them is missing or does not get to the first byte.
pub fn measure(rounds: usize, sandbox: &str) -> Result<Finding> {
    let guest = tiny::build("first-byte")?;
    let halyard = vm::halyard()?;
    let floor = std::env::current_exe()?.with_file_name("floor");
    ensure!(floor.is_file(), "{} is not there: `cargo build --release -p halyard-tests` builds it", floor.display());
    let (mut own, mut least) = (Vec::new(), Vec::new());
    for round in 0..WARM_UP + rounds {
        let times = (
            first_byte(halyard_command(&halyard, &guest).args(["--sandbox", sandbox]))?,
            first_byte(Command::new(&floor).arg(&guest))?,
        );
        if round >= WARM_UP {
            own.push(times.0);
            least.push(times.1);
        }
    }
    let series = vec![Series::new("halyard", own), Series::new("floor", least)];
    let what = format!("From exec to the guest's first byte, 1 vCPU, 256 MiB, serial port only, sandbox {sandbox}");
    Ok(Finding::ratio(what, "ms", series, LIMIT))
}

fn halyard_command(halyard: &Path, guest: &Path) -> Command {
    let mut command = Command::new(halyard);
    // The debug-exit port has the guest end the run behind its byte.
    command.args(["run", "--memory", "256M", "--debug-exit", "--kernel"]).arg(guest);
    command
}

/// Milliseconds from right before the start to the byte.
fn first_byte(command: &mut Command) -> Result<f64> {
    let program = command.get_program().display().to_string();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let started = Instant::now();
    let mut child = command.spawn().with_context(|| program.clone())?;
    let mut byte = [0];
    let read = child.stdout.as_mut().context("a pipe")?.read(&mut byte);
    let took = started.elapsed();
    child.wait()?;
    ensure!(read? == 1 && byte == *b"H", "{program} ended before the guest's first byte");
    Ok(took.as_secs_f64() * 1000.0)
}
