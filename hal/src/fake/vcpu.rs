//! A scripted vCPU: it does what its guest's script says, one step after another.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::vm::Shared;
use super::{Call, new_event};
use crate::{
    Conversion, Counter, Counters, CrashInfo, Error, EventState, Exit, ExitHandler, GpaRange, GuestCall,
    GuestCallStatus, IoAddr, Kick, KickTarget, MpState, MsiMessage, Registers, ResetState, Result, STATE_VERSION,
    SystemRegisters, Vcpu, VcpuId, VcpuSnapshot, VcpuState, Visibility,
};

/// One thing that a guest does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// It reads `size` bytes: from memory where a slot has the address, else from the handler, which is given ones.
    /// What came is told by [`super::Fake::reads`].
    Read {
        /// Port or guest physical address.
        at: IoAddr,
        /// Bytes.
        size: usize,
    },
    /// It writes: to memory where a slot takes it, to a doorbell that it rings, else to the handler.
    Write {
        /// Port or guest physical address.
        at: IoAddr,
        /// What it writes.
        data: Vec<u8>,
    },
    /// It ends a level-triggered interrupt with this vector.
    Eoi(u8),
    /// It halts until a route with this message is signalled, and takes the signal. A kick ends the run meanwhile;
    /// the next run goes on waiting.
    WaitForInterrupt(MsiMessage),
    /// It halts until a kick ends the run. The next run goes on after this step.
    WaitForKick,
    /// The run ends with [`Exit::Shutdown`].
    Shutdown,
    /// The run ends with [`Exit::Reset`].
    Reset,
    /// The run ends with [`Exit::Crash`], for this reason.
    Crash(String),
    /// The run ends with [`Exit::Debug`].
    Debug,
    /// It asks for memory of another visibility; what came of it is told by [`super::Fake::answers`].
    Convert {
        /// The pages.
        range: GpaRange,
        /// What it wants them to be.
        to: Visibility,
    },
    /// It asks the monitor for something; the answer is told by [`super::Fake::answers`].
    Call(GuestCall),
    /// It touches memory of another visibility. Where the handler refuses to convert it, the run ends with
    /// [`Exit::MemoryFault`].
    MemoryFault {
        /// What the guest touched.
        range: GpaRange,
        /// What it expected.
        want: Visibility,
    },
}

impl Step {
    /// A read of a port.
    pub fn pio_read(port: u16, size: usize) -> Self {
        Self::Read { at: IoAddr::Pio(port), size }
    }

    /// A write of a port.
    pub fn pio_write(port: u16, data: &[u8]) -> Self {
        Self::Write { at: IoAddr::Pio(port), data: data.to_vec() }
    }

    /// A read of a guest physical address.
    pub fn mmio_read(gpa: u64, size: usize) -> Self {
        Self::Read { at: IoAddr::Mmio(gpa), size }
    }

    /// A write of a guest physical address.
    pub fn mmio_write(gpa: u64, data: &[u8]) -> Self {
        Self::Write { at: IoAddr::Mmio(gpa), data: data.to_vec() }
    }
}

/// What a guest read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestRead {
    /// Port or guest physical address.
    pub at: IoAddr,
    /// What came.
    pub data: Vec<u8>,
}

/// What a guest was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestAnswer {
    /// To [`Step::Convert`] and [`Step::MemoryFault`].
    Conversion(Conversion),
    /// To [`Step::Call`].
    Call(GuestCallStatus),
}

/// A scripted vCPU.
pub(super) struct FakeVcpu {
    vm: Arc<Shared>,
    id: VcpuId,
    kick: Arc<Kicked>,
    exits: Arc<Exits>,
    /// `None` where the kind of VM hides it.
    state: Option<VcpuSnapshot>,
}

/// A kick, noted and told to a vCPU that halts.
struct Kicked {
    pending: AtomicBool,
    wake: Arc<EventFd>,
}

impl KickTarget for Kicked {
    fn kick(&self) {
        self.pending.store(true, Ordering::SeqCst);
        // A full counter has woken the vCPU already.
        let _ = self.wake.write(1);
    }
}

