//! What devices need of the machine that they are built into.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::GuestRegionMmap;
use vmm_sys_util::eventfd::EventFd;

/// A message-signalled interrupt's address and data (PCI 3.0 §6.8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MsiMessage {
    /// The address written to.
    pub address: u64,
    /// The value written.
    pub data: u32,
}

/// One interrupt into the guest.
pub trait Interrupt: Send + Sync {
    /// Writing to this event interrupts the guest while a message is set.
    fn event(&self) -> &EventFd;

    /// Sets the message to deliver; `None` masks the interrupt. Setting what is set already costs nothing.
    ///
    /// # Errors
    /// What the hypervisor answered.
    fn set(&self, message: Option<MsiMessage>) -> io::Result<()>;
}

/// Makes interrupts for devices that choose their messages at run time (MSI-X).
pub trait Interrupts: Send + Sync {
    /// A new interrupt, masked. Dropping it frees it.
    ///
    /// # Errors
    /// No interrupt is free, or the hypervisor refused.
    fn create(&self) -> io::Result<Box<dyn Interrupt>>;
}

/// Turns guest writes to an address into events, without a call of the device.
pub trait Doorbells: Send + Sync {
    /// Signals `event` on every guest write of any width to the guest physical address `at`, until the returned
    /// handle is dropped.
    ///
    /// # Errors
    /// The address has a doorbell already, or the hypervisor refused.
    fn ring_on_write(&self, at: u64, event: &EventFd) -> io::Result<Box<dyn Send + Sync>>;
}

/// Puts memory of devices' own into the guest.
pub trait DeviceMemory: Send + Sync {
    /// Has the guest reach a mapping at its address, without an exit, until the returned handle is dropped.
    ///
    /// # Errors
    /// There is memory at the address already, or the hypervisor refused.
    fn show(&self, region: Arc<GuestRegionMmap>) -> io::Result<Box<dyn Send + Sync>>;
}

/// Which memory functions of the host's reach, and at which addresses: an IOMMU's mappings.
pub trait DmaMap: Send + Sync {
    /// Has them reach a part of guest memory at its guest physical addresses, which lie in `region`. It stays where it is in the
    /// host's memory until it is unmapped.
    ///
    /// # Errors
    /// The host refuses: its limit on locked memory, or on mappings, is reached, or a part is mapped already.
    fn map(&self, region: &GuestRegionMmap, part: &Range<u64>) -> io::Result<()>;

    /// Has them reach a part no more, which was mapped as it is here. What they had begun there is done, or fails, before this
    /// returns.
    ///
    /// # Errors
    /// The host refuses.
    fn unmap(&self, part: &Range<u64>) -> io::Result<()>;
}
