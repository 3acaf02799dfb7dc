//! A vCPU of KVM's: the loop around `KVM_RUN`, and its first instruction.
#![expect(unsafe_code, reason = "exits are read from a page that is shared with KVM")]

use std::sync::Arc;
use std::thread::{self, ThreadId};

use kvm_bindings::{
    CpuId, KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, KVM_MEMORY_EXIT_FLAG_PRIVATE, KVM_MP_STATE_RUNNABLE,
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_cpuid_entry2, kvm_mp_state, kvm_run,
};
use kvm_ioctls::{HypercallExit, VcpuExit, VcpuFd};
use vmm_sys_util::errno;

use super::counters::KvmCounters;
use super::kick::{self, KickState, Running};
use super::tdx::{self, exits};
use super::vm::Shared;
use super::{failed, state};
use crate::{
    BootRegisters, Conversion, Counters, CpuidEntry, CrashInfo, Error, Exit, ExitHandler, GpaRange, Kick, ResetState,
    Result, Vcpu, VcpuId, VcpuState, Visibility,
};

/// A vCPU of KVM's.
pub(super) struct KvmVcpu {
    pub(super) fd: VcpuFd,
    pub(super) vm: Arc<Shared>,
    id: VcpuId,
    kick: Arc<KickState>,
    /// The leaves that KVM has been given.
    pub(super) cpuid: Vec<CpuidEntry>,
    /// Set once the guest can have changed anything.
    has_run: bool,
    /// The thread whose signal mask is known to let kicks through.
    thread: Option<ThreadId>,
    /// Of a trust domain's vCPU, whose registers nobody sees: what its guest is told of the calls that there are (R11 and R12
    /// of GetTdVmCallInfo).
    call_info: Option<[u64; 2]>,
}

/// Why KVM cannot carry out an access of the guest's: this process may not do it either.
const NO_MEMORY: &str =
    "the guest wrote to memory that it does not have, or the host has none for it (KVM_RUN: EFAULT)";

/// Why a fault on memory is not about who sees it.
const BROKEN_MEMORY: &str = "a page of the guest's memory is broken on the host (KVM_RUN: EHWPOISON)";

/// What an exit means for the loop in [`Vcpu::run`].
enum Step {
    /// It was answered: on with the guest.
    Answered,
    /// It ends the run.
    Ends(Exit),
    /// KVM cannot go on, for this reason.
    Crash(String),
    /// KVM cannot go on, and the reason stands in the page shared with it.
    InternalError,
}

impl KvmVcpu {
    pub(super) fn create(vm: &Arc<Shared>, id: VcpuId) -> Result<Self> {
        kick::install_handler()?;
        let mut fd = vm.fd.create_vcpu(id.0.into()).map_err(failed("KVM_CREATE_VCPU"))?;
        let immediate_exit = &raw mut fd.get_kvm_run().immediate_exit;
        // SAFETY: the byte lies in the page shared with KVM, which is unmapped when the vCPU is dropped; a `Running`
        // exists only inside `run`, which borrows the vCPU.
        let kick = Arc::new(unsafe { KickState::new(immediate_exit) });
        Ok(Self { fd, vm: vm.clone(), id, kick, cpuid: Vec::new(), has_run: false, thread: None, call_info: None })
    }

    /// The same for a trust domain, which is told of these calls.
    pub(super) fn answering(self, call_info: [u64; 2]) -> Self {
        Self { call_info: Some(call_info), ..self }
    }

