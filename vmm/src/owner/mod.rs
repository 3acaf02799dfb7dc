//! The owner thread: it alone decides what becomes of the VM.
//!
//! Devices, vCPU threads, the terminal, signals and clients only report or ask; the owner takes one report at a time.
//! What a guest's report means says [`decide`]; which requests are carried out in which phase says [`admit`].

mod change;
mod consoles;
mod decide;
mod hotplug;
mod memory;
mod phase;
mod reports;
mod troubles;
mod vcpus;

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::{EventKind, HostFacts, JobKind, JobState, Outcome, PhaseName, ProblemDocument, Reason, Shutdown, VmConfig};
use devices::legacy::PlatformEvent;
use hal::Hypervisor;
use nix::sys::signal::Signal;

pub use decide::{Verdict, decide, reason_of};
pub use phase::{Live, Phase, Prepared, RequestKind, admit};
pub use reports::{Report, Reports};

use self::hotplug::Hotplug;
use self::memory::Memory;
use self::troubles::Failing;
use self::vcpus::Vcpus;
use crate::board::Board;
use crate::endpoints::Endpoints;
use crate::inbox::{Event, Inbox};
use crate::machine::{Machine, Parts};
use crate::notify::ServiceManager;
use crate::request::{Answer, Asked, Change, Descriptors, Refusal, Request};
use crate::sandbox;
use crate::trace::{Milestone, Outputs, Trace, Watching};
use crate::vcpu::Mode;
use crate::{Failure, boot, host};

/// The most time that a guest is given to switch itself off.
const LONGEST_SHUTDOWN: Duration = Duration::from_secs(86_400);

/// When the owner's work is at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// With the VM: when its run has ended, or there is none any more.
    VmEnds,
    /// When a signal says so.
    Signal,
}

/// A guest that was asked to switch itself off.
struct Closing {
    /// Until when it may.
    deadline: Instant,
    /// What becomes of the VM then; `None` lets it run on.
    then: Option<Outcome>,
    /// The job that waits for it.
    job: Option<u64>,
}

/// The VM and everything that its owner decides with.
pub struct Owner {
    hypervisor: hal::Result<Box<dyn Hypervisor>>,
    facts: HostFacts,
    inbox: Inbox,
    reports: Reports,
    board: Arc<Board>,
    manager: ServiceManager,
    /// What is wanted of the first boot, until it has begun.
    watching: Option<Watching>,
    /// Where the report on it goes, once that is open.
    trace_files: Option<Outputs>,
    /// Boots are clients' or the guest's.
    serving: bool,
    phase: Phase,
    closing: Option<Closing>,
    /// Devices that come and go.
    hotplug: Hotplug,
    /// Memory that comes and goes.
    memory: Memory,
    /// vCPUs, which may come and go.
    vcpus: Vcpus,
    /// Devices that failed lately.
    failing: Failing,
    /// The signal that asked for the end.
    ending: Option<Signal>,
}

impl Owner {
    /// The owner of no VM, on a hypervisor that was opened, or was tried to be: the failure is told to who wants to boot.
    /// To be called before any thread is started, since it takes over the process's signals.
    ///
    /// # Errors
    /// [`Failure::Host`] where the process has no descriptors left.
    pub fn new(hypervisor: hal::Result<Box<dyn Hypervisor>>, board: Arc<Board>) -> Result<Self, Failure> {
        let facts = match &hypervisor {
            Ok(hypervisor) => host::facts(hypervisor.caps()),
            Err(_) => HostFacts::unlimited(),
        };
        let inbox = Inbox::new()?;
        Ok(Self {
            hypervisor,
            facts,
            reports: Reports::new(inbox.clone())?,
            inbox,
            board,
            manager: ServiceManager::from_environment(),
            watching: None,
            trace_files: None,
            serving: false,
            phase: Phase::Empty,
            closing: None,
            hotplug: Hotplug::default(),
            memory: Memory::default(),
            vcpus: Vcpus::default(),
            failing: Failing::default(),
            ending: None,
        })
    }

    /// Has the first boot watched. Its time counts from the start of the process, unless a client asks for it.
    pub fn watch(&mut self, watching: Watching) {
        self.watching = Some(watching);
    }

    /// Opens the files that the report on the first boot goes to, where there is to be one: the boot does it otherwise,
    /// and may not be allowed to any more.
    ///
    /// # Errors
    /// [`Failure::BadInput`] names the file that cannot be written.
    pub fn open_trace(&mut self) -> Result<(), Failure> {
        let path = self.watching.as_ref().and_then(|watching| watching.boot_trace.as_deref());
        if let (Some(path), None) = (path, &self.trace_files) {
            self.trace_files = Some(Outputs::create(path)?);
        }
        Ok(())
    }

