//! What the owner thread waits for: what the machine reports and what clients ask, with one descriptor that it can
//! poll beside signals.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::legacy::{PlatformEvent, PlatformEvents, ProcessorObserver};
use devices::pci::{Indicator, SlotObserver};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::request::Asked;

/// Something that the owner thread must decide about.
#[derive(Debug)]
pub enum Event {
    /// The guest used one of the platform's registers: power-off, reset, panic.
    Platform(PlatformEvent),
    /// A vCPU's run ended.
    Vcpu(VcpuEnd),
    /// The power indicator of a hot-plug port shows something else.
    Slot {
        /// The port.
        port: u8,
        /// What it shows now.
        shows: Indicator,
    },
    /// A driver of the guest's runs the device behind a hot-plug port.
    DriverCame {
        /// The port.
        port: u8,
    },
    /// The guest has another number of blocks of its pluggable memory plugged.
    MemoryPlugged,
    /// The guest has answered a question about a vCPU.
    ProcessorAnswered {
        /// Its number.
        number: u8,
        /// It was to take it, else to let go of it.
        insertion: bool,
        /// `_OST`'s status, 0 where all is well.
        status: u16,
    },
    /// The guest has let go of the vCPU with this number.
    ProcessorEjected(u8),
    /// A device fails: [`crate::troubles::Troubles`] say how.
    DeviceFails {
        /// The device.
        id: String,
    },
    /// User space was not reached in time, for this reason.
    BootTimeout(String),
    /// The person at the terminal asked to quit.
    Quit,
}

/// Why a vCPU thread stopped running its guest.
#[derive(Debug)]
pub enum VcpuEnd {
    /// The guest asked the hypervisor for a reset.
    Reset,
    /// A triple fault.
    TripleFault,
    /// The hypervisor cannot go on.
    Crash(String),
}

/// The owner's queues; every other thread holds a clone.
#[derive(Clone)]
pub struct Inbox(Arc<Shared>);

struct Shared {
    queues: Mutex<Queues>,
    wake: EventFd,
}

#[derive(Default)]
struct Queues {
    events: VecDeque<Event>,
    requests: VecDeque<Asked>,
    /// The owner is gone: nobody will answer.
    closed: bool,
}

impl Inbox {
    /// Empty queues.
    ///
    /// # Errors
    /// No event descriptor can be made.
    pub fn new() -> io::Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self(Arc::new(Shared { queues: Mutex::default(), wake })))
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.0.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_up(&self) {
        // A full counter wakes the owner just as well.
        let _ = self.0.wake.write(1);
    }

    /// Adds an event and wakes the owner. A guest that repeats itself cannot grow the queue: past 1024 events that
    /// the owner has not looked at, more of them say nothing new and are dropped.
    pub fn post(&self, event: Event) {
        const MOST: usize = 1024;
        let mut queues = self.queues();
        if queues.events.len() < MOST {
            queues.events.push_back(event);
        }
        self.wake_up();
    }

    /// Adds a request and wakes the owner. Who asks waits for each answer, so that there are no more requests than
    /// clients. Where the owner is gone, the request is dropped, and its reply with it.
    pub fn ask(&self, asked: Asked) {
        let mut queues = self.queues();
        if !queues.closed {
            queues.requests.push_back(asked);
            self.wake_up();
        }
    }

    /// Takes the oldest event.
    pub fn take(&self) -> Option<Event> {
        let mut queues = self.queues();
        let event = queues.events.pop_front();
        self.calm(&queues);
        event
    }

    /// Takes the oldest request.
    pub fn take_request(&self) -> Option<Asked> {
        let mut queues = self.queues();
        let asked = queues.requests.pop_front();
        self.calm(&queues);
        asked
    }

    fn calm(&self, queues: &Queues) {
        if queues.events.is_empty() && queues.requests.is_empty() {
            let _ = self.0.wake.read();
        }
    }

    /// Forgets events that are queued: they came from a machine that is gone. Requests stay.
    pub fn clear(&self) {
        let mut queues = self.queues();
        queues.events.clear();
        self.calm(&queues);
    }

    /// Drops the requests that wait, and all that come from now on.
    pub fn close(&self) {
        let mut queues = self.queues();
        queues.closed = true;
        let dropped = std::mem::take(&mut queues.requests);
        drop(queues);
        drop(dropped);
    }

    /// Readable while events or requests wait.
    pub fn wake(&self) -> &EventFd {
        &self.0.wake
    }
}

impl SlotObserver for Inbox {
    fn indicator(&self, port: u8, shows: Indicator) {
        self.post(Event::Slot { port, shows });
    }
}

impl ProcessorObserver for Inbox {
    fn answered(&self, number: u8, insertion: bool, status: u16) {
        self.post(Event::ProcessorAnswered { number, insertion, status });
    }

    fn ejected(&self, number: u8) {
        self.post(Event::ProcessorEjected(number));
    }
}

impl PlatformEvents for Inbox {
    fn event(&self, event: PlatformEvent) {
        self.post(Event::Platform(event));
    }
}
