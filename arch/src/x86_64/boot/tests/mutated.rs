//! Arbitrary and damaged files: the loader says no or loads, and writes to nothing but its own places.

use proptest::prelude::*;

use super::super::Protocol;
use super::images::*;
use crate::layout;

/// Little RAM, so that looking through all of it is fast.
const RAM: u64 = 2 * MIB;
const START: u64 = layout::HIGH_RAM_START;

/// Loads a file and looks where memory changed: in the boot data and in the kernel's range, and nowhere else.
fn load_and_look(kernel: &[u8], protocol: Option<Protocol>) {
    let memory = memory(RAM);
    let result = Case { ram: RAM, protocol, initramfs: Some(b"cpio"), ..Case::new(kernel) }.load_into(&memory);
    let mut allowed = Vec::new();
    match &result {
        Ok(loaded) => {
            let end = loaded.kernel.start + loaded.kernel.len;
            assert!(loaded.kernel.start >= START && end <= RAM, "{loaded:?}");
            assert!((loaded.kernel.start..end).contains(&loaded.registers.regs.rip), "{loaded:?}");
            allowed.push(layout::PVH_START_INFO..layout::PAGE_TABLES + 8 * layout::PAGE_SIZE);
            allowed.push(layout::CMDLINE..layout::CMDLINE + layout::CMDLINE_MAX);
            allowed.push(layout::RESET_VECTOR..layout::RESET_VECTOR + 16);
            allowed.push(loaded.kernel.start..end);
            let initramfs = loaded.initramfs.as_ref().unwrap();
            assert!(initramfs.start >= end && initramfs.start + initramfs.len <= RAM, "{loaded:?}");
            allowed.push(initramfs.start..initramfs.start + initramfs.len);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    let zeros = [0; 4096];
    for page in (0..RAM).step_by(4096) {
        let bytes = read(&memory, page, 4096);
        if bytes != zeros {
            let written = (page..).zip(bytes).filter(|(_, byte)| *byte != 0).map(|(at, _)| at);
            for at in written {
                assert!(allowed.iter().any(|range| range.contains(&at)), "{at:#x} was written: {result:?}");
            }
        }
    }
}

/// Kernels that load as they are.
fn sound_kernels() -> [Vec<u8>; 2] {
    let entry = u32::try_from(START).unwrap().to_le_bytes();
    let pvh = elf(
        START,
        &[
            load(START, b"some code", 64),
            notes(&[note(b"GNU\0", 5, &[0; 20], 4), note(b"Xen\0", 18, &entry, 4)].concat(), 4),
            load(START + 0x1000, b"some data", 0x2000),
        ],
    );
    let mut linux = bzimage(&code(0x800));
    put(&mut linux, 0x258, &START.to_le_bytes());
    put(&mut linux, 0x260, &0x1_0000u32.to_le_bytes());
    [pvh, linux]
}

/// Values at which arithmetic goes wrong, and any others.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        Just(1),
        Just(u64::MAX),
        Just(u64::MAX - 4095),
        Just(1 << 63),
        Just(u64::from(u32::MAX)),
        Just(START),
        Just(RAM),
        any::<u64>(),
        0..0x1000u64,
    ]
}

fn protocol() -> impl Strategy<Value = Option<Protocol>> {
    prop::sample::select(vec![None, Some(Protocol::Linux64), Some(Protocol::Pvh)])
}

proptest! {
    #[test]
    fn damaged_kernels_never_panic_and_write_to_their_places_only(
        mut image in prop::sample::select(sound_kernels().to_vec()),
        edits in prop::collection::vec((0..0x280usize, word(), 1..=8usize), 0..4),
        protocol in protocol(),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        for (at, value, width) in edits {
            let bytes = value.to_le_bytes();
            for (to, from) in image.iter_mut().skip(at).zip(&bytes[..width]) {
                *to = *from;
            }
        }
        if let Some(cut) = cut {
            image.truncate(cut.index(image.len()));
        }
        load_and_look(&image, protocol);
    }

    #[test]
    fn arbitrary_bytes_never_panic(
        mut image in prop::collection::vec(any::<u8>(), 0..2000),
        magic in 0..3u8,
        protocol in protocol(),
    ) {
        match magic {
            0 if image.len() > 64 => put(&mut image, 0, b"\x7fELF\x02\x01\x01"),
            1 if image.len() > 0x280 => put(&mut image, 0x202, b"HdrS\x0f\x02"),
            _ => {}
        }
        load_and_look(&image, protocol);
    }
}

#[test]
fn the_sound_kernels_load() {
    for image in sound_kernels() {
        Case { ram: RAM, ..Case::new(&image) }.load();
        load_and_look(&image, None);
    }
}
