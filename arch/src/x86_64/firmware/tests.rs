use std::fs::File;
use std::io::{Seek, Write};

use super::super::boot::BootError;
use super::super::{Platform, Topology, layout};
use super::test_kernel::kernel;
use super::*;

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

fn platform(ram: u64) -> Platform {
    Platform::firmware_boot(ram, 46, Topology::flat(2).unwrap()).unwrap()
}

fn given(kernel: &[u8], initramfs: Option<&[u8]>, cmdline: &str) -> Result<Vec<Item>, BootError> {
    let (kernel, initramfs) = (file(kernel), initramfs.map(file));
    items_for(&GivenKernel { kernel: &kernel, initramfs: initramfs.as_ref(), cmdline, unsigned: true })
}

fn items_for(given: &GivenKernel) -> Result<Vec<Item>, BootError> {
    items(&platform(1 << 30), &layout::ram_ranges(1 << 30), Some(given))
}

fn find(items: &[Item], key: ItemKey) -> Option<&ItemContents> {
    items.iter().find(|item| item.key == key).map(|item| &item.contents)
}

fn bytes(items: &[Item], key: ItemKey) -> &[u8] {
    match find(items, key) {
        Some(ItemContents::Bytes(bytes)) => bytes,
        other => panic!("{key:?}: {other:?}"),
    }
}

#[test]
fn firmware_ends_at_4_gib() {
    assert_eq!(place(4 << 20), Ok(GpaRange { start: 0xffc0_0000, len: 4 << 20 }));
    assert_eq!(place(16 << 20).map(|range| range.start), Ok(0xff00_0000));
    for size in [0, 4095, 4097, (16 << 20) + 4096, u64::MAX] {
        assert_eq!(place(size), Err(ImageError::Size(size)));
    }
    assert_eq!(check_reset_vector(&[0xff; 16]), Err(ImageError::NoResetVector));
    assert_eq!(check_reset_vector(&[0; 16]), Err(ImageError::NoResetVector));
    let mut vector = [0; 16];
    vector[0] = 0xe9;
    assert_eq!(check_reset_vector(&vector), Ok(()));
    let entry = entry();
    assert_eq!(entry.sregs.cs.base + entry.regs.rip, 0xffff_fff0);
    assert_eq!(entry.sregs.cr0 & 1, 0);
}

#[test]
fn a_kernel_is_given_whole_and_in_its_parts() {
    let items = given(&kernel(), Some(b"cpio"), "quiet").unwrap();
    assert_eq!(find(&items, ItemKey::Name("etc/boot/kernel")), Some(&ItemContents::Kernel(0..1124)));
    // Only a bzImage's header says by whom it is loaded.
    let mut setup = kernel()[..1024].to_vec();
    setup[0x210] = 0xff;
    assert_eq!(bytes(&items, ItemKey::Number(0x18)), setup);
    assert_eq!(find(&items, ItemKey::Number(0x11)), Some(&ItemContents::Kernel(1024..1124)));
    assert_eq!(find(&items, ItemKey::Number(0x12)), Some(&ItemContents::Initramfs(0..4)));
    for (number, expected) in [(0x08, 100_u32), (0x17, 1024), (0x0b, 4), (0x14, 6)] {
        assert_eq!(bytes(&items, ItemKey::Number(number)), expected.to_le_bytes(), "{number:#x}");
    }
    assert_eq!(bytes(&items, ItemKey::Number(0x15)), b"quiet\0");
    assert_eq!(bytes(&items, ItemKey::Name("opt/org.tianocore/EnableLegacyLoader")), b"yes");
    let items = given(&kernel(), None, "").unwrap();
    assert_eq!((bytes(&items, ItemKey::Number(0x0b)), find(&items, ItemKey::Number(0x12))), (&[0; 4][..], None));
}

#[test]
fn a_kernel_that_is_to_be_measured_is_as_its_file_has_it() {
    let file = file(&kernel());
    let items = items_for(&GivenKernel { kernel: &file, initramfs: None, cmdline: "", unsigned: false }).unwrap();
    assert_eq!(find(&items, ItemKey::Number(0x18)), Some(&ItemContents::Kernel(0..1024)));
    assert_eq!(bytes(&items, ItemKey::Name("opt/org.tianocore/EnableLegacyLoader")), b"no");
}

#[test]
fn an_efi_executable_that_is_no_bzimage_has_no_setup() {
    let mut file = kernel();
    file[0x202] = 0;
    let items = given(&file, None, "quiet").unwrap();
    assert_eq!(find(&items, ItemKey::Number(0x11)), Some(&ItemContents::Kernel(0..1124)));
    assert_eq!(bytes(&items, ItemKey::Number(0x17)), [0; 4]);
}

#[test]
fn what_firmware_cannot_start_is_refused() {
    let elf = [&b"\x7fELF"[..], &[0; 100]].concat();
    let mut wild = kernel();
    wild[0x3c..0x40].copy_from_slice(&[0xff; 4]);
    let mut not_pe = kernel();
    not_pe[0x40] = b'N';
    let mut long = kernel();
    long[0x1f1] = 40;
    for (file, expected) in [
        (&elf, "an ELF file"),
        (&b"#!/bin/sh\n".to_vec(), "no EFI executable"),
        (&not_pe, "no EFI executable"),
        (&wild, "truncated"),
        (&long, "truncated"),
        (&b"MZ".to_vec(), "truncated"),
        (&Vec::new(), "empty"),
    ] {
        let error = given(file, None, "").unwrap_err();
        assert!(matches!(error, BootError::Kernel(_)) && error.to_string().contains(expected), "{error}");
    }
    assert!(matches!(given(&kernel(), Some(b""), ""), Err(BootError::Initramfs(_))));
    assert!(matches!(given(&kernel(), None, &"x".repeat(200)), Err(BootError::Cmdline(_))));
}

