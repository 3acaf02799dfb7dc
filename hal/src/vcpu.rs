//! A virtual processor: how it starts, runs, exits and is interrupted.

use std::fmt;
use std::sync::Arc;

use crate::state::{Msr, Registers, SystemRegisters, VcpuState};
use crate::{CpuidEntry, GpaRange, Result, Visibility};

/// A vCPU's number within its VM, counted from 0. It is also its initial local APIC id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VcpuId(pub u8);

/// A virtual processor. It belongs to the thread that runs it; others reach it through [`Kick`] only.
pub trait Vcpu: Send {
    /// Runs the guest until something ends the run. Exits that need an answer are calls on `host` meanwhile.
    ///
    /// # Errors
    /// [`crate::Error::System`] where the hypervisor cannot run the vCPU at all.
    fn run(&mut self, host: &dyn ExitHandler) -> Result<Exit>;

    /// A handle with which any thread, or a signal handler, makes [`Vcpu::run`] return [`Exit::Kicked`].
    fn kick(&self) -> Kick;

    /// Puts the vCPU at its first instruction. If it has run, everything that the guest did to it is undone first,
    /// except that its time stamp counter goes on; its CPUID leaves cannot be others then.
    ///
    /// Where the launch chooses the first instruction ([`crate::Boot::Measured`]) it gives CPUID and model-specific
    /// registers alone, once, before [`crate::Launch::begin`].
    ///
    /// # Errors
    /// [`crate::Error::System`] or [`crate::Error::State`] where the hypervisor refuses a part of the state, which
    /// the message names; [`crate::Error::Invalid`] where the kind of VM has no such reset.
    fn reset(&mut self, at: &ResetState) -> Result<()>;

    /// Tells the guest, where it knows how to be told, that the vCPU stood still for a while: its watchdogs do not take
    /// the pause for a lockup then. To be called between two runs.
    fn stood_still(&mut self);

    /// The vCPU's saved state, where its kind lets the monitor see it.
    fn state(&mut self) -> Option<&mut dyn VcpuState>;

    /// What the hypervisor itself counts of this vCPU, from its creation on, where it does.
    fn counters(&self) -> Option<Box<dyn Counters>>;
}

/// A hypervisor's own counters of a vCPU: of exits that it answers without the monitor's help, too.
pub trait Counters: Send + Sync {
    /// All of them. Any thread may ask, whether the vCPU runs or not.
    ///
    /// # Errors
    /// [`crate::Error::System`] where they cannot be read.
    fn read(&self) -> Result<Vec<Counter>>;
}

/// How often something happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counter {
    /// The hypervisor's name for it; every backend has `exits`, all exits from the guest.
    pub name: String,
    /// How often.
    pub value: u64,
}

/// What a vCPU is before its first instruction.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ResetState {
    /// The CPUID leaves that the guest sees on this vCPU.
    pub cpuid: Vec<CpuidEntry>,
    /// Model-specific registers set after CPUID.
    pub msrs: Vec<Msr>,
    /// Where the boot processor begins; `None` for a vCPU that waits for another to start it (INIT-SIPI-SIPI).
    pub entry: Option<BootRegisters>,
}

/// Registers of the boot processor at its entry point. They are taken as they are: nothing is kept of what the
/// hypervisor would set, the APIC base included (0xfee00900 for an enabled local APIC of a boot processor).
#[derive(Debug, Clone, PartialEq, Default)]
pub struct BootRegisters {
    /// General registers.
    pub regs: Registers,
    /// Segments, control registers and tables.
    pub sregs: SystemRegisters,
}

/// What ended a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// [`Kick::kick`] was called. The instruction whose exit was answered last is complete. Several kicks may end
    /// one run; a kick that comes after it ends the next.
    Kicked,
    /// The guest asked the hypervisor itself for a reset.
    Reset,
    /// The guest shut the processor down: a triple fault.
    Shutdown,
    /// The hypervisor cannot go on with this vCPU.
    Crash(CrashInfo),
    /// A breakpoint or single step that the monitor armed.
    Debug,
    /// The guest touched memory whose visibility must change first, and [`ExitHandler::convert`] refused that.
    MemoryFault {
        /// What it touched.
        range: GpaRange,
        /// What it expected.
        want: Visibility,
    },
}

