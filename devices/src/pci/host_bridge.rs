//! The host bridge: the function 00:00.0 by which a guest knows that there is a PCI bus.

use std::sync::{Mutex, PoisonError};

use super::{Bars, ConfigSpace, Identity, PciFunction};

/// A host bridge, which has nothing but its header.
#[derive(Debug)]
pub struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    /// A host bridge.
    pub fn new() -> Self {
        Self(Mutex::new(ConfigSpace::new(&Identity {
            // Red Hat's number for a virtual PCIe host bridge: no driver of a real chip takes it for its own.
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        })))
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciFunction for HostBridge {
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
