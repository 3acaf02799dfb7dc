//! What the guest drives: buses, PCI, virtio devices, serial ports and the platform's few registers.
//!
//! This crate knows neither the hypervisor nor the configuration. Its seam is events (`EventFd`) and the small
//! traits in [`seam`], which the machine implements.

pub mod bus;
pub mod disk;
pub mod endpoint;
pub mod io_thread;
pub mod ioapic;
pub mod iovec;
pub mod legacy;
pub mod net;
pub mod pci;
pub mod seam;
pub mod vfio;
pub mod virtio;
