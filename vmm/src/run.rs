//! A VM from its configuration to its outcome.

use std::path::PathBuf;
use std::sync::Arc;

use api::{Outcome, Problems, VmConfig};
use hal::Hypervisor;

use crate::board::Board;
use crate::host;
use crate::owner::{Owner, Until};
use crate::request::Descriptors;
use crate::sandbox::{self, Thread};
use crate::server::{ApiSocket, KEPT_EVENTS, Server, SocketError};
use crate::trace::Watching;

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
    SocketError,
    hal::Error,
    crate::memory::Error,
    arch::acpi::AcpiError,
    std::io::Error,
    devices::pci::Error,
    devices::virtio::Error,
    devices::virtio::console::ConsoleError
);

/// What a monitor is to do.
#[derive(Debug)]
pub struct Plan {
    /// The VM that it begins with, where there is one.
    pub config: Option<VmConfig>,
    /// That VM boots at once.
    pub boot: bool,
    /// Where clients are served.
    pub api: Option<ApiSocket>,
    /// A file to write the process's number to, while it runs.
    pub pid_file: Option<PathBuf>,
    /// What is wanted of the first boot.
    pub watching: Watching,
    /// When the work is done.
    pub until: Until,
}

/// Carries a plan out on this host's hypervisor. The outcome of the last run, where there was one.
///
/// # Errors
/// [`Failure::BadInput`] with every problem at once, before anything was touched; [`Failure::Host`] where the host
/// fails.
pub fn carry_out(plan: Plan) -> Result<Option<Outcome>, Failure> {
    carry_out_on(hal::open(), plan)
}

/// As [`carry_out`], on a hypervisor that was opened, or was tried to be: a configuration that cannot be right is told
/// before a host that cannot run it.
///
/// # Errors
/// As [`carry_out`].
pub fn carry_out_on(hypervisor: hal::Result<Box<dyn Hypervisor>>, plan: Plan) -> Result<Option<Outcome>, Failure> {
    // The sandbox lets nobody look at the host again.
    let host = plan.api.is_some().then(|| host::report(&hypervisor));
    let board = Arc::new(Board::new(if plan.api.is_some() { KEPT_EVENTS } else { 0 }));
    let mut owner = Owner::new(hypervisor, board.clone())?;
    owner.watch(plan.watching);
    let boot = plan.boot && plan.config.is_some();
    if let Some(config) = plan.config {
        owner.create(config, Descriptors::Inherited)?;
    }
    let _pid_file = plan.pid_file.map(PidFile::write).transpose()?;
    let listener = plan.api.map(|socket| socket.listen()).transpose()?;
    if listener.is_some() {
        // From here on there is another thread. Clients may have the owner open what is granted.
        owner.open_trace()?;
        sandbox::confine(&[])?;
    }
    let owner_is = if listener.is_some() { Thread::OwnerWithClients } else { Thread::Owner };
    let start = |(listener, host)| Server::start(listener, host, board, owner.inbox().clone());
    let server = listener.zip(host).map(start).transpose()?;
    if boot {
        owner.boot()?;
    }
    sandbox::enter(owner_is);
    let outcome = owner.serve(plan.until);
    // Who still asks is told before the server ends.
    drop(owner);
    drop(server);
    outcome
}

/// A file with the process's number in it. Dropping it removes it.
struct PidFile(PathBuf);

impl PidFile {
    fn write(path: PathBuf) -> Result<Self, Failure> {
        let failed = |error: std::io::Error| Failure::Host(format!("pid file {}: {error}", path.display()));
        std::fs::write(&path, format!("{}\n", std::process::id())).map_err(failed)?;
        Ok(Self(path))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::debug!("{}: {error}", self.0.display());
        }
    }
}
