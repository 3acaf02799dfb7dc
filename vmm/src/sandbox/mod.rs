//! What the process may still do once it has what its VM needs: the walls between a guest that has taken over a part of
//! the monitor and the host.
//!
//! [`confine`] gives up, for the whole process, capabilities, new privileges and paths; [`enter`]
//! gives up, for the calling thread, all system calls that threads of its kind do not make. The lists of calls are in
//! `resources/seccomp`, one for each [`Thread`], and are compiled when Halyard is. A call that is not on its thread's
//! list ends the process with [`EXIT_CODE`] and its name in the log.
//!
//! Rights pass from a thread to those that it makes, so the process is confined while it has one thread only, but for
//! the one that takes a kernel image apart, which confines itself: see [`confine_thread`].

mod paths;
mod policies;
mod privileges;
mod violation;

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use seccompiler::sock_filter;

pub use paths::{Access, Grant, grants, restrict};
pub use privileges::{allow_locked_memory, close_on_exec, close_unclaimed, forbid_core_dumps};
pub use violation::{EXIT_CODE, report_as_json};

/// Whether the walls are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// They are.
    On,
    /// They are but for one: a system call that is not on a list is written to the kernel's log, and done.
    Log,
    /// They are not.
    Off,
}

/// Kinds of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    /// The owner, which makes machines of what is open already.
    Owner,
    /// An owner whom clients ask for devices: it opens what they name, where paths are granted.
    OwnerWithClients,
    /// A vCPU's.
    Vcpu,
    /// One that serves queues of a device.
    Io,
    /// The one that waits for the host's side of consoles.
    Console,
    /// The one that serves clients of the API.
    Api,
    /// One that takes a kernel image apart.
    Loader,
    /// The one that watches a boot.
    Watch,
    /// The one that asks the quote service.
    Quotes,
}

impl Thread {
    /// All kinds.
    pub const ALL: [Self; 9] = [
        Self::Owner,
        Self::OwnerWithClients,
        Self::Vcpu,
        Self::Io,
        Self::Console,
        Self::Api,
        Self::Loader,
        Self::Watch,
        Self::Quotes,
    ];

    /// The name of its policy.
    pub fn name(self) -> &'static str {
        match self {
            Self::Owner => "vmm",
            Self::OwnerWithClients => "clients",
            Self::Vcpu => "vcpu",
            Self::Io => "io",
            Self::Console => "console",
            Self::Api => "api",
            Self::Loader => "loader",
            Self::Watch => "watch",
            Self::Quotes => "quotes",
        }
    }

    fn policy(self) -> &'static [sock_filter] {
        match self {
            Self::Owner => &policies::VMM,
            Self::OwnerWithClients => &policies::CLIENTS,
            Self::Vcpu => &policies::VCPU,
            Self::Io => &policies::IO,
            Self::Console => &policies::CONSOLE,
            Self::Api => &policies::API,
            Self::Loader => &policies::LOADER,
            Self::Watch => &policies::WATCH,
            Self::Quotes => &policies::QUOTES,
        }
    }
}

/// The mode of the process, as a [`Mode`]: off until [`begin`].
static MODE: AtomicU8 = AtomicU8::new(Mode::Off as u8);

/// Whether the process is confined.
static CONFINED: AtomicBool = AtomicBool::new(false);

fn mode() -> Mode {
    match MODE.load(Ordering::Relaxed) {
        mode if mode == Mode::On as u8 => Mode::On,
        mode if mode == Mode::Log as u8 => Mode::Log,
        _ => Mode::Off,
    }
}

/// The paths that the process needs whatever its VM is.
static GRANTS: OnceLock<Vec<Grant>> = OnceLock::new();

/// Says what [`confine`] and [`enter`] are to do in this process, and which paths it keeps whatever its VM is. Without
/// it they do nothing.
///
/// # Errors
/// A signal cannot be handled.
pub fn begin(mode: Mode, grants: Vec<Grant>) -> io::Result<()> {
    match mode {
        Mode::On => {}
        Mode::Log => tracing::warn!(
            "the sandbox only logs: system calls that it does not allow are done, and the kernel's log names them \
             (journalctl -k, dmesg: type=1326)"
        ),
        Mode::Off => tracing::warn!(
            "THE SANDBOX IS OFF: a guest that takes over a part of the monitor has all that this process has: every \
             system call (seccomp), every file and socket of its user (landlock), its capabilities, and new ones \
             through set-uid programs"
        ),
    }
    // Only the first call's count, as only the first confinement's do.
    GRANTS.get_or_init(|| grants);
    if mode != Mode::Off {
        violation::install_handler()?;
    }
    MODE.store(mode as u8, Ordering::Relaxed);
    Ok(())
}

/// Gives up what nobody in the process needs any more: capabilities, the way to new privileges, and every path but the
/// granted: those of [`begin`] and these. To be called while there is no other thread; only the first call does anything.
///
/// # Errors
/// The kernel has no such calls, or a grant cannot be given.
pub fn confine(grants: &[Grant]) -> io::Result<()> {
    if mode() == Mode::Off || CONFINED.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    privileges::give_up_new()?;
    paths::give_up(GRANTS.get().into_iter().flatten().chain(grants))?;
    privileges::give_up_capabilities()
}

/// As [`confine`], for the calling thread alone, as often as it is called: every path but these.
///
/// # Errors
/// As [`confine`].
pub fn confine_thread(grants: &[Grant]) -> io::Result<()> {
    if mode() == Mode::Off {
        return Ok(());
    }
    privileges::give_up_new()?;
    paths::restrict(grants.iter())?;
    privileges::give_up_capabilities()
}

/// Gives up, for the calling thread, all system calls but those of its kind, as the last thing before it begins its work.
/// Only the first call on a thread does anything. Where the kernel refuses the filter, the process ends.
pub fn enter(thread: Thread) {
    let mode = mode();
    if mode == Mode::Off || !violation::introduce(thread) {
        return;
    }
    let policy = thread.policy();
    let entered = match mode {
        Mode::Log => seccompiler::apply_filter(&policies::logging(policy)),
        _ => seccompiler::apply_filter(policy),
    };
    if let Err(error) = entered {
        tracing::error!("the policy of {} threads: {error}; --sandbox off goes without", thread.name());
        std::process::exit(1);
    }
}

#[cfg(test)]
mod tests;