/// How often a handler was asked.
#[derive(Default)]
struct Exits(AtomicU64);

impl Counters for Arc<Exits> {
    fn read(&self) -> Result<Vec<Counter>> {
        Ok(vec![Counter { name: "exits".into(), value: self.0.load(Ordering::SeqCst) }])
    }
}

impl FakeVcpu {
    pub(super) fn create(vm: &Arc<Shared>, id: VcpuId, readable: bool) -> Result<Self> {
        let wake = Arc::new(new_event().map_err(|error| Error::system("eventfd", error))?);
        vm.world.watch(&wake);
        vm.world.state().live_vcpus += 1;
        let kick = Arc::new(Kicked { pending: AtomicBool::new(false), wake });
        Ok(Self { vm: vm.clone(), id, kick, exits: Arc::default(), state: readable.then(|| power_on(id)) })
    }

    fn next(&self) -> Option<Step> {
        self.vm.world.state().scripts.get(&self.id)?.front().cloned()
    }

    /// Takes the step in front off the script.
    fn done(&self) {
        if let Some(script) = self.vm.world.state().scripts.get_mut(&self.id) {
            script.pop_front();
        }
    }

    /// Halts until a kick, a change of routes or scripts, or a signal of this message.
    fn halt(&self, until: Option<MsiMessage>) -> Result<()> {
        self.vm.world.wait(&self.kick.wake, until, None).map_err(|error| Error::system("epoll_wait", error))
    }

    /// Counts what becomes a call of the handler.
    fn exit(&self) {
        self.exits.0.fetch_add(1, Ordering::SeqCst);
    }

    fn read(&self, at: IoAddr, size: usize, host: &dyn ExitHandler) {
        let mut data = vec![0xff; size];
        match at {
            IoAddr::Mmio(gpa) if self.vm.read_memory(gpa, &mut data) => {}
            IoAddr::Pio(port) => {
                self.exit();
                host.pio_read(port, &mut data);
            }
            IoAddr::Mmio(gpa) => {
                self.exit();
                host.mmio_read(gpa, &mut data);
            }
        }
        self.vm.world.state().reads.entry(self.id).or_default().push(GuestRead { at, data });
    }

    fn write(&self, at: IoAddr, data: &[u8], host: &dyn ExitHandler) {
        match at {
            IoAddr::Mmio(gpa) if self.vm.write_memory(gpa, data) => {}
            _ if self.vm.ring(at, data) => {}
            IoAddr::Pio(port) => {
                self.exit();
                host.pio_write(port, data);
            }
            IoAddr::Mmio(gpa) => {
                self.exit();
                host.mmio_write(gpa, data);
            }
        }
    }

    /// Notes what the guest was answered.
    fn answered(&self, answer: GuestAnswer) {
        self.exit();
        self.vm.world.state().answers.entry(self.id).or_default().push(answer);
    }

    /// Does one step; what it ends the run with, if it does.
    fn step(&self, step: Step, host: &dyn ExitHandler) -> Result<Option<Exit>> {
        match step {
            Step::WaitForInterrupt(message) => {
                if self.vm.world.take_interrupt(message) {
                    self.done();
                } else {
                    self.halt(Some(message))?;
                }
                return Ok(None);
            }
            Step::WaitForKick => {
                self.halt(None)?;
                return Ok(None);
            }
            _ => self.done(),
        }
        Ok(match step {
            Step::Read { at, size } => {
                self.read(at, size, host);
                None
            }
            Step::Write { at, data } => {
                self.write(at, &data, host);
                None
            }
            Step::Eoi(vector) => {
                self.exit();
                host.end_of_interrupt(vector);
                None
            }
            Step::WaitForInterrupt(_) | Step::WaitForKick => None,
            Step::Shutdown => Some(Exit::Shutdown),
            Step::Reset => Some(Exit::Reset),
            Step::Crash(reason) => Some(Exit::Crash(CrashInfo { reason, rip: None })),
            Step::Debug => Some(Exit::Debug),
            Step::Convert { range, to } => {
                self.answered(GuestAnswer::Conversion(host.convert(range, to)));
                None
            }
            Step::Call(call) => {
                self.answered(GuestAnswer::Call(host.guest_call(call)));
                None
            }
            Step::MemoryFault { range, want } => {
                let conversion = host.convert(range, want);
                self.answered(GuestAnswer::Conversion(conversion));
                (conversion == Conversion::Invalid).then_some(Exit::MemoryFault { range, want })
            }
        })
    }
}

