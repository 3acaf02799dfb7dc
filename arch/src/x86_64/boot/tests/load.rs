//! Initramfs, command line, memory map, and what a kernel finds at its entry.

use vm_memory::GuestMemoryMmap;

use super::super::{BootError, BootSource, Protocol, gigabyte_pages, load_kernel};
use super::images::*;
use crate::{BootError as PublicError, layout};

const TEXT: u64 = 16 * MIB;

fn pvh_kernel() -> Vec<u8> {
    elf(TEXT, &[load(TEXT, b"code", 4), pvh_note(0x100_0000)])
}

/// The memory map in the zero page.
fn e820(memory: &GuestMemoryMmap) -> Vec<(u64, u64, u32)> {
    let count = read(memory, layout::ZERO_PAGE + 0x1e8, 1)[0];
    let entry = |index: u8| layout::ZERO_PAGE + 0x2d0 + 20 * u64::from(index);
    (0..count)
        .map(|index| {
            let at = entry(index);
            (u64_at(memory, at), u64_at(memory, at + 8), u32_at(memory, at + 16))
        })
        .collect()
}

#[test]
fn the_memory_map_leaves_out_what_is_no_ram() {
    let image = bzimage(&code(0x1000));
    let below = [(0, 0xa_0000, 1), (0xe_0000, 0x2_0000, 3)];
    let ecam = (0xe000_0000, MIB, 2);
    for (ram, above) in [
        (256 * MIB, vec![(MIB, 255 * MIB, 1), ecam]),
        (3072 * MIB, vec![(MIB, 3071 * MIB, 1), ecam]),
        (3073 * MIB, vec![(MIB, 3071 * MIB, 1), ecam, (1 << 32, MIB, 1)]),
        (6144 * MIB, vec![(MIB, 3071 * MIB, 1), ecam, (1 << 32, 3072 * MIB, 1)]),
    ] {
        let (_, memory) = Case { ram, ..Case::new(&image) }.load();
        assert_eq!(e820(&memory), [&below[..], &above].concat(), "{ram} bytes");
    }
}

#[test]
fn regions_side_by_side_are_one_range_of_ram() {
    use vm_memory::GuestAddress;
    let half = 128 << 20;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), half), (GuestAddress(128 * MIB), half)]).unwrap();
    // The kernel lies across the border of the two.
    let border = 128 * MIB - 2;
    let image = elf(border, &[load(border, b"text", 4)]);
    Case { protocol: Some(Protocol::Linux64), ..Case::new(&image) }.load_into(&memory).unwrap();
    assert_eq!(read(&memory, border, 4), b"text");
    assert_eq!(e820(&memory)[2], (MIB, 255 * MIB, 1));
}

#[test]
fn the_64_bit_entry_has_paging_and_the_zero_page() {
    let image = bzimage(&code(0x1000));
    for gigabyte_pages in [true, false] {
        let (loaded, memory) = Case { gigabyte_pages, ..Case::new(&image) }.load();
        let sregs = loaded.registers.sregs;
        assert_eq!(loaded.registers.regs.rsi, layout::ZERO_PAGE);
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x8000_0011, 0x20, 0x500));
        assert_eq!((sregs.cs.selector, sregs.ds.selector), (0x10, 0x18));
        for address in [0, layout::ZERO_PAGE, 16 * MIB + 0x201, 0x8123_4567, 0xffff_ffff] {
            assert_eq!(translate(&memory, sregs.cr3, address), Some(address));
        }
        assert_eq!(translate(&memory, sregs.cr3, 1 << 32), None);

        let gdt = |selector: u16| u64_at(&memory, sregs.gdt.base + u64::from(selector));
        assert_eq!(gdt(0x10), 0x00af_9b00_0000_ffff);
        assert_eq!(gdt(0x18), 0x00cf_9300_0000_ffff);
        assert!(sregs.tr.selector + 15 <= sregs.gdt.limit);
        assert_eq!(read(&memory, layout::CMDLINE, 14), b"console=ttyS0\0");
        assert_eq!(u64_at(&memory, layout::ZERO_PAGE + 0x70), layout::ACPI_TABLES.start);
    }
}

