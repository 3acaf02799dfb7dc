//! What `halyard measure` foretells of a trust domain, beside what the igvm crate makes of the same pages, and what real
//! programs and hardware gave.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use halyard_tests::quotes::{bytes, digits};
use halyard_tests::tiny::{Run, run_halyard};
use halyard_tests::{Kernel, firmware};
use igvm_defs::IgvmPlatformType;
use sha2::{Digest, Sha384};
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
    let told = measure(&path, &[]).expect_code(0);
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(told.contains("\nRTMR0 to 2 are not foretold: firmware that is given no kernel"), "{told}");
    // MRTD does not depend on how much memory there is.
    let more = foretold(&path, &["--memory", "6G"]);
    assert_eq!((&more["mrtd"], more.get("events")), (&report["mrtd"], None));
    // Version 2026.08+ds-2, as a replay of the calls of QEMU 11.1.3 measures it. A later one has another.
    let digest = Command::new("sha256sum").arg(&path).output().unwrap();
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

/// A section that firmware uses from the start, as in Debian's: address, bytes.
const USED: [(u64, u64); 4] = [(0x80_0000, 0x6000), (0x80_9000, 0x2000), (0x80_b000, 0x2000), (0x81_0000, 0x1_0000)];
const GIB: u64 = 1 << 30;

/// The hand-off blocks of a guest with RAM from 0 to `low` and `high` bytes from 4 GiB on, without those that end them.
fn hand_off(low: u64, high: u64) -> Vec<u8> {
    let mut ranges = Vec::new();
    let mut at = 0;
    for (start, len) in USED {
        ranges.extend([(7_u32, at, start - at), (0, start, len)]);
        at = start + len;
    }
    ranges.extend([(7, at, low - at), (7, 4 * GIB, high)]);
    ranges.retain(|(_, _, len)| *len > 0);
    let end = 0x80_9000 + 56 + 48 * ranges.len() as u64 + 8;
    let mut blocks = [1_u16, 56, 0, 0, 9, 0].iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    blocks.resize(48, 0);
    blocks.extend_from_slice(&end.to_le_bytes());
    for (kind, start, len) in ranges {
        blocks.extend_from_slice(&[3, 0, 48, 0, 0, 0, 0, 0]);
        blocks.extend_from_slice(&[0; 16]);
        blocks.extend_from_slice(&[kind.to_le_bytes(), 7_u32.to_le_bytes()].concat());
        blocks.extend_from_slice(&[start.to_le_bytes(), len.to_le_bytes()].concat());
    }
    blocks
}

/// The value of a field of a line, as in `start=0x1000`.
fn field<'a>(line: &'a str, name: &str) -> &'a str {
    line.split(' ')
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        .unwrap_or_else(|| panic!("{name} in {line}"))
}

/// What a real QEMU adds to a trust domain, behind the recorder (tests/recorder), in the same order, is what is foretold.
/// Only where RAM lies, and so what the hand-off blocks say, differs: QEMU's hole begins at 2 GiB where there are more
/// than 2.75 GiB of it, Halyard's at 3 GiB.
#[test]
fn pages_are_those_that_a_real_qemu_adds() {
    let recorded = include_str!("../recorder/qemu.txt");
    let firmware = firmware::path().unwrap();
    let digest = Command::new("sha256sum").arg(&firmware).output().unwrap();
    let digest = String::from_utf8_lossy(&digest.stdout).split(' ').next().unwrap().to_owned();
    // Of another version only the memory beside its volumes can be compared.
    let same = recorded.lines().nth(1).is_some_and(|line| line.ends_with(&digest));
    let (mut launches, mut reports) = (0, BTreeMap::new());
    for launch in recorded.split("== ").skip(1) {
        let (title, lines) = launch.split_once('\n').unwrap();
        let memory = title.split(' ').next().unwrap();
        let gib: u64 = memory.trim_end_matches('G').parse().unwrap();
        let (qemu, own) = (if gib < 3 { gib } else { 2 }, gib.min(3));
        let told = lines.lines().find_map(|line| line.strip_prefix("  hob ")).unwrap();
        let expected = hand_off(qemu * GIB, (gib - qemu) * GIB);
        assert_eq!(told, digits(&expected) + "ffff080000000000", "{title}: what QEMU tells of memory");

        let report = reports.entry(memory).or_insert_with(|| foretold(&firmware, &["--memory", memory, "--events"]));
        assert_eq!(report["events"][0]["digest"], digits(&Sha384::digest(hand_off(own * GIB, (gib - own) * GIB))));
        let added: Vec<&str> = lines.lines().filter(|line| line.starts_with("INIT_MEM_REGION ")).collect();
        let pages = report["pages"].as_array().unwrap();
        assert_eq!(pages.len(), added.len(), "{title}");
        for (line, page) in added.into_iter().zip(pages) {
            let place = [field(line, "start"), field(line, "pages"), field(line, "measured")];
            let ours = [page["start"].as_str().unwrap(), &page["count"].to_string(), &page["measured"].to_string()];
            assert_eq!(ours, place, "{title}");
            let what = page["what"].as_str().unwrap();
            if what == "temporary memory"
                || what == "hand-off blocks" && qemu == own
                || what.ends_with("volume") && same
            {
                assert_eq!(page["sha384"], field(line, "sha384"), "{title}: {what}");
            }
        }
        launches += 1;
    }
    assert_eq!(launches, 12);
}

