//! The tables as bytes, and as an independent compiler reads them.

use std::path::Path;
use std::process::Command;

use vm_memory::GuestMemoryMmap;

use super::super::{HostBridge, Topology};
use super::*;
use hal::GpaRange;

const BASE: u64 = 0xe_0000;

fn platform(vcpus: u32) -> Platform {
    Platform::direct_boot(1 << 30, 46, Topology::flat(vcpus).unwrap()).unwrap()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The table at a guest address, cut at the length that it states.
fn table(area: &[u8], address: u64) -> &[u8] {
    let start = usize::try_from(address - BASE).unwrap();
    let len = usize::try_from(u32_at(area, start + 4)).unwrap();
    &area[start..start + len]
}

/// All tables but the RSDP, found as a guest finds them: from the RSDP through XSDT and FADT.
fn walk(area: &[u8]) -> Vec<&[u8]> {
    assert_eq!(&area[..8], b"RSD PTR ");
    assert_eq!(sum(&area[..20]), 0);
    assert_eq!(sum(&area[..36]), 0);
    let xsdt = table(area, u64_at(area, 24));
    let mut tables: Vec<&[u8]> = xsdt[36..].chunks_exact(8).map(|entry| table(area, u64_at(entry, 0))).collect();
    let dsdt = table(area, u64_at(find(&tables, b"FACP"), 140));
    tables.extend([dsdt, xsdt]);
    tables
}

fn find<'a>(tables: &[&'a [u8]], signature: &[u8; 4]) -> &'a [u8] {
    tables.iter().find(|table| table.starts_with(signature)).unwrap()
}

#[test]
fn every_table_is_found_from_the_rsdp_and_its_bytes_sum_to_zero() {
    for vcpus in [1, 2, 8, 254] {
        let area = build(&platform(vcpus), BASE);
        let tables = walk(&area);
        let names: Vec<&[u8]> = tables.iter().map(|table| &table[..4]).collect();
        assert_eq!(names, [b"FACP", b"APIC", b"MCFG", b"DSDT", b"XSDT"]);
        for table in tables {
            assert_eq!(sum(table), 0, "checksum of {}", String::from_utf8_lossy(&table[..4]));
        }
    }
}

#[test]
fn tables_of_254_vcpus_fit_into_the_area() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
    for platform in [platform(254), pluggable_platform(1, 254)] {
        write(&memory, &platform).unwrap();
    }
    let mut signature = [0; 8];
    memory.read_slice(&mut signature, GuestAddress(layout::ACPI_TABLES.start)).unwrap();
    assert_eq!(&signature, b"RSD PTR ");
}

#[test]
fn too_many_host_bridges_or_too_little_memory_are_errors() {
    let small = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0xe_1000)]).unwrap();
    let error = write(&small, &platform(254)).unwrap_err();
    assert!(error.to_string().contains("could not be written to guest memory at 0xe0000"), "{error}");

    let mut crowded = platform(254);
    let bridge = crowded.host_bridges[0].clone();
    crowded.host_bridges = vec![bridge; 10_000];
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
    let error = write(&memory, &crowded).unwrap_err();
    assert!(error.to_string().contains("131056 are reserved"), "{error}");
}

#[test]
fn the_madt_names_every_vcpu_by_its_apic_id() {
    let topology = Topology::new(2, 3, 2).unwrap();
    let mut platform = platform(1);
    platform.topology = topology;
    let area = build(&platform, BASE);
    let tables = walk(&area);
    let madt = find(&tables, b"APIC");
    assert_eq!(u32_at(madt, 36), 0xfee0_0000);
    // No 8259 beside the I/O APIC (PCAT_COMPAT).
    assert_eq!(u32_at(madt, 40), 0);

    let mut local = Vec::new();
    let mut rest = &madt[44..];
    while let [kind, len, ..] = *rest {
        let entry = &rest[..usize::from(len)];
        match kind {
            0 => local.push((entry[2], entry[3], u32_at(entry, 4))),
            1 => assert_eq!((u32_at(entry, 4), u32_at(entry, 8)), (0xfec0_0000, 0)),
            other => panic!("unexpected structure {other}"),
        }
        rest = &rest[usize::from(len)..];
    }
    let expected: Vec<_> =
        (0u8..).zip([0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]).map(|(uid, id)| (uid, id, 1)).collect();
    assert_eq!(local, expected);
}

