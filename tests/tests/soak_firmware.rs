//! Firmware that finds what it boots on a disk: Debian's shim, which Microsoft has signed.

use anyhow::{Context, Result, ensure};
use halyard_tests::quotes::digits;
use halyard_tests::story::{ask, boot, power_off};
use halyard_tests::tiny::run_halyard;
use halyard_tests::{Host, HostSpec, Kernel, VmSpec, esp, firmware};
use sha2::{Digest, Sha384};

/// No kernel is named: the firmware, which starts only what is signed, finds shim on a disk, shim GRUB, and GRUB the kernel.
#[test]
fn soak_debians_firmware_boots_a_kernel_that_it_finds_on_a_disk() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let kernel = Kernel::Debian6_12Cloud;
    let disk = esp::disk(folder.path(), kernel, "console=ttyS0 quiet panic=-1 from-disk")?;
    let host = Host::start(&HostSpec::new())?;
    firmware::slow_ticks(&host)?;
    let file = firmware::path()?.display().to_string();
    let spec = VmSpec::guest(kernel)?.kernel_on_disk().memory("1G").args(["--firmware", &file]);
    let vm = boot(&host, &spec.disk(&format!("path={},readonly=on", disk.display())))?;
    assert_eq!(ask(&vm, "uname -r")?, kernel.version()?);
    ensure!(ask(&vm, "cat /proc/cmdline")?.contains("from-disk"), "the command line is not that of the disk");
    ensure!(ask(&vm, "dmesg")?.contains("secureboot: Secure boot enabled"), "it booted without secure boot");
    power_off(&vm)
}

/// By which key the firmware starts shim is measured: an entry of its db, with Microsoft's certificate.
#[test]
fn soak_the_key_that_has_signed_shim_is_foretold() -> Result<()> {
    let path = firmware::path()?;
    let (file, shim) = (path.display().to_string(), esp::shim()?.display().to_string());
    let args = ["measure", "--json", "--events", "--firmware", &file, "--kernel", &shim];
    let report: serde_json::Value = serde_json::from_slice(&run_halyard(args).expect_code(0).stdout)?;
    let keys = report["events"].as_array().context("events")?.iter().filter(|event| event["type"] == "0x800000e0");
    let [key] = keys.collect::<Vec<_>>()[..] else { panic!("{report}") };
    // A list of one certificate: its kind, its length, an empty header, its entry's length.
    let bytes = std::fs::read(&path)?;
    let digests = (0..bytes.len() - 28).filter(|at| bytes[*at..].starts_with(&X509)).filter_map(|at| {
        let word = |at: usize| bytes[at..].first_chunk().map(|word| u32::from_le_bytes(*word) as usize);
        let entry = bytes.get(at + 28..at + word(at + 16)?)?;
        let microsofts = entry.windows(SIGNER.len()).any(|window| window == SIGNER);
        let head = firmware::variable_head("db", firmware::SECURITY, entry.len()).ok()?;
        microsofts.then(|| digits(&Sha384::digest([&head, entry].concat())))
    });
    assert!(digests.collect::<Vec<_>>().contains(&key["digest"].as_str().unwrap_or_default().to_owned()), "{key}");
    Ok(())
}

const X509: [u8; 16] = *b"\xa1\x59\xc0\xa5\xe4\x94\xa7\x4a\x87\xb5\xab\x15\x5c\x2b\xf0\x72";
/// Who has signed shim, as osslsigncode tells.
const SIGNER: &[u8] = b"Microsoft Corporation UEFI CA 2011";
