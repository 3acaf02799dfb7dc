//! Kinds of VM as data: what differs between a plain VM and a confidential one is asked of [`KindTraits`].

use std::fmt;

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
            Self::Tdx | Self::Snp => &KindTraits::CONFIDENTIAL,
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
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TdxSpec {
    /// TD attributes, as TD_PARAMS.ATTRIBUTES.
    pub attributes: u64,
    /// Identity of the owner's configuration (MRCONFIGID), 48 bytes.
    pub config_id: Option<[u8; 48]>,
    /// Identity of the owner (MROWNER), 48 bytes.
    pub owner: Option<[u8; 48]>,
    /// Identity of the owner's policy (MROWNERCONFIG), 48 bytes.
    pub owner_config: Option<[u8; 48]>,
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
    /// Guest memory has a private side that the monitor cannot read.
    pub private_memory: bool,
    /// The monitor can read and write the guest's registers.
    pub guest_state_readable: bool,
    /// Devices reach only memory that the guest has shared.
    pub dma_needs_sharing: bool,
    /// How the guest's first instruction is chosen.
    pub boot: Boot,
    /// State can be carried to another host.
    pub migratable: bool,
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
    pub const STANDARD: Self = Self {
        private_memory: false,
        guest_state_readable: true,
        dma_needs_sharing: false,
        boot: Boot::Registers,
        migratable: true,
    };

    /// The traits of a VM that its hardware hides from the monitor.
    pub const CONFIDENTIAL: Self = Self {
        private_memory: true,
        guest_state_readable: false,
        dma_needs_sharing: true,
        boot: Boot::Measured,
        migratable: false,
    };

    /// The traits of a VM whose memory is private by the hypervisor's word alone.
    pub const SOFTWARE_PROTECTED: Self = Self {
        private_memory: true,
        guest_state_readable: true,
        dma_needs_sharing: true,
        boot: Boot::Registers,
        migratable: false,
    };
}
