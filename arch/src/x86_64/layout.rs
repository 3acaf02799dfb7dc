//! Where things lie in the guest's physical address space and I/O port space.
//!
//! ```text
//! 0x0000_0000  RAM: boot data in the first 640 KiB, ACPI tables below 1 MiB, the kernel above it
//! 0xc000_0000  32-bit MMIO: BARs
//! 0xe000_0000  ECAM: PCI configuration space, 1 MiB a bus
//! 0xfec0_0000  I/O APIC
//! 0xfee0_0000  local APICs; the address range of message-signalled interrupts
//! 0xfeff_c000  pages that a hypervisor may need for itself
//! 0xff00_0000  firmware, where one boots: it ends at 4 GiB
//! 0x1_0000_0000  RAM that the hole from 0xc000_0000 pushed up, then memory that is plugged while the guest runs, then the
//!                64-bit MMIO window for BARs
//! ```

use hal::GpaRange;

/// Bytes in a page.
pub const PAGE_SIZE: u64 = 4096;

/// Start of the hole below 4 GiB that RAM leaves free.
pub const HOLE_START: u64 = 0xc000_0000;
/// End of that hole: RAM continues here.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// Boot data: the start info, the memory map and the module list of the PVH protocol. One page.
pub const PVH_START_INFO: u64 = 0x6000;
/// Boot data: the zero page (`struct boot_params`) of the Linux protocol. One page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Boot data: the global descriptor table at the 64-bit entry. One page.
pub const BOOT_GDT: u64 = 0x8000;
/// Boot data: the page tables at the 64-bit entry. Eight pages at the most.
pub const PAGE_TABLES: u64 = 0x9000;
/// Boot data: the kernel's command line with its closing zero byte.
pub const CMDLINE: u64 = 0x2_0000;
/// Bytes reserved for the command line, with its closing zero byte.
pub const CMDLINE_MAX: u64 = 0x1_0000;

/// End of the RAM below the area that a PC keeps for video memory and firmware.
pub const LOW_RAM_END: u64 = 0xa_0000;
/// The ACPI tables, with the RSDP first: the area in which old systems search for it (ACPI 6.5 §5.2.5.1).
pub const ACPI_TABLES: GpaRange = GpaRange { start: 0xe_0000, len: RESET_VECTOR - 0xe_0000 };
/// Where a processor in real mode jumps to for a reset (`f000:fff0`), 16 bytes below 1 MiB.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where RAM goes on above that area, and the lowest address at which a kernel may be loaded.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// The window for 32-bit BARs.
pub const MMIO32: GpaRange = GpaRange { start: HOLE_START, len: 0x2000_0000 };
/// PCI configuration space of segment 0, for up to 256 buses.
pub const ECAM: GpaRange = GpaRange { start: 0xe000_0000, len: 0x1000_0000 };
/// Bytes of configuration space of one bus: 32 devices of 8 functions of 4 KiB (PCIe 6.0 §7.2.2).
pub const ECAM_BUS_SIZE: u64 = 0x10_0000;
/// The registers of the I/O APIC.
pub const IOAPIC: GpaRange = GpaRange { start: 0xfec0_0000, len: 0x1000 };
/// The registers of the local APICs. Message-signalled interrupts are writes to this address range.
pub const LAPIC: GpaRange = GpaRange { start: 0xfee0_0000, len: 0x10_0000 };
/// Pages that a hypervisor may put into the guest's address space for its own use: nothing else may lie there.
pub const HYPERVISOR_PAGES: GpaRange = GpaRange { start: 0xfeff_c000, len: 0x4000 };
/// The place for firmware, whose last byte is the last below 4 GiB.
pub const FIRMWARE: GpaRange = GpaRange { start: 0xff00_0000, len: 0x100_0000 };
/// The window for 32-bit BARs where firmware boots: OVMF takes the addresses behind ECAM, up to here, for it.
pub const FIRMWARE_MMIO32: GpaRange = GpaRange { start: ECAM.start + ECAM.len, len: 0x0c00_0000 };
/// Where the window for 64-bit BARs ends where firmware boots, whatever the host: the ACPI tables are to be the same on each.
/// No guest of firmware reaches further, and Linux leaves out what its processor does not reach.
pub const FIRMWARE_MMIO64_END: u64 = 1 << 51;
/// The window for 64-bit BARs starts and ends at a multiple of this, in bytes. It is never smaller.
pub const MMIO64_GRANULE: u64 = 0x4000_0000;

