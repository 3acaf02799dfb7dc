//! What a hypervisor is: small object-safe traits, kinds of VM as data, typed exits.
//!
//! One virtual call per exit is nothing beside the exit itself, so the traits are objects and the rest of Halyard
//! never names a hypervisor. Two rules shape them: an optional ability is an `Option<&dyn Trait>`, never a default
//! that fails; and an exit that needs an answer is a call on [`ExitHandler`], an exit that ends the run is a value
//! of [`Exit`].
//!
//! Backends: [`kvm`] (Linux) and [`fake`] (scripted, for tests of everything above).

mod caps;
mod error;
pub mod fake;
mod irq;
mod kind;
pub mod kvm;
mod memory;
mod shared;
mod state;
mod vcpu;
mod vm;

pub use caps::{CpuidEntry, DirtyTrackingCaps, HostCaps};
pub use error::{Error, Result};
pub use irq::{Doorbell, DoorbellMatch, IoAddr, Irqs, MsiMessage, MsiRoute};
pub use kind::{Ability, Boot, KindName, KindTraits, SnpSpec, TdxSpec, VmKind};
pub use memory::{GpaRange, Memory, Slot, SlotId, Visibility};
pub use shared::SharedRanges;
pub use state::{
    DescriptorTable, EventState, MpState, Msr, Registers, STATE_VERSION, Segment, SystemRegisters, VcpuSnapshot,
    VcpuState,
};
pub use vcpu::{
    BootRegisters, Conversion, Counter, Counters, CrashInfo, Exit, ExitHandler, GuestCall, GuestCallStatus, Kick,
    KickTarget, ResetState, Vcpu, VcpuId,
};
pub use vm::{CpuidChange, DirtyLog, DirtyTracking, Hypervisor, Launch, Vm, VmSpec, VmState};

/// Opens the hypervisor of this host: KVM through `/dev/kvm`.
///
/// # Errors
/// [`Error::NoHypervisor`] or [`Error::NotPermitted`], both of which name the device and the remedy.
pub fn open() -> Result<Box<dyn Hypervisor>> {
    Ok(Box::new(kvm::Kvm::open()?))
}
