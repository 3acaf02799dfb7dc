//! What `halyard measure` foretells of a trust domain, beside what the igvm crate makes of the same pages, and what real
//! programs and hardware gave.

use std::fs;
use std::path::Path;

use halyard_tests::firmware;
use halyard_tests::tiny::{Run, run_halyard};
use tempfile::TempDir;

fn measure(firmware: &Path, args: &[&str]) -> Run {
    run_halyard(
        ["measure".as_ref(), "--firmware".as_ref(), firmware.as_os_str()]
            .into_iter()
            .chain(args.iter().map(AsRef::as_ref)),
    )
}

/// What `halyard measure` foretells, as JSON.
fn foretold(firmware: &Path, args: &[&str]) -> serde_json::Value {
    let run = measure(firmware, &[args, &["--json"]].concat()).expect_code(0);
    serde_json::from_slice(&run.stdout).unwrap()
}

#[test]
fn debians_firmware_is_measured_as_hardware_and_others_do() {
    let path = firmware::path().unwrap();
    let bytes = fs::read(&path).unwrap();
    let report = foretold(&path, &["--memory", "2G", "--events"]);
    assert_eq!(report["mrtd"], firmware::mrtd_by_igvm(&bytes).unwrap());
    // The list of a guest with 2 GiB is the same for each firmware with this layout: the digest is the first event behind a
    // quote of real hardware.
    let first = &report["events"][0];
    assert_eq!(first["type"], "0x8000000b");
    assert_eq!(
        first["digest"],
        "0b8772e5b0b41b83e6044a68397e02f49fb47066b4fbe4917ea2c45c64f323fdacbb37948f821ebaf8bc9c938ba8a749"
    );
    // MRTD does not depend on how much memory there is.
    let more = foretold(&path, &["--memory", "6G"]);
    assert_eq!((&more["mrtd"], more.get("events")), (&report["mrtd"], None));
    // Version 2026.08+ds-2, as a replay of the calls of QEMU 11.1.3 measures it. A later one has another.
    let digest = std::process::Command::new("sha256sum").arg(&path).output().unwrap();
    if digest.stdout.starts_with(b"a265075b4147a096109e501e76196df1ec8a18659c26f7401492c597ec88f312") {
        assert_eq!(
            report["mrtd"],
            "a7a1f751abc454f9cbab198ca8d2edb2821935df525c74182b5e776cb0929e8c59aefecce725b0d08a5e9d3d3183bd08"
        );
    }
}

/// Where a section of Debian's firmware is less than its memory, the rest is zeros; and all can be measured.
#[test]
fn each_change_of_a_firmware_shows_in_its_measurement() {
    let bytes = fs::read(firmware::path().unwrap()).unwrap();
    let descriptor = firmware::descriptor(&bytes).unwrap();
    let folder = TempDir::new().unwrap();
    let mut seen = vec![firmware::mrtd_by_igvm(&bytes).unwrap()];
    // Of the first section: fewer bytes of the file, not measured; of the second: measured.
    for (at, value) in [(16 + 4, 0x1234_u32), (16 + 28, 0), (48 + 28, 1)] {
        let mut changed = bytes.clone();
        changed[descriptor + at..descriptor + at + 4].copy_from_slice(&value.to_le_bytes());
        let path = folder.path().join("firmware.fd");
        fs::write(&path, &changed).unwrap();
        let mrtd = firmware::mrtd_by_igvm(&changed).unwrap();
        assert_eq!(foretold(&path, &[])["mrtd"], mrtd, "with {value:#x} at {at}");
        assert!(!seen.contains(&mrtd), "with {value:#x} at {at} nothing has changed");
        seen.push(mrtd);
    }
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let folder = TempDir::new().unwrap();
    let plain = folder.path().join("OVMF.fd");
    fs::write(&plain, vec![0xff; 2 << 20]).unwrap();
    for (firmware, args, message) in [
        (&*plain, &[][..], "it is not for TDX: it has no table of GUIDs at its end; Debian's firmware for TDX"),
        (Path::new("/dev/zero"), &[], "it is 67108865 bytes long"),
        (Path::new("/nonexistent"), &[], "/nonexistent: No such file"),
        (&*plain, &["--memory", "1"], "--memory 1: it must be a multiple of 4096 bytes"),
        (&*plain, &["--memory", "much"], "--memory much: "),
    ] {
        let run = measure(firmware, args).expect_code(2);
        assert!(run.stderr.contains(message), "{}", run.stderr);
    }
}