    /// Where reports and requests go.
    pub fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    /// Configures a VM, which is to be booted later.
    ///
    /// # Errors
    /// [`Failure::BadInput`] with every problem, before anything was touched.
    pub fn create(&mut self, config: VmConfig, descriptors: Descriptors) -> Result<(), Failure> {
        let prepared = Prepared::open(config, &self.facts, descriptors)?;
        let (given, config) = (prepared.given.clone(), prepared.config.clone());
        self.phase = Phase::Ready(prepared);
        self.enter(Reason::Request, |info| {
            (info.config, info.running, info.outcome) = (Some(given), Some(config), None);
        });
        Ok(())
    }

    /// Boots the VM that was configured. Where it fails, all is as before.
    ///
    /// # Errors
    /// [`Failure::BadInput`] where kernel, initramfs or endpoints cannot be used; [`Failure::Host`] where the host fails.
    pub fn boot(&mut self) -> Result<(), Failure> {
        let Phase::Ready(prepared) = mem::replace(&mut self.phase, Phase::Empty) else { return Ok(()) };
        match self.start(&prepared) {
            Ok((machine, endpoints)) => {
                self.vcpus.boot(prepared.config.cpus.count);
                self.phase = Phase::Running(Live { machine, endpoints, prepared });
                self.show_machine();
                self.enter(Reason::Request, |_| {});
                Ok(())
            }
            Err(failure) => {
                self.phase = Phase::Ready(prepared);
                Err(failure)
            }
        }
    }

    fn start(&mut self, prepared: &Prepared) -> Result<(Machine, Endpoints), Failure> {
        let Prepared { config, inputs, ports, .. } = prepared;
        let hypervisor = self.hypervisor.as_deref().map_err(|error| Failure::Host(error.to_string()))?;
        let watching = self.watching.clone().unwrap_or_default();
        // A client's boot begins when it is asked for.
        let trace = if self.serving { Trace::again(config, &watching) } else { Trace::new(config, &watching) };
        trace.mark(Milestone::Configuration);
        let loaded = boot::load(config, hypervisor.caps(), inputs, &trace)?;
        // Only now, when nothing in the input can be wrong any more, does anything appear on the host.
        let endpoints = Endpoints::open(config, &self.board)?;
        self.watching = None;
        match (self.trace_files.take(), watching.boot_trace) {
            (Some(files), _) => trace.write_to(files),
            (None, Some(path)) => trace.write_to(Outputs::create(&path)?),
            (None, None) => {}
        }
        self.reports.listen_for_quit(endpoints.quit())?;
        endpoints.watch(config, &trace);
        sandbox::confine(&sandbox::grants(config))?;
        let (inbox, trace) = (&self.inbox, &trace);
        let parts = Parts { config, hypervisor, inputs, endpoints: &endpoints, ports, inbox, trace };
        let machine = Machine::create(&parts, loaded, Mode::Run)?;
        if self.serving {
            endpoints.serve()?;
        }
        Ok((machine, endpoints))
    }

    /// Serves the VM and its clients. The outcome of the last run, where there was one.
    ///
    /// # Errors
    /// [`Failure::Host`] where waiting itself fails.
    pub fn serve(&mut self, until: Until) -> Result<Option<Outcome>, Failure> {
        self.manager.ready();
        self.serving = true;
        if let Some(live) = self.phase.live() {
            // Not before: its thread would be in the way of the guest's first instructions.
            live.endpoints.serve()?;
        }
        loop {
            let ends = until == Until::VmEnds || self.ending.is_some();
            match &self.phase {
                Phase::Stopped(outcome) if ends => return Ok(Some(outcome.clone())),
                Phase::Empty | Phase::Ready(_) if ends => return Ok(None),
                _ => {}
            }
            let deadline = self.closing.as_ref().map(|closing| closing.deadline);
            let jobs = [self.hotplug_deadline(), self.memory_deadline(), self.vcpus_deadline()];
            let others = [deadline, self.failing.deadline(), self.manager.next_tick()];
            let time = jobs.into_iter().chain(others).flatten().min();
            match self.reports.next(time)? {
                Report::Event(event) => self.handle_event(event),
                Report::Signal(signal) => self.handle_signal(signal),
                Report::Request(Asked { request, reply }) => {
                    let answer = self.handle(request);
                    reply(answer);
                }
                Report::Time => {
                    self.manager.tick();
                    self.mind_the_deadline();
                    self.mind_hotplug();
                    self.mind_memory();
                    self.mind_vcpus();
                    self.mind_failing();
                }
            }
        }
    }

