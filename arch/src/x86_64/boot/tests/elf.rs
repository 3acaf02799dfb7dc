//! ELF files.

use super::super::Protocol;
use super::images::*;
use crate::layout;

const TEXT: u64 = 16 * MIB;

fn plain() -> Vec<u8> {
    elf(TEXT + 1, &[load(TEXT, b"text", 4), load(TEXT + 0x1000, b"data", 0x3000)])
}

#[test]
fn segments_go_to_their_physical_addresses() {
    let image = plain();
    let (loaded, memory) = Case::new(&image).load();
    assert_eq!(loaded.protocol, Protocol::Linux64);
    assert_eq!(loaded.registers.regs.rip, TEXT + 1);
    assert_eq!(read(&memory, TEXT, 5), b"text\0");
    assert_eq!(read(&memory, TEXT + 0x1000, 5), b"data\0");
    assert_eq!((loaded.kernel.start, loaded.kernel.len), (TEXT, 0x4000));
}

#[test]
fn a_pvh_note_chooses_pvh() {
    let image = elf(TEXT, &[load(TEXT, b"code of the guest", 64), pvh_note(0x100_0008)]);
    let (loaded, _) = Case::new(&image).load();
    assert_eq!(loaded.protocol, Protocol::Pvh);
    assert_eq!(loaded.registers.regs.rip, 0x100_0008);

    let linux = Case { protocol: Some(Protocol::Linux64), ..Case::new(&image) };
    let (loaded, _) = linux.load();
    assert_eq!((loaded.protocol, loaded.registers.regs.rip), (Protocol::Linux64, TEXT));
}

#[test]
fn the_pvh_note_is_found_among_others() {
    let entry = 0x100_0004u32.to_le_bytes();
    let text = load(TEXT, b"code of the guest", 64);
    let property = notes(&note(b"GNU\0", 5, &[0; 20], 8), 8);
    let other_names = [note(b"GNU\0", 18, &entry, 4), note(b"Xen\0", 6, b"linux\0", 4)].concat();
    let wide = (0x100_0004u64).to_le_bytes();
    for segments in [
        // A segment of other notes before it and behind it.
        vec![property.clone(), text.clone(), pvh_note(0x100_0004), property.clone()],
        // Other notes in front of it in one segment.
        vec![text.clone(), notes(&[other_names.clone(), note(b"Xen\0", 18, &entry, 4)].concat(), 4)],
        // Eight bytes long, in a segment aligned to eight.
        vec![text.clone(), notes(&[note(b"GNU\0", 5, &[0; 20], 8), note(b"Xen\0", 18, &wide, 8)].concat(), 8)],
    ] {
        let image = elf(TEXT, &segments);
        let (loaded, _) = Case::new(&image).load();
        assert_eq!((loaded.protocol, loaded.registers.regs.rip), (Protocol::Pvh, 0x100_0004));
    }
    let image = elf(TEXT, &[text, notes(&other_names, 4)]);
    assert_eq!(Case::new(&image).load().0.protocol, Protocol::Linux64);
}

#[test]
fn headers_beyond_the_first_page_are_read() {
    let mut image = plain();
    let headers = image[64..64 + 112].to_vec();
    image.resize(0x5000, 0);
    put(&mut image, 32, &0x4ff0u64.to_le_bytes());
    image.truncate(0x4ff0);
    image.extend(headers);
    let (_, memory) = Case::new(&image).load();
    assert_eq!(read(&memory, TEXT, 4), b"text");
}

#[test]
fn files_that_are_no_executable_for_this_machine_are_named() {
    let changed = |at: usize, bytes: &[u8]| {
        let mut image = plain();
        put(&mut image, at, bytes);
        Case::new(&image).error()
    };
    let tests: [(usize, &[u8], &str); 11] = [
        (18, &183u16.to_le_bytes(), "kernel: the ELF file is for aarch64, and must be for x86-64"),
        (18, &243u16.to_le_bytes(), "for RISC-V"),
        (18, &3u16.to_le_bytes(), "for 32-bit x86"),
        (18, &22u16.to_le_bytes(), "for machine 22"),
        (4, &[1], "is a 32-bit one"),
        (5, &[2], "is not little-endian"),
        (16, &1u16.to_le_bytes(), "a relocatable object or a kernel module"),
        (16, &3u16.to_le_bytes(), "a shared object"),
        (16, &4u16.to_le_bytes(), "a core dump"),
        (54, &32u16.to_le_bytes(), "program headers of 32 bytes"),
        (56, &0u16.to_le_bytes(), "has 0 program headers"),
    ];
    for (at, bytes, expected) in tests {
        let error = changed(at, bytes);
        assert!(error.contains(expected), "{error}");
    }
    let error = changed(56, &0xffffu16.to_le_bytes());
    assert!(error.contains("has 65535 program headers"), "{error}");
}

#[test]
fn offsets_beyond_the_file_are_truncation() {
    let image = plain();
    for len in [4, 63] {
        let error = Case::new(&image[..len]).error();
        assert!(error.contains("truncated: the ELF header needs 64 bytes"), "{error}");
    }
    let error = Case::new(&image[..100]).error();
    assert!(
        error.contains("truncated: the table of ELF program headers needs 176 bytes of it, and it has 100"),
        "{error}"
    );
    let error = Case::new(&image[..image.len() - 1]).error();
    assert!(error.contains("truncated: ELF segment 1 needs 184 bytes of it, and it has 183"), "{error}");

    for offset in [u64::MAX, u64::MAX - 8, 1 << 40] {
        let mut far = image.clone();
        put(&mut far, 64 + 8, &offset.to_le_bytes());
        let error = Case::new(&far).error();
        assert!(error.contains("truncated: ELF segment 0"), "{error}");
        let mut far = image.clone();
        put(&mut far, 32, &offset.to_le_bytes());
        let error = Case::new(&far).error();
        assert!(error.contains("truncated: the table of ELF program headers"), "{error}");
    }
}

