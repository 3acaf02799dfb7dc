//! What a monitor costs beside its guest's memory: its own private memory, and its size on disk.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Finding, Series};
use crate::tiny::Running;
use crate::{tiny, vm};

/// The most private memory beside the guest's, in KiB.
const MEMORY_LIMIT: f64 = 512.0;
/// The most that the stripped program may have, in MiB: 4 for the monitor, 1 for the API and its command line.
const SIZE_LIMIT: f64 = 5.0;
/// The guest's memory, in KiB. Any mapping of that size or more is it: the program itself has none as large.
const GUEST_MEMORY: f64 = 262_144.0;

/// Measures a Halyard with an idle guest.
///
/// # Errors
/// Where it does not run.
pub fn private() -> Result<Finding> {
    let halyard = vm::halyard()?;
    // Pages of the program that were just built count as dirty until they are on disk.
    File::open(&halyard)?.sync_all().with_context(|| halyard.display().to_string())?;
    let mut command = std::process::Command::new(&halyard);
    command.args(["run", "--memory", "256M", "--debug-exit", "--kernel"]).arg(tiny::build("power-button")?);
    let mut running = Running::start(command, Duration::from_secs(30));
    // From here on it is halted.
    running.wait_for("ready\n");
    let own = private_memory(running.pid())?;
    let what = "Private dirty memory beside the guest's, 1 vCPU, 256 MiB, serial port only, guest halted";
    Ok(Finding::amount(what, "KiB", Series::new("halyard", vec![own]), MEMORY_LIMIT))
}

/// Measures the program file.
///
/// # Errors
/// Where it is missing.
pub fn size() -> Result<Finding> {
    let length = fs::metadata(vm::halyard()?)?.len();
    // A program's length is exact in a double.
    #[expect(clippy::cast_precision_loss, reason = "see above")]
    let mebibytes = length as f64 / f64::from(1 << 20);
    Ok(Finding::amount("Size of the program", "MiB", Series::new("halyard", vec![mebibytes]), SIZE_LIMIT))
}

/// The private dirty memory of a process beside its guest's, in KiB.
///
/// # Errors
/// There is no such process.
pub fn private_memory(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps");
    Ok(private_dirty(&fs::read_to_string(&path).with_context(|| path.clone())?))
}

/// The sum of `Private_Dirty`, in KiB, over the mappings in an `smaps` file but for guest memory of 256 MiB or more.
pub fn private_dirty(smaps: &str) -> f64 {
    let mut size = 0.0;
    let mut sum = 0.0;
    for (field, value) in smaps.lines().filter_map(|line| line.split_once(':')) {
        let kibibytes = || value.trim().trim_end_matches(" kB").parse().unwrap_or(f64::NAN);
        match field {
            // A mapping's size comes before its pages are told apart.
            "Size" => size = kibibytes(),
            "Private_Dirty" if size < GUEST_MEMORY => sum += kibibytes(),
            _ => {}
        }
    }
    sum
}

/// Whether a program has been stripped: it has no symbol table.
///
/// # Errors
/// Where it cannot be read.
pub fn is_stripped(program: &Path) -> Result<bool> {
    let bytes = fs::read(program).with_context(|| program.display().to_string())?;
    Ok(!bytes.windows(8).any(|window| window == b".symtab\0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_left_out() {
        let smaps = "1000-2000 rw-p 00000000 00:00 0   [heap]\nSize: 132 kB\nPrivate_Dirty:        72 kB\n\
                     3000-4000 rw-s 00000000 00:01 7   /memfd:x (deleted)\nSize: 262144 kB\nPrivate_Dirty:  24 kB\n\
                     5000-6000 rw-p 00000000 00:00 0 \nSize: 4 kB\nPrivate_Dirty:        4 kB\nVmFlags: rd wr\n";
        assert_eq!(private_dirty(smaps), 76.0);
    }
}