    /// Runs until the next exit and answers it.
    fn step(&mut self, running: &Running<'_>, host: &dyn ExitHandler) -> Result<Step> {
        let page: *mut kvm_run = self.fd.get_kvm_run();
        match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                // A string instruction reads several elements in one exit; handlers see one at a time.
                // SAFETY: the page is mapped as long as `fd` lives, and `data` lies outside of the field read.
                for element in data.chunks_exact_mut(unsafe { io_size(page) }) {
                    host.pio_read(port, element);
                }
                Ok(Step::Answered)
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                // SAFETY: as above.
                for element in data.chunks_exact(unsafe { io_size(page) }) {
                    host.pio_write(port, element);
                }
                Ok(Step::Answered)
            }
            Ok(VcpuExit::Unsupported(tdx::EXIT_TDX)) => {
                // SAFETY: as above; the exit says that the page holds a call of the guest's.
                unsafe { exits::answer_call(page, self.id, self.call_info.unwrap_or_default(), host) };
                Ok(Step::Answered)
            }
            // This exit comes with an error number, which says which of two sorts it is.
            Ok(VcpuExit::MemoryFault { .. }) if errno::Error::last().errno() == libc::EHWPOISON => {
                Ok(Step::Crash(BROKEN_MEMORY.into()))
            }
            Ok(exit) => Ok(answer(exit, host)),
            Err(error) => match error.errno() {
                // KVM completes an answered exit before it returns so: the registers are those between instructions.
                libc::EINTR if running.take_kick() => Ok(Step::Ends(Exit::Kicked)),
                // EINTR: a signal that is no business of the guest. EAGAIN: the start-up IPI has come.
                libc::EINTR | libc::EAGAIN => Ok(Step::Answered),
                libc::EFAULT => Ok(Step::Crash(NO_MEMORY.into())),
                _ => Err(failed("KVM_RUN")(error)),
            },
        }
    }

    fn run_until_exit(&mut self, running: &Running<'_>, host: &dyn ExitHandler) -> Result<Exit> {
        loop {
            match self.step(running, host)? {
                Step::Answered => {}
                Step::Ends(exit) => return Ok(exit),
                Step::Crash(reason) => return Ok(self.crash(reason)),
                Step::InternalError => {
                    let reason = internal_error(self.fd.get_kvm_run());
                    return Ok(self.crash(reason));
                }
            }
        }
    }

    fn crash(&self, reason: String) -> Exit {
        let rip = match self.call_info {
            None => self.fd.get_regs().ok().map(|regs| regs.rip),
            Some(_) => None,
        };
        Exit::Crash(CrashInfo { reason, rip })
    }

    pub(super) fn set_cpuid(&mut self, leaves: &[CpuidEntry]) -> Result<()> {
        // KVM refuses it once the vCPU has run, unless nothing changes.
        if self.cpuid == leaves {
            return Ok(());
        }
        let entries: Vec<_> = leaves.iter().map(kvm_cpuid_entry2::from).collect();
        let list = CpuId::from_entries(&entries).map_err(|_| Error::Invalid {
            what: "CPUID",
            problem: format!("{} leaves are more than KVM takes", leaves.len()),
        })?;
        self.fd.set_cpuid2(&list).map_err(failed("KVM_SET_CPUID2"))?;
        self.cpuid = leaves.to_vec();
        Ok(())
    }

    fn set_boot_registers(&self, entry: &BootRegisters) -> Result<()> {
        self.fd.set_sregs(&(&entry.sregs).into()).map_err(failed("KVM_SET_SREGS"))?;
        self.fd.set_regs(&(&entry.regs).into()).map_err(failed("KVM_SET_REGS"))?;
        if self.id != VcpuId(0) {
            // KVM lets all others wait for an INIT.
            let runnable = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
            self.fd.set_mp_state(runnable).map_err(failed("KVM_SET_MP_STATE"))?;
        }
        Ok(())
    }

    /// Lets other vCPUs' start-up IPIs find this one. KVM makes its map of local APICs before a new vCPU is in its VM, and
    /// again when a local APIC is written: it drops an INIT that comes in between.
    fn make_reachable(&self) -> Result<()> {
        let lapic = self.fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
        self.fd.set_lapic(&lapic).map_err(failed("KVM_SET_LAPIC"))
    }

    /// Undoes everything that the guest did to this vCPU. KVM has no call for it, so the state at power-on is taken
    /// from a new vCPU of the same number in a VM made for this moment.
    fn power_on(&mut self) -> Result<()> {
        let twin = self.vm.blank_twin()?;
        let mut fresh = Self::create(&twin, self.id)?;
        fresh.set_cpuid(&self.cpuid)?;
        let mut power_on = state::save(&fresh)?;
        // The counters of all vCPUs run together; one that began again alone would be seen to jump.
        power_on.msrs.retain(|msr| msr.index != state::MSR_TSC);
        power_on.tsc_khz = None;
        state::restore(self, &power_on)
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, host: &dyn ExitHandler) -> Result<Exit> {
        let thread = thread::current().id();
        if self.thread != Some(thread) {
            kick::unblock()?;
            self.thread = Some(thread);
        }
        self.has_run = true;
        let kick = self.kick.clone();
        let running = kick.enter();
        self.run_until_exit(&running, host)
    }

    fn kick(&self) -> Kick {
        Kick::new(self.kick.clone())
    }

    fn reset(&mut self, at: &ResetState) -> Result<()> {
        if self.has_run {
            self.power_on()?;
            self.has_run = false;
        }
        // First, since KVM checks MSRs and registers against it.
        self.set_cpuid(&at.cpuid)?;
        state::set_msrs(&self.fd, &at.msrs)?;
        match &at.entry {
            Some(entry) => self.set_boot_registers(entry),
            None => self.make_reachable(),
        }
    }

    fn stood_still(&mut self) {
        // Refused where the guest does not use KVM's clock: then there is nobody to tell.
        let _ = self.fd.kvmclock_ctrl();
    }

    fn state(&mut self) -> Option<&mut dyn VcpuState> {
        Some(self)
    }

    fn counters(&self) -> Option<Box<dyn Counters>> {
        Some(Box::new(KvmCounters::open(&self.fd)?))
    }
}