    fn enter(&self, reason: Reason, change: impl FnOnce(&mut api::VmInfo)) {
        let phase = self.phase.name();
        let mrtd = self.phase.mrtd();
        self.board.enter(phase, reason, |info| {
            info.mrtd = mrtd;
            change(info);
        });
        self.manager.status(&format!("the VM is {phase}"));
        tracing::debug!(%phase, ?reason, "phase");
    }

    fn show_machine(&mut self) {
        let shown = self.phase.live().map(|live| {
            let (size, plugged) = (live.prepared.config.memory.size.bytes(), live.machine.plugged_memory());
            (live.machine.counters(), (self.vcpus.present(), size + plugged), size)
        });
        match shown {
            Some((counters, present, size)) => {
                self.board.set_machine(Some(counters), present);
                self.board.want_memory(size + self.wanted_memory());
            }
            None => {
                self.board.set_machine(None, (0, 0));
                self.board.want_memory(0);
            }
        }
    }

    fn handle_event(&mut self, event: Event) {
        if matches!(event, Event::Quit) {
            self.ending = Some(Signal::SIGINT);
        }
        // A report of a machine that is gone.
        let Some(lifecycle) = self.phase.prepared().map(|prepared| prepared.config.lifecycle.clone()) else { return };
        match event {
            Event::Slot { port, shows } => self.slot_changed(port, shows),
            Event::DriverCame { port } => self.driver_came(port),
            Event::MemoryPlugged => self.memory_plugged(),
            Event::ProcessorAnswered { number, insertion, status } => self.vcpu_answered(number, insertion, status),
            Event::ProcessorEjected(number) => self.vcpu_ejected(number),
            Event::DeviceFails { ref id } => self.device_fails(id.clone()),
            Event::Platform(PlatformEvent::Panicked) => {
                self.board.publish(EventKind::GuestPanic { crash_kernel: false });
            }
            Event::Platform(PlatformEvent::CrashLoaded) => {
                self.board.publish(EventKind::GuestPanic { crash_kernel: true });
            }
            _ => {}
        }
        match decide(&lifecycle, event) {
            Verdict::GoOn => {}
            Verdict::Restart(reason) => self.restart(reason),
            Verdict::Stop(outcome) => {
                let reason = reason_of(&outcome);
                self.stop(outcome, reason);
            }
        }
    }

    /// The first SIGTERM or SIGINT presses the power button; the second, or a SIGHUP, ends the VM at once.
    fn handle_signal(&mut self, signal: Signal) {
        let again = self.ending.replace(signal).is_some();
        // Signal numbers are below 65.
        let outcome = Outcome::Signalled { signal: u8::try_from(signal as i32).unwrap_or(u8::MAX) };
        if again || signal == Signal::SIGHUP {
            self.manager.stopping(Duration::ZERO);
            self.stop(outcome, Reason::Operator);
            return;
        }
        if self.phase.name() == PhaseName::Paused {
            // A guest that stands still would not hear of it.
            self.resume(Reason::Operator);
        }
        let patience = self
            .phase
            .prepared()
            .map_or(Duration::ZERO, |prepared| prepared.config.lifecycle.shutdown_timeout.duration());
        self.manager.stopping(patience);
        self.press_power_button(Reason::Operator, patience, Some(outcome), None);
    }

    fn press_power_button(&mut self, reason: Reason, patience: Duration, then: Option<Outcome>, job: Option<u64>) {
        let Phase::Running(live) = &self.phase else { return };
        live.machine.press_power_button();
        self.board.publish(EventKind::PowerButton { reason });
        // A job that waits already goes on to wait, as long as is asked for now.
        let job = job.or(self.closing.take().and_then(|closing| closing.job));
        let deadline = Instant::now() + patience.min(LONGEST_SHUTDOWN);
        self.closing = Some(Closing { deadline, then, job });
    }

    fn mind_the_deadline(&mut self) {
        let Some(closing) = self.closing.take_if(|closing| Instant::now() >= closing.deadline) else { return };
        match closing.then {
            Some(outcome) => {
                tracing::warn!("the guest did not switch itself off in time");
                self.closing = Some(Closing { then: None, ..closing });
                self.stop(outcome, Reason::Deadline);
            }
            None => self.end_closing(closing.job, JobState::Failed),
        }
    }

    fn end_closing(&self, job: Option<u64>, how: JobState) {
        let Some(job) = job else { return };
        let error = (how == JobState::Failed)
            .then(|| ProblemDocument::new(504, "Gateway Timeout", "the guest did not switch itself off in time"));
        self.board.end_job(job, how, error);
    }

