//! What it takes to foretell the measurement of a firmware, beside the igvm crate and the bare hash of as many bytes.

use std::fs;
use std::hint::black_box;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Result, ensure};
use sha2::{Digest, Sha384};

use super::{Finding, Series};
use crate::{firmware, vm};

/// The most that Halyard may take, as a multiple of the igvm crate's time.
const IGVM_LIMIT: f64 = 1.0;
/// The most that it may take as a multiple of the bare hash's.
const HASH_LIMIT: f64 = 1.2;
/// Bytes that are hashed for each page, and for each page that is measured.
const FOR_PAGE: usize = 128;
const FOR_MEASURED_PAGE: usize = FOR_PAGE + 16 * (128 + 256);

/// Measures Debian's firmware for trust domains. Halyard's time is that of the whole program, from its start to its end.
///
/// # Errors
/// Where the firmware is missing or something fails.
pub fn measure(rounds: usize) -> Result<[Finding; 2]> {
    let (halyard, path) = (vm::halyard()?, firmware::path()?);
    let bytes: usize = firmware::pages(&fs::read(&path)?)?
        .iter()
        .map(|page| if page.measured { FOR_MEASURED_PAGE } else { FOR_PAGE })
        .sum();
    let as_many = vec![0x5a_u8; bytes];
    let (mut own, mut igvm, mut bare) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let mut command = Command::new(&halyard);
        command.args(["measure", "--firmware"]).arg(&path).stdout(Stdio::null());
        let (took, status) = timed(|| command.status());
        ensure!(status?.success(), "halyard measure fails");
        own.push(took);
        let (took, digest) = timed(|| firmware::mrtd_by_igvm(&fs::read(&path)?));
        digest?;
        igvm.push(took);
        let (took, _) = timed(|| black_box(Sha384::digest(black_box(&as_many))));
        bare.push(took);
    }
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

/// Milliseconds that something takes.
fn timed<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let started = Instant::now();
    let done = work();
    (started.elapsed().as_secs_f64() * 1000.0, done)
}
