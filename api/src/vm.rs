//! A VM as the API shows it: what was asked for, what runs, and in which phase it is.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::{Cpus, Memory, VmConfig};
use crate::outcome::Outcome;
use crate::units::{ByteSize, TimeSpan};

/// Where a VM is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PhaseName {
    /// There is no VM.
    Empty,
    /// It has a configuration, and all that this names on the host is open.
    Ready,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs and devices stand still.
    Paused,
    /// Its run ended. What it was is still shown.
    Stopped,
}

impl PhaseName {
    /// Every phase.
    pub const ALL: [Self; 5] = [Self::Empty, Self::Ready, Self::Running, Self::Paused, Self::Stopped];

    /// The name, as the API writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Ready => "ready",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

impl std::fmt::Display for PhaseName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a VM is in its phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The monitor has just been started.
    Start,
    /// A request asked for it.
    Request,
    /// The guest asked for it: a reset, or its power-off.
    Guest,
    /// The guest's kernel panicked.
    Panic,
    /// A vCPU could not go on.
    Crash,
    /// The guest was given a time to switch itself off, and did not.
    Deadline,
    /// A signal, or a person at the terminal, asked for it.
    Operator,
    /// The host failed.
    Host,
}

/// A VM: its phase and its configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmInfo {
    /// The number of the last event that this state includes. Events after it are read with `Last-Event-ID`.
    pub sequence: u64,
    /// Where the VM is in its life.
    pub phase: PhaseName,
    /// Why it is there.
    pub reason: Reason,
    /// Since when, in milliseconds since 1970 (UTC).
    pub since_ms: u64,
    /// How its run ended, where it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
    /// The configuration as it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<VmConfig>,
    /// The configuration as the machine has it: with everything that was left open filled in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running: Option<VmConfig>,
    /// The measurement of a trust domain's beginning (MRTD), in 96 hexadecimal digits, while it is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mrtd: Option<String>,
}

/// How a guest is to be switched off.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Shutdown {
    /// How long the guest has, beginning with the press of its power button; 24h at most. Without it: the
    /// configuration's `lifecycle.shutdown_timeout`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<TimeSpan>,
    /// What happens at the deadline: the VM is destroyed, or else it runs on and the job fails.
    pub force: bool,
}

/// A change of the VM's processors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VcpusPatch {
    /// How many vCPUs, 1 to 254.
    #[schemars(range(min = 1, max = 254))]
    pub count: u32,
}

/// A change of the VM's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryPatch {
    /// How much memory. While the VM runs: `memory.size` to `memory.max` of its configuration, in steps of 2M (or of a
    /// larger huge page).
    pub size: ByteSize,
}

/// The VM's processors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Vcpus {
    /// As configured.
    pub config: Cpus,
    /// How many the guest has now; 0 where no machine runs. While a job changes them, `config.count` is how many are
    /// wanted.
    pub present: u32,
}

/// The VM's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryInfo {
    /// As configured.
    pub config: Memory,
    /// How many bytes the guest has now; 0 where no machine runs.
    pub present: u64,
    /// How many bytes the guest is asked to have; 0 where no machine runs.
    pub wanted: u64,
}

/// The program that answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Version {
    /// The program's name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The version of the API.
    pub api: String,
}

/// The monitor is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Pong {
    /// Its process id.
    pub pid: u32,
}