    /// Ends the VM's run.
    fn stop(&mut self, outcome: Outcome, reason: Reason) {
        self.end_failing();
        let live = match mem::replace(&mut self.phase, Phase::Empty) {
            Phase::Running(live) | Phase::Paused(live) => live,
            other => {
                self.phase = other;
                return;
            }
        };
        if let Outcome::Failed { reason } = &outcome {
            tracing::error!("{reason}");
        }
        let Live { machine, endpoints, prepared } = live;
        drop(machine);
        self.inbox.clear();
        endpoints.drain();
        drop(endpoints);
        drop(prepared);
        self.hotplug.end_with_the_run(&self.board);
        self.memory.end_with_the_run(&self.board);
        self.vcpus_end_with_the_run();
        if let Some(Closing { job, .. }) = self.closing.take() {
            // Who asked for force has what was asked for when the deadline destroys the VM.
            let by_force = outcome == Outcome::Destroyed && reason == Reason::Deadline;
            let done = outcome == Outcome::PoweredOff || by_force;
            self.end_closing(job, if done { JobState::Succeeded } else { JobState::Failed });
        }
        self.phase = Phase::Stopped(outcome.clone());
        self.show_machine();
        self.enter(reason, |info| info.outcome = Some(outcome));
    }

    /// Makes the machine anew: it boots again, or stands at its first instruction where it stood before.
    fn restart(&mut self, reason: Reason) {
        self.end_failing();
        let (live, mode) = match mem::replace(&mut self.phase, Phase::Empty) {
            Phase::Running(live) => (live, Mode::Run),
            Phase::Paused(live) => (live, Mode::Stand),
            other => {
                self.phase = other;
                return;
            }
        };
        let Live { machine, mut endpoints, mut prepared } = live;
        drop(machine);
        self.inbox.clear();
        self.hotplug_over_reset(&mut prepared, &mut endpoints);
        match self.make_again(&prepared, &endpoints, mode) {
            Ok(machine) => {
                self.vcpus_over_reset(&prepared);
                let live = Live { machine, endpoints, prepared };
                self.phase = if mode == Mode::Run { Phase::Running(live) } else { Phase::Paused(live) };
                self.show_machine();
                self.board.publish(EventKind::Reset { reason });
                self.memory_after_reset();
                tracing::info!("the guest boots again");
            }
            Err(failure) => {
                tracing::error!("{failure}");
                endpoints.drain();
                self.hotplug.end_with_the_run(&self.board);
                self.memory.end_with_the_run(&self.board);
                self.vcpus_end_with_the_run();
                let outcome = Outcome::Failed { reason: failure.to_string() };
                self.phase = Phase::Stopped(outcome.clone());
                self.show_machine();
                self.enter(Reason::Host, |info| info.outcome = Some(outcome));
            }
        }
    }

    fn make_again(&self, prepared: &Prepared, endpoints: &Endpoints, mode: Mode) -> Result<Machine, Failure> {
        let Prepared { config, inputs, ports, .. } = prepared;
        let hypervisor = self.hypervisor.as_deref().map_err(|error| Failure::Host(error.to_string()))?;
        let trace = Trace::again(config, &Watching::default());
        let loaded = boot::load(config, hypervisor.caps(), inputs, &trace)?;
        endpoints.watch(config, &trace);
        let parts = Parts { config, hypervisor, inputs, endpoints, ports, inbox: &self.inbox, trace: &trace };
        Machine::create(&parts, loaded, mode)
    }

    fn pause(&mut self) -> Result<(), Refusal> {
        match mem::replace(&mut self.phase, Phase::Empty) {
            Phase::Running(live) => match live.machine.pause() {
                Ok(()) => {
                    self.phase = Phase::Paused(live);
                    self.enter(Reason::Request, |_| {});
                    Ok(())
                }
                Err(failure) => {
                    self.phase = Phase::Running(live);
                    Err(failure.into())
                }
            },
            other => {
                self.phase = other;
                Ok(())
            }
        }
    }

    fn resume(&mut self, reason: Reason) {
        match mem::replace(&mut self.phase, Phase::Empty) {
            Phase::Paused(live) => {
                live.machine.resume();
                self.phase = Phase::Running(live);
                self.hotplug_resumed();
                self.memory_resumed();
                self.vcpus_resumed();
                self.enter(reason, |_| {});
            }
            other => self.phase = other,
        }
    }

