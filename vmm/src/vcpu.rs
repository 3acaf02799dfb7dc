//! vCPU threads: each owns its vCPU and runs it until the machine stops or the guest ends. A gate lets all of them
//! through, or holds them between two runs.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use devices::bus::Bus;
use devices::ioapic::IoApic;
use hal::{Conversion, Exit, ExitHandler, GpaRange, GuestCall, GuestCallStatus, Kick, Vcpu, Visibility};

use crate::confidential::Guest;
use crate::inbox::{Event, Inbox, VcpuEnd};
use crate::sandbox;
use crate::trace::Trace;
use crate::trace::exits::WatchedExits;

/// How long vCPUs have to come to the gate: an exit that is being answered is the longest that they may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where exits that need an answer go.
pub struct ExitBuses {
    /// I/O ports.
    pub pio: Arc<Bus>,
    /// Guest physical addresses without memory.
    pub mmio: Arc<Bus>,
    /// Told of the end of level-triggered interrupts.
    pub ioapic: Arc<IoApic>,
    /// Where a confidential guest's memory is made private and shared, and its calls are answered.
    pub confidential: Option<Arc<Guest>>,
}

impl ExitHandler for ExitBuses {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.pio.read(port.into(), data);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        self.pio.write(port.into(), data);
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.mmio.read(gpa, data);
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.mmio.write(gpa, data);
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.ioapic.end_of_interrupt(vector);
    }

    fn convert(&self, range: GpaRange, to: Visibility) -> Conversion {
        self.confidential.as_ref().map_or(Conversion::Invalid, |guest| guest.convert(range, to))
    }

    fn guest_call(&self, call: GuestCall) -> GuestCallStatus {
        self.confidential.as_ref().map_or(GuestCallStatus::Unsupported, |guest| guest.call(call))
    }
}

/// What a vCPU has done since its machine was made.
#[derive(Debug, Default)]
pub struct VcpuCounters {
    /// The number of its thread in the kernel, 0 until it runs.
    pub thread: AtomicI32,
    /// Reads of I/O ports.
    pub pio_reads: AtomicU64,
    /// Writes of I/O ports.
    pub pio_writes: AtomicU64,
    /// Reads of addresses without memory.
    pub mmio_reads: AtomicU64,
    /// Writes of addresses without memory.
    pub mmio_writes: AtomicU64,
    /// Ends of level-triggered interrupts.
    pub interrupt_ends: AtomicU64,
    /// Runs that a kick ended.
    pub kicks: AtomicU64,
}

/// Counts one vCPU's exits on their way to who answers them.
struct Exits<'a> {
    answers: &'a dyn ExitHandler,
    counters: &'a VcpuCounters,
}

impl ExitHandler for Exits<'_> {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        count(&self.counters.pio_reads);
        self.answers.pio_read(port, data);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        count(&self.counters.pio_writes);
        self.answers.pio_write(port, data);
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        count(&self.counters.mmio_reads);
        self.answers.mmio_read(gpa, data);
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        count(&self.counters.mmio_writes);
        self.answers.mmio_write(gpa, data);
    }

    fn end_of_interrupt(&self, vector: u8) {
        count(&self.counters.interrupt_ends);
        self.answers.end_of_interrupt(vector);
    }

    fn convert(&self, range: GpaRange, to: Visibility) -> Conversion {
        self.answers.convert(range, to)
    }

    fn guest_call(&self, call: GuestCall) -> GuestCallStatus {
        self.answers.guest_call(call)
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Whether vCPUs may run their guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// They run.
    Run,
    /// They stand at the gate.
    Stand,
    /// Their threads end.
    End,
}

/// The gate before every run.
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

struct GateState {
    mode: Mode,
    /// Counts the orders to stand, so that a thread that slept through two of them stands for the second too.
    round: u64,
    /// Threads that stand at the gate since the last order.
    standing: usize,
    /// Threads whose guest has ended.
    ended: usize,
}

