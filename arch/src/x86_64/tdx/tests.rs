//! Firmware made for the purpose, good and bad, and the values that other programs and real hardware gave.

mod captured;
mod signed;

use std::fs::File;
use std::io::Write;

use hal::GpaRange;
use sha2::{Digest, Sha384};

use super::*;

const GIB: u64 = 1 << 30;
const FOUR_GIB: u64 = 4 * GIB;
const SIZE: usize = 0x10000;

/// A section as it stands in a file: offset, bytes in the file, address, bytes of memory, type, attributes.
type Raw = (u32, u32, u64, u64, u32, u32);

const FILE: u64 = FOUR_GIB - SIZE as u64;
const BFV: Raw = (0x4000, 0xc000, FILE + 0x4000, 0xc000, 0, 1);
const CFV: Raw = (0, 0x4000, FILE, 0x4000, 1, 0);
const HOB: Raw = (0, 0, 0x80_9000, 0x2000, 2, 0);
const TEMP: Raw = (0, 0, 0x81_0000, 0x1_0000, 3, 0);

/// The sections of Debian's ovmf-inteltdx 2026.08, in its order.
const DEBIAN: [Raw; 6] = [
    (0x8_4000, 0x37_c000, 0xffc8_4000, 0x37_c000, 0, 1),
    (0, 0x8_4000, 0xffc0_0000, 0x8_4000, 1, 0),
    (0, 0, 0x81_0000, 0x1_0000, 3, 0),
    (0, 0, 0x80_b000, 0x2000, 3, 0),
    (0, 0, 0x80_9000, 0x2000, 2, 0),
    (0, 0, 0x80_0000, 0x6000, 3, 0),
];

