//! What the owner thread waits for: one queue of events with a descriptor that it can poll beside signals.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use devices::legacy::{PlatformEvent, PlatformEvents};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Something that the owner thread must decide about.
#[derive(Debug)]
pub enum Event {
    /// The guest used one of the platform's registers: power-off, reset, panic.
    Platform(PlatformEvent),
    /// A vCPU's run ended.
    Vcpu(VcpuEnd),
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

/// The owner's queue; every other thread holds a clone.
#[derive(Clone)]
pub struct Inbox(Arc<Shared>);

struct Shared {
    events: Mutex<VecDeque<Event>>,
    wake: EventFd,
}

impl Inbox {
    /// An empty queue.
    ///
    /// # Errors
    /// No event descriptor can be made.
    pub fn new() -> io::Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self(Arc::new(Shared { events: Mutex::default(), wake })))
    }

    /// Adds an event and wakes the owner. A guest that repeats itself cannot grow the queue: past 1024 events that
    /// the owner has not looked at, more of them say nothing new and are dropped.
    pub fn post(&self, event: Event) {
        const MOST: usize = 1024;
        let mut events = self.0.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() < MOST {
            events.push_back(event);
        }
        // A full counter wakes the owner just as well.
        let _ = self.0.wake.write(1);
    }

    /// Takes the oldest event.
    pub fn take(&self) -> Option<Event> {
        let mut events = self.0.events.lock().unwrap_or_else(PoisonError::into_inner);
        let event = events.pop_front();
        if events.is_empty() {
            let _ = self.0.wake.read();
        }
        event
    }

    /// Forgets what is queued: it came from a machine that is gone.
    pub fn clear(&self) {
        self.0.events.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let _ = self.0.wake.read();
    }

    /// Readable while events wait.
    pub fn wake(&self) -> &EventFd {
        &self.0.wake
    }
}

impl PlatformEvents for Inbox {
    fn event(&self, event: PlatformEvent) {
        self.post(Event::Platform(event));
    }
}
