//! What a host can do, read once when the hypervisor is opened.

use serde::{Deserialize, Serialize};

use crate::KindName;

/// What this host's hypervisor can do.
#[derive(Debug, Clone)]
pub struct HostCaps {
    /// The backend's name, as a person knows it ("KVM").
    pub backend: &'static str,
    /// The kinds of VM that can be created here.
    pub kinds: Vec<KindName>,
    /// The largest number of vCPUs in one VM.
    pub max_vcpus: u32,
    /// Bits of a guest physical address.
    pub physical_address_bits: u8,
    /// Every CPUID leaf that a guest may be shown, as the hypervisor would answer it on this host.
    pub cpuid: Vec<CpuidEntry>,
    /// The local APIC's timer can run in TSC-deadline mode (bit 24 of CPUID.01H:ECX may be set).
    pub tsc_deadline: bool,
    /// How dirty guest pages can be found.
    pub dirty_tracking: DirtyTrackingCaps,
    /// The slots that a VM's memory map may hold.
    pub max_memory_slots: u32,
}

/// How dirty guest pages can be found on this host. The choice is made in [`crate::VmSpec::dirty_tracking`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DirtyTrackingCaps {
    /// A bitmap per memory slot.
    pub bitmap: bool,
    /// A ring per vCPU: the largest number of entries, 0 where there is none.
    pub ring_entries: u32,
}

/// One CPUID leaf: what the `CPUID` instruction answers for a function and, where it matters, an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// The leaf (EAX on entry).
    pub function: u32,
    /// The subleaf (ECX on entry); `None` where the leaf has no subleaves.
    pub index: Option<u32>,
    /// EAX on return.
    pub eax: u32,
    /// EBX on return.
    pub ebx: u32,
    /// ECX on return.
    pub ecx: u32,
    /// EDX on return.
    pub edx: u32,
}