#[test]
fn memory_is_told_and_what_may_be_plugged_is_kept_free() {
    let ram = layout::ram_ranges(4 << 30);
    let all = items(&platform(4 << 30), &ram, None).unwrap();
    let map = bytes(&all, ItemKey::Name("etc/e820"));
    let expected: Vec<u8> = [(0_u64, 3_u64 << 30), (4 << 30, 1 << 30)]
        .iter()
        .flat_map(|(start, len)| [&start.to_le_bytes()[..], &len.to_le_bytes(), &1_u32.to_le_bytes()].concat())
        .collect();
    assert_eq!(map, expected);
    assert_eq!(bytes(&all, ItemKey::Number(5)), [2, 0]);
    assert_eq!(find(&all, ItemKey::Name("etc/reserved-memory-end")), None);
    assert_eq!(find(&all, ItemKey::Name("etc/boot/kernel")), None);
    let more = layout::pluggable_range(1 << 30, 3 << 30).unwrap();
    let all = items(&platform(layout::ram_up_to(more)), &layout::ram_ranges(1 << 30), None).unwrap();
    assert_eq!(bytes(&all, ItemKey::Name("etc/reserved-memory-end")), (7_u64 << 30).to_le_bytes());
}

/// A PE file of two sections, the later one first, with 12 bytes of signatures.
fn executable() -> Vec<u8> {
    let mut file = vec![0x5a; 0x600];
    file[..0x200].fill(0);
    file[..2].copy_from_slice(b"MZ");
    file[0x3c] = 0x40;
    file[0x40..0x44].copy_from_slice(b"PE\0\0");
    (file[0x46], file[0x54]) = (2, 240);
    file[0x58..0x5a].copy_from_slice(&[0x0b, 2]);
    let number = |file: &mut Vec<u8>, at: usize, number: u32| file[at..at + 4].copy_from_slice(&number.to_le_bytes());
    number(&mut file, 0x58 + 60, 0x200);
    number(&mut file, 0x58 + 108, 16);
    number(&mut file, 0x58 + 144, 0x5f4);
    number(&mut file, 0x58 + 148, 12);
    for (section, (size, place)) in [(0x200, 0x400 - 16), (0x1f0, 0x200)].into_iter().enumerate() {
        number(&mut file, 0x148 + 40 * section + 16, size);
        number(&mut file, 0x148 + 40 * section + 20, place);
    }
    file
}

fn digest(file: &Vec<u8>) -> Result<Vec<u8>, String> {
    let executable = Executable::read(file).map_err(|error| error.to_string())?;
    Ok(executable.digest::<sha2::Sha384>().unwrap().to_vec())
}

#[test]
fn signatures_and_checksum_do_not_count_and_all_else_does() {
    let file = executable();
    let before = digest(&file).unwrap();
    for at in [0x58 + 64, 0x58 + 67, 0x5f4, 0x5ff] {
        let mut changed = file.clone();
        changed[at] ^= 1;
        assert_eq!(digest(&changed).unwrap(), before, "byte {at:#x}");
    }
    for at in [0, 0x58 + 63, 0x58 + 68, 0x58 + 143, 0x58 + 152, 0x1ff, 0x200, 0x3f0, 0x5ef, 0x5f3] {
        let mut changed = file.clone();
        changed[at] ^= 1;
        assert_ne!(digest(&changed).ok().as_ref(), Some(&before), "byte {at:#x}");
    }
}

#[test]
fn signatures_are_read_up_to_one_that_is_cut_off() {
    let with = |head: [u8; 8]| {
        let mut file = executable();
        file[0x5f4..0x5fc].copy_from_slice(&head);
        Executable::read(&file).unwrap().signatures().unwrap()
    };
    assert_eq!(with([12, 0, 0, 0, 0, 2, 2, 0]), [vec![0x5a; 4]]);
    assert_eq!(with([10, 0, 0, 0, 0, 2, 2, 0]), [vec![0x5a; 2]]);
    // Of another kind, longer than there is, shorter than its own head.
    assert!(with([12, 0, 0, 0, 0, 2, 1, 0]).is_empty());
    assert!(with([13, 0, 0, 0, 0, 2, 2, 0]).is_empty());
    assert_eq!(with([0, 0, 0, 0, 0, 2, 2, 0]), [Vec::<u8>::new()]);
}

#[test]
fn headers_that_lie_are_refused() {
    let file = executable();
    for (at, bytes) in [
        (0x3c, &[0xff; 4][..]),
        (0x40, b"NE"),
        (0x46, &[0xff; 2]),
        (0x58, &[0x0b, 1]),
        (0x58 + 60, &[0xff; 4]),
        (0x58 + 144, &[0; 4]),
        (0x58 + 148, &[0xff; 4]),
        (0x148 + 16, &[0xff; 4]),
        (0x148 + 20, &[0, 3, 0, 0]),
    ] {
        let mut changed = file.clone();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        let error = digest(&changed).unwrap_err();
        assert!(error.starts_with("it is no EFI executable"), "{at:#x}: {error}");
    }
    for len in [0, 0x41, 0x60, 0x150, 0x1ff, 0x300] {
        digest(&file[..len].to_vec()).unwrap_err();
    }
}