/// What `halyard measure` says of an IGVM file.
fn measure_igvm(path: &Path, bytes: &[u8], args: &[&str]) -> Run {
    fs::write(path, bytes).unwrap();
    let args = [&["measure", "--json", "--igvm", path.to_str().unwrap()], args].concat();
    run_halyard(args)
}

#[test]
fn an_igvm_file_of_the_same_pages_has_the_same_measurement() {
    let firmware = firmware::path().unwrap();
    let bytes = fs::read(&firmware).unwrap();
    let folder = TempDir::new().unwrap();
    let (path, corim) = (folder.path().join("td.igvm"), folder.path().join("td.corim"));
    // The hand-off blocks are not measured but for their addresses, so that no file has them.
    let pages = firmware::directives(&bytes).unwrap();
    let file = firmware::igvm(IgvmPlatformType::TDX, pages.clone()).unwrap();
    let run = measure_igvm(&path, &file, &["--events", "--corim", corim.to_str().unwrap()]).expect_code(0);
    let report: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
    let mrtd = firmware::mrtd_by_igvm(&bytes).unwrap();
    assert_eq!(report["mrtd"], mrtd);
    assert_eq!(report["pages"][0]["count"], 892);
    // The document names the digest, and is the same for the firmware that has the same measurement.
    let document = fs::read(&corim).unwrap();
    assert!(digits(&document).contains(&mrtd));
    measure(&firmware, &["--corim", corim.to_str().unwrap()]).expect_code(0);
    assert_eq!(fs::read(&corim).unwrap(), document);

    let twice = [&pages[..2], &pages[1..2]].concat();
    let mut headers = file.clone();
    headers[12..16].copy_from_slice(&0x4000_0000_u32.to_le_bytes());
    let mut checksum = file.clone();
    checksum[24] ^= 0x80;
    for (file, message) in [
        (firmware::igvm(IgvmPlatformType::TDX, twice).unwrap(), "pages at 0xffc85000 lie where there are others"),
        (
            firmware::igvm(IgvmPlatformType::NATIVE, pages[..1].to_vec()).unwrap(),
            "it is not for TDX: it supports NATIVE",
        ),
        (headers, "its headers are longer than 2 MiB"),
        (checksum, "it is no IGVM file that can be launched: "),
        (file[..1000].to_vec(), "it is no IGVM file that can be launched: "),
        (bytes, "it does not begin with \"IGVM\""),
        (Vec::new(), "it does not begin with \"IGVM\""),
    ] {
        let run = measure_igvm(&path, &file, &[]).expect_code(2);
        assert!(run.stderr.contains(message), "{}", run.stderr);
    }
}

/// A register after the events of a report that are its own.
fn replayed(report: &serde_json::Value, register: &str) -> String {
    let events = report["events"].as_array().unwrap().iter().filter(|event| event["register"] == register);
    let value = events.fold([0; 48], |value: [u8; 48], event| {
        let digest = bytes(event["digest"].as_str().unwrap());
        Sha384::digest([&value[..], &digest].concat()).into()
    });
    digits(&value)
}

