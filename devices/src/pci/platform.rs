//! Functions that are there so that a guest knows the platform by them: they have nothing but configuration space.

use std::sync::{Mutex, PoisonError};

use super::{Bars, ConfigSpace, Identity, PciFunction};

const INTEL: u16 = 0x8086;
/// The host bridge of QEMU's q35 (Intel 82G33, `mch`), by which OVMF knows the platform that it is on.
const Q35_HOST_BRIDGE: u16 = 0x29c0;
/// Where it says that ECAM lies (Intel 3 Series Express Chipset datasheet, §5.1.16): 256 buses, enabled.
const Q35_PCIEXBAR: usize = 0x60;
const Q35_PCIEXBAR_ENABLED: u64 = 1;
/// The LPC bridge of the Intel I/O Controller Hub 9, and where it says that power management registers lie (datasheet,
/// §13.1.13 and 13.1.14): at I/O ports, enabled.
const ICH9_LPC: u16 = 0x2918;
const ICH9_PMBASE: usize = 0x40;
const ICH9_PMBASE_IO: u16 = 1;
const ICH9_ACPI_CNTL: usize = 0x44;
const ICH9_ACPI_ENABLED: u8 = 1 << 7;
/// Class codes.
const CLASS_HOST_BRIDGE: u32 = 0x06_00_00;
const CLASS_ISA_BRIDGE: u32 = 0x06_01_00;
/// The subsystem of all functions here, which is that of virtio devices: Red Hat's, "QEMU virtual machine".
const SUBSYSTEM_VENDOR: u16 = 0x1af4;
const SUBSYSTEM: u16 = 0x1100;

/// A function that has nothing but configuration space.
#[derive(Debug)]
pub struct PlatformFunction(Mutex<ConfigSpace>);

impl PlatformFunction {
    /// The host bridge of a platform without firmware.
    pub fn host_bridge() -> Self {
        // Red Hat's number for a virtual PCIe host bridge: no driver of a real chip takes it for its own.
        Self::new(0x1b36, 0x0008, CLASS_HOST_BRIDGE, |_| {})
    }

    /// The host bridge by which firmware knows its platform, with ECAM at `ecam`, a multiple of 256 MiB below 4 GiB. It stays
    /// there, whatever is written.
    pub fn q35_host_bridge(ecam: u64) -> Self {
        Self::new(INTEL, Q35_HOST_BRIDGE, CLASS_HOST_BRIDGE, |config| {
            config.set(Q35_PCIEXBAR, &(ecam | Q35_PCIEXBAR_ENABLED).to_le_bytes());
        })
    }

    /// The bridge by which firmware finds the power management registers, at I/O port `pm_base`, and legacy devices.
    /// The registers stay there, whatever is written. Its place is 00:1f.0.
    pub fn ich9_lpc(pm_base: u16) -> Self {
        Self::new(INTEL, ICH9_LPC, CLASS_ISA_BRIDGE, |config| {
            config.set(ICH9_PMBASE, &(pm_base | ICH9_PMBASE_IO).to_le_bytes());
            config.set(ICH9_ACPI_CNTL, &[ICH9_ACPI_ENABLED]);
            // Firmware looks whether legacy devices behind it can be switched on.
            config.allow_io();
        })
    }

    fn new(vendor: u16, device: u16, class: u32, complete: impl FnOnce(&mut ConfigSpace)) -> Self {
        let mut config = ConfigSpace::new(&Identity {
            vendor,
            device,
            revision: 0,
            class,
            subsystem_vendor: SUBSYSTEM_VENDOR,
            subsystem: SUBSYSTEM,
        });
        complete(&mut config);
        Self(Mutex::new(config))
    }
}

impl PciFunction for PlatformFunction {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let config = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut config = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        config.write(offset, data);
    }

    fn bars(&self) -> Bars {
        Bars::default()
    }

    fn place_bar(&self, _index: usize, _address: u64) {}

    fn memory_enabled(&self) -> bool {
        false
    }

    fn bar_read(&self, _index: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _index: usize, _offset: u64, _data: &[u8]) {}

    fn bar_mapped(&self, _index: usize, _at: Option<u64>) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(function: &PlatformFunction, offset: u16) -> u32 {
        let mut data = [0; 4];
        function.config_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn firmware_knows_the_platform_and_cannot_move_it() {
        let bridge = PlatformFunction::q35_host_bridge(0xe000_0000);
        assert_eq!((word(&bridge, 0), word(&bridge, 0x60), word(&bridge, 0x64)), (0x29c0_8086, 0xe000_0001, 0));
        bridge.config_write(0x60, &[0; 8]);
        assert_eq!(word(&bridge, 0x60), 0xe000_0001);
        let lpc = PlatformFunction::ich9_lpc(0x600);
        assert_eq!((word(&lpc, 0), word(&lpc, 8) >> 8), (0x2918_8086, CLASS_ISA_BRIDGE));
        assert_eq!((word(&lpc, 0x40), word(&lpc, 0x44)), (0x601, 0x80));
        lpc.config_write(0x40, &[0xff; 4]);
        lpc.config_write(4, &[7, 0]);
        assert_eq!((word(&lpc, 0x40), word(&lpc, 4)), (0x601, 7));
    }
}
