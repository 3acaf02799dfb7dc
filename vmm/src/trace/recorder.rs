//! What is kept of a boot, and the one lock in front of it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hal::{Counters, Kick};

use super::sight::Sight;
use super::{Milestone, Outputs, View};

/// The most different things accessed that are counted apart, in all phases together; further ones are counted as
/// [`OTHER_PLACES`].
const MOST_PLACES: usize = 4096;
/// The address of accesses that are not told apart any more.
pub const OTHER_PLACES: u64 = u64::MAX;
/// How many of a vCPU's last exits are kept.
const LAST_EXITS: usize = 16;

/// Why a guest exited to the monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// It read an I/O port.
    PioRead,
    /// It wrote an I/O port.
    PioWrite,
    /// It read an address without memory.
    MmioRead,
    /// It wrote an address without memory.
    MmioWrite,
    /// It ended a level-triggered interrupt.
    EndOfInterrupt,
    /// The monitor asked it to.
    Kick,
}

impl Reason {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::PioRead => "pio-read",
            Self::PioWrite => "pio-write",
            Self::MmioRead => "mmio-read",
            Self::MmioWrite => "mmio-write",
            Self::EndOfInterrupt => "end-of-interrupt",
            Self::Kick => "kick",
        }
    }

    /// The address under which an access is counted: ports by themselves, memory by its page.
    fn granule(self, address: u64) -> u64 {
        match self {
            Self::MmioRead | Self::MmioWrite => address & !0xfff,
            _ => address,
        }
    }
}

/// One exit.
#[derive(Debug, Clone, Copy)]
pub struct ExitSeen {
    /// When, since exec.
    pub at: Duration,
    /// Why.
    pub reason: Reason,
    /// Port, guest physical address or vector.
    pub address: u64,
    /// Bytes accessed.
    pub size: usize,
    /// What was read or written, little-endian.
    pub value: u64,
}

/// A milestone and when it was reached, since exec.
#[derive(Debug, Clone)]
pub struct Mark {
    /// When.
    pub at: Duration,
    /// Which.
    pub milestone: Milestone,
}

/// What happened from a milestone to the next.
#[derive(Debug, Clone, Default)]
pub struct Phase {
    /// How often each place was accessed.
    pub exits: HashMap<(Reason, u64), u64>,
    /// The hypervisor's own counters of all vCPUs, at its end.
    pub counters: BTreeMap<String, u64>,
}

/// A vCPU, as its watcher knows it.
pub struct Seat {
    /// Makes it look up.
    pub kick: Kick,
    counters: Option<Box<dyn Counters>>,
    /// Its last exits, oldest first.
    pub last: VecDeque<ExitSeen>,
    /// It is to show what it does.
    wanted: bool,
    sight: Option<Result<Sight, String>>,
}

/// All that is known of the boot.
#[derive(Default)]
pub struct State {
    /// In the order in which they were reached.
    pub marks: Vec<Mark>,
    /// `phases[n]` begins at `marks[n]`.
    pub phases: Vec<Phase>,
    /// By the number of the vCPU.
    pub seats: Vec<Seat>,
    /// User space was reached.
    pub up: bool,
    /// The machine comes to its end.
    pub ended: bool,
    /// Where the report goes.
    pub outputs: Option<Outputs>,
    view: Option<Arc<View>>,
    places: usize,
}

/// Everything that is noted of a boot goes through here.
pub struct Recorder {
    exec: Instant,
    /// Nothing more is to be noted.
    over: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

impl Recorder {
    /// Of a boot that began this long ago.
    pub fn new(since_exec: Duration) -> Self {
        let now = Instant::now();
        let exec = now.checked_sub(since_exec).unwrap_or(now);
        let recorder = Self { exec, over: AtomicBool::new(false), state: Mutex::default(), changed: Condvar::new() };
        recorder.note(Duration::ZERO, Milestone::Exec);
        recorder
    }

