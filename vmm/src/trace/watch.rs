//! The thread that waits for a boot's end, writes what is known of it, and ends the run where it takes too long.

use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use api::BootUntil;

use super::diagnosis::Findings;
use super::recorder::Recorder;
use super::report::Report;
use super::sight::Sight;
use super::symbols::Symbols;
use super::{Milestone, View, Word};
use crate::inbox::{Event, Inbox};
use crate::sandbox;

/// How often user mode is looked for, and on how many vCPUs each time.
const LOOK_EVERY: Duration = Duration::from_millis(250);
const LOOK_AT: usize = 8;
/// How long a vCPU may take to answer.
const ANSWER: Duration = Duration::from_secs(1);
/// The time between two looks at a guest that does not come up.
const MOMENT: Duration = Duration::from_millis(100);

/// How long a boot may take, and who is told where it takes longer.
pub struct Limit {
    /// From exec, or the reset.
    pub timeout: Duration,
    /// What tells of user space.
    pub until: BootUntil,
    /// Who is told.
    pub inbox: Inbox,
}

/// A machine under observation. Dropping it ends the observation: what is known is written, and nothing of the machine
/// is kept. The machine's vCPU threads must have ended before.
pub struct Attached {
    recorder: Arc<Recorder>,
    thread: Option<JoinHandle<()>>,
}

impl Attached {
    pub(super) fn start(recorder: Arc<Recorder>, view: View, limit: Option<Limit>) -> io::Result<Self> {
        let view = Arc::new(view);
        recorder.look_at(view.clone());
        let watcher = Watcher { recorder: recorder.clone(), view, limit, next_vcpu: 0, diagnosis: Vec::new() };
        let thread = Builder::new().name("boot-watch".into()).spawn(move || {
            sandbox::enter(sandbox::Thread::Watch);
            watcher.watch();
        })?;
        Ok(Self { recorder, thread: Some(thread) })
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.recorder.end();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that watches the boot panicked");
        }
        self.recorder.forget_machine();
    }
}

struct Watcher {
    recorder: Arc<Recorder>,
    view: Arc<View>,
    limit: Option<Limit>,
    /// The next vCPU to be looked at.
    next_vcpu: usize,
    diagnosis: Vec<String>,
}

impl Watcher {
    fn watch(mut self) {
        let deadline = self.limit.as_ref().map(|limit| self.recorder.instant(limit.timeout));
        let looks = self.limit.as_ref().is_some_and(|limit| limit.until == BootUntil::UserMode);
        loop {
            let next_look = Instant::now() + LOOK_EVERY;
            let wake = if looks { deadline.map(|deadline| deadline.min(next_look)) } else { deadline };
            if self.wait_for_end(wake) {
                break;
            }
            if looks && self.sees_user_mode() {
                self.recorder.mark(Milestone::UserSpace(Word::UserMode));
            } else if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                self.give_up();
                break;
            }
        }
        self.write();
    }

    /// Waits until the boot or the machine is at its end, or else until `wake`: false then.
    fn wait_for_end(&self, wake: Option<Instant>) -> bool {
        let mut state = self.recorder.lock();
        loop {
            if state.up || state.ended {
                return true;
            }
            if wake.is_some_and(|wake| Instant::now() >= wake) {
                return false;
            }
            state = self.recorder.wait(state, wake);
        }
    }

    fn sees_user_mode(&mut self) -> bool {
        let count = self.recorder.lock().seats.len();
        let which: Vec<usize> = (0..count.min(LOOK_AT)).map(|step| (self.next_vcpu + step) % count).collect();
        self.next_vcpu += which.len();
        let sights = self.recorder.look(&which, ANSWER);
        sights.into_iter().flatten().flatten().any(|sight| sight.user_mode)
    }

    /// Finds out what holds the guest up, says it, and has the run ended.
    fn give_up(&mut self) {
        let count = self.recorder.lock().seats.len();
        let which: Vec<usize> = (0..count).collect();
        let before = self.recorder.look(&which, ANSWER);
        // A guest that ends by itself now is not looked at again, which does no harm.
        self.wait_for_end(Some(Instant::now() + MOMENT));
        let now = self.recorder.look(&which, ANSWER);
        let sights: Vec<[Option<Result<Sight, String>>; 2]> = before.into_iter().zip(now).map(<[_; 2]>::from).collect();
        let state = self.recorder.lock();
        let (marks, time) = (state.marks.clone(), self.recorder.now());
        let exits: Vec<_> = state.seats.iter().map(|seat| seat.last.iter().copied().collect()).collect();
        drop(state);
        let findings = Findings { view: &self.view, marks: &marks, now: time, sights: &sights, exits: &exits };
        let symbols = Symbols::find(&self.view.memory, self.view.system_map.as_ref(), self.view.slide);
        self.diagnosis = findings.lines(&symbols);
        for line in &self.diagnosis {
            tracing::error!("boot: {line}");
        }
        if let Some(limit) = &self.limit {
            limit.inbox.post(Event::BootTimeout(findings.summary()));
        }
    }

    /// Writes the report, where one is wanted.
    fn write(&self) {
        let mut state = self.recorder.lock();
        let Some(outputs) = state.outputs.take() else { return };
        let (marks, phases, vcpus) = (state.marks.clone(), state.phases.clone(), state.seats.len());
        drop(state);
        let mut report = Report::new(&self.view, &marks, &phases, vcpus, self.recorder.now());
        report.diagnosis.clone_from(&self.diagnosis);
        if let Err(error) = outputs.write(&report) {
            tracing::error!("boot trace: {error}");
        }
    }
}
