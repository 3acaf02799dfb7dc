//! Devices that come and go while the machine exists: the guest is told, and its answer is awaited.
//!
//! The guest answers with the power indicator of the device's hot-plug port ([`devices::pci::RootPort`]). A device that
//! comes is taken when the indicator has blinked and stays on, or when a driver runs the device; one that goes is let go
//! when the indicator goes off. What the guest refuses, or does not answer in time, is undone. Each is a job, and the
//! board shows only devices that the guest has taken.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use api::{DeviceConfig, EventKind, JobKind, JobState, ProblemDocument, Problems};
use devices::pci::Indicator;

use super::consoles::check_no_stdio;
use super::phase::{Live, Phase, Prepared, no_device};
use super::{Owner, change};
use crate::board::Board;
use crate::machine::Parts;
use crate::request::{Answer, Descriptors, Refusal};
use crate::trace::Trace;

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    /// That the guest takes a device.
    Add,
    /// That it lets go of one.
    Remove,
}

/// A device that comes or goes, until the guest has answered.
#[derive(Debug)]
struct Waiting {
    wish: Wish,
    id: String,
    port: u8,
    job: u64,
    deadline: Instant,
    /// For [`Wish::Remove`]: the button was pressed. While the indicator still blinks for something else it is not.
    pressed: bool,
    /// The indicator has blinked: what it shows next is the guest's answer.
    blinked: bool,
}

/// The devices that come and go.
#[derive(Debug, Default)]
pub(super) struct Hotplug {
    waiting: Vec<Waiting>,
    /// Ports whose guest is to keep its device after all, and has not answered the first press yet: the second follows when
    /// the indicator blinks. Two presses that the guest sees at once are one to it.
    keep: BTreeSet<u8>,
}

/// How a wait ends.
enum Ending {
    /// The guest did as it was asked.
    Done,
    /// It did not, or was not asked any more.
    Undone(JobState, Option<ProblemDocument>),
}

impl Ending {
    fn failed(status: u16, title: &'static str, why: String) -> Self {
        Self::Undone(JobState::Failed, Some(ProblemDocument::new(status, title, why)))
    }
}

impl Hotplug {
    /// The devices that the guest has not taken yet.
    pub(super) fn comes(&self, id: &str) -> bool {
        self.waiting.iter().any(|waiting| waiting.id == id && waiting.wish == Wish::Add)
    }

    fn of(&self, id: &str) -> Option<&Waiting> {
        self.waiting.iter().find(|waiting| waiting.id == id)
    }

    fn take(&mut self, which: impl Fn(&Waiting) -> bool) -> Option<Waiting> {
        let at = self.waiting.iter().position(which)?;
        Some(self.waiting.remove(at))
    }

    /// Ends all waits with the machine: nobody will answer any more.
    pub(super) fn end_with_the_run(&mut self, board: &Board) {
        self.keep.clear();
        for waiting in self.waiting.drain(..) {
            let why = format!("the run of the VM ended before the guest had answered for «{}»", waiting.id);
            board.end_job(waiting.job, JobState::Failed, Some(ProblemDocument::new(409, "Conflict", why)));
        }
    }
}

impl Owner {
    /// When the next guest has had its time. A machine that stands still has all of it.
    pub(super) fn hotplug_deadline(&self) -> Option<Instant> {
        let runs = matches!(self.phase, Phase::Running(_));
        self.hotplug.waiting.iter().map(|waiting| waiting.deadline).min().filter(|_| runs)
    }

    fn patience(&self) -> Duration {
        let prepared = self.phase.prepared();
        prepared.map_or(Duration::ZERO, |prepared| prepared.config.pci.hotplug_timeout.duration())
    }

