//! What a host can do, as the contract needs it.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A kind of VM by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum KindName {
    /// A plain VM.
    Standard,
    /// An Intel TDX trust domain.
    Tdx,
    /// An AMD SEV-SNP guest.
    Snp,
    /// A VM with private memory, for development.
    SoftwareProtected,
}

impl KindName {
    /// The name, as the configuration writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::Tdx => "tdx",
            Self::Snp => "snp",
            Self::SoftwareProtected => "software-protected",
        }
    }
}

impl fmt::Display for KindName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What [`crate::validate`] must know of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// The most vCPUs that one VM may have here.
    pub max_vcpus: u32,
    /// Bits of a guest physical address.
    pub physical_address_bits: u8,
    /// The most memory, in bytes, that a guest's address space has room for beside its devices.
    pub max_memory: u64,
    /// The most devices that the machine's buses have room for.
    pub max_devices: u32,
    /// The kinds of VM that can be created here.
    pub kinds: Vec<KindName>,
}

impl HostFacts {
    /// A host that can do all that Halyard can: for looking at a configuration apart from the host that will run it.
    pub fn unlimited() -> Self {
        Self {
            max_vcpus: crate::MAX_VCPUS,
            physical_address_bits: 52,
            max_memory: 1 << 51,
            max_devices: u32::MAX,
            kinds: vec![KindName::Standard, KindName::Tdx, KindName::Snp, KindName::SoftwareProtected],
        }
    }
}

/// Whether the host has an ability, and what that means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Check {
    /// What was looked at, as in `/dev/kvm`.
    pub name: String,
    /// It is there and can be used.
    pub ok: bool,
    /// Nothing runs without it.
    pub required: bool,
    /// What was found; where it is not `ok`, the reason.
    pub detail: String,
    /// What would help; empty where nothing need be done.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

/// Whether a kind of VM can be created here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct KindReport {
    /// The kind.
    pub kind: KindName,
    /// It can be created.
    pub available: bool,
    /// Why not; empty where it can be.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// What this host can do and why not: what `halyard probe` prints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HostReport {
    /// The monitor's version.
    pub version: String,
    /// The hypervisor, as in `KVM`; absent where it could not be opened.
    pub hypervisor: Option<String>,
    /// The most vCPUs that one VM may have.
    pub max_vcpus: Option<u32>,
    /// Bits of a guest physical address.
    pub physical_address_bits: Option<u8>,
    /// The most memory that a guest's address space has room for, in bytes.
    pub max_memory: Option<u64>,
    /// How dirty guest pages can be found, as in `bitmap`, `ring of 65536`.
    pub dirty_tracking: Vec<String>,
    /// Each kind of VM.
    pub kinds: Vec<KindReport>,
    /// Each ability that was looked at.
    pub checks: Vec<Check>,
}

impl HostReport {
    /// A plain VM can run here.
    pub fn can_run(&self) -> bool {
        self.checks.iter().all(|check| check.ok || !check.required)
    }
}