/// Why the hypervisor cannot go on with a vCPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CrashInfo {
    /// The hypervisor's words and codes.
    pub reason: String,
    /// The instruction pointer, where it can be read.
    pub rip: Option<u64>,
}

impl fmt::Display for CrashInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rip {
            Some(rip) => write!(f, "{} at instruction pointer {rip:#x}", self.reason),
            None => f.write_str(&self.reason),
        }
    }
}

/// Answers the exits that need an answer; a handler for VMs of a kind that does not make one of them refuses it. Called on the
/// vCPU's own thread. `data` is little-endian, 1, 2, 4 or 8 bytes long; an address that no device claims reads as all ones.
pub trait ExitHandler {
    /// The guest reads an I/O port.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// The guest writes an I/O port.
    fn pio_write(&self, port: u16, data: &[u8]);
    /// The guest reads an address without memory.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]);
    /// The guest writes an address without memory.
    fn mmio_write(&self, gpa: u64, data: &[u8]);
    /// The guest ended a level-triggered interrupt with this vector.
    fn end_of_interrupt(&self, vector: u8);
    /// A confidential guest wants memory private or shared: it asked so, or touched it so. What the guest asks for is
    /// made of whole pages, but may lie anywhere. Without an answer of the monitor's own it cannot be.
    fn convert(&self, range: GpaRange, to: Visibility) -> Conversion {
        let _ = (range, to);
        Conversion::Invalid
    }
    /// A confidential guest asks the monitor itself for something. The answer comes at once; what takes longer goes on
    /// behind it. Without an answer of the monitor's own there is none.
    fn guest_call(&self, call: GuestCall) -> GuestCallStatus {
        let _ = call;
        GuestCallStatus::Unsupported
    }
}

/// What became of a guest's wish for memory of another visibility.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conversion {
    /// It is as the guest wants it.
    Done,
    /// Not now: the guest shall ask again.
    Retry,
    /// It cannot be, there or at all.
    Invalid,
}

/// What a confidential guest asks the monitor itself for (Intel TDX Guest-Hypervisor Communication Interface 1.5, §3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestCall {
    /// TDG.VP.VMCALL<GetQuote>: a quote of the report in a shared buffer, written there when it is ready.
    GetQuote {
        /// Guest physical address of the buffer, without the bit that marks shared memory.
        gpa: u64,
        /// Bytes of it.
        size: u64,
    },
    /// TDG.VP.VMCALL<SetupEventNotifyInterrupt>: the interrupt that says, on the vCPU that asks, that a quote is ready.
    SetupEventNotify {
        /// The vCPU that asks.
        vcpu: VcpuId,
        /// Its vector, which no one has checked.
        vector: u64,
    },
}

/// The monitor's answer to a [`GuestCall`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestCallStatus {
    /// It is done, or has begun.
    Success,
    /// Not now: the guest shall ask again.
    Retry,
    /// An argument is wrong.
    InvalidOperand,
    /// An address or a size is not of whole pages.
    AlignError,
    /// There is no such service.
    Unsupported,
}

/// Makes a running vCPU return. Cloning is cheap; [`Kick::kick`] is async-signal-safe.
#[derive(Clone)]
pub struct Kick(Arc<dyn KickTarget>);

impl Kick {
    /// A handle on a backend's target.
    pub fn new(target: Arc<dyn KickTarget>) -> Self {
        Self(target)
    }

    /// Makes the vCPU's current run, or its next one, return [`Exit::Kicked`].
    pub fn kick(&self) {
        self.0.kick();
    }
}

/// A backend's side of [`Kick`].
pub trait KickTarget: Send + Sync {
    /// See [`Kick::kick`].
    fn kick(&self);
}
