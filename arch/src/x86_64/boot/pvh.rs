//! The PVH boot protocol: start info, module list and memory map, all in one page (Xen,
//! `public/arch-x86/hvm/start_info.h`).

use hal::{BootRegisters, GpaRange};
use linux_loader::start_info::{XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::super::layout;
use super::error::{BootError, KernelError};
use super::map::MemoryMap;
use super::plan::Kernel;
use super::{Protocol, registers, write_boot_data};

/// Version 1 of the start info has the memory map.
const VERSION: u32 = 1;

/// Writes what the kernel finds at its entry, and tells the registers there.
pub(super) fn prepare(
    memory: &GuestMemoryMmap,
    map: &MemoryMap,
    kernel: &Kernel,
    initramfs: Option<GpaRange>,
) -> Result<BootRegisters, BootError> {
    let entry =
        kernel.pvh_entry.ok_or(KernelError::Protocol { wanted: Protocol::Pvh, reason: "it has no PVH entry point" })?;
    write_boot_data(memory, "the PVH start info", layout::PVH_START_INFO, &start_page(map, initramfs))?;
    Ok(registers::pvh(entry))
}

/// The start info, then the module list of one entry or none, then the memory map.
fn start_page(map: &MemoryMap, initramfs: Option<GpaRange>) -> Vec<u8> {
    let modules: Vec<_> = initramfs
        .iter()
        .map(|range| hvm_modlist_entry { paddr: range.start, size: range.len, ..hvm_modlist_entry::default() })
        .collect();
    let map: Vec<_> = map
        .entries()
        .iter()
        .map(|(span, kind)| hvm_memmap_table_entry {
            addr: span.start(),
            size: span.len(),
            type_: kind.number(),
            reserved: 0,
        })
        .collect();
    let modules_at = layout::PVH_START_INFO + 56;
    let map_at = modules_at + if modules.is_empty() { 0 } else { 32 };
    // Both counts fit: there is one module, and the memory map is bounded.
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        flags: 0,
        nr_modules: u32::try_from(modules.len()).unwrap_or(0),
        modlist_paddr: if modules.is_empty() { 0 } else { modules_at },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::ACPI_TABLES.start,
        memmap_paddr: map_at,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        reserved: 0,
    };
    let mut page = info.as_slice().to_vec();
    page.extend(modules.iter().flat_map(|entry| entry.as_slice()));
    page.extend(map.iter().flat_map(|entry| entry.as_slice()));
    page
}