/// The digests of a report's events of one type, by what they are of.
fn events_of<'a>(report: &'a serde_json::Value, kind: &str) -> Vec<(&'a str, &'a str)> {
    let events = report["events"].as_array().unwrap().iter().filter(|event| event["type"] == kind);
    events.map(|event| (event["what"].as_str().unwrap(), event["digest"].as_str().unwrap())).collect()
}

/// An item of CBOR (RFC 8949) whose head has this major type and number.
fn item(major: u8, number: usize, rest: &[Vec<u8>]) -> Vec<u8> {
    let head = match u8::try_from(number) {
        Ok(number @ ..24) => vec![major << 5 | number],
        Ok(number) => vec![major << 5 | 24, number],
        Err(_) => [&[major << 5 | 25][..], &u16::try_from(number).unwrap().to_be_bytes()].concat(),
    };
    [&[head], rest].concat().concat()
}

fn number(number: usize) -> Vec<u8> {
    item(0, number, &[])
}

fn string(text: &str) -> Vec<u8> {
    item(3, text.len(), &[text.into()])
}

fn array(items: &[Vec<u8>]) -> Vec<u8> {
    item(4, items.len(), items)
}

fn map(pairs: &[(usize, Vec<u8>)]) -> Vec<u8> {
    let items: Vec<_> = pairs.iter().flat_map(|(key, value)| [number(*key), value.clone()]).collect();
    item(5, pairs.len(), &items)
}

/// The CoRIM document of these measurements, as draft-ietf-rats-corim has it: in its one CoMID a reference triple, in which the
/// launch measurement is a digest, and the others are integrity registers.
fn document(report: &serde_json::Value) -> Vec<u8> {
    let measurement = |value: &serde_json::Value| bytes(value.as_str().unwrap());
    let registers = [0, 1, 2].map(|at| measurement(&report["rtmr"][at]));
    let id = Sha384::digest([&[measurement(&report["mrtd"])], &registers[..]].concat().concat());
    let id = string(&format!("Intel/TDX/{}", digits(&id[..16])));
    let digests = |digest: Vec<u8>| array(&[array(&[number(7), item(2, 48, &[digest])])]);
    let environment = map(&[(0, map(&[(1, string("Intel")), (2, string("TDX"))]))]);
    let launch = map(&[(0, string("MRTD")), (1, map(&[(2, digests(measurement(&report["mrtd"])))]))]);
    let pairs: Vec<_> = (0..).zip(registers.map(digests)).collect();
    let registers = map(&[(0, string("RTMR")), (1, map(&[(14, map(&pairs))]))]);
    let triples = map(&[(0, array(&[array(&[environment, array(&[launch, registers])])]))]);
    let comid = map(&[(1, map(&[(0, id.clone())])), (4, triples)]);
    let tags = array(&[item(6, 506, &[item(2, comid.len(), &[comid])])]);
    item(6, 501, &[map(&[(0, id), (1, tags)])])
}

/// Debian's firmware that also has Debian's key, and so starts Debian's kernels.
fn trusting(folder: &TempDir) -> PathBuf {
    let made = folder.path().join("firmware.fd");
    firmware::enroll(&firmware::path().unwrap(), &made, &firmware::DEBIANS_KEY).unwrap();
    made
}