    /// Time since exec.
    pub fn now(&self) -> Duration {
        self.exec.elapsed()
    }

    /// The moment that comes this long after exec.
    pub fn instant(&self, since_exec: Duration) -> Instant {
        // A time that the clock does not reach is a day from now.
        let never = || Instant::now() + Duration::from_secs(24 * 60 * 60);
        self.exec.checked_add(since_exec).unwrap_or_else(never)
    }

    /// The state, which must not be held across a call of a device or of the hypervisor's vCPUs.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something changes, or until `deadline`.
    pub fn wait<'a>(&self, state: MutexGuard<'a, State>, deadline: Option<Instant>) -> MutexGuard<'a, State> {
        match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
            None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            Some(left) => self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
        }
    }

    /// Whether there is nothing more to note.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// See [`super::Trace::mark`].
    pub fn mark(&self, milestone: Milestone) {
        if !self.is_over() {
            self.note(self.now(), milestone);
        }
    }

    fn note(&self, at: Duration, milestone: Milestone) {
        let mut state = self.lock();
        if state.marks.iter().any(|mark| mark.milestone == milestone) {
            return;
        }
        state.close_phase();
        if let Milestone::UserSpace(_) = milestone {
            state.up = true;
            self.over.store(true, Ordering::Relaxed);
            self.changed.notify_all();
        }
        state.marks.push(Mark { at, milestone });
        state.phases.push(Phase::default());
    }

    /// Notes that the machine comes to its end.
    pub fn end(&self) {
        let mut state = self.lock();
        if !state.up && !state.ended {
            state.close_phase();
        }
        state.ended = true;
        self.over.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// Looks at this machine from now on.
    pub fn look_at(&self, view: Arc<View>) {
        self.lock().view = Some(view);
    }

    /// The machine that is looked at.
    pub fn view(&self) -> Option<Arc<View>> {
        self.lock().view.clone()
    }

    /// Lets go of all that belongs to the machine.
    pub fn forget_machine(&self) {
        let mut state = self.lock();
        state.seats.clear();
        state.view = None;
    }

    /// Adds the next vCPU and returns its number.
    pub fn add_vcpu(&self, kick: Kick, counters: Option<Box<dyn Counters>>) -> usize {
        let mut state = self.lock();
        state.seats.push(Seat {
            kick,
            counters,
            last: VecDeque::with_capacity(LAST_EXITS),
            wanted: false,
            sight: None,
        });
        state.seats.len() - 1
    }

    /// Has vCPUs stop for a moment and show what they do; `None` for one that does not answer within `patience`.
    pub fn look(&self, which: &[usize], patience: Duration) -> Vec<Option<Result<Sight, String>>> {
        let mut state = self.lock();
        let mut kicks = Vec::with_capacity(which.len());
        for number in which {
            if let Some(seat) = state.seats.get_mut(*number) {
                (seat.wanted, seat.sight) = (true, None);
                kicks.push(seat.kick.clone());
            }
        }
        drop(state);
        kicks.iter().for_each(Kick::kick);
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        let waits = |state: &State| which.iter().any(|number| state.seats.get(*number).is_some_and(|seat| seat.wanted));
        while waits(&state) && !state.ended && Instant::now() < deadline {
            state = self.wait(state, Some(deadline));
        }
        let mut take = |number: &usize| {
            let seat = state.seats.get_mut(*number)?;
            seat.wanted = false;
            seat.sight.take()
        };
        which.iter().map(&mut take).collect()
    }

    /// Whether a vCPU is to show what it does.
    pub fn wants(&self, vcpu: usize) -> bool {
        self.lock().seats.get(vcpu).is_some_and(|seat| seat.wanted)
    }

    /// What a vCPU shows.
    pub fn show(&self, vcpu: usize, sight: Result<Sight, String>) {
        if let Some(seat) = self.lock().seats.get_mut(vcpu).filter(|seat| seat.wanted) {
            (seat.wanted, seat.sight) = (false, Some(sight));
        }
        self.changed.notify_all();
    }

    /// Gives the report its files.
    pub fn write_to(&self, outputs: Outputs) {
        self.lock().outputs = Some(outputs);
    }

    /// Counts an exit of a vCPU.
    pub fn exit(&self, vcpu: usize, exit: ExitSeen) {
        let mut state = self.lock();
        state.count(exit.reason, exit.reason.granule(exit.address));
        // The last exits are to tell what the guest does, not the monitor.
        if let Some(seat) = state.seats.get_mut(vcpu).filter(|_| exit.reason != Reason::Kick) {
            if seat.last.len() == LAST_EXITS {
                seat.last.pop_front();
            }
            seat.last.push_back(exit);
        }
    }
}

