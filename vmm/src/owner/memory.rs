//! Memory that is plugged and unplugged while the machine exists: the guest's driver is asked, and does it block by block.
//!
//! What is asked for stays so until something else is, over a reset of the guest, too: its next driver plugs as much. A job
//! waits until it is reached. It fails where the guest makes no progress for `memory.resize_timeout`, and tells how far it
//! came; a guest often cannot let go of all that it is asked to.

use std::time::{Duration, Instant};

use api::{ByteSize, EventKind, JobKind, JobState, Problem, ProblemDocument, Problems};

use super::Owner;
use super::phase::Phase;
use crate::board::Board;
use crate::request::{Answer, Refusal};

/// What the guest is asked for.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// Bytes that it is to have plugged.
    wanted: u64,
    waiting: Option<Waiting>,
}

/// A job that waits for it.
#[derive(Debug)]
struct Waiting {
    job: u64,
    /// Bytes that were plugged when it began.
    from: u64,
    /// Bytes that were plugged when it was last looked.
    seen: u64,
    deadline: Instant,
}

impl Waiting {
    /// How much of the way is done, in percent.
    fn progress(&self, now: u64, wanted: u64) -> u8 {
        let way = wanted.abs_diff(self.from).max(1);
        let left = wanted.abs_diff(now).min(way);
        u8::try_from((way - left).saturating_mul(100) / way).unwrap_or(100)
    }
}

impl Memory {
    /// Ends with the machine: nothing is plugged any more, and nobody will answer.
    pub(super) fn end_with_the_run(&mut self, board: &Board) {
        self.wanted = 0;
        if let Some(Waiting { job, .. }) = self.waiting.take() {
            let why = "the run of the VM ended before the guest had as much memory as it was asked to have";
            board.end_job(job, JobState::Failed, Some(ProblemDocument::new(409, "Conflict", why)));
        }
    }
}

impl Owner {
    /// When the guest has had its time. A machine that stands still has all of it.
    pub(super) fn memory_deadline(&self) -> Option<Instant> {
        let runs = matches!(self.phase, Phase::Running(_));
        self.memory.waiting.as_ref().map(|waiting| waiting.deadline).filter(|_| runs)
    }

    fn memory_patience(&self) -> Duration {
        let prepared = self.phase.prepared();
        prepared.map_or(Duration::ZERO, |prepared| prepared.config.memory.resize_timeout.duration())
    }

    /// Asks the guest of a machine to have this much memory.
    pub(super) fn resize_memory(&mut self, size: ByteSize) -> Result<Answer, Refusal> {
        let Some(live) = self.phase.live() else { return Ok(Answer::Done) };
        let wanted = wanted(&live.prepared.config.memory, size)?;
        let plugged = live.machine.plugged_memory();
        if let Some(waiting) = self.memory.waiting.as_ref().filter(|_| self.memory.wanted == wanted) {
            return Ok(Answer::Job(waiting.job));
        }
        live.machine.request_memory(wanted);
        // Who asked for something else before does not get it any more.
        self.end_memory_job(JobState::Cancelled, None);
        self.memory.wanted = wanted;
        if plugged == wanted {
            self.show_machine();
            return Ok(Answer::Done);
        }
        let job = self.board.start_job(JobKind::ResizeMemory, None);
        let deadline = Instant::now() + self.memory_patience();
        self.memory.waiting = Some(Waiting { job, from: plugged, seen: plugged, deadline });
        self.show_machine();
        // The guest may have been quicker than this.
        self.memory_plugged();
        Ok(Answer::Job(job))
    }

    /// What the guest is asked to have, beside what it booted with.
    pub(super) fn wanted_memory(&self) -> u64 {
        self.memory.wanted
    }