/// A platform whose first vCPUs are there when it boots, and others can come.
fn pluggable_platform(present: u32, vcpus: u32) -> Platform {
    Platform { pluggable: Some(present), ..platform(vcpus) }
}

#[test]
fn processors_that_may_come_are_online_capable_and_those_that_stay_have_no_methods() {
    let area = build(&pluggable_platform(2, 4), BASE);
    let tables = walk(&area);
    let madt = find(&tables, b"APIC");
    let flags: Vec<u32> = madt[44..].chunks(8).take(4).map(|entry| u32_at(entry, 4)).collect();
    assert_eq!(flags, [1, 1, 2, 2]);
    let count = |table: &[u8], word: &[u8]| table.windows(word.len()).filter(|at| *at == word).count();
    let dsdt = find(&tables, b"DSDT");
    let counts = [b"_MAT", b"_STA", b"_EJ0", b"_OST", b"PSCN"].map(|name| count(dsdt, name));
    // The panic device has an _STA, too; the method that scans is called once.
    assert_eq!(counts, [3, 4, 3, 3, 2]);

    let area = build(&platform(4), BASE);
    let tables = walk(&area);
    let dsdt = find(&tables, b"DSDT");
    for name in [b"_MAT", b"_EJ0", b"_OST", b"PSCN", b"PREG"] {
        assert_eq!(count(dsdt, name), 0);
    }
}

