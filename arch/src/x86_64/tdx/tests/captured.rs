//! What is foretold beside what firmware and kernels did on hardware, and event logs as they are read.

use super::log::{Found, LogError, compare, read};
use super::measure::{Digest384, Event};
use super::*;
use crate::firmware::{Item, ItemContents, ItemKey};

const CAPTURED: &str = include_str!("captured.txt");

fn digest(text: &str) -> Digest384 {
    std::array::from_fn(|byte| u8::from_str_radix(&text[2 * byte..2 * byte + 2], 16).unwrap())
}

/// The digests of lines that begin with a sign.
fn digests(sign: &str) -> Vec<Digest384> {
    CAPTURED.lines().filter_map(|line| line.strip_prefix(sign)).map(digest).collect()
}

/// The captured log's events, of all registers in the order in which they came.
fn events() -> Vec<Event> {
    let lines = CAPTURED.lines().filter(|line| line.starts_with(|first: char| first.is_ascii_digit()));
    lines
        .map(|line| {
            let mut words = line.splitn(4, ' ');
            let mut word = || words.next().unwrap();
            Event {
                register: word().parse().unwrap(),
                kind: u32::from_str_radix(word(), 16).unwrap(),
                digest: digest(word()),
                what: word().into(),
            }
        })
        .collect()
}

#[test]
fn registers_of_captured_events_are_those_of_the_quotes() {
    let events = events();
    assert_eq!(events::registers(&events).to_vec(), digests("= "));
    let mut other = digests("+ ").into_iter();
    let tables = |event: Event| match event.kind {
        0xa => Event { digest: other.next().unwrap(), ..event },
        _ => event,
    };
    let other: Vec<Event> = events.into_iter().map(tables).collect();
    assert_eq!(events::registers(&other)[..1], digests("* "));
}

/// Of a guest with as much memory and firmware of the same layout, all events are foretold but for those of what is another
/// machine's, in the same order.
#[test]
fn a_captured_log_is_what_is_foretold() {
    let file = firmware(4 << 20, &DEBIAN);
    let plan = LaunchPlan::from_firmware(&file, &ram(2 * GIB)).unwrap();
    let table = |name| Item { key: ItemKey::Name(name), contents: ItemContents::Bytes(vec![1]) };
    let items = ["etc/acpi/tables", "etc/acpi/rsdp", "etc/table-loader"].map(table);
    let kernel = executable();
    let given = events::MeasuredKernel { kernel: &kernel, initramfs: Some(&kernel), cmdline: "quiet" };
    let mut foretold = events::of_firmware(&plan, &items, None);
    foretold.extend(events::of_kernel(&given).unwrap());

    let captured = events();
    let order = |events: &[Event], register| -> Vec<u32> {
        events.iter().filter(|event| event.register == register).map(|event| event.kind).collect()
    };
    for register in 0..3 {
        assert_eq!(order(&foretold, register), order(&captured, register), "RTMR{register}");
    }
    let of = |found| -> Vec<String> {
        let compared = compare(&foretold, &captured);
        compared.into_iter().filter(|(_, other)| *other == found).map(|(event, _)| event.what.to_string()).collect()
    };
    let others = [
        "the configuration volume",
        "etc/table-loader",
        "etc/acpi/rsdp",
        "etc/acpi/tables",
        "Boot0000",
        "the kernel",
        "the kernel's command line",
        "the initramfs",
    ];
    assert_eq!(of(Found::Foretold), others);
    assert_eq!(of(Found::Both).len(), captured.len() - others.len());
    assert_eq!(of(Found::Logged).len(), others.len());
}

/// QEMU 10.2.4 and edk2 2026-02 on hardware (the fixtures of github.com/aleph-im's measurements): RTMR2 with a command line and
/// an initramfs whose SHA-384 is known.
#[test]
fn load_options_are_measured_as_hardware_did() {
    let kernel = executable();
    let cmdline = "root=LABEL=cloudimg-rootfs ro console=ttyS0";
    let given = events::MeasuredKernel { kernel: &kernel, initramfs: Some(&kernel), cmdline };
    let mut events = events::of_kernel(&given).unwrap().split_off(5);
    events[1].digest =
        digest("88de90bedcc560064688c74ccd6609a25ed9d48b0a0e13d8b2a558212724d8755b2c8114dcf04b8d51ea4cf7782e3091");
    let expected = "972547466cb6bcb8a23cd479e9258c3affbbc4f0ba2805d732477200d0dff8432447c7a775e70453cdb51f018a306ece";
    assert_eq!(hex(&events::registers(&events)[2]), expected);
}

/// A store that knows secure boot, without keys: what an event log of hardware, and one of OVMF 2025-08, have.
#[test]
fn secure_boot_that_is_off_is_measured_as_hardware_did() {
    let empty = volume(AUTHENTICATED, &[]);
    assert_eq!(start_of(&Variables::read(&empty).measured()[0].1), 0xcfa4_e2c6);
}

/// The first event of a log, with these algorithms and lengths of digests, as OVMF writes it.
fn first(algorithms: &[(u16, u16)]) -> Vec<u8> {
    let mut log = vec![0; 32];
    log[4] = 3;
    let mut event = b"Spec ID Event03\0\0\0\0\0\0\x02\0\x02".to_vec();
    event.extend_from_slice(&u32::try_from(algorithms.len()).unwrap().to_le_bytes());
    event.extend(algorithms.iter().flat_map(|(id, length)| [id.to_le_bytes(), length.to_le_bytes()]).flatten());
    event.push(0);
    log[28..].copy_from_slice(&u32::try_from(event.len()).unwrap().to_le_bytes());
    log.extend(event);
    log
}

