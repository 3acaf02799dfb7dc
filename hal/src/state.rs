//! A vCPU's architectural state as versioned data, in sections that are present where the vCPU has the ability.
//!
//! Nothing in here is a hypervisor's own layout, so that a state saved on one can be restored on another.

use serde::{Deserialize, Serialize};

use crate::{CpuidEntry, Result};

/// The version of [`VcpuSnapshot`] that this monitor writes.
pub const STATE_VERSION: u32 = 1;

/// Saves and restores a vCPU that is not running.
pub trait VcpuState {
    /// The whole state.
    ///
    /// # Errors
    /// [`crate::Error::System`] naming the part that could not be read.
    fn save(&mut self) -> Result<VcpuSnapshot>;

    /// Puts a saved state back.
    ///
    /// # Errors
    /// [`crate::Error::State`] where the version is unknown or a section cannot be placed on this host; it lists
    /// all of them. [`crate::Error::System`] naming the part that the hypervisor refused.
    fn restore(&mut self, from: &VcpuSnapshot) -> Result<()>;
}

/// Everything that makes a vCPU what it is between two instructions (Intel SDM vol. 3, AMD APM vol. 2).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VcpuSnapshot {
    /// [`STATE_VERSION`] of the writer.
    pub version: u32,
    /// The CPUID leaves that the guest sees.
    pub cpuid: Vec<CpuidEntry>,
    /// Whether it runs, halts or waits to be started.
    pub mp_state: MpState,
    /// General registers.
    pub regs: Registers,
    /// Segments, control registers and tables.
    pub sregs: SystemRegisters,
    /// The XSAVE area in standard (not compacted) format.
    pub xsave: Vec<u8>,
    /// Extended control registers: (number, value).
    pub xcrs: Vec<(u32, u64)>,
    /// Model-specific registers, in the order in which they are to be written.
    pub msrs: Vec<Msr>,
    /// The local APIC's register page (1024 bytes), where it is emulated by the hypervisor.
    pub lapic: Option<Vec<u8>>,
    /// Exceptions and interrupts on their way.
    pub events: EventState,
    /// DR0 to DR3, DR6, DR7.
    pub debug_registers: [u64; 6],
    /// Frequency of the time stamp counter in kHz.
    pub tsc_khz: Option<u32>,
    /// State of a guest hypervisor's processor structures, in the backend's format, where nesting is on.
    pub nested: Option<Vec<u8>>,
}

/// A model-specific register and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// The register's number.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// Whether a vCPU runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub enum MpState {
    /// It executes instructions.
    #[default]
    Runnable,
    /// It waits for an INIT.
    Uninitialized,
    /// It has had an INIT and waits for a SIPI.
    InitReceived,
    /// It waits for an interrupt after HLT.
    Halted,
    /// It has had a SIPI with this vector and has not begun.
    SipiReceived,
}

/// General registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[expect(missing_docs, reason = "the architecture's own names say all")]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Segment {
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
    /// Selector.
    pub selector: u16,
    /// Access rights: type in bits 3:0, S in 4, DPL in 6:5, P in 7, AVL in 12, L in 13, D/B in 14, G in 15, and
    /// "unusable" in 16 (the layout of VMX access rights, Intel SDM vol. 3 §25.4.1).
    pub access: u32,
}

/// A descriptor table register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct DescriptorTable {
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Segments, control registers and descriptor tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[expect(missing_docs, reason = "the architecture's own names say all")]
pub struct SystemRegisters {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldt: Segment,
    pub gdt: DescriptorTable,
    pub idt: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub apic_base: u64,
}

/// Exceptions and interrupts that were on their way when the vCPU stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct EventState {
    /// An exception being delivered: vector, error code, and the payload that CR2 or DR6 will get.
    pub exception: Option<(u8, Option<u32>, Option<u64>)>,
    /// The exception has been injected already, so that it must not be merged with another.
    pub exception_injected: bool,
    /// A maskable interrupt being delivered, and whether it came from an INT instruction.
    pub interrupt: Option<(u8, bool)>,
    /// Interrupts are held back for one instruction (bit 0: MOV SS, bit 1: STI).
    pub interrupt_shadow: u8,
    /// A non-maskable interrupt is being delivered.
    pub nmi_injected: bool,
    /// Further non-maskable interrupts wait.
    pub nmi_pending: bool,
    /// Non-maskable interrupts are blocked until IRET.
    pub nmi_masked: bool,
    /// The vector of a start-up IPI that was received.
    pub sipi_vector: u32,
    /// In system management mode: bit 0 in it, bit 1 an SMI waits, bit 2 SMM inside an NMI, bit 3 latched INIT.
    pub smm: u8,
    /// A triple fault waits to be reported.
    pub triple_fault: bool,
}