    fn kind_of(&self, request: &Request) -> Option<RequestKind> {
        Some(match request {
            Request::Create { config, .. } => match self.phase.prepared() {
                Some(prepared) if prepared.given == **config => RequestKind::CreateAgain,
                _ => RequestKind::Create,
            },
            Request::Boot => RequestKind::Boot,
            Request::Pause => RequestKind::Pause,
            Request::Resume => RequestKind::Resume,
            Request::Reset => RequestKind::Reset,
            Request::Shutdown(_) => RequestKind::Shutdown,
            Request::Nmi => RequestKind::Nmi,
            Request::Destroy => RequestKind::Destroy,
            Request::Change { .. } => RequestKind::Change,
            Request::OpenConsole { .. } => RequestKind::OpenConsole,
            Request::CancelJob(_) => return None,
        })
    }

    /// Carries a request out, where it is admitted.
    fn handle(&mut self, request: Request) -> Result<Answer, Refusal> {
        let kind = self.kind_of(&request);
        if let Some(kind) = kind {
            admit(self.phase.name(), kind)?;
        }
        match request {
            Request::Create { .. } if kind == Some(RequestKind::CreateAgain) => return Ok(Answer::Done),
            Request::Create { config, descriptors } => {
                self.create(*config, descriptors)?;
                return Ok(Answer::Created);
            }
            Request::Boot => self.boot()?,
            Request::Pause => self.pause()?,
            Request::Resume => self.resume(Reason::Request),
            Request::Reset => self.restart(Reason::Request),
            Request::Shutdown(how) => return self.shutdown(&how),
            Request::Nmi => {
                if let Some(live) = self.phase.live() {
                    live.machine.nmi()?;
                }
            }
            Request::Destroy => self.destroy(),
            Request::Change { change, expected } => return self.change(change, expected),
            Request::OpenConsole { id, take_over } => return self.open_console(&id, take_over),
            Request::CancelJob(id) => self.cancel(id)?,
        }
        Ok(Answer::Done)
    }

    fn shutdown(&mut self, how: &Shutdown) -> Result<Answer, Refusal> {
        let Some(prepared) = self.phase.prepared() else { return Ok(Answer::Done) };
        let patience = how.deadline.unwrap_or(prepared.config.lifecycle.shutdown_timeout).duration();
        let then = how.force.then_some(Outcome::Destroyed);
        let waiting = self.closing.as_ref().and_then(|closing| closing.job);
        let job = waiting.unwrap_or_else(|| self.board.start_job(JobKind::Shutdown, None));
        self.press_power_button(Reason::Request, patience, then, Some(job));
        Ok(Answer::Job(job))
    }

    fn cancel(&mut self, id: u64) -> Result<(), Refusal> {
        let job = self.board.job(id).ok_or_else(|| Refusal::Missing(format!("there is no job {id}")))?;
        if job.state != JobState::Running {
            return Ok(());
        }
        if self.cancel_hotplug(id) || self.cancel_resize(id) || self.cancel_memory(id) {
            return Ok(());
        }
        // The power button cannot be lifted again; only nobody waits any more.
        self.closing = self.closing.take().and_then(|closing| {
            (self.ending.is_some()).then_some(Closing { job: closing.job.filter(|job| *job != id), ..closing })
        });
        self.board.end_job(id, JobState::Cancelled, None);
        Ok(())
    }

    fn destroy(&mut self) {
        self.stop(Outcome::Destroyed, Reason::Request);
        if matches!(self.phase, Phase::Empty) {
            return;
        }
        self.phase = Phase::Empty;
        self.enter(Reason::Request, |info| (info.config, info.running) = (None, None));
    }

    fn change(&mut self, change: Change, expected: Option<u64>) -> Result<Answer, Refusal> {
        let is = self.board.generation();
        if let Some(expected) = expected.filter(|expected| *expected != is) {
            return Err(Refusal::Changed { is, expected });
        }
        match &mut self.phase {
            Phase::Ready(prepared) => {
                let (answer, event) = change::change_config(prepared, &self.facts, change)?;
                let (given, config) = (prepared.given.clone(), prepared.config.clone());
                if let Some(event) = event {
                    self.board.reconfigure(event, |info| (info.config, info.running) = (Some(given), Some(config)));
                }
                Ok(answer)
            }
            Phase::Running(_) | Phase::Paused(_) => match change {
                Change::PutDevice { device, descriptors } => self.plug(*device, descriptors),
                Change::RemoveDevice { id, force } => self.unplug(&id, force),
                Change::Vcpus(patch) => self.resize_vcpus(patch.count),
                Change::Memory(patch) => self.resize_memory(patch.size),
            },
            Phase::Empty | Phase::Stopped(_) => Ok(Answer::Done),
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.inbox.close();
    }
}
