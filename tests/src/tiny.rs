//! Tiny guests: a few hundred instructions of assembly each, from `tests/guests`, which show one thing each.
//!
//! They run on the machine's own `/dev/kvm`, in milliseconds even where the kernel emulates it in software.
//!
//! ```no_run
//! use halyard_tests::tiny::Tiny;
//!
//! let Some(guest) = Tiny::new("timer") else { return };
//! let run = guest.args(["--memory", "64M"]).run();
//! assert_eq!(run.output(), "awake after 00000001 ticks\n");
//! ```
//!
//! Everything here panics where it cannot go on, as tests do.

mod build;
pub mod bzimage;
mod run;
mod served;

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use api::{ByteSize, Endpoint, VmConfig};

pub use build::build;
pub use run::{Run, Running};
pub use served::Served;

/// How long a guest may take, where a test does not say otherwise. Far more than any needs.
const DEADLINE: Duration = Duration::from_secs(30);

/// Exit code of `halyard run` where a guest ended the run with a number (of 0 to 31) through the debug-exit port.
pub const fn debug_exit(number: u8) -> i32 {
    64 + number as i32
}

/// A guest to be started in Halyard.
#[derive(Debug, Clone)]
pub struct Tiny {
    kernel: PathBuf,
    args: Vec<OsString>,
    deadline: Duration,
}

impl Tiny {
    /// The guest of `tests/guests/NAME.S`. `None`, with the reason printed, where this machine has no KVM to run it on.
    pub fn new(name: &str) -> Option<Self> {
        kvm().then(|| Self { kernel: guest(name), args: Vec::new(), deadline: DEADLINE })
    }

    /// Adds arguments for `halyard run`.
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Gives the guest a command line.
    pub fn cmdline(self, text: &str) -> Self {
        self.args(["--cmdline", text])
    }

    /// Sets how long the run may take before it is killed and the test fails.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Starts the guest, with its serial port at the test's hands.
    pub fn start(&self) -> Running {
        let mut command = halyard();
        command.arg("run").arg("--kernel").arg(&self.kernel).arg("--debug-exit").args(&self.args);
        Running::start(command, self.deadline)
    }

    /// Runs the guest to its end, without input.
    pub fn run(&self) -> Run {
        self.start().finish()
    }
}

/// Runs `halyard` with these arguments, without input, and waits for its end.
pub fn run_halyard<A: Into<OsString>>(args: impl IntoIterator<Item = A>) -> Run {
    let mut command = halyard();
    command.args(args.into_iter().map(Into::into));
    Running::start(command, DEADLINE).finish()
}

/// Runs any command as [`run_halyard`] does: for programs that set the scene and then start Halyard.
pub fn run_command(command: Command) -> Run {
    Running::start(command, DEADLINE).finish()
}

fn halyard() -> Command {
    let mut command = Command::new(binary());
    // What a developer's shell may have set changes nothing in a test.
    command.env_remove("RUST_LOG");
    command
}

/// The `halyard` program that tests use; see [`crate::vm::halyard`]. The first call says which.
pub fn binary() -> PathBuf {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    let find = || {
        let path = crate::vm::halyard().unwrap_or_else(|error| panic!("{error:#}"));
        eprintln!("testing {}", path.display());
        path
    };
    BINARY.get_or_init(find).clone()
}

/// The ELF file of the guest `tests/guests/NAME.S`, for arguments of [`run_halyard`]; see [`build`].
pub fn guest(name: &str) -> PathBuf {
    build(name).unwrap_or_else(|error| panic!("{error:#}"))
}

/// A VM that boots a tiny guest, whose serial port is reached through the API: 1 processor, 64 MiB.
pub fn config(name: &str) -> VmConfig {
    let mut config = VmConfig::new(guest(name));
    config.memory.size = ByteSize::mib(64);
    config.serial = Some(Endpoint::Api {});
    config.platform.debug_exit = true;
    config
}

/// Starts a service without a VM, or ends the test where there is no KVM.
#[macro_export]
macro_rules! serve {
    () => {{
        if !$crate::tiny::kvm() {
            return;
        }
        $crate::tiny::Served::start("serve", ["--log-level", "debug"])
    }};
}

/// Whether this machine lets a test use KVM; prints the reason where it does not.
pub fn kvm() -> bool {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            eprintln!("skipped: /dev/kvm: {error}");
            false
        }
    }
}
