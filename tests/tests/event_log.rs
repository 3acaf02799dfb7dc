//! What `halyard measure` foretells of firmware and a kernel beside what the same firmware, with a TPM instead of a trust domain,
//! and the same kernel have measured when they ran.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use halyard_tests::measured::{self, Measured};
use halyard_tests::quotes::{bytes, digits};
use halyard_tests::tiny::run_halyard;
use halyard_tests::{Kernel, firmware};
use sha2::{Digest, Sha384};
use tempfile::TempDir;

/// A kernel that cannot go on ends QEMU.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1";
/// Types of events (TCG PC Client Platform Firmware Profile, §10.4.1).
const SEPARATOR: u32 = 4;
const VARIABLE: u32 = 0x8000_0001;
const AUTHORITY: u32 = 0x8000_00e0;

/// An event's type and digest.
type Event = (u32, Vec<u8>);

/// Which register of a trust domain has what a TPM has in this one (Intel TDX Virtual Firmware Design Guide, §8.1).
fn register(pcr: u32) -> Option<usize> {
    match pcr {
        1 | 7 => Some(0),
        2..=6 => Some(1),
        8..=15 => Some(2),
        _ => None,
    }
}

/// What was measured into the register of a trust domain that these of a TPM are. Each of them ends with a separator of its
/// own, a trust domain's with one.
fn of_register(log: &[Measured], number: usize) -> Vec<Event> {
    let mut events: Vec<_> = log
        .iter()
        .filter(|event| register(event.pcr) == Some(number))
        .map(|event| (event.kind, event.digest.clone()))
        .collect();
    events.dedup_by(|one, other| one.0 == SEPARATOR && one == other);
    events
}

/// What `halyard measure` says.
fn foretold(firmware: &Path, kernel: &Path, initramfs: &Path) -> Result<serde_json::Value> {
    let mut args: Vec<_> = ["measure", "--json", "--events", "--cmdline", CMDLINE].map(Into::into).into();
    for (flag, path) in [("--firmware", firmware), ("--kernel", kernel), ("--initramfs", initramfs)] {
        args.extend([flag.into(), path.as_os_str().to_owned()]);
    }
    Ok(serde_json::from_slice(&run_halyard(args).expect_code(0).stdout)?)
}

/// The events of a register in a report.
fn events_of(report: &serde_json::Value, number: usize) -> Result<Vec<Event>> {
    let all = report["events"].as_array().context("events")?.iter();
    all.filter(|event| event["register"] == format!("rtmr{number}"))
        .map(|event| {
            let kind = event["type"].as_str().context("a type")?.trim_start_matches("0x");
            let digest = event["digest"].as_str().context("a digest")?;
            Ok((u32::from_str_radix(kind, 16)?, bytes(digest)))
        })
        .collect()
}

/// A register after these events.
fn replayed(events: &[Event]) -> String {
    let value = events.iter().fold([0; 48], |value: [u8; 48], (_, digest)| {
        Sha384::new().chain_update(value).chain_update(digest).finalize().into()
    });
    digits(&value)
}

/// Boots Debian's kernel by firmware with a key or digest more, and compares RTMR1 and RTMR2 as a whole, and of RTMR0 what is not
/// of the machine: the variables, and by which of them the kernel is started.
fn compare(kernel: &Path, what: &[&str]) -> Result<()> {
    let folder = TempDir::new()?;
    let path = |name: &str| folder.path().join(name);
    let (initramfs, variables, file) = (path("initrd.img"), path("variables.fd"), path("firmware.fd"));
    fs::write(&initramfs, measured::initramfs()?)?;
    firmware::enroll(&firmware::file("OVMF_VARS_4M.ms.fd")?, &variables, what)?;
    firmware::enroll(&firmware::path()?, &file, what)?;
    let (kernel_path, initramfs_path) = (kernel.display().to_string(), initramfs.display().to_string());
    let given = [("-kernel", &*kernel_path), ("-initrd", &*initramfs_path), ("-append", CMDLINE)];
    let log = measured::event_log(folder.path(), &variables, &given)?;
    let report = foretold(&file, kernel, &initramfs)?;
    for number in [1, 2] {
        let measured = of_register(&log, number);
        ensure!(!measured.is_empty() && measured == events_of(&report, number)?, "RTMR{number}: {log:?}, {report}");
        ensure!(report["rtmr"][number] == replayed(&measured), "RTMR{number}: {}", report["rtmr"]);
    }
    let of_keys = |events: Vec<Event>| -> Vec<_> {
        events.into_iter().filter(|(kind, _)| [VARIABLE, AUTHORITY].contains(kind)).collect()
    };
    let keys = of_keys(of_register(&log, 0));
    ensure!(keys.len() == 6 && keys == of_keys(events_of(&report, 0)?), "RTMR0: {log:?}, {report}");
    Ok(())
}

#[test]
fn a_kernel_that_the_firmware_has_a_key_for_is_measured_as_foretold() -> Result<()> {
    compare(&Kernel::Debian6_12Cloud.bzimage()?, &firmware::DEBIANS_KEY)
}

#[test]
fn a_kernel_that_the_firmware_has_a_digest_of_is_measured_as_foretold() -> Result<()> {
    let folder = TempDir::new()?;
    let (kernel, data) = (folder.path().join("vmlinuz"), folder.path().join("data"));
    firmware::osslsigncode(&["remove-signature"], &Kernel::Debian6_1Cloud.bzimage()?, &kernel)?;
    firmware::osslsigncode(&["extract-data", "-h", "sha256"], &kernel, &data)?;
    // In what a signature would be of, the digest is the one string of 32 bytes.
    let data = digits(&fs::read(&data)?);
    let digest = data.split_once("05000420").and_then(|(_, rest)| rest.get(..64)).context("the digest")?;
    compare(&kernel, &["--add-db-hash", firmware::SECURITY, digest])
}