/// An event as it stands in a log.
fn entry(index: u32, kind: u32, digests: &[(u16, &[u8])], data: &[u8]) -> Vec<u8> {
    let words = [index, kind, u32::try_from(digests.len()).unwrap()];
    let mut entry: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    for (id, digest) in digests {
        entry.extend_from_slice(&id.to_le_bytes());
        entry.extend_from_slice(digest);
    }
    entry.extend_from_slice(&u32::try_from(data.len()).unwrap().to_le_bytes());
    entry.extend_from_slice(data);
    entry
}

#[test]
fn a_log_is_read_up_to_what_fills_it() {
    let one = [(12, 48)];
    let captured = events();
    let mut log = first(&one);
    for Event { register, kind, what, digest } in &captured {
        log.extend(entry(u32::from(*register) + 1, *kind, &[(12, digest)], what.as_bytes()));
    }
    for filler in [&[][..], &[0xff; 100], &[0; 100]] {
        let read = read(&[&log, filler].concat()).unwrap();
        assert_eq!(events::registers(&read), events::registers(&captured));
        assert_eq!(read[0].what, "TdxTable");
    }
    // The BootOrder of a log that OVMF wrote, with a name of nine characters, beside a SHA-1; what is no action does not count.
    let order =
        [&[0x61; 16][..], &9_u64.to_le_bytes(), &2_u64.to_le_bytes(), b"B\0o\0o\0t\0O\0r\0d\0e\0r\0\0\0"].concat();
    let mut log = first(&[(4, 20), (12, 48)]);
    log.extend(entry(1, 3, &[(4, &[1; 20]), (12, &[2; 48])], b"StartupLocality"));
    log.extend(entry(1, 0x8000_0002, &[(4, &[1; 20]), (12, &[2; 48])], &order));
    let expected = Event { register: 0, kind: 0x8000_0002, what: "BootOrder".into(), digest: [2; 48] };
    assert_eq!(read(&log).unwrap(), [expected]);
}

#[test]
fn what_is_wrong_with_a_log_is_named() {
    let good = [first(&[(12, 48)]), entry(1, 4, &[(12, &[3; 48])], &[0; 4])].concat();
    let start = good.len() - 12 - 2 - 48 - 4 - 4;
    let changed = |at: usize, bytes: &[u8]| {
        let mut log = good.clone();
        put(&mut log, at, bytes);
        log
    };
    for log in [
        Vec::new(),
        good[..40].to_vec(),
        first(&[]),
        first(&[(4, 20)]),
        first(&[(12, 47)]),
        changed(4, &[4]),
        changed(28, &[0xff; 4]),
        changed(32, b"spec"),
        changed(56, &[0xff; 4]),
    ] {
        assert_eq!(read(&log), Err(LogError::Header));
    }
    for (log, message) in [
        (good[..good.len() - 1].to_vec(), "its event 1, at byte 65, is cut off"),
        (good[..start + 20].to_vec(), "is cut off"),
        (good[..start + 5].to_vec(), "is cut off"),
        (changed(start + 8, &[0; 4]), "has other digests"),
        (changed(start + 8, &[0xff; 4]), "is cut off"),
        (changed(start + 12, &[11]), "has other digests"),
        (changed(good.len() - 8, &[0xff; 4]), "is cut off"),
        (changed(start, &[5]), "is of no register"),
        (changed(start + 1, &[1]), "is of no register"),
    ] {
        let error = read(&log).unwrap_err().to_string();
        assert!(error.contains(message), "{error}, and «{message}» was to be in it");
    }
    // An event of MRTD, which begins as what fills a log does not.
    let mrtd = [first(&[(12, 48)]), entry(0, 1, &[(12, &[3; 48])], &[])].concat();
    assert!(read(&mrtd).is_ok_and(|events| events.is_empty()));
}

#[test]
fn two_lists_differ_in_as_little_as_there_is() {
    let event = |digest: u8| Event { register: 1, kind: 4, what: "-".into(), digest: [digest; 48] };
    let list = |digests: &[u8]| digests.iter().map(|digest| event(*digest)).collect::<Vec<_>>();
    let told = |foretold: &[u8], logged: &[u8]| -> String {
        let (foretold, mut logged) = (list(foretold), list(logged));
        // Of RTMR3 nothing is said.
        logged.push(Event { register: 3, ..event(9) });
        let word = |(event, found): (&Event, Found)| match found {
            Found::Both => format!("{}", event.digest[0]),
            Found::Foretold => format!("-{}", event.digest[0]),
            Found::Logged => format!("+{}", event.digest[0]),
        };
        compare(&foretold, &logged).into_iter().map(word).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(told(&[1, 2, 3], &[1, 2, 3]), "1 2 3");
    assert_eq!(told(&[1, 2, 3], &[1, 4, 3]), "1 -2 +4 3");
    assert_eq!(told(&[1, 1, 2], &[3, 1, 2]), "-1 +3 1 2");
    assert_eq!(told(&[], &[1]), "+1");
    assert_eq!(told(&[1, 2], &[]), "-1 -2");
}
