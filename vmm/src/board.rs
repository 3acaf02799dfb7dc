//! What everybody may know of the VM: its state, the events that led there, its jobs and its counters.
//!
//! Only the owner thread and devices write here; readers never wait for the owner. State and events are under one lock, so
//! that a state says exactly which events it includes.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::{SystemTime, UNIX_EPOCH};

use api::{Event, EventKind, Job, JobKind, JobState, PhaseName, ProblemDocument, Reason, VmInfo};
use hyper::body::Bytes;

use crate::machine::MachineCounters;

/// How many jobs that have ended are remembered.
const KEPT_JOBS: usize = 32;

/// The state of the VM, as readers see it.
pub struct Board(Mutex<State>);

struct State {
    info: VmInfo,
    /// The same as JSON, once somebody has asked for it: many look at a VM, and few change it.
    text: Option<Bytes>,
    /// Changes with the configuration.
    generation: u64,
    events: VecDeque<Arc<Event>>,
    /// How many events are kept.
    keep: usize,
    readers: Vec<Waker>,
    closed: bool,
    jobs: VecDeque<Job>,
    last_job: u64,
    counters: Option<Arc<MachineCounters>>,
    /// Vcpus and bytes of memory that the machine has.
    present: (u32, u64),
    /// Bytes of memory that the guest is asked to have.
    wanted_memory: u64,
}