    /// Adds a device to a machine, or says what became of the same request before.
    pub(super) fn plug(&mut self, device: DeviceConfig, descriptors: Descriptors) -> Result<Answer, Refusal> {
        let id = device.id().to_owned();
        let given = self.phase.prepared().map(|prepared| prepared.given_device(&id)).unwrap_or_default();
        if let Some(given) = given {
            return match self.hotplug.of(&id) {
                Some(waiting) if waiting.wish == Wish::Add && *given == device => Ok(Answer::Job(waiting.job)),
                Some(waiting) => Err(Refusal::Conflict(format!("job {} is at work on «{id}»", waiting.job))),
                None => self.change_running(&device),
            };
        }
        if let DeviceConfig::Console(console) = &device {
            check_no_stdio(&console.endpoint)?;
        }
        let port = self.put_behind_a_port(device, descriptors)?;
        let job = self.board.start_job(JobKind::AddDevice, Some(&id));
        self.wait_for(Wish::Add, id, port, job);
        self.show_machine();
        Ok(Answer::Job(job))
    }

    /// Changes a device that the machine has, as far as that can be while it runs.
    fn change_running(&mut self, wanted: &DeviceConfig) -> Result<Answer, Refusal> {
        let id = wanted.id().to_owned();
        let Some(Live { prepared, .. }) = self.phase.live() else { return Err(no_device(&id)) };
        change::allowed_while_it_runs(prepared, wanted)?;
        if let DeviceConfig::Console(console) = wanted {
            self.lead_console(console)?;
        }
        let Some(Live { machine, prepared, .. }) = self.phase.live() else { return Err(no_device(&id)) };
        let changed = machine.change_device(wanted).map_err(|problem| Refusal::Problems(Problems(vec![problem])))?;
        if prepared.set_changeable(wanted) || changed {
            self.show_change(EventKind::DeviceChanged { id });
        }
        Ok(Answer::Done)
    }

    /// Makes a device and puts it behind a free port, or leaves nothing of it.
    fn put_behind_a_port(&mut self, device: DeviceConfig, descriptors: Descriptors) -> Result<u8, Refusal> {
        let hypervisor = self.hypervisor.as_deref().map_err(|error| Refusal::Host(error.to_string()))?;
        let stand = matches!(self.phase, Phase::Paused(_));
        let Some(live) = self.phase.live() else { return Err(no_device(device.id())) };
        let Live { machine, endpoints, prepared } = live;
        let id = device.id().to_owned();
        let ports = prepared.config.pci.hotplug_ports;
        let port = machine.free_port().ok_or_else(|| no_port(&id, ports))?;
        let facts = &self.facts;
        prepared.put_device(device, |config| api::validate_running(config, facts), descriptors)?;
        let Prepared { config, inputs, ports, .. } = &*prepared;
        let made = endpoints.add(config, &id, &self.board).and_then(|()| {
            let found = config.devices.iter().find(|device| device.id() == id);
            let device = found.ok_or_else(|| crate::Failure::Host(format!("«{id}» is not there")))?;
            let trace = &Trace::off();
            let parts = Parts { config, hypervisor, inputs, endpoints, ports, inbox: &self.inbox, trace };
            machine.add_device(&parts, device, port, stand)
        });
        if let Err(failure) = made {
            endpoints.remove(&id);
            prepared.remove_device(&id)?;
            return Err(failure.into());
        }
        prepared.ports.insert(id, port);
        Ok(port)
    }

    /// Removes a device from a machine: the guest is asked to let go of it, unless it is forced out or not in use.
    pub(super) fn unplug(&mut self, id: &str, force: bool) -> Result<Answer, Refusal> {
        let Some(live) = self.phase.live() else { return Ok(Answer::Done) };
        let prepared = &live.prepared;
        if !prepared.config.devices.iter().any(|device| device.id() == id) {
            return Err(no_device(id));
        }
        let Some(port) = prepared.ports.get(id).copied() else {
            return Err(Refusal::Conflict(format!(
                "«{id}» was there when the VM booted and stays as long as it runs: only a device that was added to the \
                 running VM can be removed from it"
            )));
        };
        let in_use = live.machine.in_use(port);
        match self.hotplug.of(id).map(|waiting| (waiting.wish, waiting.job)) {
            Some((Wish::Add, job)) if !force => {
                let what = format!("«{id}» is being added by job {job}: wait for it, or cancel it");
                return Err(Refusal::Conflict(what));
            }
            Some((Wish::Remove, job)) if !force => return Ok(Answer::Job(job)),
            _ => {}
        }
        if force || !in_use {
            let waiting = self.hotplug.take(|waiting| waiting.id == id);
            self.take_out(id);
            // One that the guest had not taken was never shown.
            if waiting.as_ref().is_none_or(|waiting| waiting.wish == Wish::Remove) {
                self.show_change(EventKind::DeviceRemoved { id: id.to_owned(), forced: in_use });
            }
            if let Some(Waiting { wish, job, .. }) = waiting {
                let how = if wish == Wish::Add { JobState::Cancelled } else { JobState::Succeeded };
                self.board.end_job(job, how, None);
            }
            return Ok(Answer::Done);
        }
        let job = self.board.start_job(JobKind::RemoveDevice, Some(id));
        self.wait_for(Wish::Remove, id.to_owned(), port, job);
        if !self.hotplug.keep.remove(&port) {
            self.ask_for(port);
        }
        Ok(Answer::Job(job))
    }

