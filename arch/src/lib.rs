//! What the guest sees of the platform: memory layout, processors, boot protocols and ACPI.
//!
//! Everything here is computation on guest memory and plain data: no thread, no device, no call into a hypervisor.
//! The order in which a monitor uses it:
//!
//! 1. [`layout::ram_ranges`] says where guest RAM lies, [`Platform::direct_boot`] chooses what the guest is shown.
//! 2. [`load_kernel`] and [`acpi::write`] fill guest memory. Neither needs a VM, so that both can run while the
//!    hypervisor is still creating one.
//!    Where firmware boots instead, it is [`Platform::firmware_boot`], and [`firmware::items`] are what it asks for.
//! 3. [`CpuidTable`] and [`boot_msrs`] give each vCPU its [`hal::ResetState`].

#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "x86_64")]
pub use x86_64::*;