/// The first serial port (16550): eight ports.
pub const COM1_PORT: u16 = 0x3f8;
/// Its pin of the I/O APIC: edge-triggered, active high.
pub const COM1_PIN: u8 = 4;
/// Writing a byte here ends a test: see the debug-exit device. Named in no ACPI table.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;
/// The first of the keyboard controller's ports, where a platform has one.
pub const I8042_PORT: u16 = 0x60;
/// Where software in a guest says that user space is reached: a byte of any value. Nothing answers here unless the boot
/// is watched, and it is named in no ACPI table.
pub const BOOT_MARKER_PORT: u16 = 0x508;
/// The port of the panic device, one byte: reading tells the events it knows, writing reports one.
pub const PVPANIC_PORT: u16 = 0x505;

/// The address and data ports of PCI configuration space, where firmware boots: eight ports.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// The firmware configuration device, where firmware boots: twelve ports. Named in no ACPI table.
pub const FW_CFG_PORT: u16 = 0x510;
/// The index and data ports of the real-time clock, where firmware boots: two ports. Named in no ACPI table.
pub const CMOS_PORT: u16 = 0x70;
/// Power management registers of a chipset, where firmware boots: twelve ports. OVMF switches off by those here, wherever
/// else the chipset says that they are. Named in no ACPI table.
pub const PM_PORT: u16 = 0x600;

/// The sleep control register, one byte (ACPI 6.5 §4.8.3.7): the sleep type in bits 4:2, bit 5 makes it so.
pub const ACPI_SLEEP_CONTROL_PORT: u16 = 0x620;
/// The sleep status register, one byte (ACPI 6.5 §4.8.3.7): bit 7 is set on waking, and is cleared by writing it.
pub const ACPI_SLEEP_STATUS_PORT: u16 = 0x621;
/// The reset register, one byte: writing [`ACPI_RESET_VALUE`] resets the machine.
pub const ACPI_RESET_PORT: u16 = 0x622;
/// What is written to the reset register.
pub const ACPI_RESET_VALUE: u8 = 1;
/// The sleep type that means off (S5) in the sleep control register.
pub const ACPI_SLEEP_TYPE_S5: u8 = 5;
/// What a guest writes to the sleep control register to be switched off.
pub const ACPI_SLEEP_CONTROL_S5: u8 = ACPI_SLEEP_TYPE_S5 << 2 | 1 << 5;

/// The generic event device's register, four bytes: reading tells which events have happened, and clears them.
pub const GED_PORT: u16 = 0x624;
/// Bytes of the generic event device's register.
pub const GED_PORT_SIZE: u8 = 4;
/// The generic event device's pin of the I/O APIC: edge-triggered, active high.
pub const GED_PIN: u8 = 9;
/// The bit of the generic event device's register for a press of the power button.
pub const GED_POWER_BUTTON: u32 = 1 << 0;
/// The bit of the generic event device's register for processors that come and go.
pub const GED_PROCESSORS: u32 = 1 << 1;

/// The processors' hot-plug registers, where a platform has some: four bytes that tell what is asked of the guest, four
/// that take its answers, and one for each processor.
pub const PROCESSORS_PORT: u16 = 0x6f8;
/// Where in them each processor's byte is: at this offset plus its number.
pub const PROCESSORS_STATUS: u8 = 8;
/// What the first of them reads as where nothing more is asked.
pub const PROCESSORS_NONE: u32 = u32::MAX;

/// Memory that is plugged while the guest runs begins at a multiple of this, in bytes: Linux adds memory by blocks that it
/// chooses, of 128 MiB to 2 GiB, and leaves out what is no whole one.
pub const PLUGGABLE_ALIGNMENT: u64 = 2 << 30;

