//! The x86-64 platform.

pub mod acpi;
mod boot;
mod cpuid;
pub mod firmware;
pub mod layout;
mod msr;
mod platform;
pub mod tdx;
mod topology;

pub use boot::{
    BootError, BootSource, CmdlineError, InitramfsError, KernelError, KernelImage, LoadedKernel, MemoryError, Protocol,
    Sink, Slide, gigabyte_pages, load_kernel, payload,
};
pub use cpuid::CpuidTable;
pub use msr::boot_msrs;
pub use platform::{HostBridge, Platform};
pub use topology::{Topology, TopologyError};
