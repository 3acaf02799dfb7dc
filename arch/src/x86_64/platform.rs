//! What the platform shows to the guest, chosen in one place.
//!
//! A directly booted Linux and a firmware want opposite things: each legacy device that is declared absent saves the
//! kernel a probe that costs up to a second, while a firmware needs some of them.

use hal::GpaRange;

use super::Topology;
use super::layout::{self, LayoutError};

/// What the guest is shown. ACPI tables, the memory map and the monitor's bus are all made from this.
///
/// The platform is always hardware-reduced (ACPI 6.5 §4.1): no PM1 registers, no SCI, no PM timer, no 8259 and no
/// 8254. Sleep, reset and events go through the ports in [`layout`].
#[derive(Debug, Clone)]
pub struct Platform {
    /// The arrangement of vCPUs.
    pub topology: Topology,
    /// How many of them are there when the guest boots, the first ones, where others can come and these can go. Without
    /// it all are there and stay.
    pub pluggable: Option<u32>,
    /// There is a VGA adapter at its fixed addresses.
    pub vga: bool,
    /// There is a keyboard controller at ports 0x60 and 0x64.
    pub i8042: bool,
    /// There is a real-time clock at ports 0x70 and 0x71, for the operating system to drive.
    pub cmos_rtc: bool,
    /// Firmware boots, and finds the chipset that it looks for: a host bridge and an LPC bridge that it knows, a timer, a
    /// clock, and ports for PCI configuration space, resets and its own configuration. The ACPI tables tell of none of
    /// these: an operating system that looks for them pays for each with an exit.
    pub firmware: bool,
    /// There is a serial port at [`layout::COM1_PORT`].
    pub serial: bool,
    /// There is a panic device at [`layout::PVPANIC_PORT`].
    pub pvpanic: bool,
    /// Pins of the I/O APIC. Linux goes through all of them several times, at some nine exits a pin.
    pub ioapic_pins: u8,
    /// PCI host bridges, from the lowest bus up: one for each NUMA node of the guest that has devices.
    pub host_bridges: Vec<HostBridge>,
}

/// A PCI Express host bridge. Configuration space is reached through ECAM only: there are no ports 0xcf8 and 0xcfc.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostBridge {
    /// PCI segment group.
    pub segment: u16,
    /// Its root bus.
    pub first_bus: u8,
    /// The last bus below it that is in use. Linux reads 32 devices on every bus up to here, so it is kept low.
    pub last_bus: u8,
    /// Where ECAM has bus 0 of the segment, whether this bridge owns that bus or not.
    pub ecam_base: u64,
    /// The window for 32-bit BARs.
    pub mmio32: GpaRange,
    /// The window for 64-bit BARs.
    pub mmio64: GpaRange,
    /// The NUMA node, as a proximity domain (ACPI 6.5 §6.2.14).
    pub proximity: Option<u32>,
}

impl Platform {
    /// The platform for a directly booted Linux: no legacy device but the serial port, one host bridge with one bus.
    /// A monitor with more buses raises [`HostBridge::last_bus`].
    ///
    /// `ram_bytes` is the most RAM that the guest will ever have.
    ///
    /// # Errors
    /// [`LayoutError`] where RAM and the 64-bit MMIO window do not fit into `physical_address_bits`.
    pub fn direct_boot(ram_bytes: u64, physical_address_bits: u8, topology: Topology) -> Result<Self, LayoutError> {
        Ok(Self {
            topology,
            pluggable: None,
            vga: false,
            i8042: false,
            cmos_rtc: false,
            firmware: false,
            serial: true,
            pvpanic: true,
            ioapic_pins: layout::GED_PIN + 1,
            host_bridges: vec![HostBridge {
                segment: 0,
                first_bus: 0,
                last_bus: 0,
                ecam_base: layout::ECAM.start,
                mmio32: layout::MMIO32,
                mmio64: layout::mmio64_window(ram_bytes, physical_address_bits)?,
                proximity: None,
            }],
        })
    }
}

impl Platform {
    /// The platform for a firmware such as OVMF: as for a directly booted Linux, which the firmware then starts, with the
    /// chipset that it looks for, and 32-bit BARs where it puts them.
    ///
    /// OVMF knows its platform by the host bridge. As QEMU's q35 it asks for ACPI tables, memory map and kernel by fw_cfg. It
    /// knows Cloud Hypervisor's, too, which would spare the chipset; but then tables come through the hand-off blocks, where
    /// a page or two must hold all, memory through a PVH start info, and there is no way to give it a kernel.
    ///
    /// # Errors
    /// As [`Platform::direct_boot`].
    pub fn firmware_boot(ram_bytes: u64, physical_address_bits: u8, topology: Topology) -> Result<Self, LayoutError> {
        let mut platform = Self::direct_boot(ram_bytes, physical_address_bits, topology)?;
        platform.firmware = true;
        for bridge in &mut platform.host_bridges {
            bridge.mmio32 = layout::FIRMWARE_MMIO32;
            bridge.mmio64.len = layout::FIRMWARE_MMIO64_END.saturating_sub(bridge.mmio64.start);
        }
        Ok(platform)
    }
}

impl HostBridge {
    /// The configuration space of its buses.
    pub fn ecam(&self) -> GpaRange {
        let buses = u64::from(self.last_bus.saturating_sub(self.first_bus)) + 1;
        GpaRange {
            start: self.ecam_base.saturating_add(u64::from(self.first_bus) * layout::ECAM_BUS_SIZE),
            len: buses * layout::ECAM_BUS_SIZE,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_direct_boot_shows_one_bus_and_no_legacy_device_but_the_serial_port() {
        let platform = Platform::direct_boot(6 << 30, 40, Topology::flat(2).unwrap()).unwrap();
        assert!(platform.serial && platform.pvpanic);
        assert!(platform.ioapic_pins > layout::COM1_PIN.max(layout::GED_PIN));
        assert!(!platform.vga && !platform.i8042 && !platform.cmos_rtc);
        let [bridge] = &platform.host_bridges[..] else { panic!("one host bridge") };
        assert_eq!((bridge.segment, bridge.first_bus, bridge.last_bus), (0, 0, 0));
        assert_eq!(bridge.ecam(), GpaRange { start: 0xe000_0000, len: 0x10_0000 });
        assert_eq!(bridge.mmio64, GpaRange { start: 7 << 30, len: (1 << 40) - (7 << 30) });
        Platform::direct_boot(1 << 40, 40, Topology::flat(2).unwrap()).unwrap_err();
    }

    #[test]
    fn what_firmware_is_shown_depends_on_no_host() {
        let shown = |bits| Platform::firmware_boot(6 << 30, bits, Topology::flat(2).unwrap()).unwrap();
        assert_eq!(crate::acpi::link(&shown(36)), crate::acpi::link(&shown(52)));
        let bridge = &shown(40).host_bridges[0];
        assert_eq!((bridge.mmio32.start, bridge.mmio64.start), (0xf000_0000, 7 << 30));
        assert_eq!(bridge.mmio64.start + bridge.mmio64.len, 1 << 51);
        Platform::firmware_boot(1 << 40, 40, Topology::flat(2).unwrap()).unwrap_err();
    }

    #[test]
    fn a_bridge_has_the_configuration_space_of_its_own_buses() {
        let platform = Platform::direct_boot(1 << 30, 40, Topology::flat(1).unwrap()).unwrap();
        let bridge = HostBridge { first_bus: 8, last_bus: 255, ..platform.host_bridges[0].clone() };
        assert_eq!(bridge.ecam(), GpaRange { start: 0xe080_0000, len: 248 << 20 });
    }
}