#[test]
fn the_pvh_entry_is_32_bit_with_the_start_info() {
    let kernel = pvh_kernel();
    let (loaded, memory) = Case { initramfs: Some(b"cpio"), ..Case::new(&kernel) }.load();
    let (regs, sregs) = (loaded.registers.regs, loaded.registers.sregs);
    assert_eq!((regs.rip, regs.rbx), (0x100_0000, layout::PVH_START_INFO));
    assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
    assert_eq!(sregs.cs.access >> 13 & 3, 0b10, "a 32-bit code segment: D set, L clear");

    let info = layout::PVH_START_INFO;
    assert_eq!((u32_at(&memory, info), u32_at(&memory, info + 4)), (0x336e_c578, 1));
    assert_eq!(u64_at(&memory, info + 24), layout::CMDLINE);
    assert_eq!(u64_at(&memory, info + 32), layout::ACPI_TABLES.start);

    assert_eq!(u32_at(&memory, info + 12), 1);
    let module = u64_at(&memory, info + 16);
    let initramfs = loaded.initramfs.unwrap();
    assert_eq!((u64_at(&memory, module), u64_at(&memory, module + 8)), (initramfs.start, 4));
    assert_eq!(read(&memory, initramfs.start, 5), b"cpio\0");

    let (map, entries) = (u64_at(&memory, info + 40), u32_at(&memory, info + 48));
    let map: Vec<_> = (0..u64::from(entries))
        .map(|index| map + 24 * index)
        .map(|at| (u64_at(&memory, at), u64_at(&memory, at + 8), u32_at(&memory, at + 16)))
        .collect();
    let ram = (MIB, 255 * MIB, 1);
    assert_eq!(map, [(0, 0xa_0000, 1), (0xe_0000, 0x2_0000, 3), ram, (0xe000_0000, MIB, 2)]);
}

#[test]
fn the_reset_vector_writes_the_reset_register() {
    let (_, memory) = Case::new(&pvh_kernel()).load();
    // mov dx, 0x622; mov al, 1; out dx, al
    assert_eq!(read(&memory, 0xf_fff0, 6), [0xba, 0x22, 0x06, 0xb0, 0x01, 0xee]);
}

#[test]
fn without_an_initramfs_there_is_no_module() {
    let (loaded, memory) = Case::new(&pvh_kernel()).load();
    assert!(loaded.initramfs.is_none());
    assert_eq!(u32_at(&memory, layout::PVH_START_INFO + 12), 0);
    assert_eq!(u64_at(&memory, layout::PVH_START_INFO + 16), 0);
}

#[test]
fn an_initramfs_lies_page_aligned_at_the_top_of_what_the_kernel_reaches() {
    let image = bzimage(&code(0x1000));
    let contents = code(0x1801);
    for (ram, expected) in [(256 * MIB, 256 * MIB - 0x2000), (6144 * MIB, 0x7fff_e000)] {
        let (loaded, memory) = Case { initramfs: Some(&contents), ram, ..Case::new(&image) }.load();
        let range = loaded.initramfs.unwrap();
        assert_eq!((range.start, range.len), (expected, 0x1801));
        assert_eq!(read(&memory, range.start, 0x1801), contents);
        assert_eq!(u64::from(u32_at(&memory, layout::ZERO_PAGE + 0x218)), expected);
        assert_eq!(u32_at(&memory, layout::ZERO_PAGE + 0x21c), 0x1801);
    }
    let mut reaches_less = image.clone();
    put(&mut reaches_less, 0x22c, &0x37ff_ffffu32.to_le_bytes());
    let (loaded, _) = Case { initramfs: Some(&contents), ram: 1024 * MIB, ..Case::new(&reaches_less) }.load();
    assert_eq!(loaded.initramfs.unwrap().start, 0x3800_0000 - 0x2000);
}

#[test]
fn an_initramfs_that_does_not_fit_is_named() {
    let image = bzimage(&code(0x1000));
    let case = |initramfs: &[u8]| Case { initramfs: Some(initramfs), ram: 21 * MIB, ..Case::new(&image) }.error();
    // Between the kernel's end at 20 MiB and the end of RAM is one MiB.
    let error = case(&vec![1; 0x10_0001]);
    assert!(error.contains("initramfs: 1048577 bytes do not fit into guest memory: 1048576 bytes are free"), "{error}");
    assert_eq!(case(b""), "initramfs: the file is empty: a cpio archive is needed, or no initramfs at all");
    let full = vec![1; 0x10_0000];
    Case { initramfs: Some(&full), ram: 21 * MIB, ..Case::new(&image) }.load();
}

