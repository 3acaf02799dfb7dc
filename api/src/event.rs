//! What happens to a VM, numbered, and the jobs that take a while.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::document::ProblemDocument;
use crate::outcome::Outcome;
use crate::vm::{PhaseName, Reason};

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Event {
    /// Its number. Each event's number is one more than that of the event before it.
    pub sequence: u64,
    /// When it happened, in milliseconds since 1970 (UTC).
    pub time_ms: u64,
    /// What happened.
    pub event: EventKind,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum EventKind {
    /// The VM entered a phase.
    Phase {
        /// The phase.
        phase: PhaseName,
        /// Why.
        reason: Reason,
        /// How the run ended, where it did.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        outcome: Option<Outcome>,
    },
    /// The configuration changed in another part than its devices.
    ConfigChanged {},
    /// The guest took vCPUs that were added, or let go of some.
    VcpusChanged {
        /// How many it has now.
        present: u32,
    },
    /// A device was added.
    DeviceAdded {
        /// The device.
        id: String,
    },
    /// A device was changed.
    DeviceChanged {
        /// The device.
        id: String,
    },
    /// A device was removed.
    DeviceRemoved {
        /// The device.
        id: String,
        /// The guest was using it and was not asked.
        forced: bool,
    },
    /// A device could not be added or removed; or it stopped working until the guest resets it, since the guest broke one of
    /// its rules or the host failed. What repeats itself is told of once a second at the most.
    DeviceFailed {
        /// The device.
        id: String,
        /// Why; the last time, where there were several.
        reason: String,
        /// How often since the last such event of the device.
        count: u64,
    },
    /// Requests of the guest to a disk failed on the host. There is at most one such event of a disk in a second.
    IoError {
        /// The disk.
        id: String,
        /// What the last of them was to do.
        operation: IoOperation,
        /// Where on the disk, in bytes.
        offset: u64,
        /// The operating system's error number, where it gave one: 5 is EIO, 28 ENOSPC.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        errno: Option<i32>,
        /// The same in words.
        reason: String,
        /// How many failed since the last such event of the disk.
        count: u64,
    },
    /// The guest has as much memory as it was asked to have.
    MemoryResized {
        /// How much, in bytes.
        present: u64,
    },
    /// The guest's kernel panicked.
    GuestPanic {
        /// Its crash kernel is at work, and the guest goes on until that is done.
        crash_kernel: bool,
    },
    /// The guest was reset.
    Reset {
        /// Who asked for it.
        reason: Reason,
    },
    /// The guest's power button was pressed.
    PowerButton {
        /// Who pressed it.
        reason: Reason,
    },
    /// A client was connected to a console.
    ConsoleOpened {
        /// The console.
        id: String,
    },
    /// A client of a console is gone.
    ConsoleClosed {
        /// The console.
        id: String,
    },
    /// A job began, made progress or ended.
    Job {
        /// The job as it is now.
        job: Job,
    },
    /// Events were lost to this reader, which was too slow or came too late: read the state again. It is the only kind
    /// that is not the same for all readers; its number is that of the last event lost.
    Gap {
        /// The number of the first event lost.
        first: u64,
        /// The number of the last event lost.
        last: u64,
    },
}

/// What a request to a disk is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum IoOperation {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Make all that was written before durable.
    Flush,
    /// Forget what is there.
    Discard,
    /// Write zeroes.
    WriteZeroes,
}

impl fmt::Display for IoOperation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write of zeroes",
        })
    }
}

impl EventKind {
    /// The event's `type`, as the API writes it.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Phase { .. } => "phase",
            Self::ConfigChanged {} => "config-changed",
            Self::VcpusChanged { .. } => "vcpus-changed",
            Self::DeviceAdded { .. } => "device-added",
            Self::DeviceChanged { .. } => "device-changed",
            Self::DeviceRemoved { .. } => "device-removed",
            Self::DeviceFailed { .. } => "device-failed",
            Self::IoError { .. } => "io-error",
            Self::MemoryResized { .. } => "memory-resized",
            Self::GuestPanic { .. } => "guest-panic",
            Self::Reset { .. } => "reset",
            Self::PowerButton { .. } => "power-button",
            Self::ConsoleOpened { .. } => "console-opened",
            Self::ConsoleClosed { .. } => "console-closed",
            Self::Job { .. } => "job",
            Self::Gap { .. } => "gap",
        }
    }
}

/// Work that takes a while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Job {
    /// Its number, by which requests name it.
    pub id: u64,
    /// What it does.
    pub kind: JobKind,
    /// The device that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// How far it is.
    pub state: JobState,
    /// Progress in percent, where it can be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 100))]
    pub progress: Option<u8>,
    /// When it began, in milliseconds since 1970 (UTC).
    pub started_ms: u64,
    /// When it ended, in milliseconds since 1970 (UTC).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_ms: Option<u64>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ProblemDocument>,
}

/// What a job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum JobKind {
    /// It waits for the guest to switch itself off.
    Shutdown,
    /// It waits for the guest to take a device. Where that does not, or the job is cancelled, the device is taken out again.
    AddDevice,
    /// It waits for the guest to let go of a device. Where that does not, or the job is cancelled, the device stays.
    RemoveDevice,
    /// It waits for the guest to have as much memory as it is asked to have. Where that takes too long, the guest is still
    /// asked; where the job is cancelled, it keeps what it has.
    ResizeMemory,
    /// It waits for the guest to take vCPUs, or to let go of some. What the guest does not do, or has not done when the job
    /// is cancelled, is not wanted any more.
    ChangeVcpus,
}

/// How far a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// It is at work.
    Running,
    /// It did what it was to do.
    Succeeded,
    /// It could not.
    Failed,
    /// A request ended it.
    Cancelled,
}
