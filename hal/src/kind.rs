//! Kinds of VM as data: what differs between a plain VM and a confidential one is asked of [`KindTraits`].

use std::fmt;

use crate::{CpuidEntry, Visibility};

/// The kind of VM to create. Every kind is always compiled in; a host that lacks one says so in
/// [`crate::Hypervisor::create`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum VmKind {
    /// A plain VM, whose memory and registers the monitor can read.
    #[default]
    Standard,
    /// An Intel TDX trust domain.
    Tdx(TdxSpec),
    /// An AMD SEV-SNP guest.
    Snp(SnpSpec),
    /// A VM with private memory, but without hardware that keeps it so: for development.
    SoftwareProtected,
}

impl VmKind {
    /// The kind without its parameters.
    pub fn name(&self) -> KindName {
        match self {
            Self::Standard => KindName::Standard,
            Self::Tdx(_) => KindName::Tdx,
            Self::Snp(_) => KindName::Snp,
            Self::SoftwareProtected => KindName::SoftwareProtected,
        }
    }
}

/// A kind of VM by name, as capabilities and messages carry it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KindName {
    /// See [`VmKind::Standard`].
    Standard,
    /// See [`VmKind::Tdx`].
    Tdx,
    /// See [`VmKind::Snp`].
    Snp,
    /// See [`VmKind::SoftwareProtected`].
    SoftwareProtected,
}

impl KindName {
    /// How this kind differs from a plain VM.
    pub fn traits(self) -> &'static KindTraits {
        match self {
            Self::Standard => &KindTraits::STANDARD,
            Self::Tdx => &KindTraits::TDX,
            Self::Snp => &KindTraits::SNP,
            Self::SoftwareProtected => &KindTraits::SOFTWARE_PROTECTED,
        }
    }
}

impl fmt::Display for KindName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Standard => "standard",
            Self::Tdx => "TDX",
            Self::Snp => "SEV-SNP",
            Self::SoftwareProtected => "software-protected",
        })
    }
}

/// Parameters of a trust domain (TDX Module ABI, TD_PARAMS).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TdxSpec {
    /// TD attributes, as TD_PARAMS.ATTRIBUTES.
    pub attributes: u64,
    /// Identity of the owner's configuration (MRCONFIGID), 48 bytes; `None` for zeros.
    pub config_id: Option<[u8; 48]>,
    /// Identity of the owner (MROWNER), 48 bytes; `None` for zeros.
    pub owner: Option<[u8; 48]>,
    /// Identity of the owner's policy (MROWNERCONFIG), 48 bytes; `None` for zeros.
    pub owner_config: Option<[u8; 48]>,
    /// The CPUID leaves that are wanted: those of the boot processor. The hypervisor takes of them what it can configure,
    /// and the state components of leaf 0xd; [`crate::Launch::changes`] says what came of them.
    pub cpuid: Vec<CpuidEntry>,
}

impl TdxSpec {
    /// The attribute SEPT_VE_DISABLE: an access to a page that is not there ends the trust domain instead of raising an
    /// exception in it, at any place that the host chooses. Linux as a guest insists on it.
    pub const SEPT_VE_DISABLE: u64 = 1 << 28;
}

impl Default for TdxSpec {
    /// What Linux as a guest needs, and no leaf of CPUID.
    fn default() -> Self {
        Self { attributes: Self::SEPT_VE_DISABLE, config_id: None, owner: None, owner_config: None, cpuid: Vec::new() }
    }
}

/// Parameters of an SEV-SNP guest (SEV-SNP firmware ABI, SNP_LAUNCH_START).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SnpSpec {
    /// The guest policy word.
    pub policy: u64,
}

/// How a kind of VM differs from a plain one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KindTraits {
    /// Guest memory has a private side that the monitor cannot read. Each slot has both sides then, and begins as
    /// [`KindTraits::begins`] says.
    pub private_memory: bool,
    /// Devices reach only memory that the guest has shared.
    pub dma_needs_sharing: bool,
    /// How the guest's first instruction is chosen.
    pub boot: Boot,
    /// What a plain VM has and this kind cannot have.
    pub lacks: &'static [Ability],
}

