//! What devices need of the machine that they are built into.

use std::io;

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
