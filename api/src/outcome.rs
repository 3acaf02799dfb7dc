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
    /// A signal ended the run.
    Signalled {
        /// The signal's number.
        signal: u8,
    },
}

impl Outcome {
    /// The exit code of `halyard run`. Codes 1 (the host failed) and 2 (bad input) belong to runs without an outcome.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::PoweredOff => 0,
            Self::Reset => 3,
            Self::Panicked => 4,
            Self::Crashed { .. } => 5,
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
            Self::Signalled { signal } => write!(f, "ended by signal {signal}"),
        }
    }
}