/// Memory does not fit into the guest's address space.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// RAM, or the MMIO window above it, goes beyond the last address.
    #[error(
        "{ram_mib} MiB of memory do not fit: a guest physical address has {bits} bits on this host, which leaves room \
         for {max_mib} MiB"
    )]
    TooLarge {
        /// The RAM that was asked for, in MiB.
        ram_mib: u64,
        /// Bits of a guest physical address.
        bits: u8,
        /// The most RAM that fits, in MiB.
        max_mib: u64,
    },
}

/// Where `bytes` of RAM lie: below the hole, and the rest from 4 GiB on. `bytes` must be a multiple of the page size.
pub fn ram_ranges(bytes: u64) -> Vec<GpaRange> {
    let low = bytes.min(HOLE_START);
    let ranges = [GpaRange { start: 0, len: low }, GpaRange { start: HOLE_END, len: bytes - low }];
    ranges.into_iter().filter(|range| range.len > 0).collect()
}

/// Where `bytes` of memory lie that is plugged while the guest runs: above `ram` bytes of RAM, at a multiple of
/// [`PLUGGABLE_ALIGNMENT`]. `None` where the address space has no such range.
pub fn pluggable_range(ram: u64, bytes: u64) -> Option<GpaRange> {
    let ram_end = HOLE_END.checked_add(ram.saturating_sub(HOLE_START))?;
    let start = ram_end.checked_next_multiple_of(PLUGGABLE_ALIGNMENT)?;
    start.checked_add(bytes)?;
    Some(GpaRange { start, len: bytes })
}

/// The RAM that would reach as far up as `range`, which lies above the hole, for [`mmio64_window`].
pub fn ram_up_to(range: GpaRange) -> u64 {
    range.start.saturating_add(range.len).saturating_sub(HOLE_END - HOLE_START)
}

/// The most RAM, in bytes, that fits beside the hole and the 64-bit MMIO window.
pub fn max_ram(physical_address_bits: u8) -> u64 {
    high_ram_limit(physical_address_bits).saturating_sub(HOLE_END - HOLE_START)
}

/// The highest address at which RAM may end.
fn high_ram_limit(physical_address_bits: u8) -> u64 {
    let end = 1u64.checked_shl(physical_address_bits.into()).unwrap_or(0);
    end.saturating_sub(MMIO64_GRANULE)
}