impl Vcpu for FakeVcpu {
    fn run(&mut self, host: &dyn ExitHandler) -> Result<Exit> {
        self.vm.world.call(Call::Run(self.id))?;
        if self.vm.is_launched() && !self.vm.launch().is_finished() {
            return Err(Error::Invalid { what: "launch", problem: "the guest is not sealed, so it cannot run".into() });
        }
        loop {
            let next = self.next();
            if self.kick.pending.swap(false, Ordering::SeqCst) {
                if next == Some(Step::WaitForKick) {
                    self.done();
                }
                return Ok(Exit::Kicked);
            }
            match next {
                None => self.halt(None)?,
                Some(step) => {
                    if let Some(exit) = self.step(step, host)? {
                        return Ok(exit);
                    }
                }
            }
        }
    }

    fn kick(&self) -> Kick {
        Kick::new(self.kick.clone())
    }

    fn reset(&mut self, at: &ResetState) -> Result<()> {
        self.vm.world.call(Call::Reset(self.id))?;
        if self.vm.is_launched() {
            self.vm.launch().reset(self.id, at)?;
        }
        let mut world = self.vm.world.state();
        world.resets.insert(self.id, at.clone());
        let Some(state) = &mut self.state else { return Ok(()) };
        *state = VcpuSnapshot { cpuid: at.cpuid.clone(), msrs: at.msrs.clone(), ..power_on(self.id) };
        if let Some(entry) = &at.entry {
            state.regs = entry.regs;
            state.sregs = entry.sregs;
            state.mp_state = MpState::Runnable;
        }
        Ok(())
    }

    fn stood_still(&mut self) {
        // Nothing can go wrong with it on a real host either.
        let _ = self.vm.world.call(Call::StoodStill(self.id));
    }

    fn state(&mut self) -> Option<&mut dyn VcpuState> {
        if self.state.is_some() { Some(self) } else { None }
    }

    fn counters(&self) -> Option<Box<dyn Counters>> {
        Some(Box::new(self.exits.clone()))
    }
}

impl VcpuState for FakeVcpu {
    fn save(&mut self) -> Result<VcpuSnapshot> {
        self.vm.world.call(Call::Save(self.id))?;
        self.state.clone().ok_or_else(|| Error::State("this kind of VM hides it".into()))
    }

    fn restore(&mut self, from: &VcpuSnapshot) -> Result<()> {
        self.vm.world.call(Call::Restore(self.id))?;
        if from.version != STATE_VERSION {
            return Err(Error::State(format!("version {} is not {STATE_VERSION}", from.version)));
        }
        self.state = Some(from.clone());
        Ok(())
    }
}

impl Drop for FakeVcpu {
    fn drop(&mut self) {
        self.vm.drop_vcpu(self.id);
        let mut state = self.vm.world.state();
        state.live_vcpus -= 1;
        // A drop cannot fail; an injected failure would have no one to go to.
        let _ = state.call(Call::DropVcpu(self.id));
    }
}

/// A vCPU that nothing has touched.
fn power_on(id: VcpuId) -> VcpuSnapshot {
    VcpuSnapshot {
        version: STATE_VERSION,
        cpuid: Vec::new(),
        mp_state: if id == VcpuId(0) { MpState::Runnable } else { MpState::Uninitialized },
        regs: Registers::default(),
        sregs: SystemRegisters::default(),
        xsave: vec![0; 4096],
        xcrs: vec![(0, 1)],
        msrs: Vec::new(),
        lapic: Some(vec![0; 1024]),
        events: EventState::default(),
        debug_registers: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
        tsc_khz: Some(super::TSC_KHZ),
        nested: None,
    }
}
