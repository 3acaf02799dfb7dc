//! Interrupts into the guest and doorbells out of it: handles that free what they hold when dropped.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use vmm_sys_util::eventfd::EventFd;

use crate::Result;

/// A message-signalled interrupt: what a device writes to the interrupt controller (PCI 3.0 §6.8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MsiMessage {
    /// The address written to.
    pub address: u64,
    /// The value written.
    pub data: u32,
}

/// A way for a device to interrupt the guest. Writing to its event interrupts without a call into the monitor's
/// vCPU threads. Dropping it detaches the event before the route goes.
pub trait MsiRoute: Send + Sync {
    /// The event that raises the interrupt while a message is set.
    fn event(&self) -> &EventFd;

    /// Sets the message that the interrupt delivers, or takes it away (masked). While it is masked nothing reads the
    /// event: what is written to it then is delivered when a message is set again, as PCI wants of a pending bit
    /// (PCI 3.0 §6.8.3.5). A caller who wants it forgotten reads the event first. Setting the message that is set
    /// already does nothing.
    ///
    /// # Errors
    /// [`crate::Error::System`] where the hypervisor refuses the route.
    fn set(&self, message: Option<MsiMessage>) -> Result<()>;
}

/// An address at which a guest rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IoAddr {
    /// An I/O port.
    Pio(u16),
    /// A guest physical address.
    Mmio(u64),
}

/// Which writes to a doorbell's address ring it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DoorbellMatch {
    /// A write of any width and value.
    Any,
    /// A 16-bit write of this value.
    U16(u16),
    /// A 32-bit write of this value.
    U32(u32),
}

/// A guest write turned into an event without an exit to the monitor. Dropping it frees the address.
pub trait Doorbell: Send + Sync {
    /// The event that the guest's write signals.
    fn event(&self) -> &EventFd;
}

/// The interrupts and doorbells of a VM. Local APICs are the hypervisor's; an I/O APIC is a device of the monitor
/// that speaks through the routes made here.
pub trait Irqs: Send + Sync {
    /// A new message-signalled interrupt, masked.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] where no route is free; [`crate::Error::System`] where the hypervisor refuses.
    fn msi(&self) -> Result<Box<dyn MsiRoute>>;

    /// The route of pin `pin` (0 to 23) of the monitor's I/O APIC, masked. When its message is level-triggered
    /// (data bit 15), the guest's end of interrupt is told to [`crate::ExitHandler::end_of_interrupt`].
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] where the pin does not exist or is taken; [`crate::Error::System`] where the
    /// hypervisor refuses.
    fn line(&self, pin: u8) -> Result<Box<dyn MsiRoute>>;

    /// An event that guest writes to `at` signal through `event`, which the caller made and may share.
    ///
    /// # Errors
    /// [`crate::Error::System`] where the address is taken or the hypervisor refuses.
    fn doorbell(&self, at: IoAddr, on: DoorbellMatch, event: EventFd) -> Result<Box<dyn Doorbell>>;

    /// How many routes of [`Irqs::msi`] and [`Irqs::line`] are held, as it changes. One that the hypervisor refuses to free
    /// stays counted.
    fn routes_held(&self) -> Arc<AtomicUsize>;
}
