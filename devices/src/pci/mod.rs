//! PCI Express: configuration space, base address registers, MSI-X, the root bus with its ECAM window, and root ports with
//! hot-plug.
//!
//! A function decodes its own configuration; the root bus maps its base address registers onto the bus of
//! memory-mapped registers, wherever the guest puts them. There are no INTx interrupts and no I/O BARs.

mod config;
mod msix;
mod platform;
mod ports;
mod root_port;
mod segment;

pub(crate) use config::CAPABILITY_MSI;
pub use config::{Bar, BarKind, Bars, ConfigSpace, ConfigState, Identity};
pub(crate) use msix::{CAPABILITY_MSIX, CONTROL_ENABLE, CONTROL_FUNCTION_MASK, ENTRY_LEN};
pub use msix::{MsixCapability, MsixState, MsixVectors};
pub use platform::PlatformFunction;
pub use ports::ConfigPorts;
pub use root_port::{Indicator, RootPort, SlotObserver};
pub use segment::{Address, Error, MAX_PORTS, PciSegment, Windows};

/// One function of a PCI device.
pub trait PciFunction: Send + Sync {
    /// Reads configuration space. `offset + data.len()` is at most 4096.
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// Writes configuration space, under the same bounds.
    fn config_write(&self, offset: u16, data: &[u8]);

    /// The base address registers as they stand.
    fn bars(&self) -> Bars;

    /// Gives a base address register its first address, before the guest runs.
    fn place_bar(&self, index: usize, address: u64);

    /// True while the guest lets the function answer to memory accesses (the command register's bit 1).
    fn memory_enabled(&self) -> bool;

    /// Reads the memory of a base address register. The access lies within it.
    fn bar_read(&self, index: usize, offset: u64, data: &mut [u8]);

    /// Writes the memory of a base address register, under the same bounds.
    fn bar_write(&self, index: usize, offset: u64, data: &[u8]);

    /// Tells where a base address register now answers, `None` for nowhere.
    fn bar_mapped(&self, index: usize, at: Option<u64>);
}
