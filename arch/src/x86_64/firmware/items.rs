//! What firmware finds of the machine by fw_cfg: numbered and named items, as QEMU gives them to a confidential guest, whose
//! kernel is not patched on its way (QEMU, `hw/i386/x86-common.c` and `hw/i386/fw_cfg.c`). Numbers in them are little-endian.

use std::fs::File;
use std::ops::Range;

use hal::GpaRange;

use super::super::acpi::{self, LinkedTables};
use super::super::boot::{self, BootError, EfiKernel};
use super::super::layout;
use super::super::platform::Platform;

/// Items by number (QEMU, `include/standard-headers/linux/qemu_fw_cfg.h`).
const RAM_SIZE: u16 = 0x03;
const CPU_COUNT: u16 = 0x05;
const KERNEL_SIZE: u16 = 0x08;
const INITRD_SIZE: u16 = 0x0b;
const BOOT_MENU: u16 = 0x0e;
const MAX_CPUS: u16 = 0x0f;
const KERNEL_DATA: u16 = 0x11;
const INITRD_DATA: u16 = 0x12;
const CMDLINE_SIZE: u16 = 0x14;
const CMDLINE_DATA: u16 = 0x15;
const SETUP_SIZE: u16 = 0x17;
const SETUP_DATA: u16 = 0x18;
/// Items by name.
const MEMORY_MAP: &str = "etc/e820";
const RESERVED_MEMORY_END: &str = "etc/reserved-memory-end";
const KERNEL_FILE: &str = "etc/boot/kernel";
const LEGACY_LOADER: &str = "opt/org.tianocore/EnableLegacyLoader";
/// A range of the memory map is RAM.
const MAP_RAM: u32 = 1;

/// How firmware asks for an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ItemKey {
    /// By its number.
    Number(u16),
    /// By its name.
    Name(&'static str),
}

/// What an item holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ItemContents {
    /// These bytes.
    Bytes(Vec<u8>),
    /// A part of the kernel's file.
    Kernel(Range<u64>),
    /// A part of the initramfs.
    Initramfs(Range<u64>),
}

/// Something that firmware finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// How it is asked for.
    pub key: ItemKey,
    /// What it holds.
    pub contents: ItemContents,
}

/// A kernel for firmware to start.
#[derive(Debug, Clone, Copy)]
pub struct GivenKernel<'a> {
    /// A bzImage with an EFI stub, or another EFI executable.
    pub kernel: &'a File,
    /// An initramfs, handed to the kernel as it is.
    pub initramfs: Option<&'a File>,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// Firmware with secure boot may start a kernel that none of its keys has signed: not as an EFI executable then, but by
    /// its setup header, where a boot loader is entered for that. Not for a guest that is to prove what it runs: such a
    /// kernel is not measured, so that firmware is told not to, whatever it does unasked.
    pub unsigned: bool,
}

/// All items for a platform with this RAM, and for a kernel, if firmware is not to look for one on a disk.
///
/// # Errors
/// [`BootError`], where firmware cannot start the kernel or take its initramfs and command line.
pub fn items(platform: &Platform, ram: &[GpaRange], given: Option<&GivenKernel>) -> Result<Vec<Item>, BootError> {
    let mut items = Items::default();
    let vcpus = platform.topology.vcpus();
    let present = platform.pluggable.unwrap_or(vcpus);
    items.number(RAM_SIZE, ram.iter().map(|range| range.len).sum::<u64>().to_le_bytes());
    items.number(CPU_COUNT, count(present));
    items.number(MAX_CPUS, count(vcpus));
    items.number(BOOT_MENU, [0; 2]);
    items.named(MEMORY_MAP, memory_map(ram));
    let ram_end = ram.last().map_or(0, |range| range.start.saturating_add(range.len));
    let window = platform.host_bridges.first().map_or(0, |bridge| bridge.mmio64.start);
    if window > ram_end.next_multiple_of(layout::MMIO64_GRANULE).max(layout::HOLE_END) {
        // Memory can be plugged: firmware must not put a device there.
        items.named(RESERVED_MEMORY_END, window.to_le_bytes().to_vec());
    }
    let LinkedTables { tables, rsdp, loader } = acpi::link(platform);
    items.named(acpi::TABLES_FILE, tables);
    items.named(acpi::RSDP_FILE, rsdp);
    items.named(acpi::LOADER_FILE, loader);
    if let Some(given) = given {
        items.kernel(given)?;
    }
    Ok(items.0)
}

#[derive(Default)]
struct Items(Vec<Item>);

impl Items {
    fn add(&mut self, key: ItemKey, contents: ItemContents) {
        self.0.push(Item { key, contents });
    }

    fn number<const N: usize>(&mut self, number: u16, bytes: [u8; N]) {
        self.add(ItemKey::Number(number), ItemContents::Bytes(bytes.to_vec()));
    }

    fn named(&mut self, name: &'static str, bytes: Vec<u8>) {
        self.add(ItemKey::Name(name), ItemContents::Bytes(bytes));
    }

    /// The kernel as one file, and as the two parts that it has as a bzImage, for firmware that takes it by those.
    fn kernel(&mut self, given: &GivenKernel) -> Result<(), BootError> {
        let EfiKernel { size, setup, cmdline_max } = boot::efi_kernel(given.kernel)?;
        boot::check_cmdline(given.cmdline, cmdline_max)?;
        let initramfs = given.initramfs.map(boot::initramfs_size).transpose()?.unwrap_or(0);
        self.add(ItemKey::Name(KERNEL_FILE), ItemContents::Kernel(0..size.into()));
        self.number(KERNEL_SIZE, (size - setup).to_le_bytes());
        self.add(ItemKey::Number(KERNEL_DATA), ItemContents::Kernel(setup.into()..size.into()));
        self.number(SETUP_SIZE, setup.to_le_bytes());
        let setup_data = match given.unsigned {
            true => ItemContents::Bytes(boot::setup_with_loader(given.kernel, setup)?),
            false => ItemContents::Kernel(0..setup.into()),
        };
        self.add(ItemKey::Number(SETUP_DATA), setup_data);
        self.number(INITRD_SIZE, initramfs.to_le_bytes());
        if given.initramfs.is_some() {
            self.add(ItemKey::Number(INITRD_DATA), ItemContents::Initramfs(0..initramfs.into()));
        }
        let mut cmdline = given.cmdline.as_bytes().to_vec();
        cmdline.push(0);
        self.number(CMDLINE_SIZE, u32::try_from(cmdline.len()).unwrap_or(u32::MAX).to_le_bytes());
        self.add(ItemKey::Number(CMDLINE_DATA), ItemContents::Bytes(cmdline));
        self.named(LEGACY_LOADER, if given.unsigned { b"yes".to_vec() } else { b"no".to_vec() });
        Ok(())
    }
}

fn count(vcpus: u32) -> [u8; 2] {
    u16::try_from(vcpus).unwrap_or(u16::MAX).to_le_bytes()
}

/// Address, length and kind of each range (ACPI 6.5 §15.1): RAM alone. The firmware knows its own memory.
fn memory_map(ram: &[GpaRange]) -> Vec<u8> {
    let mut map = Vec::new();
    for range in ram {
        map.extend_from_slice(&range.start.to_le_bytes());
        map.extend_from_slice(&range.len.to_le_bytes());
        map.extend_from_slice(&MAP_RAM.to_le_bytes());
    }
    map
}