/// Something that a plain VM can do, and others cannot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ability {
    /// The monitor reads and writes registers ([`crate::Vcpu::state`], [`crate::Vm::state`]).
    Registers,
    /// The VM's state is saved, and restored later.
    Snapshot,
    /// The VM goes on on another host.
    Migration,
    /// It starts anew in place ([`crate::Vcpu::reset`] of a vCPU that has run). Without it a reset is a new VM.
    Reset,
    /// vCPUs wait for others to start them (INIT-SIPI-SIPI). Without it all run from the beginning.
    StartupInterrupts,
    /// vCPUs are added after the launch.
    LateVcpus,
    /// System management mode.
    SystemManagement,
    /// The end of level-triggered interrupts is told ([`crate::ExitHandler::end_of_interrupt`]).
    LevelInterrupts,
    /// Memory that the guest can only read ([`crate::Slot::readonly`]).
    ReadonlyMemory,
    /// Written pages are found ([`crate::Slot::log_dirty`]).
    DirtyLog,
    /// Performance counters.
    PerformanceCounters,
}

impl fmt::Display for Ability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Registers => "access to registers",
            Self::Snapshot => "snapshots",
            Self::Migration => "migration",
            Self::Reset => "a reset in place",
            Self::StartupInterrupts => "vCPUs that others start",
            Self::LateVcpus => "vCPUs that come later",
            Self::SystemManagement => "system management mode",
            Self::LevelInterrupts => "level-triggered interrupts",
            Self::ReadonlyMemory => "read-only memory",
            Self::DirtyLog => "a log of written pages",
            Self::PerformanceCounters => "performance counters",
        })
    }
}

/// How a guest's first instruction is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    /// The monitor sets the registers.
    Registers,
    /// A launch sequence measures pages, and the hardware sets the registers.
    Measured,
}

impl KindTraits {
    /// The traits of a plain VM.
    pub const STANDARD: Self =
        Self { private_memory: false, dma_needs_sharing: false, boot: Boot::Registers, lacks: &[] };

    /// The traits of a trust domain, as Linux runs it (6.16 to 7.3).
    pub const TDX: Self = Self {
        private_memory: true,
        dma_needs_sharing: true,
        boot: Boot::Measured,
        lacks: &[
            Ability::Registers,
            Ability::Snapshot,
            Ability::Migration,
            Ability::Reset,
            Ability::StartupInterrupts,
            Ability::LateVcpus,
            Ability::SystemManagement,
            Ability::LevelInterrupts,
            Ability::ReadonlyMemory,
            Ability::DirtyLog,
            Ability::PerformanceCounters,
        ],
    };

    /// The traits of an SEV-SNP guest.
    pub const SNP: Self = Self {
        private_memory: true,
        dma_needs_sharing: true,
        boot: Boot::Measured,
        lacks: &[
            Ability::Registers,
            Ability::Snapshot,
            Ability::Migration,
            Ability::Reset,
            Ability::SystemManagement,
            Ability::ReadonlyMemory,
            Ability::DirtyLog,
        ],
    };

    /// The traits of a VM whose memory is private by the hypervisor's word alone.
    pub const SOFTWARE_PROTECTED: Self = Self {
        private_memory: true,
        dma_needs_sharing: true,
        boot: Boot::Registers,
        lacks: &[
            Ability::Snapshot,
            Ability::Migration,
            Ability::SystemManagement,
            Ability::ReadonlyMemory,
            Ability::DirtyLog,
        ],
    };

    /// How memory is before the guest makes it otherwise: private where a launch fills that side. Without one the guest begins in
    /// what the monitor wrote.
    pub fn begins(&self) -> Visibility {
        match self.boot {
            Boot::Registers => Visibility::Shared,
            Boot::Measured => Visibility::Private,
        }
    }

    /// Whether this kind has an ability.
    pub fn has(&self, ability: Ability) -> bool {
        !self.lacks.contains(&ability)
    }
}
