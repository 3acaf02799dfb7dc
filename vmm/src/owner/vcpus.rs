//! vCPUs that come and go while the machine exists: the guest is told, and its answer is awaited.
//!
//! A vCPU that comes is taken when the guest says so (`_OST`, ACPI 6.5 §6.3.5), one that goes is gone when it ejects it
//! (`_EJ0`). A change is one job for all its vCPUs. Until it ends, the configuration says how many are wanted; from then
//! on, how many there are: what the guest refuses, or does not do in time, is not wanted any more. A guest may let go of a
//! vCPU unasked. It starts from the wanted number when it is reset.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use api::{Cpus, EventKind, JobKind, JobState, Problem, ProblemDocument, Problems};

use super::phase::{Phase, Prepared};
use super::{Owner, change};
use crate::request::{Answer, Refusal};

/// `_OST`: all is well.
const SUCCESS: u16 = 0;
/// `_OST`: the guest is at work on a vCPU that comes; on one that goes.
const INSERTING: u16 = 0x80;
const EJECTING: u16 = 0x84;

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Add,
    Remove,
}

/// A change of the number of vCPUs, until the guest has answered.
#[derive(Debug)]
struct Resize {
    wish: Wish,
    job: u64,
    /// Those that the guest has not answered for, and how many there were at first.
    waiting: BTreeSet<u8>,
    all: usize,
    /// Those that it has refused, and with which status it did last.
    refused: usize,
    status: u16,
    deadline: Instant,
}

/// The vCPUs of the machine.
#[derive(Debug, Default)]
pub(super) struct Vcpus {
    /// Those that the guest has, by their numbers.
    taken: BTreeSet<u8>,
    resize: Option<Resize>,
}

/// Why a change ends before the guest has answered for all.
enum Early {
    TimedOut,
    Cancelled,
}

impl Vcpus {
    /// How many the guest has.
    pub(super) fn present(&self) -> u32 {
        u32::try_from(self.taken.len()).unwrap_or(u32::MAX)
    }

    /// A guest boots with this many.
    pub(super) fn boot(&mut self, count: u32) {
        self.taken = (0..u8::try_from(count).unwrap_or(u8::MAX)).collect();
    }

    /// The job that is at work.
    fn job(&self) -> Option<u64> {
        self.resize.as_ref().map(|resize| resize.job)
    }
}

/// What is wrong with a number of vCPUs in a request, where its VM says how many there may be.
pub(super) fn check_count(cpus: &Cpus, count: u32) -> Result<(), Refusal> {
    match cpus.max {
        Some(max) if count > max => {
            let problem = format!("{count} vCPUs are more than there may be in this VM");
            let remedy = format!("1 to {max} are possible; cpus.max says how many");
            Err(Refusal::Problems(Problems(vec![Problem::new("count", problem, remedy)])))
        }
        _ if count == 0 => {
            let problem = Problem::new("count", "a VM without vCPUs cannot run", "at least 1 is needed");
            Err(Refusal::Problems(Problems(vec![problem])))
        }
        _ => Ok(()),
    }
}

impl Owner {
    /// When the guest has had its time. A machine that stands still has all of it.
    pub(super) fn vcpus_deadline(&self) -> Option<Instant> {
        let runs = matches!(self.phase, Phase::Running(_));
        self.vcpus.resize.as_ref().map(|resize| resize.deadline).filter(|_| runs)
    }

    fn vcpus_patience(&self) -> Duration {
        let prepared = self.phase.prepared();
        prepared.map_or(Duration::ZERO, |prepared| prepared.config.pci.hotplug_timeout.duration())
    }

    /// Changes the number of vCPUs of a machine, or says what became of the same request before.
    pub(super) fn resize_vcpus(&mut self, count: u32) -> Result<Answer, Refusal> {
        let Some(prepared) = self.phase.prepared() else { return Ok(Answer::Done) };
        let cpus = &prepared.config.cpus;
        check_count(cpus, count)?;
        if cpus.count == count {
            return Ok(self.vcpus.job().map_or(Answer::Done, Answer::Job));
        }
        if let Some(job) = self.vcpus.job() {
            let what = format!("job {job} is at work on the vCPUs: wait for it, or cancel it");
            return Err(Refusal::Conflict(what));
        }
        if cpus.max.is_none() {
            return Err(Refusal::Conflict(
                "the number of vCPUs cannot be changed while the VM runs: create it with how many there may be \
                 (cpus.max, --cpus 1,max=8)"
                    .into(),
            ));
        }
        let (wish, chosen) = self.choose_vcpus(count, cpus.most());
        if wish == Wish::Add {
            self.add_vcpus(&chosen)?;
        }
        self.want_vcpus(count);
        if wish == Wish::Remove {
            chosen.iter().for_each(|number| self.ask_for_vcpu(*number));
        }
        let job = self.board.start_job(JobKind::ChangeVcpus, None);
        let deadline = Instant::now() + self.vcpus_patience();
        let all = chosen.len();
        self.vcpus.resize = Some(Resize { wish, job, waiting: chosen, all, refused: 0, status: SUCCESS, deadline });
        self.show_processors();
        Ok(Answer::Job(job))
    }

