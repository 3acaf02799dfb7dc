//! The 64-bit Linux boot protocol: zero page, page tables and descriptor table (Linux,
//! `Documentation/arch/x86/boot.rst`, "64-bit Boot Protocol").

use hal::{BootRegisters, GpaRange};
use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::super::layout;
use super::error::BootError;
use super::map::MemoryMap;
use super::plan::Kernel;
use super::{registers, write_boot_data};

/// A boot loader without an assigned number.
pub(super) const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;

/// Page table entry: present and writable.
const TABLE: u64 = 0b11;
/// Page table entry: present, writable, and a page instead of a table.
const LARGE_PAGE: u64 = 1 << 7 | 0b11;
/// In a table.
const ENTRIES: u64 = 512;
/// What is mapped one to one beside the kernel: all addresses of 32 bits, in GiB.
const MAPPED_GIB: u64 = 4;

/// Writes what the kernel finds at its entry, and tells the registers there.
pub(super) fn prepare(
    memory: &GuestMemoryMmap,
    map: &MemoryMap,
    kernel: &Kernel,
    initramfs: Option<GpaRange>,
    gigabyte_pages: bool,
) -> Result<BootRegisters, BootError> {
    let params = zero_page(map, kernel, initramfs);
    write_boot_data(memory, "the zero page", layout::ZERO_PAGE, params.as_slice())?;
    let gdt = registers::gdt().map(u64::to_le_bytes);
    write_boot_data(memory, "the descriptor table", layout::BOOT_GDT, gdt.as_flattened())?;
    let tables = page_tables(kernel.range, gigabyte_pages);
    write_boot_data(memory, "the page tables", layout::PAGE_TABLES, &tables)?;
    Ok(registers::linux64(kernel.linux64_entry))
}

fn zero_page(map: &MemoryMap, kernel: &Kernel, initramfs: Option<GpaRange>) -> boot_params {
    let elf = setup_header { boot_flag: BOOT_FLAG, header: HEADER_MAGIC, ..setup_header::default() };
    let mut params = boot_params { hdr: kernel.header.unwrap_or(elf), ..boot_params::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    let low = |address: u64| u32::try_from(address & 0xffff_ffff).unwrap_or(0);
    let high = |address: u64| low(address >> 32);
    params.hdr.cmd_line_ptr = low(layout::CMDLINE);
    params.acpi_rsdp_addr = layout::ACPI_TABLES.start;
    if let Some(initramfs) = initramfs {
        params.hdr.ramdisk_image = low(initramfs.start);
        params.ext_ramdisk_image = high(initramfs.start);
        params.hdr.ramdisk_size = low(initramfs.len);
        params.ext_ramdisk_size = high(initramfs.len);
    }
    let mut table = params.e820_table;
    for (to, (span, kind)) in table.iter_mut().zip(map.entries()) {
        *to = boot_e820_entry { addr: span.start(), size: span.len(), r#type: kind.number() };
        params.e820_entries += 1;
    }
    params.e820_table = table;
    params
}

/// Page tables that map the first 4 GiB one to one, and the kernel, wherever in the first 512 GiB it lies: two pages with
/// pages of 1 GiB, else up to eight.
fn page_tables(kernel: GpaRange, gigabyte_pages: bool) -> Vec<u8> {
    let table = |index: usize| layout::PAGE_TABLES + layout::PAGE_SIZE * index as u64;
    let last = (kernel.start + kernel.len.max(1) - 1) >> 30;
    let kernel = (kernel.start >> 30).max(MAPPED_GIB)..=last.min(ENTRIES - 1);
    let mut tables = vec![[0; 512], [0; 512]];
    tables[0][0] = table(1) | TABLE;
    for gib in (0..MAPPED_GIB).chain(kernel) {
        let Ok(index) = usize::try_from(gib) else { continue };
        if gigabyte_pages {
            tables[1][index] = gib << 30 | LARGE_PAGE;
        } else {
            tables[1][index] = table(tables.len()) | TABLE;
            tables.push(std::array::from_fn(|page| gib << 30 | (page as u64) << 21 | LARGE_PAGE));
        }
    }
    tables.as_flattened().iter().copied().flat_map(u64::to_le_bytes).collect()
}