impl Gate {
    fn new(mode: Mode) -> Self {
        Self { state: Mutex::new(GateState { mode, round: 1, standing: 0, ended: 0 }), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives an order. It reaches those who are in the guest with their next kick.
    fn order(&self, mode: Mode) {
        let mut state = self.lock();
        state.mode = mode;
        state.round += 1;
        state.standing = 0;
        drop(state);
        self.changed.notify_all();
    }

    /// Stands as long as the order is so. `None` where the thread is to end, or to leave; otherwise whether it stood.
    fn pass(&self, leave: &AtomicBool) -> Option<bool> {
        let mut state = self.lock();
        let mut counted = 0;
        loop {
            if leave.load(Ordering::Relaxed) {
                if counted == state.round {
                    state.standing -= 1;
                }
                return None;
            }
            match state.mode {
                Mode::Run => return Some(counted > 0),
                Mode::End => return None,
                Mode::Stand => {}
            }
            if counted != state.round {
                counted = state.round;
                state.standing += 1;
                self.changed.notify_all();
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Has one thread leave, whatever the order for all is.
    fn dismiss(&self, leave: &AtomicBool) {
        let state = self.lock();
        leave.store(true, Ordering::Relaxed);
        drop(state);
        self.changed.notify_all();
    }

    fn ended(&self) {
        self.lock().ended += 1;
        self.changed.notify_all();
    }

    /// A thread that had ended is not one of them any more.
    fn forget_ended(&self) {
        self.lock().ended -= 1;
    }

    /// Waits until none of `threads` threads is in the guest; how many still are when the time is over.
    fn wait_until_all_stand(&self, threads: usize) -> usize {
        let in_guest = |state: &mut GateState| state.standing + state.ended < threads;
        let waited = self.changed.wait_timeout_while(self.lock(), PATIENCE, in_guest);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        threads.saturating_sub(state.standing + state.ended)
    }
}

/// The vCPU threads of a machine, by their vCPUs' numbers. Dropping it stops them.
pub struct VcpuThreads {
    threads: BTreeMap<u8, Member>,
    gate: Arc<Gate>,
    backend: &'static str,
    inbox: Inbox,
}

/// A vCPU's thread, as the others see it.
struct Member {
    thread: JoinHandle<Option<Left>>,
    /// Where its vCPU is handed over, until it has it.
    seat: Option<Sender<Seat>>,
    kick: Option<Kick>,
    /// It is to end, and all others go on.
    leave: Arc<AtomicBool>,
    counters: Arc<VcpuCounters>,
}

/// What a thread is handed.
struct Seat {
    vcpu: Box<dyn Vcpu>,
    /// Where exits go.
    buses: Arc<ExitBuses>,
    /// Who looks at the boot answers first.
    watched: Option<WatchedExits>,
}

/// What a thread leaves.
struct Left {
    vcpu: Box<dyn Vcpu>,
    /// It ended by itself, and the gate counts it so.
    ended: bool,
}

impl VcpuThreads {
    /// Starts threads for vCPUs 0 to `count` - 1, named `CPU n/` and the backend's name: KubeVirt finds vCPU threads by
    /// it. They wait for [`VcpuThreads::run`]: what a thread has to do before it can run a vCPU goes on beside the making
    /// of its machine.
    ///
    /// # Errors
    /// A thread cannot be made; those that were are stopped again.
    pub fn spawn(backend: &'static str, count: u8, inbox: &Inbox) -> io::Result<Self> {
        let gate = Arc::new(Gate::new(Mode::Stand));
        let mut all = Self { threads: BTreeMap::new(), gate, backend, inbox: inbox.clone() };
        (0..count).try_for_each(|number| all.start(number))?;
        Ok(all)
    }

    /// Starts the thread of another vCPU, which waits for [`VcpuThreads::seat`].
    ///
    /// # Errors
    /// The thread cannot be made.
    pub fn start(&mut self, number: u8) -> io::Result<()> {
        let (leave, counters) = (Arc::<AtomicBool>::default(), Arc::<VcpuCounters>::default());
        let work = Thread {
            inbox: self.inbox.clone(),
            gate: self.gate.clone(),
            leave: leave.clone(),
            counters: counters.clone(),
        };
        let (seat, vcpu) = channel();
        let thread = Builder::new().name(format!("CPU {number}/{}", self.backend)).spawn(move || work.run(&vcpu))?;
        self.threads.insert(number, Member { thread, seat: Some(seat), kick: None, leave, counters });
        Ok(())
    }

    /// Hands each thread its vCPU. With [`Mode::Stand`] their guests do not run before [`VcpuThreads::resume`].
    pub fn run(&mut self, vcpus: Vec<Box<dyn Vcpu>>, buses: &Arc<ExitBuses>, trace: &Trace, mode: Mode) {
        self.gate.order(mode);
        for (member, vcpu) in self.threads.values_mut().zip(vcpus) {
            let watched = trace.vcpu(&*vcpu, buses);
            member.seat(Seat { vcpu, buses: buses.clone(), watched });
        }
    }

    /// Hands a thread that was started later its vCPU, which runs or stands as all others do.
    pub fn seat(&mut self, number: u8, vcpu: Box<dyn Vcpu>, buses: &Arc<ExitBuses>) {
        if let Some(member) = self.threads.get_mut(&number) {
            member.seat(Seat { vcpu, buses: buses.clone(), watched: None });
        }
    }

    /// Ends a vCPU's thread between two instructions and takes the vCPU out of it, where there is one.
    pub fn take_out(&mut self, number: u8) -> Option<Box<dyn Vcpu>> {
        let member = self.threads.remove(&number)?;
        self.gate.dismiss(&member.leave);
        let left = member.end()?;
        if left.ended {
            self.gate.forget_ended();
        }
        Some(left.vcpu)
    }

    /// Whether there is a thread for this vCPU.
    pub fn has(&self, number: u8) -> bool {
        self.threads.contains_key(&number)
    }

    /// What each vCPU has done, with its number.
    pub fn counters(&self) -> Vec<(u8, Arc<VcpuCounters>)> {
        self.threads.iter().map(|(number, member)| (*number, member.counters.clone())).collect()
    }

    /// Stops all guests between two instructions and returns when all stand.
    ///
    /// # Errors
    /// Some do not come in time, since an exit of theirs is not answered; all run on then.
    pub fn pause(&self) -> io::Result<()> {
        self.gate.order(Mode::Stand);
        self.threads.values().for_each(Member::kick);
        match self.gate.wait_until_all_stand(self.threads.len()) {
            0 => Ok(()),
            late => {
                self.gate.order(Mode::Run);
                let problem = format!("{late} of {} vCPUs do not stop", self.threads.len());
                Err(io::Error::new(io::ErrorKind::TimedOut, problem))
            }
        }
    }

    /// Lets all guests run on.
    pub fn resume(&self) {
        self.gate.order(Mode::Run);
    }
}

impl Member {
    fn seat(&mut self, seat: Seat) {
        self.kick = Some(seat.vcpu.kick());
        if self.seat.take().is_none_or(|place| place.send(seat).is_err()) {
            tracing::error!("a vCPU thread has ended before its time");
        }
    }

    fn kick(&self) {
        if let Some(kick) = &self.kick {
            kick.kick();
        }
    }

    /// Waits for the end of the thread, which was told that it is to end.
    fn end(self) -> Option<Left> {
        self.kick();
        drop(self.seat);
        self.thread.join().unwrap_or_else(|_| {
            tracing::error!("a vCPU thread panicked");
            None
        })
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.gate.order(Mode::End);
        self.threads.values().for_each(Member::kick);
        while let Some((_, member)) = self.threads.pop_first() {
            member.end();
        }
    }
}

/// What a vCPU's thread has beside the vCPU.
struct Thread {
    inbox: Inbox,
    gate: Arc<Gate>,
    leave: Arc<AtomicBool>,
    counters: Arc<VcpuCounters>,
}

impl Thread {
    fn run(self, vcpu: &Receiver<Seat>) -> Option<Left> {
        sandbox::enter(sandbox::Thread::Vcpu);
        // Where none comes, the machine was not made.
        let Seat { mut vcpu, buses, watched } = vcpu.recv().ok()?;
        self.counters.thread.store(nix::unistd::gettid().as_raw(), Ordering::Relaxed);
        let answers: &dyn ExitHandler = watched.as_ref().map_or(&*buses, |watched| watched);
        let exits = Exits { answers, counters: &self.counters };
        while let Some(stood) = self.gate.pass(&self.leave) {
            if stood {
                vcpu.stood_still();
            }
            if let Some(watched) = &watched {
                watched.before_entry(&mut *vcpu);
            }
            let end = match vcpu.run(&exits) {
                Ok(Exit::Kicked) => {
                    count(&self.counters.kicks);
                    continue;
                }
                Ok(Exit::Reset) => VcpuEnd::Reset,
                Ok(Exit::Shutdown) => VcpuEnd::TripleFault,
                Ok(Exit::Crash(info)) => VcpuEnd::Crash(info.to_string()),
                Ok(Exit::Debug) => VcpuEnd::Crash("a debug exit that nobody armed".into()),
                Ok(Exit::MemoryFault { range, want }) => {
                    VcpuEnd::Crash(format!("memory at {:#x} is not to be {want:?}, as the guest wants it", range.start))
                }
                Err(error) => VcpuEnd::Crash(error.to_string()),
            };
            self.inbox.post(Event::Vcpu(end));
            self.gate.ended();
            return Some(Left { vcpu, ended: true });
        }
        Some(Left { vcpu, ended: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hal::fake::{Call, Fake, Step};
    use hal::{Hypervisor, VcpuId, VmSpec};

    fn start(fake: &Fake, count: u8, mode: Mode) -> (VcpuThreads, Inbox) {
        let vm = fake.create(&VmSpec { max_vcpus: count.into(), ..VmSpec::default() }).unwrap();
        let vcpus: Vec<_> = (0..count).map(|id| vm.create_vcpu(VcpuId(id)).unwrap()).collect();
        let (pio, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let buses = Arc::new(ExitBuses { pio, mmio, ioapic: Arc::new(IoApic::new(24)), confidential: None });
        let inbox = Inbox::new().unwrap();
        let mut threads = VcpuThreads::spawn("test", count, &inbox).unwrap();
        threads.run(vcpus, &buses, &Trace::off(), mode);
        (threads, inbox)
    }

    fn runs(fake: &Fake) -> usize {
        fake.calls().iter().filter(|call| matches!(call, Call::Run(_))).count()
    }

    #[test]
    fn a_pause_that_comes_before_the_first_run_holds_all() {
        for _ in 0..50 {
            let fake = Fake::new();
            let (threads, _inbox) = start(&fake, 3, Mode::Run);
            threads.pause().unwrap();
            let before = runs(&fake);
            std::thread::yield_now();
            assert_eq!(runs(&fake), before, "somebody runs while all stand");
            threads.resume();
            threads.pause().unwrap();
        }
    }

    #[test]
    fn vcpus_that_stand_at_first_run_only_when_they_may() {
        let fake = Fake::new();
        let (threads, _inbox) = start(&fake, 2, Mode::Stand);
        assert_eq!(threads.gate.wait_until_all_stand(2), 0);
        assert_eq!(runs(&fake), 0);
        threads.resume();
        while runs(&fake) < 2 {
            std::thread::yield_now();
        }
        drop(threads);
        let stood = fake.calls().iter().filter(|call| matches!(call, Call::StoodStill(_))).count();
        assert_eq!(stood, 2, "each is told of its pause when it goes on");
    }

    #[test]
    fn a_vcpu_that_died_is_not_waited_for() {
        let fake = Fake::new();
        fake.script(VcpuId(1), [Step::Crash("it broke".into())]);
        let (threads, inbox) = start(&fake, 2, Mode::Run);
        while inbox.take().is_none() {
            std::thread::yield_now();
        }
        threads.pause().unwrap();
        threads.resume();
        threads.pause().unwrap();
    }

    #[test]
    fn vcpus_come_and_go_whether_the_others_run_or_stand() {
        let fake = Fake::new();
        let (mut threads, _inbox) = start(&fake, 3, Mode::Run);
        let (pio, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        let buses = Arc::new(ExitBuses { pio, mmio, ioapic: Arc::new(IoApic::new(0)), confidential: None });
        for round in 0..200 {
            if round % 2 == 0 {
                threads.pause().unwrap();
            }
            let vcpu = threads.take_out(1).unwrap();
            assert!(threads.take_out(1).is_none() && !threads.has(1));
            let before = runs(&fake);
            threads.start(1).unwrap();
            threads.seat(1, vcpu, &buses);
            threads.pause().unwrap();
            if round % 2 == 0 {
                assert_eq!(runs(&fake), before, "it runs while all stand");
            }
            threads.resume();
        }
        assert_eq!(threads.counters().iter().map(|(number, _)| *number).collect::<Vec<_>>(), [0, 1, 2]);
        threads.start(3).unwrap();
        assert!(threads.take_out(3).is_none(), "it was never given one");
        threads.pause().unwrap();
    }

    #[test]
    fn a_vcpu_that_died_and_is_taken_out_is_not_counted() {
        let fake = Fake::new();
        fake.script(VcpuId(1), [Step::Crash("it broke".into())]);
        let (mut threads, inbox) = start(&fake, 2, Mode::Run);
        while inbox.take().is_none() {
            std::thread::yield_now();
        }
        drop(threads.take_out(1).unwrap());
        assert_eq!(threads.gate.lock().ended, 0);
        threads.pause().unwrap();
    }

    #[test]
    fn orders_in_quick_succession_are_all_obeyed() {
        let fake = Fake::new();
        let (threads, _inbox) = start(&fake, 4, Mode::Run);
        for _ in 0..500 {
            threads.pause().unwrap();
            threads.resume();
        }
        threads.pause().unwrap();
        let before = runs(&fake);
        std::thread::yield_now();
        assert_eq!(runs(&fake), before);
    }
}
