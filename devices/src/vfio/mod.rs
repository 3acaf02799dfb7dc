//! PCI functions of the host's that the guest drives itself, by VFIO (Linux: Documentation/driver-api/vfio.rst).
//!
//! What the guest reads of such a function is the function's own, but for what would let it reach beyond it: addresses of its
//! memory, interrupts, power states and what is not passed on (I/O ports, INTx, option ROM, extended capabilities). Its memory
//! is mapped into the guest, except where its MSI-X table lies; its interrupts go from the host's kernel to the guest without
//! the monitor.
//!
//! Which memory it reaches itself is up to the machine: see [`DmaMap`](crate::seam::DmaMap), which [`Container`] is.

mod config;
mod container;
mod function;
mod host;
mod mapping;
mod msi;
pub mod testing;

use std::io;
use std::ops::Range;

use vmm_sys_util::eventfd::EventFd;

pub use container::Container;
pub use function::{Seams, VfioFunction};
pub use host::{HostFunction, OpenError};
pub use mapping::Mapping;

/// A part of what the host's kernel offers of a function: the six base address registers' memory, or configuration space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Region {
    /// The memory of this base address register.
    Bar(u8),
    /// Configuration space.
    Config,
}

/// Kinds of message-signalled interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signals {
    /// MSI (PCI 3.0 §6.8.1).
    Msi,
    /// MSI-X (PCI 3.0 §6.8.2).
    Msix,
}

/// A function of the host's, as its kernel hands it out.
pub trait Physical: Send + Sync {
    /// What messages call it.
    fn name(&self) -> &str;

    /// Length of a region in bytes; 0 where there is none.
    fn len(&self, region: Region) -> u64;

    /// Parts of a base address register's memory that can be mapped.
    fn mappable(&self, bar: u8) -> Vec<Range<u64>>;

    /// Maps a part of a base address register's memory, of whole pages.
    ///
    /// # Errors
    /// The host refuses.
    fn map(&self, bar: u8, part: &Range<u64>) -> io::Result<Mapping>;

    /// Reads; what cannot be read is all ones.
    fn read(&self, region: Region, offset: u64, data: &mut [u8]);

    /// Writes; what cannot be written is lost.
    fn write(&self, region: Region, offset: u64, data: &[u8]);

    /// The most interrupts of a kind.
    fn signals(&self, kind: Signals) -> u16;

    /// Has interrupts of a kind written to these events, the first to the first; with none, they are off.
    ///
    /// # Errors
    /// The host refuses.
    fn signal_to(&self, kind: Signals, events: &[&EventFd]) -> io::Result<()>;

    /// Resets it, where it can be.
    fn reset(&self);
}

#[cfg(test)]
mod tests;
