//! bzImages.

use super::super::Protocol;
use super::images::*;
use crate::layout;

#[test]
fn a_relocatable_kernel_goes_to_its_preferred_address() {
    let code = code(0x1234);
    let image = bzimage(&code);
    let (loaded, memory) = Case::new(&image).load();
    assert_eq!(loaded.protocol, Protocol::Linux64);
    assert_eq!(loaded.registers.regs.rip, 16 * MIB + 0x200);
    assert_eq!(read(&memory, 16 * MIB, code.len()), code);
    assert_eq!((loaded.kernel.start, loaded.kernel.len), (16 * MIB, 4 * MIB));
}

#[test]
fn another_kernel_goes_to_1_mib_and_keeps_its_preferred_address_free() {
    let code = code(0x1000);
    let mut image = bzimage(&code);
    put(&mut image, 0x234, &[0]);
    let (loaded, memory) = Case::new(&image).load();
    assert_eq!(loaded.registers.regs.rip, MIB + 0x200);
    assert_eq!(read(&memory, MIB, code.len()), code);
    assert_eq!((loaded.kernel.start, loaded.kernel.len), (MIB, 19 * MIB));
}

#[test]
fn the_setup_header_is_handed_on() {
    let image = bzimage(&code(0x1000));
    let (_, memory) = Case::new(&image).load();
    let zero_page = layout::ZERO_PAGE;
    assert_eq!(read(&memory, zero_page + 0x202, 4), b"HdrS");
    assert_eq!(read(&memory, zero_page + 0x206, 2), [0x0f, 0x02]);
    assert_eq!(u64_at(&memory, zero_page + 0x258), 16 * MIB);
    // Written by the loader: its type, and where the command line is.
    assert_eq!(read(&memory, zero_page + 0x210, 1), [0xff]);
    assert_eq!(u64_at(&memory, zero_page + 0x228) & 0xffff_ffff, layout::CMDLINE);
}

#[test]
fn what_lies_behind_a_short_setup_header_is_not_taken_for_one() {
    let mut image = bzimage(&code(0x1000));
    // The header ends before init_size (0x260): what stands there is code.
    put(&mut image, 0x201, &[0x260u16.to_le_bytes()[0] - 2]);
    put(&mut image, 0x260, &[0xff; 12]);
    let (loaded, memory) = Case::new(&image).load();
    assert_eq!(loaded.kernel.len, 0x1000);
    assert_eq!(read(&memory, layout::ZERO_PAGE + 0x260, 12), [0; 12]);
}

#[test]
fn a_kernel_for_another_mode_is_named() {
    let changed = |at: usize, bytes: &[u8]| {
        let mut image = bzimage(&code(0x1000));
        put(&mut image, at, bytes);
        Case::new(&image).error()
    };
    let error = changed(0x236, &[0, 0]);
    assert_eq!(
        error,
        "kernel: the bzImage holds a 32-bit kernel without a 64-bit entry point: a kernel for x86-64 is needed"
    );
    let error = changed(0x206, &[0x0b, 0x02]);
    assert!(error.contains("speaks boot protocol 2.11: 2.12 or later is needed"), "{error}");
    let error = changed(0x211, &[0]);
    assert!(error.contains("is a zImage"), "{error}");
    let error = changed(0x258, &0x9_0000u64.to_le_bytes());
    assert!(error.contains("prefers to be loaded at 0x90000, in the area of boot data"), "{error}");
}

#[test]
fn a_truncated_file_is_named() {
    let image = bzimage(&code(0x1000));
    let error = Case::new(&image[..image.len() - 16]).error();
    assert!(error.contains("truncated: its protected-mode code needs 5105 bytes of it, and it has 5104"), "{error}");
    for len in [1024, 0x210] {
        let error = Case::new(&image[..len]).error();
        assert!(error.contains("truncated"), "{error}");
    }
    let error = Case::new(&image[..0x204]).error();
    assert!(error.contains("neither a bzImage nor an ELF executable"), "{error}");
}

#[test]
fn a_kernel_that_does_not_fit_says_how_much_memory_would_do() {
    let image = bzimage(&code(0x1000));
    let error = Case { ram: 19 * MIB, ..Case::new(&image) }.error();
    assert!(
        error.contains("up to 0x1400000, and low RAM ends at 0x1300000: give the guest at least 20 MiB"),
        "{error}"
    );
    Case { ram: 20 * MIB, ..Case::new(&image) }.load();

    let mut far = image.clone();
    put(&mut far, 0x258, &0xbff0_0000u64.to_le_bytes());
    let error = Case::new(&far).error();
    assert!(error.contains("from 0xbff00000 up to 0xc0300000: a kernel that stays below 0xc0000000"), "{error}");
    put(&mut far, 0x258, &u64::MAX.to_le_bytes());
    assert!(Case::new(&far).error().contains("needs memory"), "no overflow");
}

#[test]
fn pvh_cannot_be_forced_on_it() {
    let image = bzimage(&code(0x1000));
    let error = Case { protocol: Some(Protocol::Pvh), ..Case::new(&image) }.error();
    assert!(error.contains("a bzImage has no PVH entry point"), "{error}");
}