    fn wait_for(&mut self, wish: Wish, id: String, port: u8, job: u64) {
        let deadline = Instant::now() + self.patience();
        self.hotplug.waiting.push(Waiting { wish, id, port, job, deadline, pressed: true, blinked: false });
    }

    /// Presses the button for a wait that has just begun, or leaves that for when the indicator does not blink any more.
    fn ask_for(&mut self, port: u8) {
        let port_now = self.phase.live().and_then(|live| live.machine.port(port));
        if port_now.is_none_or(|port| port.indicator() != Indicator::Blinking) {
            self.press(port);
        } else if let Some(waiting) = self.hotplug.waiting.last_mut() {
            waiting.pressed = false;
        }
    }

    /// Presses a port's attention button.
    fn press(&mut self, port: u8) {
        if let Some(port) = self.phase.live().and_then(|live| live.machine.port(port)) {
            port.press();
        }
    }

    /// The indicator of a port shows something else.
    pub(super) fn slot_changed(&mut self, port: u8, shows: Indicator) {
        if self.hotplug.keep.remove(&port) && shows == Indicator::Blinking {
            self.press(port);
        }
        let Some(waiting) = self.hotplug.waiting.iter_mut().find(|waiting| waiting.port == port) else { return };
        let refused = |what: &str| Ending::failed(409, "Conflict", what.to_owned());
        let ending = match (waiting.wish, shows) {
            (_, Indicator::Blinking) => {
                waiting.blinked = waiting.pressed;
                return;
            }
            (Wish::Add, Indicator::On) | (Wish::Remove, Indicator::Off) => Ending::Done,
            (Wish::Remove, Indicator::On) if !waiting.pressed => {
                waiting.pressed = true;
                return self.press(port);
            }
            // What the guest still had to say of a device that was there before.
            _ if !waiting.blinked => return,
            (Wish::Add, Indicator::Off) => refused("the guest did not take the device"),
            (Wish::Remove, Indicator::On) => refused("the guest keeps the device"),
        };
        self.answered(|waiting| waiting.port == port, ending);
    }

    /// A driver runs the device behind a port. Where the indicator blinks, the guest says itself when it is ready.
    pub(super) fn driver_came(&mut self, port: u8) {
        let is_it = |waiting: &Waiting| waiting.port == port && waiting.wish == Wish::Add && !waiting.blinked;
        self.answered(is_it, Ending::Done);
    }

    /// Ends what guests have not answered in time.
    pub(super) fn mind_hotplug(&mut self) {
        let now = Instant::now();
        while self.hotplug_deadline().is_some_and(|deadline| deadline <= now) {
            let why = format!("the guest has not answered within {:?}", self.patience());
            self.answered(|waiting| waiting.deadline <= now, Ending::failed(504, "Gateway Timeout", why));
        }
    }

    /// Cancels a job, where it is one of these. False where it is not.
    pub(super) fn cancel_hotplug(&mut self, job: u64) -> bool {
        let is = self.hotplug.waiting.iter().any(|waiting| waiting.job == job);
        self.answered(|waiting| waiting.job == job, Ending::Undone(JobState::Cancelled, None));
        is
    }