impl State {
    fn count(&mut self, reason: Reason, address: u64) {
        let full = self.places >= MOST_PLACES;
        let Some(phase) = self.phases.last_mut() else { return };
        let known = phase.exits.contains_key(&(reason, address));
        let address = if full && !known { OTHER_PLACES } else { address };
        self.places += usize::from(!known && !full);
        *phase.exits.entry((reason, address)).or_default() += 1;
    }

    /// Reads the hypervisor's counters for the phase that is under way.
    fn close_phase(&mut self) {
        let mut sums = BTreeMap::new();
        for counters in self.seats.iter().filter_map(|seat| seat.counters.as_ref()) {
            match counters.read() {
                Ok(counters) => {
                    for counter in counters {
                        *sums.entry(counter.name).or_default() += counter.value;
                    }
                }
                Err(error) => tracing::debug!("boot trace: {error}"),
            }
        }
        if let Some(phase) = self.phases.last_mut() {
            phase.counters = sums;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(reason: Reason, address: u64) -> ExitSeen {
        ExitSeen { at: Duration::ZERO, reason, address, size: 1, value: 0 }
    }

    #[test]
    fn a_milestone_is_noted_once_and_nothing_after_user_space() {
        let recorder = Recorder::new(Duration::from_millis(5));
        recorder.mark(Milestone::Pci);
        recorder.mark(Milestone::Pci);
        recorder.mark(Milestone::UserSpace(super::super::Word::Marker));
        recorder.mark(Milestone::DriverOk("disk0".into()));
        let state = recorder.lock();
        let names: Vec<_> = state.marks.iter().map(|mark| mark.milestone.name()).collect();
        assert_eq!(names, ["exec", "first-pci-access", "user-space"]);
        assert!(state.marks[1].at >= Duration::from_millis(5) && state.up);
        assert_eq!(state.phases.len(), 3);
    }

    #[test]
    fn exits_count_by_port_and_by_page_in_their_phase() {
        let recorder = Recorder::new(Duration::ZERO);
        recorder.exit(0, exit(Reason::PioWrite, 0x3f8));
        recorder.mark(Milestone::FirstEntry);
        for address in [0x1000, 0x1ffc, 0x2000] {
            recorder.exit(0, exit(Reason::MmioRead, address));
        }
        let state = recorder.lock();
        assert_eq!(state.phases[0].exits, HashMap::from([((Reason::PioWrite, 0x3f8), 1)]));
        let expected = HashMap::from([((Reason::MmioRead, 0x1000), 2), ((Reason::MmioRead, 0x2000), 1)]);
        assert_eq!(state.phases[1].exits, expected);
    }

    #[test]
    fn a_guest_that_accesses_everything_fills_no_memory() {
        let recorder = Recorder::new(Duration::ZERO);
        for page in 0..10_000 {
            recorder.exit(0, exit(Reason::MmioWrite, page << 12));
        }
        let state = recorder.lock();
        assert_eq!(state.phases[0].exits.len(), MOST_PLACES + 1);
        assert_eq!(state.phases[0].exits.values().sum::<u64>(), 10_000);
        assert_eq!(state.phases[0].exits[&(Reason::MmioWrite, OTHER_PLACES)], 10_000 - MOST_PLACES as u64);
    }
}