#[test]
fn with_a_kernel_all_registers_are_foretold() {
    let folder = TempDir::new().unwrap();
    let firmware = trusting(&folder);
    let kernel = Kernel::Debian6_12Cloud.bzimage().unwrap().display().to_string();
    let initramfs = folder.path().join("initrd.img");
    fs::write(&initramfs, b"an archive").unwrap();
    let initramfs = initramfs.display().to_string();
    let words = ["--kernel", &kernel, "--initramfs", &initramfs, "--cmdline", "quiet", "--events"];
    let with = |more: &[&str]| foretold(&firmware, &[&words[..], more].concat());
    let corim = folder.path().join("td.corim");
    let report = with(&["--memory", "2G", "--cpus", "2", "--corim", corim.to_str().unwrap()]);
    assert_eq!(digits(&fs::read(&corim).unwrap()), digits(&document(&report)));
    for (number, register) in ["rtmr0", "rtmr1", "rtmr2"].into_iter().enumerate() {
        assert_eq!(report["rtmr"][number], replayed(&report, register));
    }
    // The kernel, as another program reads it: the digest ends what a signature would be of.
    let data = folder.path().join("data");
    firmware::osslsigncode(&["extract-data", "-h", "sha384"], kernel.as_ref(), &data).unwrap();
    let [("the kernel", digest)] = events_of(&report, "0x80000003")[..] else { panic!("{report}") };
    assert!(digits(&fs::read(&data).unwrap()).contains(digest), "{digest}");
    let options: Vec<u8> = "initrd=initrd quiet\0".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let expected = [
        ("the kernel's command line", &*digits(&Sha384::digest(options))),
        ("the initramfs", &digits(&Sha384::digest(b"an archive"))),
    ];
    assert_eq!(events_of(&report, "0x00000006"), expected);
    // Debian's firmware has keys of Microsoft's.
    let names: Vec<_> = events_of(&report, "0x80000001").into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["SecureBoot", "PK", "KEK", "db", "dbx"]);

    let changed = |other: &serde_json::Value| [0, 1, 2].map(|number| other["rtmr"][number] != report["rtmr"][number]);
    assert_eq!(changed(&with(&["--memory", "2G", "--cpus", "3"])), [true, false, false]);
    assert_eq!(changed(&with(&["--memory", "3G", "--cpus", "2"])), [true, false, false]);
    let more = with(&["--memory", "2G", "--cpus", "2,max=3"]);
    assert_eq!(changed(&more), [true, false, false]);

    let config = folder.path().join("vm.yaml");
    let text = format!(
        "firmware: {{path: {}}}\nkernel: {{path: {kernel}, initramfs: {initramfs}, cmdline: loud}}\n\
         memory: {{size: 2G}}\ncpus: {{count: 2}}\n",
        firmware.display()
    );
    fs::write(&config, text).unwrap();
    let of_config = |more: &[&str]| -> serde_json::Value {
        let args = [&["measure", "--json", "--config", config.to_str().unwrap()], more].concat();
        serde_json::from_slice(&run_halyard(args).expect_code(0).stdout).unwrap()
    };
    assert_eq!(changed(&of_config(&[])), [false, false, true]);
    assert_eq!(changed(&of_config(&["--cmdline", "quiet"])), [false; 3]);
}

/// An event log (TCG crypto-agile) of these events: register, type, digest.
fn event_log(events: &[(u32, u32, Vec<u8>)]) -> Vec<u8> {
    let mut log = [&[0, 0, 0, 0, 3, 0, 0, 0][..], &[0; 20], &[33, 0, 0, 0], b"Spec ID Event03\0", &[0; 8]].concat();
    log.extend_from_slice(&[1, 0, 0, 0, 12, 0, 48, 0, 0]);
    for (register, kind, digest) in events {
        log.extend([register + 1, *kind, 1].into_iter().flat_map(u32::to_le_bytes));
        log.extend_from_slice(&[12, 0]);
        log.extend_from_slice(digest);
        log.extend_from_slice(&[4, 0, 0, 0]);
        log.extend_from_slice(b"text");
    }
    log.resize(0x1_0000, 0xff);
    log
}

