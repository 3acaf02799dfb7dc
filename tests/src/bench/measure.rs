//! What it takes to foretell the measurement of a firmware, beside the igvm crate and the bare hash of as many bytes: programs, each
//! from its start to its end, that read the same file.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Result, ensure};

use super::{Finding, Series};
use crate::{firmware, vm};

/// The most that Halyard may take, as a multiple of the igvm crate's time.
const IGVM_LIMIT: f64 = 1.0;
/// The most that it may take as a multiple of the bare hash's.
const HASH_LIMIT: f64 = 1.2;
/// Bytes that are hashed for each page, and for each page that is measured.
const FOR_PAGE: usize = 128;
const FOR_MEASURED_PAGE: usize = FOR_PAGE + 16 * (128 + 256);

/// Measures Debian's firmware for trust domains.
///
/// # Errors
/// Where the firmware or a program is missing, or something fails.
pub fn measure(rounds: usize) -> Result<[Finding; 2]> {
    let (path, other) = (firmware::path()?, std::env::current_exe()?.with_file_name("mrtd"));
    let bytes: usize = firmware::pages(&fs::read(&path)?)?
        .iter()
        .map(|page| if page.measured { FOR_MEASURED_PAGE } else { FOR_PAGE })
        .sum();
    let mut programs = [vm::halyard()?, other.clone(), other].map(Command::new);
    programs[0].args(["measure", "--firmware"]).arg(&path);
    programs[1].arg(&path);
    programs[2].arg(&path).arg(bytes.to_string());
    let mut took = [const { Vec::new() }; 3];
    for _ in 0..rounds {
        for (program, took) in programs.iter_mut().zip(&mut took) {
            let started = Instant::now();
            let status = program.stdout(Stdio::null()).status()?;
            took.push(started.elapsed().as_secs_f64() * 1000.0);
            ensure!(status.success(), "{program:?} fails");
        }
    }
    let [own, igvm, bare] = took;
    let own = Series::new("halyard measure", own);
    let compared = |name, values, limit, what: &str| {
        let what = format!("Foretelling MRTD of Debian's firmware, beside {what}");
        Finding::ratio(what, "ms", vec![own.clone(), Series::new(name, values)], limit)
    };
    Ok([
        compared("the igvm crate", igvm, IGVM_LIMIT, "the igvm crate"),
        compared("SHA-384 alone", bare, HASH_LIMIT, "SHA-384 of as many bytes"),
    ])
}
