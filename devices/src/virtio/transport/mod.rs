//! How a driver reaches a virtio device: one status machine ([`Core`]), and the registers that show it.

mod core;
mod pci;
mod signals;
mod slot;

pub use self::core::Core;
pub use self::pci::VirtioPci;
pub use self::signals::Signals;
pub use self::slot::Area;

#[cfg(test)]
mod tests;