#[test]
fn segments_stay_in_ram_and_off_the_boot_data() {
    let error = |segments: &[Segment]| Case::new(&elf(TEXT, segments)).error();
    let text = load(TEXT, b"text", 4);

    let low = error(&[text.clone(), load(layout::ZERO_PAGE, b"low", 3)]);
    assert!(low.contains("ELF segment 1 starts at 0x7000, in the area of boot data"), "{low}");
    let low = error(&[text.clone(), load(layout::ACPI_TABLES.start, b"low", 3)]);
    assert!(low.contains("starts at 0xe0000"), "{low}");

    let high = error(&[text.clone(), load(300 * MIB, b"high", 4)]);
    assert!(
        high.contains("up to 0x12c00004, and low RAM ends at 0x10000000: give the guest at least 301 MiB"),
        "{high}"
    );
    let hole = error(&[text.clone(), load(layout::HOLE_START - 1, b"hole", 4)]);
    assert!(hole.contains("goes beyond 0xc0000000"), "{hole}");
    let wraps = error(&[text.clone(), load(u64::MAX, b"wraps", 5)]);
    assert!(wraps.contains("goes beyond"), "{wraps}");
    let huge = error(&[text.clone(), load(32 * MIB, b"huge", u64::MAX)]);
    assert!(huge.contains("goes beyond"), "{huge}");

    let overlap = error(&[text.clone(), load(32 * MIB, b"a", 0x2000), load(32 * MIB + 0x1fff, b"b", 1)]);
    assert!(overlap.contains("ELF segments 1 and 2 overlap at 0x2001fff"), "{overlap}");
    let overlap = error(&[load(TEXT + 3, b"a", 1), text.clone()]);
    assert!(overlap.contains("ELF segments 1 and 0 overlap"), "{overlap}");

    let shrinks = error(&[load(TEXT, b"text", 3)]);
    assert!(shrinks.contains("takes 0x4 bytes from the file and 0x3 in memory"), "{shrinks}");
    let shrinks = error(&[load(TEXT, b"text", 0)]);
    assert!(shrinks.contains("and 0x0 in memory"), "{shrinks}");
    let nothing = error(&[pvh_note(0)]);
    assert!(nothing.contains("has no segment to load"), "{nothing}");
}

#[test]
fn segments_without_bytes_in_the_file_may_state_any_offset() {
    let mut image = elf(TEXT, &[load(TEXT, b"text", 4), load(32 * MIB, b"", 0x1000), load(0, b"", 0)]);
    put(&mut image, 64 + 56 + 8, &u64::MAX.to_le_bytes());
    let (loaded, _) = Case::new(&image).load();
    assert_eq!((loaded.kernel.start, loaded.kernel.len), (TEXT, 16 * MIB + 0x1000));
}

#[test]
fn the_entry_point_is_code_of_the_file() {
    for entry in [0, TEXT - 1, TEXT + 4, TEXT + 0x1000 + 4, u64::MAX] {
        let image = elf(entry, &[load(TEXT, b"text", 4), load(TEXT + 0x1000, b"data", 0x3000)]);
        let error = Case::new(&image).error();
        let expected = format!("the 64-bit Linux entry point {entry:#x} lies in no segment");
        assert!(error.contains(&expected), "{error}");
    }
    let image = elf(TEXT, &[load(TEXT, b"text", 4), pvh_note(0x10)]);
    let error = Case::new(&image).error();
    assert!(error.contains("the PVH entry point 0x10 lies in no segment"), "{error}");

    // Each protocol looks at its own entry point only.
    let pvh_only = elf(0, &[load(TEXT, b"text", 4), pvh_note(0x100_0000)]);
    Case::new(&pvh_only).load();
    let error = Case { protocol: Some(Protocol::Linux64), ..Case::new(&pvh_only) }.error();
    assert!(error.contains("the 64-bit Linux entry point 0x0 lies in no segment"), "{error}");
}

#[test]
fn broken_notes_are_named() {
    let text = load(TEXT, b"text", 4);
    let with = |contents: &[u8]| elf(TEXT, &[text.clone(), notes(contents, 4)]);
    let mut long = note(b"Xen\0", 18, &[0; 4], 4);
    put(&mut long, 4, &u32::MAX.to_le_bytes());
    let error = Case::new(&with(&long)).error();
    assert!(error.contains("ELF segment 1 holds a note that is longer than the segment"), "{error}");

    for description in [&[0; 2][..], &[0xff; 8]] {
        let error = Case::new(&with(&note(b"Xen\0", 18, description, 4))).error();
        assert!(error.contains("a PVH entry point that is no 32-bit address"), "{error}");
    }
    let error = Case::new(&with(&vec![0; 0x1_0001])).error();
    assert!(error.contains("holds 0x10001 bytes of notes"), "{error}");
    // The rest of a segment that is too short for a note is padding.
    assert_eq!(Case::new(&with(&[0; 11])).load().0.protocol, Protocol::Linux64);
}

#[test]
fn pvh_cannot_be_forced_on_a_kernel_without_it() {
    let image = plain();
    let error = Case { protocol: Some(Protocol::Pvh), ..Case::new(&image) }.error();
    assert!(error.contains("cannot be started by the PVH protocol: the ELF file has no note of type 18"), "{error}");
}