impl Board {
    /// The board of no VM, which keeps this many events for readers who come later.
    pub fn new(keep: usize) -> Self {
        let info = VmInfo {
            sequence: 0,
            phase: PhaseName::Empty,
            reason: Reason::Start,
            since_ms: now_ms(),
            outcome: None,
            config: None,
            running: None,
            mrtd: None,
        };
        Self(Mutex::new(State {
            info,
            text: None,
            generation: 0,
            events: VecDeque::new(),
            keep,
            readers: Vec::new(),
            closed: false,
            jobs: VecDeque::new(),
            last_job: 0,
            counters: None,
            present: (0, 0),
            wanted_memory: 0,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VM, and its configuration's generation.
    pub fn info(&self) -> (VmInfo, u64) {
        let state = self.lock();
        (state.info.clone(), state.generation)
    }

    /// The VM as JSON, and its configuration's generation.
    ///
    /// # Errors
    /// It cannot be written as such.
    pub fn info_json(&self) -> serde_json::Result<(Bytes, u64)> {
        let mut state = self.lock();
        let text = match state.text.take() {
            Some(text) => text,
            None => serde_json::to_vec(&state.info)?.into(),
        };
        state.text = Some(text.clone());
        Ok((text, state.generation))
    }

    /// vCPUs and bytes of memory that a machine has now.
    pub fn present(&self) -> (u32, u64) {
        self.lock().present
    }

    /// Bytes of memory that the guest is asked to have.
    pub fn wanted_memory(&self) -> u64 {
        self.lock().wanted_memory
    }

    /// Sets the bytes of memory that the guest is asked to have.
    pub fn want_memory(&self, bytes: u64) {
        self.lock().wanted_memory = bytes;
    }

    /// The counters of the machine, where there is one.
    pub fn counters(&self) -> Option<Arc<MachineCounters>> {
        self.lock().counters.clone()
    }

    /// Sets what the machine has: its counters, vCPUs and bytes of memory.
    pub fn set_machine(&self, counters: Option<Arc<MachineCounters>>, present: (u32, u64)) {
        let mut state = self.lock();
        state.counters = counters;
        state.present = present;
    }

    /// The configuration's generation.
    pub fn generation(&self) -> u64 {
        self.lock().generation
    }

    /// Tells of an event.
    pub fn publish(&self, event: EventKind) {
        self.lock().publish(event);
    }

    /// Enters a phase.
    pub fn enter(&self, phase: PhaseName, reason: Reason, change: impl FnOnce(&mut VmInfo)) {
        let mut state = self.lock();
        let before = (state.info.config.is_some(), state.info.running.is_some());
        change(&mut state.info);
        state.info.phase = phase;
        state.info.reason = reason;
        state.info.since_ms = now_ms();
        if before != (state.info.config.is_some(), state.info.running.is_some()) || phase == PhaseName::Ready {
            state.generation += 1;
        }
        let outcome = state.info.outcome.clone();
        state.publish(EventKind::Phase { phase, reason, outcome });
    }

    /// Changes the configuration, and tells of it.
    pub fn reconfigure(&self, event: EventKind, change: impl FnOnce(&mut VmInfo)) {
        let mut state = self.lock();
        change(&mut state.info);
        state.generation += 1;
        state.publish(event);
    }

    /// The event after number `after`, or a gap where that one is not kept any more. Where there is none yet, `waker` is
    /// woken by the next; where there will be none, the answer is `None`.
    pub fn poll_event(&self, after: u64, waker: &Waker) -> Poll<Option<Arc<Event>>> {
        let mut state = self.lock();
        match state.event_after(after) {
            Some(event) => Poll::Ready(Some(event)),
            None if state.closed => Poll::Ready(None),
            None => {
                if !state.readers.iter().any(|reader| reader.will_wake(waker)) {
                    state.readers.push(waker.clone());
                }
                Poll::Pending
            }
        }
    }

    /// Wakes a reader that is gone no more.
    pub fn forget(&self, waker: &Waker) {
        self.lock().readers.retain(|reader| !reader.will_wake(waker));
    }

    /// No more events come.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.wake_readers();
    }

    /// The number of the last event.
    pub fn sequence(&self) -> u64 {
        self.lock().info.sequence
    }

    /// All jobs that are remembered, the oldest first.
    pub fn jobs(&self) -> Vec<Job> {
        self.lock().jobs.iter().cloned().collect()
    }

    /// A job.
    pub fn job(&self, id: u64) -> Option<Job> {
        self.lock().jobs.iter().find(|job| job.id == id).cloned()
    }

    /// A job begins, for this device where it is about one. Its number is returned.
    pub fn start_job(&self, kind: JobKind, device: Option<&str>) -> u64 {
        let mut state = self.lock();
        state.last_job += 1;
        let id = state.last_job;
        let started_ms = now_ms();
        let job = Job {
            id,
            kind,
            device: device.map(str::to_owned),
            state: JobState::Running,
            progress: None,
            started_ms,
            ended_ms: None,
            error: None,
        };
        let ended = |job: &Job| job.state != JobState::Running;
        if state.jobs.iter().filter(|job| ended(job)).count() >= KEPT_JOBS
            && let Some(oldest) = state.jobs.iter().position(ended)
        {
            state.jobs.remove(oldest);
        }
        state.jobs.push_back(job.clone());
        state.publish(EventKind::Job { job });
        id
    }

    /// A job has come so far, in percent. That is told where it is news.
    pub fn advance_job(&self, id: u64, progress: u8) {
        let mut state = self.lock();
        let news = |job: &&mut Job| job.id == id && job.progress != Some(progress);
        let Some(job) = state.jobs.iter_mut().find(news) else { return };
        job.progress = Some(progress);
        let job = job.clone();
        state.publish(EventKind::Job { job });
    }

    /// A job ends.
    pub fn end_job(&self, id: u64, how: JobState, error: Option<ProblemDocument>) {
        let mut state = self.lock();
        let Some(job) = state.jobs.iter_mut().find(|job| job.id == id) else { return };
        job.state = how;
        job.ended_ms = Some(now_ms());
        job.error = error;
        job.progress = job.progress.map(|progress| if how == JobState::Succeeded { 100 } else { progress });
        let job = job.clone();
        state.publish(EventKind::Job { job });
    }
}

impl State {
    fn publish(&mut self, event: EventKind) {
        self.info.sequence += 1;
        self.text = None;
        if self.keep == 0 {
            return;
        }
        if self.events.len() >= self.keep {
            self.events.pop_front();
        }
        self.events.push_back(Arc::new(Event { sequence: self.info.sequence, time_ms: now_ms(), event }));
        self.wake_readers();
    }

    fn wake_readers(&mut self) {
        for reader in self.readers.drain(..) {
            reader.wake();
        }
    }

    fn event_after(&self, after: u64) -> Option<Arc<Event>> {
        let last = self.info.sequence;
        if after == last {
            return None;
        }
        let oldest = self.events.front().map_or(last + 1, |event| event.sequence);
        // A number beyond the last one is of another process, whose events are unknown here.
        if after > last || after + 1 < oldest {
            let lost = if after > last { last } else { oldest - 1 };
            let first = if after > last { 1 } else { after + 1 };
            let event = EventKind::Gap { first, last: lost };
            return Some(Arc::new(Event { sequence: lost, time_ms: now_ms(), event }));
        }
        let index = usize::try_from(after + 1 - oldest).ok()?;
        self.events.get(index).cloned()
    }
}

/// Milliseconds since 1970.
fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn next(board: &Board, after: u64) -> Option<Arc<Event>> {
        match board.poll_event(after, Waker::noop()) {
            Poll::Ready(event) => event,
            Poll::Pending => None,
        }
    }

    #[test]
    fn a_late_reader_is_told_once_what_it_lost() {
        let board = Board::new(3);
        for number in 0..5 {
            board.publish(EventKind::DeviceAdded { id: number.to_string() });
        }
        let gap = next(&board, 0).unwrap();
        assert_eq!((gap.sequence, &gap.event), (2, &EventKind::Gap { first: 1, last: 2 }));
        let rest: Vec<u64> = (2..5).map(|after| next(&board, after).unwrap().sequence).collect();
        assert_eq!(rest, [3, 4, 5]);
        assert!(next(&board, 5).is_none());
        let stranger = next(&board, 77).unwrap();
        assert_eq!((stranger.sequence, &stranger.event), (5, &EventKind::Gap { first: 1, last: 5 }));
    }

    #[test]
    fn a_waiting_reader_is_woken_by_the_next_event() {
        struct Counter(AtomicUsize);
        impl std::task::Wake for Counter {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let board = Board::new(8);
        let counter = Arc::new(Counter(AtomicUsize::new(0)));
        let waker = Waker::from(counter.clone());
        assert!(board.poll_event(0, &waker).is_pending() && board.poll_event(0, &waker).is_pending());
        board.publish(EventKind::PowerButton { reason: Reason::Request });
        board.publish(EventKind::PowerButton { reason: Reason::Request });
        assert_eq!(counter.0.load(Ordering::Relaxed), 1, "once for each time that it waits");
        assert!(board.poll_event(2, &waker).is_pending());
        board.forget(&waker);
        board.publish(EventKind::PowerButton { reason: Reason::Request });
        assert_eq!(counter.0.load(Ordering::Relaxed), 1, "it has gone");
    }

    /// A reader that begins at a state's number, at any moment, sees each later event once and reaches the same state.
    #[test]
    fn state_and_events_join_without_a_gap() {
        const CHANGES: u64 = 1000;
        let board = Arc::new(Board::new(2 * usize::try_from(CHANGES).unwrap()));
        let writers: Vec<_> = (0..4)
            .map(|_| {
                let board = board.clone();
                std::thread::spawn(move || {
                    for number in 0..CHANGES / 4 {
                        let phase = if number % 2 == 0 { PhaseName::Running } else { PhaseName::Paused };
                        board.enter(phase, Reason::Request, |info| info.outcome = None);
                    }
                })
            })
            .collect();
        let readers: Vec<_> = (0..4)
            .map(|_| {
                let board = board.clone();
                std::thread::spawn(move || {
                    let (info, _) = board.info();
                    let (mut at, mut phase) = (info.sequence, info.phase);
                    while at < CHANGES {
                        let Some(event) = next(&board, at) else { continue };
                        assert_eq!(event.sequence, at + 1, "an event is missing or comes twice");
                        at = event.sequence;
                        if let EventKind::Phase { phase: entered, .. } = &event.event {
                            phase = *entered;
                        }
                    }
                    phase
                })
            })
            .collect();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        let (info, _) = board.info();
        assert_eq!(info.sequence, CHANGES);
        for reader in readers {
            assert_eq!(reader.join().unwrap(), info.phase);
        }
    }

    #[test]
    fn the_text_is_that_of_the_state() {
        let board = Board::new(8);
        let check = || {
            let (text, generation) = board.info_json().unwrap();
            let (info, same) = board.info();
            assert_eq!((serde_json::from_slice::<VmInfo>(&text).unwrap(), generation), (info, same));
        };
        check();
        board.enter(PhaseName::Ready, Reason::Request, |info| info.config = Some(api::VmConfig::new("k")));
        check();
        check();
        board.reconfigure(EventKind::DeviceAdded { id: "a".into() }, |info| info.running = info.config.clone());
        check();
        board.publish(EventKind::PowerButton { reason: Reason::Request });
        check();
    }

    #[test]
    fn jobs_that_ended_are_remembered_but_not_for_ever() {
        let board = Board::new(0);
        let running = board.start_job(JobKind::Shutdown, None);
        for _ in 0..100 {
            let id = board.start_job(JobKind::Shutdown, None);
            board.end_job(id, JobState::Cancelled, None);
        }
        assert_eq!(board.jobs().len(), KEPT_JOBS + 1);
        assert_eq!(board.job(running).unwrap().state, JobState::Running);
        assert_eq!(board.job(101).unwrap().state, JobState::Cancelled);
        assert!(board.job(2).is_none() && board.job(102).is_none());
    }
}