    /// Ends a wait. Who sees the end of its job sees what the job did, too.
    fn answered(&mut self, which: impl Fn(&Waiting) -> bool, ending: Ending) {
        let Some(Waiting { wish, id, port, job, pressed, .. }) = self.hotplug.take(which) else { return };
        match (wish, ending) {
            (Wish::Add, Ending::Done) => {
                self.show_change(EventKind::DeviceAdded { id });
                self.board.end_job(job, JobState::Succeeded, None);
            }
            (Wish::Remove, Ending::Done) => {
                self.take_out(&id);
                self.show_change(EventKind::DeviceRemoved { id, forced: false });
                self.board.end_job(job, JobState::Succeeded, None);
            }
            (_, Ending::Undone(how, error)) => {
                if wish == Wish::Add {
                    self.take_out(&id);
                } else if pressed {
                    self.press_again(port);
                }
                if let Some(error) = &error {
                    tracing::warn!("«{id}»: {}", error.detail);
                    self.board.publish(EventKind::DeviceFailed { id, reason: error.detail.clone(), count: 1 });
                }
                self.board.end_job(job, how, error);
            }
        }
    }

    /// A second press while the indicator blinks has the guest keep its device.
    fn press_again(&mut self, port: u8) {
        let shows = self.phase.live().and_then(|live| live.machine.port(port)).map(|port| port.indicator());
        match shows {
            Some(Indicator::Blinking) => self.press(port),
            Some(Indicator::On) => drop(self.hotplug.keep.insert(port)),
            Some(Indicator::Off) | None => {}
        }
    }

    fn take_out(&mut self, id: &str) {
        let Some(Live { machine, endpoints, prepared }) = self.phase.live() else { return };
        if let Some(port) = prepared.ports.get(id) {
            self.hotplug.keep.remove(port);
        }
        machine.take_device_out(id);
        endpoints.remove(id);
        if let Err(error) = prepared.remove_device(id) {
            tracing::error!("{error}");
        }
        self.show_machine();
    }

    /// Shows the devices that the guest has.
    fn show_change(&self, event: EventKind) {
        if let Some(prepared) = self.phase.prepared() {
            self.show_change_of(prepared, event);
        }
    }

    fn show_change_of(&self, prepared: &Prepared, event: EventKind) {
        let (given, config) = change::shown(prepared, |id| !self.hotplug.comes(id));
        self.board.reconfigure(event, |info| (info.config, info.running) = (Some(given), Some(config)));
    }

    /// A machine that is made anew has let go of what it was asked for, and a guest that boots finds what was added.
    pub(super) fn hotplug_over_reset(&mut self, live: &mut Prepared, endpoints: &mut crate::endpoints::Endpoints) {
        let deadline = Instant::now() + live.config.pci.hotplug_timeout.duration();
        let (gone, stay) = self.hotplug.waiting.drain(..).partition(|waiting| waiting.wish == Wish::Remove);
        self.hotplug.waiting = stay;
        self.hotplug.keep.clear();
        for waiting in &mut self.hotplug.waiting {
            (waiting.deadline, waiting.pressed, waiting.blinked) = (deadline, true, false);
        }
        let gone: Vec<Waiting> = gone;
        for Waiting { id, job, .. } in gone {
            endpoints.remove(&id);
            if let Err(error) = live.remove_device(&id) {
                tracing::error!("{error}");
            }
            self.show_change_of(live, EventKind::DeviceRemoved { id, forced: false });
            self.board.end_job(job, JobState::Succeeded, None);
        }
    }

    /// A guest that runs on has all its time again.
    pub(super) fn hotplug_resumed(&mut self) {
        let deadline = Instant::now() + self.patience();
        self.hotplug.waiting.iter_mut().for_each(|waiting| waiting.deadline = deadline);
    }
}

fn no_port(id: &str, ports: u8) -> Refusal {
    Refusal::Conflict(match ports {
        0 => format!(
            "«{id}» cannot be added while the VM runs: it has no hot-plug ports; create it with some \
             (pci.hotplug_ports, --hotplug-ports)"
        ),
        _ => format!("«{id}» cannot be added: each of the VM's {ports} hot-plug ports has a device"),
    })
}
