//! The tables of fixed form: FADT, MADT and MCFG.

use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;

use super::super::layout;
use super::super::platform::{HostBridge, Platform};
use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};

/// IA-PC boot architecture flags (ACPI 6.5 §5.2.9.3): there are devices on an LPC or ISA bus.
const BOOT_LEGACY_DEVICES: u16 = 1 << 0;
/// There is a keyboard controller.
const BOOT_8042: u16 = 1 << 1;
/// There is no VGA adapter to probe for.
const BOOT_VGA_NOT_PRESENT: u16 = 1 << 2;
/// Active state power management of PCIe links must not be touched.
const BOOT_NO_ASPM: u16 = 1 << 4;
/// There is no real-time clock to probe for.
const BOOT_NO_CMOS_RTC: u16 = 1 << 5;

/// The first I/O APIC's id, which no local APIC has.
const IOAPIC_ID: u8 = 0xff;

/// The fixed description table (ACPI 6.5 §5.2.9).
pub(super) fn fadt(platform: &Platform, dsdt: u64) -> FADT {
    let mut table = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // Buttons are devices of the DSDT, not registers.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    let flags = [
        (platform.serial, BOOT_LEGACY_DEVICES),
        (platform.i8042, BOOT_8042),
        (!platform.vga, BOOT_VGA_NOT_PRESENT),
        (true, BOOT_NO_ASPM),
        (!platform.cmos_rtc, BOOT_NO_CMOS_RTC),
    ];
    let flags = flags.into_iter().filter(|(on, _)| *on).fold(0, |all, (_, flag)| all | flag);
    table.iapc_boot_arch = flags.into();
    table.reset_reg = byte_port(layout::ACPI_RESET_PORT);
    table.reset_value = layout::ACPI_RESET_VALUE;
    table.sleep_control_reg = byte_port(layout::ACPI_SLEEP_CONTROL_PORT);
    table.sleep_status_reg = byte_port(layout::ACPI_SLEEP_STATUS_PORT);
    table.finalize()
}

/// A register of one byte at an I/O port.
fn byte_port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

/// The interrupt controllers (ACPI 6.5 §5.2.12): a local APIC for each vCPU, and the I/O APIC. A vCPU's processor UID
/// is its number, counted from 0. One that may come later is "online capable".
pub(super) fn madt(platform: &Platform) -> MADT {
    // Both addresses lie below 4 GiB.
    let low = |address: u64| u32::try_from(address).unwrap_or(u32::MAX);
    let local = LocalInterruptController::Address(low(layout::LAPIC.start));
    let mut table = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local);
    let present = platform.pluggable.unwrap_or(u32::MAX);
    for (uid, id) in (0u8..).zip(platform.topology.vcpu_ids()) {
        let there = u32::from(uid) < present;
        let status = if there { EnabledStatus::Enabled } else { EnabledStatus::DisabledOnlineCapable };
        table.add_structure(ProcessorLocalApic::new(uid, id.0, status));
    }
    table.add_structure(IoApic::new(IOAPIC_ID, low(layout::IOAPIC.start), 0));
    table
}

/// Where PCI configuration space lies (PCI Firmware 3.3 §4.1.2). Linux looks for devices up to the last bus here.
pub(super) fn mcfg(bridges: &[HostBridge]) -> MCFG {
    let mut table = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for bridge in bridges {
        table.add_ecam(bridge.ecam_base, bridge.segment, bridge.first_bus, bridge.last_bus);
    }
    table
}