#[test]
fn an_event_log_is_compared_event_by_event() {
    let folder = TempDir::new().unwrap();
    let firmware = trusting(&folder);
    let kernel = Kernel::Debian6_12Cloud.bzimage().unwrap().display().to_string();
    let path = folder.path().join("CCEL");
    let words = ["--kernel", &kernel, "--events", "--event-log", path.to_str().unwrap()];
    let mut events: Vec<(u32, u32, Vec<u8>)> = foretold(&firmware, &words[..3])["events"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| {
            let text = |name: &str| event[name].as_str().unwrap();
            let register = text("register").trim_start_matches("rtmr").parse().unwrap();
            (register, u32::from_str_radix(&text("type")[2..], 16).unwrap(), bytes(text("digest")))
        })
        .collect();
    // What the guest extends RTMR3 with is its own.
    events.push((3, 6, vec![5; 48]));
    fs::write(&path, event_log(&events)).unwrap();
    let report = foretold(&firmware, &words);
    assert_eq!((&report["log"]["matches"], &report["log"]["rtmr"]), (&true.into(), &report["rtmr"]));
    let listed = report["log"]["events"].as_array().unwrap();
    assert!(listed.len() == events.len() - 1 && listed.iter().all(|event| event["found"] == "both"));

    let digest = digits(&events[3].2);
    events[3].2 = vec![7; 48];
    fs::write(&path, event_log(&events)).unwrap();
    let run = measure(&firmware, &words[..2]).expect_code(0);
    assert!(!String::from_utf8_lossy(&run.stdout).contains("log "));
    let run = measure(&firmware, &[&words[..2], &words[3..]].concat()).expect_code(9);
    let text = String::from_utf8_lossy(&run.stdout).into_owned();
    let lines: Vec<_> = text.lines().filter(|line| line.starts_with("log - ") || line.starts_with("log + ")).collect();
    let expected = [
        format!("log - rtmr0 0x80000001 {digest} SecureBoot, which is not in the log"),
        format!("log + rtmr0 0x80000001 {} text, which was not foretold", "07".repeat(48)),
    ];
    assert_eq!(lines, expected);
    let verdicts: Vec<_> = text.lines().filter(|line| line.starts_with("log   RTMR")).collect();
    let verdicts: Vec<_> = verdicts.iter().map(|line| !line.ends_with("not as foretold")).collect();
    assert_eq!(verdicts, [false, true, true]);

    let cut = fs::read(&path).unwrap()[..200].to_vec();
    for (log, args, message) in [
        (cut, &words[..], "its event 2, at byte 135, is cut off"),
        (vec![0; 100], &words, "it does not begin with \"Spec ID Event03\""),
        (vec![0; (1 << 20) + 1], &words, "it is longer than the 1048576 bytes that a log may have"),
        (Vec::new(), &words[3..], "is not foretold: firmware that is given no kernel (--kernel) goes on by what"),
    ] {
        fs::write(&path, log).unwrap();
        let run = measure(&firmware, args).expect_code(2);
        assert!(run.stderr.contains(message), "{}", run.stderr);
    }
}

#[test]
fn a_kernel_that_the_firmware_does_not_start_has_no_registers() {
    let firmware = firmware::path().unwrap();
    let folder = TempDir::new().unwrap();
    let unsigned = folder.path().join("vmlinuz").display().to_string();
    let kernel = Kernel::Debian6_12Cloud.bzimage().unwrap().display().to_string();
    firmware::osslsigncode(&["remove-signature"], kernel.as_ref(), unsigned.as_ref()).unwrap();
    for (kernel, why) in [(&unsigned, "which is not signed"), (&kernel, "which no key of it has signed")] {
        let why = format!("this firmware has secure boot on, and does not start the kernel, {why}: ");
        let report = foretold(&firmware, &["--kernel", kernel, "--events"]);
        assert!(report["not_foretold"].as_str().unwrap().starts_with(&why), "{report}");
        assert_eq!((report.get("rtmr"), report["events"].as_array().unwrap().len()), (None, 2));
        let run = measure(&firmware, &["--kernel", kernel, "--event-log", kernel]).expect_code(2);
        assert!(run.stderr.contains(&why), "{}", run.stderr);
    }
    // What signatures are of does not change with them; here neither is needed.
    let without = folder.path().join("firmware.fd");
    firmware::enroll(&firmware, &without, &["--delete", "PK"]).unwrap();
    let register = |kernel: &str| foretold(&without, &["--kernel", kernel])["rtmr"][1].clone();
    assert!(register(&kernel).is_string() && register(&kernel) == register(&unsigned));
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
        (&*plain, &["--memory", "1"], "--memory 1: size: 1 is not a multiple of the 4K that pages have"),
        (&*plain, &["--memory", "much"], "--memory much: "),
    ] {
        let run = measure(firmware, args).expect_code(2);
        assert!(run.stderr.contains(message), "{}", run.stderr);
    }
}