/// A file of `size` bytes that says this of itself.
fn firmware(size: usize, sections: &[Raw]) -> Vec<u8> {
    let mut file: Vec<u8> = (0..=250_u8).cycle().take(size).collect();
    let mut descriptor = b"TDVF".to_vec();
    let count = u32::try_from(sections.len()).unwrap();
    for word in [16 + 32 * count, 1, count] {
        descriptor.extend_from_slice(&word.to_le_bytes());
    }
    for (offset, raw, start, len, kind, attributes) in sections {
        descriptor.extend_from_slice(&[offset.to_le_bytes(), raw.to_le_bytes()].concat());
        descriptor.extend_from_slice(&[start.to_le_bytes(), len.to_le_bytes()].concat());
        descriptor.extend_from_slice(&[kind.to_le_bytes(), attributes.to_le_bytes()].concat());
    }
    let distance = 0x800_u32;
    put(&mut file, size - 0x800, &descriptor);
    // Read backwards: the table's own entry, ours, and one of somebody else's in front of it.
    let mut table = Vec::new();
    for (data, guid) in [
        (&[7; 5][..], [0xee; 16]),
        (&distance.to_le_bytes()[..], *b"\x35\x65\x7a\xe4\x4a\x98\x98\x47\x86\x5e\x46\x85\xa7\xbf\x8e\xc2"),
    ] {
        table.extend_from_slice(data);
        table.extend_from_slice(&u16::try_from(data.len() + 18).unwrap().to_le_bytes());
        table.extend_from_slice(&guid);
    }
    table.extend_from_slice(&u16::try_from(table.len() + 18).unwrap().to_le_bytes());
    table.extend_from_slice(b"\xde\x82\xb5\x96\xb2\x1f\xf7\x45\xba\xea\xa3\x66\xc5\x5a\x08\x2d");
    put(&mut file, size - 0x20 - table.len(), &table);
    file
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

fn ram(len: u64) -> [GpaRange; 1] {
    [GpaRange { start: 0, len }]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_firmwares_sections_are_read_in_its_order() {
    let file = firmware(SIZE, &[BFV, CFV, TEMP, HOB]);
    let tdvf = Tdvf::parse(&file).unwrap();
    let kinds: Vec<_> = tdvf.sections.iter().map(|section| (section.kind, section.measured)).collect();
    assert_eq!(
        kinds,
        [
            (SectionKind::BootVolume, true),
            (SectionKind::ConfigurationVolume, false),
            (SectionKind::Temporary, false),
            (SectionKind::HandOff, false)
        ]
    );
    assert_eq!(tdvf.sections[0].data, 0x4000..SIZE);
    assert_eq!(tdvf.hand_off().unwrap().memory, GpaRange { start: 0x80_9000, len: 0x2000 });
}

#[test]
fn what_is_wrong_with_a_firmware_is_named() {
    let with = |change: fn(&mut Raw)| {
        let mut bad = BFV;
        change(&mut bad);
        firmware(SIZE, &[bad, CFV, TEMP, HOB])
    };
    for (file, message) in [
        (with(|bad| bad.4 = 9), "section 0 of its TDVF descriptor is of type 9; 0 to 3 are known"),
        (with(|bad| bad.4 = 5), "only td-shim has"),
        (with(|bad| bad.5 = 2), "are to be added later (bit 1): attributes 0x2"),
        (with(|bad| bad.5 = 0x8000_0001), "attributes 0x80000001"),
        (with(|bad| bad.0 = u32::MAX), "has 0xc000 bytes at 0xffffffff in a file of 0x10000 bytes"),
        (with(|bad| bad.1 = 0xd000), "in a file of"),
        (with(|bad| bad.1 = 0), "has 0 bytes in the file; only volumes have some"),
        (with(|bad| bad.2 = u64::MAX - 0xfff), "not below 4 GiB"),
        (with(|bad| bad.3 = u64::MAX), "not below 4 GiB"),
        (with(|bad| bad.3 = 0), "has 0x0 bytes at 0xffff4000"),
        (with(|bad| bad.3 = 0xb800), "no whole pages"),
        (with(|bad| bad.2 = FILE + 0x2000), "section 0 of its TDVF descriptor overlaps section 1"),
        (with(|bad| bad.2 = 0x100_0000), "lies from 0x1000000"),
        (firmware(SIZE, &[BFV, CFV, TEMP]), "has 0 sections of the kind TD HOB"),
        (firmware(SIZE, &[CFV, TEMP, HOB]), "has 0 sections of the kind boot volume"),
        (firmware(SIZE, &[BFV, HOB, TEMP, (0, 0, 0x10_0000, 0x1000, 2, 0)]), "has 2 sections of the kind TD HOB"),
        (firmware(SIZE, &[BFV, (5, 0x1000, FILE, 0x1000, 2, 0), TEMP]), "only volumes have some"),
        (Vec::new(), "it is 0 bytes long"),
        (vec![0; 4097], "it is 4097 bytes long"),
        (vec![0; 4096], "package ovmf-inteltdx"),
    ] {
        let error = Tdvf::parse(&file).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn a_descriptor_that_cannot_be_believed_is_refused() {
    let good = firmware(SIZE, &[BFV, HOB]);
    let descriptor = SIZE - 0x800;
    let table = SIZE - 0x20 - 18;
    for (at, bytes, message) in [
        (descriptor, &b"XXXX"[..], "instead of \"TDVF\""),
        (descriptor + 8, &[2, 0, 0, 0], "has version 2"),
        (descriptor + 4, &[80, 0, 0, 1], "bytes long, and to have 2 sections"),
        (descriptor + 12, &[0xff; 4], "and to have 4294967295 sections"),
        // The table's length, and that of the entry before it.
        (table, &[0xff, 0xff], "its table is 65535 bytes long"),
        (table, &[3, 0], "its table is 3 bytes long"),
        (table - 18, &[0xff, 0xff], "an entry of its table is cut off"),
        (table - 18, &[20, 0], "is told of in 2 bytes instead of 4"),
        (table - 16, &[0xee; 16], "no TDVF entry"),
        (table - 22, &[0xff; 4], "lies 0xffffffff bytes before the end"),
        (table - 22, &[8, 0, 0, 0], "is cut off by the file's end"),
        (table + 2, &[0; 16], "no table of GUIDs"),
    ] {
        let mut file = good.clone();
        put(&mut file, at, bytes);
        let error = Tdvf::parse(&file).unwrap_err().to_string();
        assert!(error.contains(message), "{error}, and «{message}» was to be in it");
    }
    // 2^27 sections, as long as they say, end behind the file.
    let mut file = good;
    put(&mut file, descriptor + 4, &[16, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 8]);
    assert!(Tdvf::parse(&file).is_err());
}

#[test]
fn the_hand_off_of_2_gib_is_what_a_real_quote_was_made_over() {
    let file = firmware(4 << 20, &DEBIAN);
    let plan = LaunchPlan::from_firmware(&file, &ram(2 * GIB)).unwrap();
    assert_eq!(plan.hand_off, 0x80_9000);
    let measured = plan.measured_hand_off();
    assert_eq!(measured.len(), 440);
    // The first event of RTMR0 behind a quote from hardware (QEMU 8.2.2, 2 GiB), and the bytes that QEMU 11.1.3 writes.
    assert_eq!(
        hex(&Sha384::digest(measured)),
        "0b8772e5b0b41b83e6044a68397e02f49fb47066b4fbe4917ea2c45c64f323fdacbb37948f821ebaf8bc9c938ba8a749"
    );
}

#[test]
fn the_hand_off_of_4_gib_in_two_ranges_is_qemus() {
    let file = firmware(4 << 20, &DEBIAN);
    let ram = [GpaRange { start: 0, len: 2 * GIB }, GpaRange { start: FOUR_GIB, len: 2 * GIB }];
    let plan = LaunchPlan::from_firmware(&file, &ram).unwrap();
    let digest = hex(&Sha384::digest(plan.measured_hand_off()));
    assert!(digest.starts_with("5b684faf8d02a733945f821d9cdd1708"), "{digest}");
}

#[test]
fn firmware_needs_ram_where_its_sections_are_and_room_for_its_list() {
    let file = firmware(4 << 20, &DEBIAN);
    let error = LaunchPlan::from_firmware(&file, &ram(8 << 20)).unwrap_err().to_string();
    assert!(error.contains("needs memory from 0x800000 to 0x806000, which is not RAM"), "{error}");
    // Each hole in the RAM, and each section, makes the list longer.
    let ram: Vec<GpaRange> = (0..200).map(|number| GpaRange { start: number * GIB, len: GIB / 2 }).collect();
    let error = LaunchPlan::from_firmware(&file, &ram).unwrap_err().to_string();
    assert!(error.contains("has 8192 bytes, and"), "{error}");
}

#[test]
fn a_measurement_is_of_pages_in_their_order_and_of_contents_where_they_count() {
    let page = |contents: &[u8], measured| LaunchRegion {
        kind: SectionKind::BootVolume,
        memory: GpaRange { start: 0x1000, len: 0x1000 },
        contents: contents.to_vec().into(),
        measured,
    };
    let mrtd = |regions| measure::mrtd(&LaunchPlan { regions, hand_off: 0 });
    // By hand: TDH.MEM.PAGE.ADD of the page, then sixteen TDH.MR.EXTEND.
    let block = |name: &str, address: u64| {
        let mut block = name.as_bytes().to_vec();
        block.resize(16, 0);
        block.extend_from_slice(&address.to_le_bytes());
        block.resize(128, 0);
        block
    };
    let mut expected = block("MEM.PAGE.ADD", 0x1000);
    assert_eq!(mrtd(vec![page(&[1; 300], false)]).as_slice(), Sha384::digest(&expected).as_slice());
    let mut contents = vec![1; 300];
    contents.resize(4096, 0);
    for (number, chunk) in (0..).zip(contents.chunks(256)) {
        expected.extend(block("MR.EXTEND", 0x1000 + number * 256));
        expected.extend_from_slice(chunk);
    }
    assert_eq!(mrtd(vec![page(&[1; 300], true)]).as_slice(), Sha384::digest(&expected).as_slice());
}

/// A configuration volume with these variables: name, vendor's first byte, data.
fn volume(store: [u8; 16], variables: &[(&str, [u8; 16], &[u8])]) -> Vec<u8> {
    let mut volume = vec![0; 72 + 28];
    volume[48] = 72;
    volume[72..88].copy_from_slice(&store);
    for (name, vendor, data) in variables {
        let name: Vec<u8> = format!("{name}\0").encode_utf16().flat_map(u16::to_le_bytes).collect();
        let mut header = vec![0; 60];
        header[..4].copy_from_slice(&[0xaa, 0x55, 0x3f, 0]);
        header[36..40].copy_from_slice(&u32::try_from(name.len()).unwrap().to_le_bytes());
        header[40..44].copy_from_slice(&u32::try_from(data.len()).unwrap().to_le_bytes());
        header[44..].copy_from_slice(vendor);
        volume.extend([header, name, data.to_vec()].concat());
        volume.resize(volume.len().next_multiple_of(4), 0xff);
    }
    volume.resize(volume.len() + 100, 0xff);
    volume
}

const AUTHENTICATED: [u8; 16] = *b"\x78\x2c\xf3\xaa\x7b\x94\x9a\x43\xa1\x80\x2e\x14\x4e\xc3\x77\x92";
const GLOBAL: [u8; 16] = *b"\x61\xdf\xe4\x8b\xca\x93\xd2\x11\xaa\x0d\x00\xe0\x98\x03\x2b\x8c";
const SECURITY: [u8; 16] = *b"\xcb\xb2\x19\xd7\x3a\x3d\x96\x45\xa3\xbc\xda\xd0\x0e\x67\x65\x6f";

fn start_of(digest: &[u8; 48]) -> u32 {
    u32::from_be_bytes(*digest.first_chunk().unwrap())
}

/// What an event log of real hardware has for firmware without secure boot: each variable is missing.
#[test]
fn variables_that_are_missing_are_measured_as_hardware_did() {
    let other_store = volume([0; 16], &[("PK", GLOBAL, b"key")]);
    let none = Variables::read(&other_store);
    let digests: Vec<_> = none.measured().iter().map(|(name, digest)| (*name, start_of(digest))).collect();
    let expected = [
        ("SecureBoot", 0x9dc3_a1f8),
        ("PK", 0x6f2e_3cbc),
        ("KEK", 0xd607_c0ef),
        ("db", 0x08a7_4f89),
        ("dbx", 0x18cc_6e01),
    ];
    assert_eq!(digests, expected);
    assert!(!none.secure_boot());
    assert_eq!(Variables::read(&[]).measured(), none.measured());
}

#[test]
fn a_platform_key_is_secure_boot() {
    let all = volume(
        AUTHENTICATED,
        &[("PK", GLOBAL, b"key"), ("dbt", SECURITY, b"later"), ("db", SECURITY, b"good"), ("db", GLOBAL, b"other")],
    );
    let variables = Variables::read(&all);
    assert!(variables.secure_boot());
    let measured = variables.measured();
    let names: Vec<_> = measured.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["SecureBoot", "PK", "KEK", "db", "dbx", "dbt"]);
    let expected =
        Sha384::digest([&SECURITY[..], &[2, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0], b"d\0b\0good"].concat());
    assert_eq!(measured[3].1, *expected);
    let empty = volume(AUTHENTICATED, &[]);
    let empty = Variables::read(&empty);
    assert!(!empty.secure_boot() && empty.measured()[0] != measured[0]);
    // A deleted variable, and one that ends beyond the volume.
    let mut changed = all.clone();
    changed[100 + 2] = 0x3c;
    assert!(!Variables::read(&changed).secure_boot());
    changed[100 + 40..100 + 44].fill(0xff);
    assert_eq!(Variables::read(&changed).measured(), empty.measured());
}

/// An executable as short as there is one.
fn pe() -> Vec<u8> {
    let mut pe = vec![0; 0x400];
    pe[..2].copy_from_slice(b"MZ");
    pe[0x3c] = 0x40;
    pe[0x40..0x44].copy_from_slice(b"PE\0\0");
    pe[0x54] = 240;
    pe[0x58..0x5a].copy_from_slice(&[0x0b, 2]);
    pe[0x58 + 60..0x58 + 62].copy_from_slice(&[0, 2]);
    pe
}

fn executable() -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&pe()).unwrap();
    file
}

/// The events of a log of real hardware, and RTMRs as they follow from events.
#[test]
fn what_a_kernel_is_given_is_measured_as_hardware_did() {
    let kernel = executable();
    let given = events::MeasuredKernel { kernel: &kernel, initramfs: Some(&kernel), cmdline: "quiet" };
    let all = events::of_kernel(&given).unwrap();
    let seen: Vec<_> = all.iter().map(|event| (event.register, event.kind)).collect();
    let application = (1, 0x8000_0003);
    assert_eq!(seen, [application, (1, 0x8000_0007), (1, 4), (1, 0x8000_0007), (1, 0x8000_0007), (2, 6), (2, 6)]);
    let digests: Vec<_> = all[1..5].iter().map(|event| start_of(&event.digest)).collect();
    assert_eq!(digests, [0x77a0_dab2, 0x3943_41b7, 0x214b_0bef, 0x0a2e_01c8]);
    let options: Vec<u8> = "initrd=initrd quiet\0".encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert_eq!((all[5].digest, all[6].digest), (Sha384::digest(options).into(), Sha384::digest(pe()).into()));
    let last = Sha384::digest([[0; 48], all[5].digest].concat());
    let last: [u8; 48] = Sha384::digest([&last[..], &all[6].digest].concat()).into();
    let registers = events::registers(&all);
    assert_eq!((registers[0], registers[2]), ([0; 48], last));
}