impl VcpuState for KvmVcpu {
    fn save(&mut self) -> Result<crate::VcpuSnapshot> {
        state::save(self)
    }

    fn restore(&mut self, from: &crate::VcpuSnapshot) -> Result<()> {
        state::restore(self, from)
    }
}

/// The bytes of one element of an I/O exit, never 0.
///
/// # Safety
/// `page` must be a mapped `kvm_run` whose exit is `KVM_EXIT_IO`.
unsafe fn io_size(page: *const kvm_run) -> usize {
    // SAFETY: the caller vouches for the page, and the exit reason says that this part of the union is in use.
    usize::from(unsafe { (*page).__bindgen_anon_1.io.size }).max(1)
}

/// Answers an exit that is not port I/O.
fn answer(exit: VcpuExit<'_>, host: &dyn ExitHandler) -> Step {
    match exit {
        VcpuExit::MmioRead(gpa, data) => {
            host.mmio_read(gpa, data);
            Step::Answered
        }
        VcpuExit::MmioWrite(gpa, data) => {
            host.mmio_write(gpa, data);
            Step::Answered
        }
        VcpuExit::IoapicEoi(vector) => {
            host.end_of_interrupt(vector);
            Step::Answered
        }
        VcpuExit::Hypercall(HypercallExit { nr: exits::MAP_GPA_RANGE, args, ret, .. }) => {
            *ret = exits::map_range(&args, host);
            Step::Answered
        }
        VcpuExit::Intr => Step::Answered,
        VcpuExit::Shutdown => Step::Ends(Exit::Shutdown),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Step::Ends(Exit::Shutdown),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Step::Ends(Exit::Reset),
        VcpuExit::SystemEvent(tdx::SYSTEM_EVENT_TDX_FATAL, registers) => Step::Crash(exits::last_words(registers)),
        VcpuExit::SystemEvent(event, _) => Step::Crash(format!("the guest reported a crash (system event {event})")),
        VcpuExit::Debug(_) => Step::Ends(Exit::Debug),
        VcpuExit::MemoryFault { flags, gpa, size } => {
            let private = flags & u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE) != 0;
            let want = if private { Visibility::Private } else { Visibility::Shared };
            let range = GpaRange { start: gpa, len: size };
            match host.convert(range, want) {
                Conversion::Done | Conversion::Retry => Step::Answered,
                Conversion::Invalid => Step::Ends(Exit::MemoryFault { range, want }),
            }
        }
        VcpuExit::FailEntry(reason, cpu) => Step::Crash(format!(
            "the processor refused to enter the guest: hardware reason {reason:#x} on host processor {cpu}"
        )),
        VcpuExit::InternalError => Step::InternalError,
        VcpuExit::Unknown => Step::Crash("KVM reported an exit of the processor that it does not know".into()),
        VcpuExit::Unsupported(reason) => Step::Crash(format!("KVM exit {reason} is not known to this monitor")),
        other => Step::Crash(format!("KVM exit {other:?} was not asked for")),
    }
}

/// What `KVM_EXIT_INTERNAL_ERROR` says of itself.
fn internal_error(page: &kvm_run) -> String {
    // SAFETY: the exit reason says that this part of the union is in use.
    let internal = unsafe { page.__bindgen_anon_1.internal };
    let what = match internal.suberror {
        KVM_INTERNAL_ERROR_EMULATION => "an instruction could not be emulated",
        KVM_INTERNAL_ERROR_SIMUL_EX => "exceptions came at once that cannot be delivered together",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit came while an event was delivered",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "the processor left the guest for an unexpected reason",
        _ => "for a reason without a name",
    };
    format!("KVM internal error {}: {what}{}", internal.suberror, instruction_bytes(page))
}

/// The bytes of the instruction that could not be emulated, where KVM tells them.
fn instruction_bytes(page: &kvm_run) -> String {
    // SAFETY: the caller has seen `KVM_EXIT_INTERNAL_ERROR`; for this suberror the layout is another view of the
    // same plain integers.
    let failure = unsafe { page.__bindgen_anon_1.emulation_failure };
    let told = failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
    if failure.suberror != KVM_INTERNAL_ERROR_EMULATION || failure.ndata == 0 || !told {
        return String::new();
    }
    // SAFETY: the flag says that size and bytes are there.
    let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
    let bytes = instruction.insn_bytes.iter().take(instruction.insn_size.into());
    bytes.fold(" (bytes".to_string(), |text, byte| format!("{text} {byte:02x}")) + ")"
}
