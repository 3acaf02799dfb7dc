//! What can go wrong between Halyard and the hypervisor.

use std::io;

/// The result of a call into the hypervisor.
pub type Result<T> = std::result::Result<T, Error>;

/// A call into the hypervisor that failed. Each message says what was asked, what happened and what would help.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The hypervisor's device does not exist.
    #[error("{device} does not exist: {remedy}")]
    NoHypervisor {
        /// The device file.
        device: String,
        /// What the user can do.
        remedy: &'static str,
    },
    /// The hypervisor's device exists but this process may not open it.
    #[error("no permission to open {device}: {remedy}")]
    NotPermitted {
        /// The device file.
        device: String,
        /// What the user can do.
        remedy: &'static str,
    },
    /// The hypervisor's device is there but of no use.
    #[error("{device} cannot be used: {problem}; {remedy}")]
    Unusable {
        /// The device.
        device: String,
        /// Why not.
        problem: String,
        /// What the user can do.
        remedy: &'static str,
    },
    /// The host cannot do what the VM's specification asks for. Given by [`crate::Hypervisor::create`] only.
    #[error("this host cannot run such a VM: {0}")]
    Unsupported(String),
    /// An argument that the caller chose is out of range.
    #[error("{what}: {problem}")]
    Invalid {
        /// The argument.
        what: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A system call failed.
    #[error("{call}: {source}")]
    System {
        /// The call, by the name under which its documentation is found.
        call: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// A step of a confidential guest's launch failed.
    #[error("{step}: {problem}; {remedy}")]
    Launch {
        /// The step, by the name under which its documentation is found.
        step: &'static str,
        /// What was refused, by whom and why, as far as it can be told.
        problem: String,
        /// What the user can do.
        remedy: &'static str,
    },
    /// A saved state does not fit this vCPU or this backend.
    #[error("saved vCPU state: {0}")]
    State(String),
}

impl Error {
    /// An [`Error::System`] from a raw OS error.
    pub fn system(call: &'static str, source: impl Into<io::Error>) -> Self {
        Self::System { call, source: source.into() }
    }
}
