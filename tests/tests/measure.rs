//! What `halyard measure` foretells of a trust domain, beside what the igvm crate makes of the same pages, and what real
//! programs and hardware gave. The reader of the firmware here is another than Halyard's.

use std::fs;
use std::path::Path;

use halyard_tests::cache;
use halyard_tests::tiny::{Run, run_halyard};
use igvm::IgvmDirectiveHeader;
use igvm::measurement::generate_tdx_measurement;
use igvm_defs::{IgvmPageDataFlags, IgvmPageDataType};
use tempfile::TempDir;

const PAGE: usize = 4096;

/// A section of a TDVF descriptor: place in the file, place in memory, type, attributes.
struct Section {
    data: std::ops::Range<usize>,
    start: u64,
    len: usize,
    attributes: u32,
}

/// The sections of a firmware file, wherever its descriptor is.
fn sections(file: &[u8]) -> Vec<Section> {
    let word = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
    let size = |at: usize| usize::try_from(word(at)).unwrap();
    // The signature, and a version of 1 behind it.
    let found = (0..file.len() - 16).rev().find(|at| file[*at..].starts_with(b"TDVF") && word(at + 8) == 1).unwrap();
    let first = found + 16;
    let section = |at: usize| Section {
        data: size(at)..size(at) + size(at + 4),
        start: u64::from_le_bytes(file[at + 8..at + 16].try_into().unwrap()),
        len: size(at + 16),
        attributes: word(at + 28),
    };
    (0..size(found + 12)).map(|number| section(first + 32 * number)).collect()
}

/// MRTD as the igvm crate computes it, page by page.
fn by_igvm(file: &[u8]) -> String {
    let mut pages = Vec::new();
    for Section { data, start, len, attributes } in sections(file) {
        let mut contents = file[data].to_vec();
        contents.resize(len, 0);
        for (number, page) in (0..).zip(contents.chunks(PAGE)) {
            pages.push(IgvmDirectiveHeader::PageData {
                gpa: start + number * PAGE as u64,
                compatibility_mask: 1,
                flags: IgvmPageDataFlags::new().with_unmeasured(attributes & 1 == 0),
                data_type: IgvmPageDataType::NORMAL,
                data: page.to_vec(),
            });
        }
    }
    hex(&generate_tdx_measurement(&pages, 1).unwrap())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

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
    let firmware = cache::folder().unwrap().join("firmware/OVMF.inteltdx.ms.fd");
    let bytes = fs::read(&firmware).expect("scripts/install unpacks it");
    let report = foretold(&firmware, &["--memory", "2G", "--events"]);
    assert_eq!(report["mrtd"], by_igvm(&bytes));
    // The list of a guest with 2 GiB is the same for each firmware with this layout: the digest is the first event behind a
    // quote of real hardware.
    let first = &report["events"][0];
    assert_eq!(first["type"], "0x8000000b");
    assert_eq!(
        first["digest"],
        "0b8772e5b0b41b83e6044a68397e02f49fb47066b4fbe4917ea2c45c64f323fdacbb37948f821ebaf8bc9c938ba8a749"
    );
    // MRTD does not depend on how much memory there is.
    let more = foretold(&firmware, &["--memory", "6G"]);
    assert_eq!((&more["mrtd"], more.get("events")), (&report["mrtd"], None));
    // Version 2026.08+ds-2, as a replay of the calls of QEMU 11.1.3 measures it. A later one has another.
    let digest = std::process::Command::new("sha256sum").arg(&firmware).output().unwrap();
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
    let original = cache::folder().unwrap().join("firmware/OVMF.inteltdx.ms.fd");
    let bytes = fs::read(&original).expect("scripts/install unpacks it");
    let descriptor = (0..bytes.len()).rev().find(|at| bytes[*at..].starts_with(b"TDVF")).unwrap();
    let folder = TempDir::new().unwrap();
    let mut seen = vec![by_igvm(&bytes)];
    // Of the first section: fewer bytes of the file, not measured; of the second: measured.
    for (at, value) in [(16 + 4, 0x1234_u32), (16 + 28, 0), (48 + 28, 1)] {
        let mut changed = bytes.clone();
        changed[descriptor + at..descriptor + at + 4].copy_from_slice(&value.to_le_bytes());
        let path = folder.path().join("firmware.fd");
        fs::write(&path, &changed).unwrap();
        let mrtd = by_igvm(&changed);
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
