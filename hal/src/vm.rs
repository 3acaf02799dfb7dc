//! The hypervisor and the VM: what is created from what.

use std::fmt;

use crate::{GpaRange, HostCaps, Irqs, KindName, KindTraits, Memory, Result, SlotId, Vcpu, VcpuId, VmKind};

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

    /// Why VMs of a kind cannot be created here, and what would help; `None` where they can. It may look at more of the
    /// host than [`HostCaps`] did.
    fn missing(&self, kind: KindName) -> Option<String>;
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

/// The one-shot launch of a confidential guest: [`Launch::begin`] once all vCPUs exist and were reset, [`Launch::add`] for
/// each piece of what it starts with, and [`Launch::finish`], which seals it. No vCPU runs before, and none is created after
/// the beginning. The order of what is added is part of the measurement.
pub trait Launch: Send + Sync {
    /// Fixes the vCPUs, each of which finds `hand_off`, the guest physical address of what the monitor tells the firmware,
    /// in a register (RCX in a trust domain).
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] where it has begun already, or a vCPU has not been reset; [`crate::Error::Launch`] where the
    /// hypervisor refuses.
    fn begin(&self, hand_off: u64) -> Result<()>;

    /// Fills whole private pages with `contents`, and with zeros behind their end. The pages are added to the guest's
    /// measurement, and where `measured` what they hold, too.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] before [`Launch::begin`] and after [`Launch::finish`], where the range is not of whole pages
    /// of private memory in one slot, or where `contents` are longer; [`crate::Error::Launch`] where the hypervisor refuses.
    fn add(&self, range: GpaRange, contents: &[u8], measured: bool) -> Result<()>;

    /// Seals the guest: vCPUs may run, nothing more can be added.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] before [`Launch::begin`] and when called twice; [`crate::Error::Launch`] where the hypervisor
    /// refuses.
    fn finish(&self) -> Result<()>;

    /// Where the CPUID leaves that the guest gets are not those that were asked for, once the first vCPU was reset.
    fn changes(&self) -> Vec<CpuidChange>;
}

/// A register of a CPUID leaf in which a guest finds something else than was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuidChange {
    /// The leaf (EAX on entry).
    pub function: u32,
    /// The subleaf (ECX on entry); `None` where the leaf has no subleaves.
    pub index: Option<u32>,
    /// The register: "eax", "ebx", "ecx" or "edx".
    pub register: &'static str,
    /// What was asked for.
    pub wanted: u32,
    /// What the guest gets.
    pub given: u32,
}

impl fmt::Display for CpuidChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { function, index, register, wanted, given } = self;
        write!(f, "CPUID {function:#x}")?;
        if let Some(index) = index {
            write!(f, ".{index:#x}")?;
        }
        write!(f, " {register}: {wanted:#010x} was asked for, {given:#010x} is given")?;
        let (denied, forced) = (wanted & !given, given & !wanted);
        if denied != 0 {
            write!(f, ", without {denied:#x}")?;
        }
        if forced != 0 {
            write!(f, ", with {forced:#x}")?;
        }
        Ok(())
    }
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