#[test]
fn the_fadt_declares_absent_hardware_absent() {
    let area = build(&platform(1), BASE);
    let tables = walk(&area);
    let fadt = find(&tables, b"FACP");
    let boot_flags = u32_at(fadt, 109) & 0xffff;
    // Serial port; no keyboard controller, no VGA, no ASPM, no CMOS clock.
    assert_eq!(boot_flags, 1 | 1 << 2 | 1 << 4 | 1 << 5);
    // HW_REDUCED_ACPI and RESET_REG_SUP.
    assert_eq!(u32_at(fadt, 112) & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
    assert_eq!(&fadt[116..120], [1, 8, 0, 1]);
    assert_eq!((u64_at(fadt, 120), fadt[128]), (0x622, 1));
    assert_eq!((u64_at(fadt, 248), u64_at(fadt, 260)), (0x620, 0x621));

    let mut firmware = platform(1);
    (firmware.vga, firmware.i8042, firmware.cmos_rtc) = (true, true, true);
    let area = build(&firmware, BASE);
    let tables = walk(&area);
    assert_eq!(u32_at(find(&tables, b"FACP"), 109) & 0xffff, 1 | 1 << 1 | 1 << 4);
}

#[test]
fn the_mcfg_ends_at_the_last_bus_in_use() {
    let mut platform = platform(1);
    platform.host_bridges[0].last_bus = 3;
    let area = build(&platform, BASE);
    let tables = walk(&area);
    let mcfg = find(&tables, b"MCFG");
    assert_eq!(mcfg.len(), 44 + 16);
    assert_eq!(u64_at(mcfg, 44), 0xe000_0000);
    assert_eq!(mcfg[52..56], [0, 0, 0, 3]);
}

/// Does what a script says, as firmware does, with the tables at [`BASE`]. Returns them with the root pointer in front.
fn run_script(linked: &LinkedTables) -> Vec<u8> {
    let (mut tables, mut rsdp) = (linked.tables.clone(), linked.rsdp.clone());
    let room = rsdp.len().next_multiple_of(64);
    let base = BASE + u64::try_from(room).unwrap();
    let mut allocated = Vec::new();
    for command in linked.loader.chunks_exact(128) {
        let name = |at: usize| {
            let bytes = command[at..at + 56].iter().copied().take_while(|byte| *byte != 0).collect();
            String::from_utf8(bytes).unwrap()
        };
        let number = |at: usize| usize::try_from(u32_at(command, at)).unwrap();
        let file = name(4);
        let bytes = if file == "etc/acpi/rsdp" { &mut rsdp } else { &mut tables };
        match command[0] {
            1 => allocated.push((file, number(60), command[64])),
            2 => {
                assert_eq!((name(60).as_str(), command[120]), ("etc/acpi/tables", 8));
                let at = number(116);
                let address = base + u64_at(bytes, at);
                bytes[at..at + 8].copy_from_slice(&address.to_le_bytes());
            }
            3 => {
                let (at, start, length) = (number(60), number(64), number(68));
                bytes[at] = sum(&bytes[start..start + length]).wrapping_neg();
            }
            other => panic!("command {other}"),
        }
    }
    assert_eq!(allocated, [("etc/acpi/rsdp".to_owned(), 16, 2), ("etc/acpi/tables".to_owned(), 64, 1)]);
    rsdp.resize(room, 0);
    rsdp.extend(tables);
    rsdp
}

#[test]
fn tables_that_firmware_links_are_the_same_and_sound() {
    for platform in [platform(1), pluggable_platform(1, 254)] {
        let linked = link(&platform);
        assert_eq!(linked, link(&platform));
        let area = run_script(&linked);
        let tables = walk(&area);
        let direct = build(&platform, BASE);
        for (table, other) in tables.iter().zip(walk(&direct)) {
            assert_eq!(sum(table), 0, "checksum of {}", String::from_utf8_lossy(&table[..4]));
            assert_eq!((&table[..8], table.len()), (&other[..8], other.len()));
        }
        assert_eq!(find(&tables, b"DSDT"), find(&walk(&direct), b"DSDT"));
    }
}

/// Everything that a platform can show at once.
fn crowded_platform() -> Platform {
    let mut platform = platform(1);
    platform.topology = Topology::new(2, 64, 1).unwrap();
    let first = platform.host_bridges[0].clone();
    platform.host_bridges = vec![
        HostBridge { last_bus: 7, proximity: Some(0), mmio32: GpaRange { start: 0xc000_0000, len: 1 << 28 }, ..first },
        HostBridge {
            segment: 0,
            first_bus: 8,
            last_bus: 15,
            ecam_base: 0xe000_0000,
            mmio32: GpaRange { start: 0xd000_0000, len: 1 << 28 },
            mmio64: GpaRange { start: 1 << 45, len: 1 << 40 },
            proximity: Some(1),
        },
    ];
    platform
}

/// Disassembles a table, and compiles the result again where it is AML. Returns the source.
fn iasl(directory: &Path, name: &str, table: &[u8]) -> String {
    let run = |arguments: &[&str]| {
        let output = Command::new("iasl").args(arguments).current_dir(directory).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "iasl {arguments:?} on {name}: {text}");
        text
    };
    std::fs::write(directory.join(format!("{name}.dat")), table).unwrap();
    let text = run(&["-d", &format!("{name}.dat")]);
    assert!(!text.contains("Error") && !text.contains("Warning"), "disassembling {name}: {text}");
    let text = run(&["-we", &format!("{name}.dsl")]);
    if name == "DSDT" {
        assert!(text.contains(" 0 Errors, 0 Warnings"), "compiling {name}: {text}");
    }
    std::fs::read_to_string(directory.join(format!("{name}.dsl"))).unwrap()
}

#[test]
fn an_independent_compiler_reads_the_tables() {
    if Command::new("iasl").arg("-v").output().is_err() {
        eprintln!("skipped: iasl is not installed (Debian package acpica-tools)");
        return;
    }
    for platform in [platform(254), pluggable_platform(1, 254), crowded_platform()] {
        let area = build(&platform, BASE);
        let directory = tempfile::tempdir().unwrap();
        let mut dsdt = String::new();
        for table in walk(&area) {
            let name = String::from_utf8_lossy(&table[..4]).into_owned();
            let source = iasl(directory.path(), &name, table);
            if name == "DSDT" {
                dsdt = source;
            }
        }
        for expected in ["_S5", "PNP0A08", "PNP0C02", "PNP0501", "PNP0C0C", "ACPI0013", "ACPI0007", "QEMU0001", "_OSC"]
        {
            assert!(dsdt.contains(expected), "{expected} in {dsdt}");
        }
    }
}