#[test]
fn a_command_line_is_bounded_by_the_kernel_and_by_its_place() {
    let image = bzimage(&code(0x1000));
    let long = "x".repeat(2047);
    Case { cmdline: &long, ..Case::new(&image) }.load();
    let long = "x".repeat(2048);
    let error = Case { cmdline: &long, ..Case::new(&image) }.error();
    assert_eq!(error, "kernel command line: 2048 bytes long, and this kernel takes 2047 at the most");

    let kernel = pvh_kernel();
    let long = "x".repeat(0xffff);
    let (_, memory) = Case { cmdline: &long, ..Case::new(&kernel) }.load();
    assert_eq!(read(&memory, layout::CMDLINE + 0xfffe, 2), b"x\0");
    let long = "x".repeat(0x1_0000);
    let error = Case { cmdline: &long, ..Case::new(&kernel) }.error();
    assert!(error.contains("65536 bytes long, and this kernel takes 65535"), "{error}");
    let error = Case { cmdline: "console=\0ttyS0", ..Case::new(&kernel) }.error();
    assert!(error.contains("kernel command line: byte 8 is zero"), "{error}");
}

#[test]
fn files_of_other_formats_are_told_apart() {
    let error = Case::new(b"").error();
    assert_eq!(error, "kernel: the file is empty: a bzImage or an ELF executable is needed");
    let mut arm = vec![0; 64];
    put(&mut arm, 56, b"ARM\x64");
    let tests: [(&[u8], &str); 6] = [
        (b"\x1f\x8b\x08\0", "compressed with gzip"),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
        (b"\xfd7zXZ\0", "compressed with xz"),
        (b"\x04\x22\x4d\x18", "compressed with lz4"),
        (&arm, "another machine, aarch64"),
        (&[0x5a; 5000], "it has no \"HdrS\" at byte 514 and does not begin with \"\\x7fELF\""),
    ];
    for (image, expected) in tests {
        let error = Case::new(image).error();
        assert!(error.starts_with("kernel: neither a bzImage nor an ELF executable"), "{error}");
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn what_is_no_regular_file_is_named() {
    let directory = std::fs::File::open("/").unwrap();
    let kernel = file(&pvh_kernel());
    let load = |kernel, initramfs| {
        let source = BootSource {
            kernel,
            initramfs,
            cmdline: "",
            protocol: None,
            gigabyte_pages: true,
            unpacked: None,
            share: false,
            random: None,
        };
        load_kernel(&memory(32 * MIB), &platform(32 * MIB), &source).unwrap_err()
    };
    let error = load(&directory, None);
    assert!(matches!(error, PublicError::Kernel(_)));
    assert_eq!(error.to_string(), "kernel: not a regular file: a bzImage or an ELF executable is needed");
    let error = load(&kernel, Some(&directory));
    assert!(matches!(error, BootError::Initramfs(_)));
    assert_eq!(error.to_string(), "initramfs: not a regular file: a cpio archive is needed");
}

#[test]
fn memory_without_room_for_a_kernel_is_named() {
    let image = pvh_kernel();
    let error = Case { ram: MIB, ..Case::new(&image) }.error();
    assert!(error.contains("memory: there is no RAM at 0x100000"), "{error}");
    let error = Case { ram: 0x1_0000, ..Case::new(&image) }.error();
    assert!(error.contains("memory: there is no RAM at 0x0"), "{error}");
}

#[test]
fn gigabyte_pages_are_a_feature_of_the_processor() {
    let leaf = |edx| hal::CpuidEntry { function: 0x8000_0001, index: None, eax: 0, ebx: 0, ecx: 0, edx };
    assert!(gigabyte_pages(&[leaf(1 << 26)]));
    assert!(!gigabyte_pages(&[leaf(!(1 << 26))]));
    assert!(!gigabyte_pages(&[]));
}