    /// The lowest numbers come, and the highest go.
    fn choose_vcpus(&self, count: u32, most: u32) -> (Wish, BTreeSet<u8>) {
        let (present, taken) = (self.vcpus.present(), &self.vcpus.taken);
        let how_many = |more: u32| usize::try_from(more).unwrap_or(usize::MAX);
        if count > present {
            let free = (0..u8::try_from(most).unwrap_or(u8::MAX)).filter(|number| !taken.contains(number));
            (Wish::Add, free.take(how_many(count - present)).collect())
        } else {
            (Wish::Remove, taken.iter().rev().copied().take(how_many(present - count)).collect())
        }
    }

    /// Makes vCPUs for the guest, all of them or none.
    fn add_vcpus(&mut self, chosen: &BTreeSet<u8>) -> Result<(), Refusal> {
        let Some(live) = self.phase.live() else { return Ok(()) };
        let mut made = Vec::new();
        for number in chosen {
            if let Err(failure) = live.machine.add_vcpu(*number) {
                // The guest has not been told to look yet.
                made.into_iter().for_each(|number| live.machine.take_vcpu(number));
                return Err(failure.into());
            }
            made.push(*number);
        }
        Ok(())
    }

    fn ask_for_vcpu(&mut self, number: u8) {
        if let Some(live) = self.phase.live() {
            live.machine.ask_for_vcpu(number);
        }
    }

    fn show_processors(&mut self) {
        if let Some(live) = self.phase.live() {
            live.machine.show_processors();
        }
        self.show_machine();
    }

    /// So many are wanted from now on.
    fn want_vcpus(&mut self, count: u32) {
        let Some(live) = self.phase.live() else { return };
        let prepared = &mut live.prepared;
        if prepared.config.cpus.count != count {
            (prepared.config.cpus.count, prepared.given.cpus.count) = (count, count);
            self.show_config_changed();
        }
    }

    fn show_config_changed(&self) {
        if let Some(prepared) = self.phase.prepared() {
            let (given, config) = change::shown(prepared, |id| !self.hotplug.comes(id));
            let change = |info: &mut api::VmInfo| (info.config, info.running) = (Some(given), Some(config));
            self.board.reconfigure(EventKind::ConfigChanged {}, change);
        }
    }

    /// The guest has answered for a vCPU.
    pub(super) fn vcpu_answered(&mut self, number: u8, insertion: bool, status: u16) {
        let deadline = Instant::now() + self.vcpus_patience();
        let wish = if insertion { Wish::Add } else { Wish::Remove };
        let resize =
            self.vcpus.resize.as_mut().filter(|resize| resize.wish == wish && resize.waiting.contains(&number));
        let Some(resize) = resize else { return self.vcpu_answered_late(number, wish, status) };
        match (wish, status) {
            // It says more when it is done, or lets go of it. That it is busy gives it no more time: it could say so for ever.
            (Wish::Add, INSERTING) | (Wish::Remove, EJECTING | SUCCESS) => {}
            (Wish::Add, SUCCESS) => {
                resize.deadline = deadline;
                self.vcpus.taken.insert(number);
                self.show_vcpus();
                self.vcpu_done(number);
            }
            _ => {
                resize.deadline = deadline;
                (resize.refused, resize.status) = (resize.refused + 1, status);
                if wish == Wish::Add {
                    self.take_vcpu(number);
                }
                self.vcpu_done(number);
            }
        }
    }

    /// A guest that does not let go of a vCPU that it took too late has it.
    fn vcpu_answered_late(&mut self, number: u8, wish: Wish, status: u16) {
        let keeps = wish == Wish::Remove && !matches!(status, EJECTING | SUCCESS);
        let there = self.phase.live().is_some_and(|live| live.machine.has_vcpu(number));
        if keeps && there && self.vcpus.taken.insert(number) {
            self.show_unasked();
        }
    }

    /// The guest has let go of a vCPU, asked or not.
    pub(super) fn vcpu_ejected(&mut self, number: u8) {
        self.take_vcpu(number);
        let deadline = Instant::now() + self.vcpus_patience();
        let was_taken = self.vcpus.taken.remove(&number);
        let resize = self.vcpus.resize.as_mut().filter(|resize| resize.waiting.contains(&number));
        if let Some(resize) = resize {
            resize.deadline = deadline;
            resize.refused += usize::from(resize.wish == Wish::Add);
            if was_taken {
                self.show_vcpus();
            }
            self.vcpu_done(number);
        } else if was_taken {
            self.show_unasked();
        }
    }

