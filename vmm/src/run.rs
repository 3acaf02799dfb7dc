//! A VM from its configuration to its outcome.

use std::sync::Arc;

use api::{Outcome, Problems, VmConfig};
use hal::Hypervisor;

use crate::board::Board;
use crate::owner::{Owner, Until};
use crate::request::Descriptors;

/// Why there is no outcome.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The configuration, or a file that it names, cannot be used. Nothing was changed.
    #[error("{0}")]
    BadInput(Problems),
    /// The host failed.
    #[error("{0}")]
    Host(String),
}

/// What turns into [`Failure::Host`] with its own words.
macro_rules! host_failures {
    ($($error:ty),*) => { $(
        impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self::Host(error.to_string())
            }
        }
    )* };
}
host_failures!(
    hal::Error,
    crate::memory::Error,
    arch::acpi::AcpiError,
    std::io::Error,
    devices::pci::Error,
    devices::virtio::Error,
    devices::virtio::console::ConsoleError
);

/// Runs a VM on this host's hypervisor until it ends.
///
/// # Errors
/// [`Failure::BadInput`] with every problem at once, before anything was touched; [`Failure::Host`] where the host
/// fails, at any time.
pub fn run(config: VmConfig) -> Result<Outcome, Failure> {
    run_on(hal::open(), config)
}

/// As [`run`], on a hypervisor that was opened, or was tried to be: a configuration that cannot be right is told before
/// a host that cannot run it.
///
/// # Errors
/// As [`run`].
pub fn run_on(hypervisor: hal::Result<Box<dyn Hypervisor>>, config: VmConfig) -> Result<Outcome, Failure> {
    let mut owner = Owner::new(hypervisor, Arc::new(Board::new(0)))?;
    owner.create(config, Descriptors::Inherited)?;
    owner.boot()?;
    Ok(owner.serve(Until::VmEnds)?.unwrap_or(Outcome::Destroyed))
}
