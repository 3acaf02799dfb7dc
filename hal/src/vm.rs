//! The hypervisor and the VM: what is created from what.

use crate::{GpaRange, HostCaps, Irqs, KindTraits, Memory, Result, SlotId, Vcpu, VcpuId, VmKind};

/// A host's hypervisor.
pub trait Hypervisor: Send + Sync {
    /// What this host can do.
    fn caps(&self) -> &HostCaps;

    /// Creates a VM.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`], once and by name, for any wish that this host cannot fulfil;
    /// [`crate::Error::System`] where the hypervisor fails.
    fn create(&self, spec: &VmSpec) -> Result<Box<dyn Vm>>;
}

/// What must be known of a VM when it is created.
#[derive(Debug, Clone, Default)]
pub struct VmSpec {
    /// Its kind.
    pub kind: VmKind,
    /// How many vCPUs will be created at the most.
    pub max_vcpus: u32,
    /// How dirty pages will be found: fixed for the VM's life.
    pub dirty_tracking: DirtyTracking,
}

/// How dirty guest pages are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DirtyTracking {
    /// They are not.
    #[default]
    Off,
    /// One bit a page for each slot with [`crate::Slot::log_dirty`].
    Bitmap,
    /// A ring of this many entries for each vCPU.
    Ring {
        /// Entries, a power of two.
        entries: u32,
    },
}

/// A virtual machine.
pub trait Vm: Send + Sync {
    /// How its kind differs from a plain VM.
    fn kind(&self) -> &KindTraits;
    /// Its memory map.
    fn memory(&self) -> &dyn Memory;
    /// Its interrupts and doorbells.
    fn irqs(&self) -> &dyn Irqs;
    /// Frequency of the guest's time stamp counter in kHz, where the hypervisor knows it before a vCPU runs.
    fn tsc_khz(&self) -> Option<u32>;
    /// A new vCPU.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] where `id` is not below [`VmSpec::max_vcpus`]; [`crate::Error::System`] where the
    /// hypervisor refuses.
    fn create_vcpu(&self, id: VcpuId) -> Result<Box<dyn Vcpu>>;
    /// The launch sequence of a confidential kind.
    fn launch(&self) -> Option<&dyn Launch>;
    /// Dirty pages, where [`VmSpec::dirty_tracking`] asked for them.
    fn dirty_log(&self) -> Option<&dyn DirtyLog>;
    /// State that belongs to the VM and to none of its vCPUs.
    fn state(&self) -> Option<&dyn VmState>;
}

/// The one-shot launch of a confidential guest: pages are added and measured, then the guest is sealed.
pub trait Launch: Send + Sync {
    /// Copies initial contents into private memory and, where `measured`, into the guest's measurement.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] after [`Launch::finish`], or where the range is not private memory.
    fn add(&self, range: GpaRange, contents: &[u8], measured: bool) -> Result<()>;
    /// Seals the guest: vCPUs may run, nothing more can be added.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] when called twice.
    fn finish(&self) -> Result<()>;
}

/// Guest pages written since the last look. A page that was only read may count as written, never the other way round.
pub trait DirtyLog: Send + Sync {
    /// The dirty pages of a slot as a bitmap, bit 0 of word 0 for the first 4096 bytes, and starts the next look.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] where the slot does not exist or is not logged.
    fn collect(&self, slot: SlotId) -> Result<Vec<u64>>;
}

/// The VM's clock, as a guest reads it through the hypervisor's leaves.
pub trait VmState: Send + Sync {
    /// The guest clock in nanoseconds.
    ///
    /// # Errors
    /// [`crate::Error::System`] where the hypervisor has no such clock.
    fn clock(&self) -> Result<u64>;
    /// Sets the guest clock, in nanoseconds.
    ///
    /// # Errors
    /// [`crate::Error::System`] where the hypervisor refuses.
    fn set_clock(&self, nanoseconds: u64) -> Result<()>;
}