    fn take_vcpu(&mut self, number: u8) {
        if let Some(live) = self.phase.live() {
            live.machine.take_vcpu(number);
        }
        self.show_machine();
    }

    fn show_vcpus(&mut self) {
        self.show_machine();
        self.board.publish(EventKind::VcpusChanged { present: self.vcpus.present() });
    }

    /// The guest has another number of vCPUs than it was asked to have. A job sets right what is wanted at its end.
    fn show_unasked(&mut self) {
        self.show_vcpus();
        if self.vcpus.resize.is_none() {
            self.want_vcpus(self.vcpus.present());
        }
    }

    /// Nothing more is to be said of this one. The last one ends the job.
    fn vcpu_done(&mut self, number: u8) {
        let Some(resize) = &mut self.vcpus.resize else { return };
        resize.waiting.remove(&number);
        let (job, left, all) = (resize.job, resize.waiting.len(), resize.all);
        if left > 0 {
            let percent = (all - left) * 100 / all.max(1);
            self.board.advance_job(job, u8::try_from(percent).unwrap_or(100));
            return;
        }
        let (wish, refused, status) = (resize.wish, resize.refused, resize.status);
        if refused == 0 {
            return self.end_resize(JobState::Succeeded, None);
        }
        let what = if wish == Wish::Add { "did not take" } else { "keeps" };
        let why = format!("the guest {what} {refused} of {all} vCPUs (its status is {status:#x})");
        self.end_resize(JobState::Failed, Some((409, "Conflict", why)));
    }

    /// Ends the job. From now on as many are wanted as there are.
    fn end_resize(&mut self, how: JobState, error: Option<(u16, &'static str, String)>) {
        let Some(resize) = self.vcpus.resize.take() else { return };
        let present = self.vcpus.present();
        let wanted = self.phase.prepared().map_or(present, |prepared| prepared.config.cpus.count);
        self.want_vcpus(present);
        let error = error.map(|(status, title, why)| {
            let why = format!("{why}: it has {present}, and {wanted} were wanted");
            tracing::warn!("{why}");
            ProblemDocument::new(status, title, why)
        });
        self.board.end_job(resize.job, how, error);
    }

    /// Ends what the guest has not answered in time.
    pub(super) fn mind_vcpus(&mut self) {
        if self.vcpus_deadline().is_some_and(|deadline| deadline <= Instant::now()) {
            self.give_up_on_vcpus(Early::TimedOut);
        }
    }

    /// Cancels a job, where it is this one. False where it is not.
    pub(super) fn cancel_resize(&mut self, job: u64) -> bool {
        let is = self.vcpus.job() == Some(job);
        if is {
            self.give_up_on_vcpus(Early::Cancelled);
        }
        is
    }

    /// Takes back what the guest has not answered. Where it may be at work on it already, a vCPU that comes is asked back
    /// from it, and it may still let go of one that was to go.
    fn give_up_on_vcpus(&mut self, why: Early) {
        let patience = self.vcpus_patience();
        let Some(resize) = &self.vcpus.resize else { return };
        let (wish, waiting, all) = (resize.wish, resize.waiting.clone(), resize.all);
        if let Some(live) = self.phase.live() {
            for number in &waiting {
                match (live.machine.take_vcpu_question_back(*number), wish) {
                    (true, Wish::Add) => live.machine.take_vcpu(*number),
                    (false, Wish::Add) => live.machine.ask_for_vcpu(*number),
                    (_, Wish::Remove) => {}
                }
            }
        }
        self.show_processors();
        match why {
            Early::Cancelled => self.end_resize(JobState::Cancelled, None),
            Early::TimedOut => {
                let left = waiting.len();
                let why = format!("the guest has not answered within {patience:?} for {left} of {all} vCPUs");
                self.end_resize(JobState::Failed, Some((504, "Gateway Timeout", why)));
            }
        }
    }

    /// A guest that runs on has all its time again.
    pub(super) fn vcpus_resumed(&mut self) {
        let deadline = Instant::now() + self.vcpus_patience();
        self.vcpus.resize.iter_mut().for_each(|resize| resize.deadline = deadline);
    }

    /// A machine that was made anew has as many as are wanted.
    pub(super) fn vcpus_over_reset(&mut self, prepared: &Prepared) {
        self.vcpus.boot(prepared.config.cpus.count);
        if let Some(resize) = self.vcpus.resize.take() {
            self.board.publish(EventKind::VcpusChanged { present: self.vcpus.present() });
            self.board.end_job(resize.job, JobState::Succeeded, None);
        }
    }

    /// Nobody will answer any more.
    pub(super) fn vcpus_end_with_the_run(&mut self) {
        self.vcpus.taken.clear();
        if let Some(resize) = self.vcpus.resize.take() {
            let why = "the run of the VM ended before the guest had answered for its vCPUs";
            self.board.end_job(resize.job, JobState::Failed, Some(ProblemDocument::new(409, "Conflict", why)));
        }
    }
}
