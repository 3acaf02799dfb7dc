//! The eyes on a boot: when each step from exec to user space was reached, and what the guest exited for in between.
//!
//! A [`Trace`] is handed through the making of the machine and told of each [`Milestone`]. Where nobody asked for it
//! ([`Trace::off`]) it holds nothing, and the vCPU threads call the buses as ever; where somebody did, each of them has
//! an exit handler of its own in front of the buses ([`exits`]), until user space is reached. Exits are counted by
//! what the guest accessed, for each stretch between two milestones; those that the hypervisor answers by itself are
//! told by its own counters. What is kept is bounded, whatever the guest does.
//!
//! One thread ([`watch`]) waits for the boot's end, writes the report ([`report`], [`picture`]) and, where the boot may
//! not take for ever, says what holds it up.

mod diagnosis;
pub mod exits;
mod names;
pub mod picture;
mod recorder;
pub mod report;
mod sight;
mod start;
mod symbols;
mod watch;

use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use api::{Lifecycle, Problem, Problems, VmConfig};
use devices::virtio::transport::VirtioPci;
use hal::Vcpu;
use vm_memory::GuestMemoryMmap;

use self::exits::WatchedExits;
use self::recorder::Recorder;
use self::watch::Limit;
use crate::Failure;
use crate::inbox::Inbox;
use crate::vcpu::ExitBuses;

pub use self::watch::Attached;

/// A step of a boot. Each is noted when it is first reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Milestone {
    /// The process began.
    Exec,
    /// The configuration is read and checked, and the files that it names are open.
    Configuration,
    /// Guest memory is made.
    Memory,
    /// The kernel's payload is at hand decompressed: by the host, now or before. Not for a kernel that needs none, or
    /// does it itself.
    KernelDecompressed,
    /// Kernel, initramfs and boot data are in guest memory.
    Kernel,
    /// The VM is made, with its memory.
    Vm,
    /// The vCPUs are made, and so are the devices.
    Vcpus,
    /// The boot processor enters the guest.
    FirstEntry,
    /// The guest's first byte on the serial port or a console, by its id.
    Output(String),
    /// The first access to PCI configuration space.
    Pci,
    /// A device's driver runs it (DRIVER_OK), by the device's id.
    DriverOk(String),
    /// User space is reached, as far as this says.
    UserSpace(Word),
}

/// What tells of user space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// A program wrote to the marker port.
    Marker,
    /// A program wrote to a console's named port, by the device's id.
    Port(String),
    /// A vCPU was seen in user mode.
    UserMode,
}

impl Milestone {
    /// Its name in reports.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Exec => "exec",
            Self::Configuration => "configuration",
            Self::Memory => "memory",
            Self::KernelDecompressed => "kernel-decompressed",
            Self::Kernel => "kernel",
            Self::Vm => "vm",
            Self::Vcpus => "vcpus",
            Self::FirstEntry => "first-entry",
            Self::Output(_) => "first-output",
            Self::Pci => "first-pci-access",
            Self::DriverOk(_) => "driver-ok",
            Self::UserSpace(_) => "user-space",
        }
    }

    /// The device it is about, or what told of it.
    pub fn subject(&self) -> Option<&str> {
        match self {
            Self::Output(id) | Self::DriverOk(id) | Self::UserSpace(Word::Port(id)) => Some(id),
            Self::UserSpace(Word::Marker) => Some("marker"),
            Self::UserSpace(Word::UserMode) => Some("user-mode"),
            _ => None,
        }
    }
}

impl fmt::Display for Milestone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.subject() {
            Some(subject) => write!(f, "{} {subject}", self.name()),
            None => f.write_str(self.name()),
        }
    }
}

/// Where the report goes.
#[derive(Debug)]
pub struct Outputs {
    json: File,
    svg: File,
}

impl Outputs {
    /// Makes, or empties, the file at `path` and the picture beside it.
    ///
    /// # Errors
    /// [`Failure::BadInput`] names the file that cannot be written.
    pub fn create(path: &Path) -> Result<Self, Failure> {
        let refused = |problem: String, remedy: &str| {
            Failure::BadInput(Problems(vec![Problem::new("--boot-trace", problem, remedy)]))
        };
        let picture = path.with_extension("svg");
        if picture == path {
            let problem = format!("{} has the name that the picture gets", path.display());
            return Err(refused(problem, "name the JSON file; the picture is put beside it"));
        }
        let create = |path: &Path| {
            File::create(path).map_err(|error: io::Error| refused(format!("{}: {error}", path.display()), ""))
        };
        Ok(Self { json: create(path)?, svg: create(&picture)? })
    }
}

