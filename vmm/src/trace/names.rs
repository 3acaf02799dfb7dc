//! What lies at an address that a guest accesses, by the name that people know.

use std::ops::RangeInclusive;

use arch::layout;
use devices::pci::PciFunction;
use devices::virtio::transport::VirtioPci;

use super::View;
use super::recorder::{OTHER_PLACES, Reason};

/// The ports of PCI configuration mechanism #1 (PCI 3.0 §3.2.2.3.2). Halyard has none, but guests may look.
pub const PCI_CONFIG_PORTS: RangeInclusive<u16> = 0xcf8..=0xcff;

/// Ports of Halyard's own platform, and those at which PCs have something that guests look for.
const PORTS: [(RangeInclusive<u16>, &str); 22] = [
    (layout::COM1_PORT..=layout::COM1_PORT + 7, "serial"),
    (layout::ACPI_SLEEP_CONTROL_PORT..=layout::ACPI_RESET_PORT, "acpi"),
    (layout::GED_PORT..=layout::GED_PORT + 3, "acpi events"),
    (layout::PVPANIC_PORT..=layout::PVPANIC_PORT, "pvpanic"),
    (layout::DEBUG_EXIT_PORT..=layout::DEBUG_EXIT_PORT + 3, "debug-exit"),
    (layout::BOOT_MARKER_PORT..=layout::BOOT_MARKER_PORT, "boot marker"),
    (PCI_CONFIG_PORTS, "pci-config"),
    (0x00..=0x0f, "dma controller"),
    (0x20..=0x21, "interrupt controller (8259)"),
    (0x40..=0x43, "timer (8254)"),
    (0x60..=0x60, "keyboard controller (8042)"),
    (0x61..=0x61, "timer (8254) gate"),
    (0x64..=0x64, "keyboard controller (8042)"),
    (0x70..=0x71, "clock (CMOS)"),
    (0x80..=0x80, "delay (POST code)"),
    (0x81..=0x8f, "dma pages"),
    (0xa0..=0xa1, "interrupt controller (8259)"),
    (0x2e8..=0x2ef, "serial port 4"),
    (0x2f8..=0x2ff, "serial port 2"),
    (0x3b0..=0x3df, "vga"),
    (0x3e8..=0x3ef, "serial port 3"),
    (0x510..=0x51b, "fw_cfg"),
];

/// The name of what lies there. Base address registers are taken as they stand now.
pub fn place(view: &View, reason: Reason, address: u64) -> String {
    match reason {
        _ if address == OTHER_PLACES => "further addresses".into(),
        Reason::PioRead | Reason::PioWrite => port(address).into(),
        Reason::MmioRead | Reason::MmioWrite => memory(view, address),
        Reason::EndOfInterrupt => format!("vector {address}"),
        Reason::Kick => "monitor".into(),
    }
}

fn port(address: u64) -> &'static str {
    let port = u16::try_from(address).unwrap_or(u16::MAX);
    PORTS.iter().find(|(ports, _)| ports.contains(&port)).map_or("unclaimed port", |(_, name)| name)
}

fn memory(view: &View, gpa: u64) -> String {
    let within = |start: u64, len: u64| gpa.checked_sub(start).filter(|offset| *offset < len);
    if within(layout::IOAPIC.start, layout::IOAPIC.len).is_some() {
        return "ioapic".into();
    }
    if view.ecam.contains(&gpa) {
        // Buses of 32 devices of 8 functions of 4 KiB (PCIe 6.0 §7.2.2).
        let offset = gpa - view.ecam.start;
        return format!("ecam {:02x}:{:02x}.{}", offset >> 20, offset >> 15 & 31, offset >> 12 & 7);
    }
    for (id, function) in &view.functions {
        for bar in function.bars().into_iter().flatten() {
            if let Some(offset) = within(bar.address, bar.size) {
                return format!("{id} {}", VirtioPci::structure_at(offset));
            }
        }
    }
    "unclaimed memory".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_have_the_names_of_their_devices() {
        assert_eq!(port(0x3fd), "serial");
        assert_eq!(port(layout::ACPI_RESET_PORT.into()), "acpi");
        assert_eq!(port(0xcfc), "pci-config");
        assert_eq!(port(0x1234), "unclaimed port");
        assert_eq!(port(0x1_03f8), "unclaimed port");
    }
}
