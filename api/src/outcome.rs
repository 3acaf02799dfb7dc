//! What became of a VM.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a VM's run ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest powered itself off.
    PoweredOff,
    /// The guest reset itself and [`crate::OnReset::Exit`] was asked for.
    Reset,
    /// The guest's kernel panicked.
    Panicked,
    /// A vCPU could not go on: a triple fault, or an instruction that the hypervisor cannot carry out.
    Crashed {
        /// What happened, and on which vCPU.
        reason: String,
    },
    /// User space was not reached in time.
    BootTimeout {
        /// In which time, and what the guest last did.
        reason: String,
    },
    /// The guest wrote to the debug-exit port.
    DebugExit {
        /// The byte that it wrote.
        value: u8,
    },
    /// The user ended the run from the terminal.
    Quit,
    /// A request destroyed the VM, or its time to switch itself off after a request was over.
    Destroyed,
    /// The host failed while the VM ran.
    Failed {
        /// What failed.
        reason: String,
    },
    /// A signal ended the run.
    Signalled {
        /// The signal's number.
        signal: u8,
    },
}

impl Outcome {
    /// The exit code of `halyard run`. Code 1 is also that of a host that failed before the VM ran, and code 2 that of
    /// bad input.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::PoweredOff => 0,
            Self::Failed { .. } => 1,
            Self::Reset => 3,
            Self::Panicked => 4,
            Self::Crashed { .. } => 5,
            Self::Destroyed => 7,
            Self::BootTimeout { .. } => 6,
            Self::DebugExit { value } => 64 + (value & 0x1f),
            Self::Quit => 130,
            Self::Signalled { signal } => 128 + (signal & 0x7f),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest reset"),
            Self::Panicked => f.write_str("the guest's kernel panicked"),
            Self::Crashed { reason } => write!(f, "the guest crashed: {reason}"),
            Self::BootTimeout { reason } => write!(f, "the guest did not come up: {reason}"),
            Self::DebugExit { value } => write!(f, "the guest wrote {value:#04x} to the debug-exit port"),
            Self::Quit => f.write_str("ended from the terminal"),
            Self::Destroyed => f.write_str("destroyed by a request"),
            Self::Failed { reason } => write!(f, "the host failed: {reason}"),
            Self::Signalled { signal } => write!(f, "ended by signal {signal}"),
        }
    }
}