/// What is wanted of a boot beside the VM's configuration.
#[derive(Debug, Clone, Default)]
pub struct Watching {
    /// Where the report is written as JSON, with a picture beside it.
    pub boot_trace: Option<PathBuf>,
}

/// What a boot's watcher must know of the machine.
pub struct View {
    /// The PCI functions with the ids of their devices.
    pub functions: Vec<(String, Arc<VirtioPci>)>,
    /// Where PCI configuration space lies.
    pub ecam: std::ops::Range<u64>,
    /// The guest's memory.
    pub memory: GuestMemoryMmap,
    /// How far the kernel lies from the addresses that it was linked for, as far as its loader knows.
    pub slide: u64,
    /// The kernel's System.map, where there is one.
    pub system_map: Option<File>,
}

/// A boot under observation, or not.
#[derive(Clone, Default)]
pub struct Trace(Option<Arc<Recorder>>);

impl Trace {
    /// Nobody looks.
    pub fn off() -> Self {
        Self(None)
    }

    /// Looks at the boot that began with this process, where `watching` asks for it.
    pub fn new(config: &VmConfig, watching: &Watching) -> Self {
        Self::since(config, watching, start::since_exec)
    }

    /// Looks at the boot that begins now, on a client's request or after a reset.
    pub fn again(config: &VmConfig, watching: &Watching) -> Self {
        Self::since(config, watching, || Duration::ZERO)
    }

    fn since(config: &VmConfig, watching: &Watching, start: impl FnOnce() -> Duration) -> Self {
        let wanted = watching.boot_trace.is_some() || config.lifecycle.boot_timeout.is_some();
        Self(wanted.then(|| Arc::new(Recorder::new(start()))))
    }

    /// Whether somebody looks.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Notes that a milestone is reached, where it has not been before.
    pub fn mark(&self, milestone: Milestone) {
        if let Some(recorder) = &self.0 {
            recorder.mark(milestone);
        }
    }

    /// Something to call when the guest first writes to a serial port or console. `named`: it is a port for programs.
    pub fn on_output(&self, id: &str, named: bool) -> Option<Box<dyn FnOnce() + Send>> {
        let recorder = self.0.clone()?;
        let id = id.to_owned();
        let milestone = if named { Milestone::UserSpace(Word::Port(id)) } else { Milestone::Output(id) };
        Some(Box::new(move || recorder.mark(milestone)))
    }

    /// The exit handler of a vCPU, in front of `buses`.
    pub fn vcpu(&self, vcpu: &dyn Vcpu, buses: &Arc<ExitBuses>) -> Option<WatchedExits> {
        let recorder = self.0.clone()?;
        let number = recorder.add_vcpu(vcpu.kick(), vcpu.counters());
        WatchedExits::new(recorder, number, buses.clone())
    }

    /// Looks at this machine until what is returned is dropped. Where the boot takes longer than `lifecycle` allows,
    /// `inbox` is told.
    ///
    /// # Errors
    /// No thread can be made.
    pub fn attach(&self, view: View, lifecycle: &Lifecycle, inbox: &Inbox) -> io::Result<Option<Attached>> {
        let limit = lifecycle.boot_timeout.map(|time| Limit {
            timeout: time.duration(),
            until: lifecycle.boot_until,
            inbox: inbox.clone(),
        });
        match &self.0 {
            Some(recorder) => Ok(Some(Attached::start(recorder.clone(), view, limit)?)),
            None => Ok(None),
        }
    }

    /// Gives the trace the files that its report goes to.
    pub fn write_to(&self, outputs: Outputs) {
        if let Some(recorder) = &self.0 {
            recorder.write_to(outputs);
        }
    }
}

/// Seconds for people: `1.234 s`.
fn seconds(time: Duration) -> String {
    format!("{:.3} s", time.as_secs_f64())
}