    /// The guest has plugged or unplugged something.
    pub(super) fn memory_plugged(&mut self) {
        let patience = self.memory_patience();
        let wanted = self.memory.wanted;
        let Some(live) = self.phase.live() else { return };
        let plugged = live.machine.plugged_memory();
        let present = live.prepared.config.memory.size.bytes().saturating_add(plugged);
        let news = self.board.present().1 != present;
        self.show_machine();
        if let Some(waiting) = self.memory.waiting.as_mut().filter(|waiting| waiting.seen != plugged) {
            (waiting.seen, waiting.deadline) = (plugged, Instant::now() + patience);
            self.board.advance_job(waiting.job, waiting.progress(plugged, wanted));
        }
        if plugged == wanted {
            if news {
                self.board.publish(EventKind::MemoryResized { present });
            }
            self.end_memory_job(JobState::Succeeded, None);
        }
    }

    /// Ends what the guest has not done in time.
    pub(super) fn mind_memory(&mut self) {
        if self.memory_deadline().is_none_or(|deadline| deadline > Instant::now()) {
            return;
        }
        // A report may have been lost.
        self.memory_plugged();
        if self.memory_deadline().is_none_or(|deadline| deadline > Instant::now()) {
            return;
        }
        let base = self.phase.prepared().map_or(0, |prepared| prepared.config.memory.size.bytes());
        let (present, wanted) = (ByteSize::new(self.board.present().1), ByteSize::new(base + self.memory.wanted));
        let why = format!(
            "the guest has {present} of memory and not {wanted}, and made no progress for {:?}; it is still asked",
            self.memory_patience()
        );
        tracing::warn!("{why}");
        self.end_memory_job(JobState::Failed, Some(ProblemDocument::new(504, "Gateway Timeout", why)));
    }

    fn end_memory_job(&mut self, how: JobState, error: Option<ProblemDocument>) {
        if let Some(waiting) = self.memory.waiting.take() {
            self.board.end_job(waiting.job, how, error);
        }
    }

    /// Cancels a job, where it is this one: the guest keeps what it has. False where it is not.
    pub(super) fn cancel_memory(&mut self, job: u64) -> bool {
        if self.memory.waiting.as_ref().is_none_or(|waiting| waiting.job != job) {
            return false;
        }
        if let Some(live) = self.phase.live() {
            let plugged = live.machine.plugged_memory();
            live.machine.request_memory(plugged);
            self.memory.wanted = plugged;
        }
        self.end_memory_job(JobState::Cancelled, None);
        self.show_machine();
        true
    }

    /// A machine that is made anew has nothing plugged, and its guest is asked for as much as the last one was.
    pub(super) fn memory_after_reset(&mut self) {
        let wanted = self.memory.wanted;
        let Some(live) = self.phase.live() else { return };
        live.machine.request_memory(wanted);
        if let Some(waiting) = &mut self.memory.waiting {
            (waiting.from, waiting.seen) = (0, 0);
        }
        self.memory_resumed();
        self.memory_plugged();
    }

    /// A guest that runs on has all its time again.
    pub(super) fn memory_resumed(&mut self) {
        let deadline = Instant::now() + self.memory_patience();
        if let Some(waiting) = &mut self.memory.waiting {
            waiting.deadline = deadline;
        }
    }
}

/// Bytes to be plugged for a size of memory.
fn wanted(memory: &api::Memory, size: ByteSize) -> Result<u64, Refusal> {
    let Some(max) = memory.max.filter(|max| *max > memory.size) else {
        return Err(Refusal::Conflict(
            "the size of memory cannot be changed while the VM runs: create it with more to come (memory.max, \
             --memory SIZE,max=SIZE)"
                .into(),
        ));
    };
    let problem =
        |problem: String, remedy: String| Err(Refusal::Problems(Problems(vec![Problem::new("size", problem, remedy)])));
    let (least, block) = (memory.size, memory.block());
    if size < least || size > max {
        return problem(
            format!("this guest cannot have {size} while it runs"),
            format!("{least} to {max} are possible"),
        );
    }
    let wanted = size.bytes() - least.bytes();
    if !wanted.is_multiple_of(block) {
        let near = ByteSize::new(size.bytes() - wanted % block);
        let what =
            format!("{size} are not the {least} that it booted with, and a multiple of {}", ByteSize::new(block));
        return problem(what, format!("{near} would be"));
    }
    Ok(wanted)
}