/// The window for 64-bit BARs: from the first GiB boundary above RAM to the end of the address space. It lies as low
/// as it can, since the IOMMU of a host may reach fewer addresses than its processors.
///
/// `ram_bytes` is the most RAM that the guest will ever have, with what may be plugged later.
///
/// # Errors
/// [`LayoutError::TooLarge`] where less than [`MMIO64_GRANULE`] remains above RAM.
pub fn mmio64_window(ram_bytes: u64, physical_address_bits: u8) -> Result<GpaRange, LayoutError> {
    let end = 1u64.checked_shl(physical_address_bits.into()).unwrap_or(0);
    let limit = high_ram_limit(physical_address_bits);
    let too_large = || LayoutError::TooLarge {
        ram_mib: ram_bytes >> 20,
        bits: physical_address_bits,
        max_mib: max_ram(physical_address_bits) >> 20,
    };
    let high_ram = ram_bytes.saturating_sub(HOLE_START);
    let start = HOLE_END
        .checked_add(high_ram)
        .and_then(|ram_end| ram_end.checked_next_multiple_of(MMIO64_GRANULE))
        .filter(|start| *start <= limit)
        .ok_or_else(too_large)?;
    Ok(GpaRange { start, len: end - start })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn ranges(bytes: u64) -> Vec<(u64, u64)> {
        ram_ranges(bytes).into_iter().map(|range| (range.start, range.len)).collect()
    }

    #[test]
    fn ram_leaves_the_hole_free() {
        assert_eq!(ranges(0), []);
        assert_eq!(ranges(256 * MIB), [(0, 256 * MIB)]);
        assert_eq!(ranges(3 * GIB), [(0, 3 * GIB)]);
        assert_eq!(ranges(3 * GIB + 4096), [(0, 3 * GIB), (4 * GIB, 4096)]);
        assert_eq!(ranges(6 * GIB), [(0, 3 * GIB), (4 * GIB, 3 * GIB)]);
    }

    #[test]
    fn the_64_bit_window_lies_above_ram_and_ends_with_the_address_space() {
        let window = |bytes, bits| mmio64_window(bytes, bits).map(|range| (range.start, range.len));
        assert_eq!(window(256 * MIB, 36), Ok((4 * GIB, 60 * GIB)));
        assert_eq!(window(3 * GIB, 36), Ok((4 * GIB, 60 * GIB)));
        assert_eq!(window(3 * GIB + 4096, 36), Ok((5 * GIB, 59 * GIB)));
        assert_eq!(window(6 * GIB, 48), Ok((7 * GIB, (1 << 48) - 7 * GIB)));
        // RAM up to the last GiB leaves that one to the window.
        assert_eq!(window(62 * GIB, 36), Ok((63 * GIB, GIB)));
    }

    #[test]
    fn pluggable_memory_lies_between_ram_and_the_64_bit_window() {
        let range = |ram, bytes| pluggable_range(ram, bytes).map(|range| (range.start, range.len));
        assert_eq!(range(GIB, 3 * GIB), Some((4 * GIB, 3 * GIB)));
        assert_eq!(range(3 * GIB, GIB), Some((4 * GIB, GIB)));
        assert_eq!(range(3 * GIB + 4096, 128 * MIB), Some((6 * GIB, 128 * MIB)));
        assert_eq!(range(u64::MAX, GIB), None);
        assert_eq!(range(GIB, u64::MAX - GIB), None);
        let top = ram_up_to(pluggable_range(GIB, 3 * GIB).unwrap());
        assert_eq!(mmio64_window(top, 40).unwrap().start, 7 * GIB);
    }

    #[test]
    fn ram_that_does_not_fit_is_an_error_that_says_what_would() {
        let error = mmio64_window(62 * GIB + 4096, 36).unwrap_err();
        assert_eq!(error, LayoutError::TooLarge { ram_mib: 62 * 1024, bits: 36, max_mib: 62 * 1024 });
        let error = mmio64_window(100 * GIB, 36).unwrap_err();
        assert_eq!(
            error.to_string(),
            "102400 MiB of memory do not fit: a guest physical address has 36 bits on this host, which leaves room for \
             63488 MiB"
        );
        for (bytes, bits) in [(u64::MAX, 52), (u64::MAX - GIB, 63), (GIB, 0), (GIB, 32), (GIB, 64), (GIB, 255)] {
            mmio64_window(bytes, bits).unwrap_err();
        }
    }

    #[test]
    fn nothing_lies_on_anything_else() {
        let reset_vector = GpaRange { start: RESET_VECTOR, len: 16 };
        let fixed = [
            GpaRange { start: PVH_START_INFO, len: PAGE_SIZE },
            GpaRange { start: ZERO_PAGE, len: PAGE_SIZE },
            GpaRange { start: BOOT_GDT, len: PAGE_SIZE },
            GpaRange { start: PAGE_TABLES, len: 8 * PAGE_SIZE },
            GpaRange { start: CMDLINE, len: CMDLINE_MAX },
            GpaRange { start: LOW_RAM_END, len: 0 },
            ACPI_TABLES,
            reset_vector,
            GpaRange { start: HIGH_RAM_START, len: HOLE_START - HIGH_RAM_START },
            MMIO32,
            ECAM,
            FIRMWARE_MMIO32,
            IOAPIC,
            LAPIC,
            HYPERVISOR_PAGES,
            FIRMWARE,
            GpaRange { start: HOLE_END, len: 0 },
        ];
        for pair in fixed.windows(2) {
            assert!(pair[0].start + pair[0].len <= pair[1].start, "{pair:x?}");
        }
        assert_eq!(ECAM.len, 256 * ECAM_BUS_SIZE);
    }
}
