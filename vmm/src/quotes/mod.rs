//! Quotes for a trust domain: what its calls GetQuote and SetupEventNotifyInterrupt are answered with (Intel TDX
//! Guest-Hypervisor Communication Interface).
//!
//! A quote is a report of the TDX module's, signed by Intel's Quote Generation Service, which is a program of the host's.
//! A vCPU's thread only takes the guest's report and says that its request is in flight ([`Quotes::get_quote`]); a
//! thread of its own asks the service and writes the answer. No report and no quote ever reaches a log.

mod buffer;
mod counters;
mod service;
#[cfg(test)]
pub mod tests;
mod wire;
mod worker;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use api::QuoteService;
use devices::seam::{Interrupt, MsiMessage};
use hal::{GpaRange, GuestCall, GuestCallStatus};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vm_memory::GuestMemoryMmap;

pub use buffer::{Asked, Buffer, Status};
pub use counters::QuoteCounters;
pub use service::Fault;
pub use wire::{Answer, Question, REPORT_LEN, REQUEST_LEN, WireError};

use crate::sandbox;
use worker::{Place, Request, Worker};

/// The most requests of a guest that are in flight at once.
pub const MOST_IN_FLIGHT: usize = 16;
/// How long the service may take for an answer.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How long may be waited, and how often the service is looked for.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// See [`PATIENCE`].
    patience: Duration,
    /// From one look at a service that did not answer to the next.
    probe: Duration,
}

/// The pace of real guests.
const PACE: Pace = Pace { patience: PATIENCE, probe: Duration::from_secs(10) };

/// How long a vCPU waits for the answer itself. Linux looks for it when the call returns, and then once a second.
const BRIEF: Duration = Duration::from_millis(8);
/// Vectors below are the processor's own exceptions.
const FIRST_VECTOR: u64 = 32;
/// Where messages for local APICs are written (Intel SDM, volume 3, §11.11.1).
const MSI_ADDRESS: u64 = 0xfee0_0000;

/// Which memory of its guest the monitor may look at.
pub trait SharedMemory: Send + Sync {
    /// Whether all of a range is shared.
    fn is_shared(&self, range: GpaRange) -> bool;
}

/// What quotes are made with.
pub struct Parts {
    /// The guest's memory.
    pub memory: GuestMemoryMmap,
    /// Which of it is shared.
    pub shared: Arc<dyn SharedMemory>,
    /// The interrupt with which the guest is told of answers, which it may set up.
    pub interrupt: Arc<dyn Interrupt>,
    /// Where the quote service listens, if there is one. It need not be there yet.
    pub service: Option<QuoteService>,
    /// Where is counted.
    pub counters: Arc<QuoteCounters>,
}

/// Tells the guest that there is an answer, where it wants to be told.
struct Notice {
    interrupt: Arc<dyn Interrupt>,
    wanted: AtomicBool,
}

impl Notice {
    fn give(&self) {
        if self.wanted.load(Ordering::Acquire)
            && let Err(error) = self.interrupt.event().write(1)
        {
            tracing::error!("telling the guest of a quote: {error}");
        }
    }
}

/// Answers a trust domain's calls about quotes. Dropping it, as at a reset, gives up all requests in flight: the guest's
/// memory is not touched after that.
pub struct Quotes {
    /// `None` where there is no service to ask. Dropped first, which ends its thread: that may not give the interrupt back.
    line: Option<Line>,
    memory: GuestMemoryMmap,
    shared: Arc<dyn SharedMemory>,
    notice: Arc<Notice>,
    counters: Arc<QuoteCounters>,
}

/// The way to the thread that asks.
struct Line {
    /// Taken away to end the thread.
    requests: Option<Sender<Request>>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Quotes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Quotes").field("service", &self.line.is_some()).finish_non_exhaustive()
    }
}

impl Quotes {
    /// Begins to answer, and looks for the service where there is to be one.
    ///
    /// # Errors
    /// The thread that asks it cannot be made.
    pub fn new(parts: Parts) -> io::Result<Self> {
        Self::with_pace(parts, PACE)
    }

    fn with_pace(parts: Parts, pace: Pace) -> io::Result<Self> {
        let Parts { memory, shared, interrupt, service, counters } = parts;
        let notice = Arc::new(Notice { interrupt, wanted: AtomicBool::new(false) });
        let line = service.map(|address| Line::new(address, pace, &notice, &counters)).transpose()?;
        Ok(Self { line, memory, shared, notice, counters })
    }

    /// What is counted.
    pub fn counters(&self) -> Arc<QuoteCounters> {
        self.counters.clone()
    }

    /// Answers a call of the guest's. It may take a few milliseconds.
    pub fn call(&self, call: GuestCall) -> GuestCallStatus {
        match call {
            GuestCall::GetQuote { gpa, size } => self.get_quote(gpa, size),
            GuestCall::SetupEventNotify { vcpu, vector } => self.set_up_event_notify(vcpu.0.into(), vector),
        }
    }

    /// The guest asks for a quote, in a buffer of `len` bytes at `gpa`, of which the bit that says that an address is
    /// shared was taken away. What the call returns; the buffer's own status tells of the quote. Where the guest has set up
    /// no interrupt, the answer is waited for, a few milliseconds at most.
    fn get_quote(&self, gpa: u64, len: u64) -> GuestCallStatus {
        let Asked { buffer, report } = match Buffer::take(&self.memory, &self.shared, gpa, len) {
            Ok(asked) => asked,
            Err(status) => {
                self.counters.refused(false);
                return status;
            }
        };
        let Some(line) = &self.line else {
            buffer.tell(Status::Unavailable);
            return GuestCallStatus::Success;
        };
        let Some(report) = report else {
            self.counters.refused(false);
            buffer.tell(Status::Failed);
            return GuestCallStatus::Success;
        };
        let Some(place) = Place::take(&self.counters) else {
            self.counters.refused(true);
            return GuestCallStatus::Retry;
        };
        buffer.tell(Status::InFlight);
        let (answered, answer) = channel();
        line.ask(Request { buffer, report, place, answered });
        if !self.notice.wanted.load(Ordering::Acquire) {
            // Nothing is ever sent: the end of the request ends the wait.
            let _ = answer.recv_timeout(BRIEF);
        }
        GuestCallStatus::Success
    }

    /// The guest's vCPU with this local APIC id wants the interrupt `vector` for answers from now on.
    fn set_up_event_notify(&self, apic_id: u32, vector: u64) -> GuestCallStatus {
        let Some(vector) = u8::try_from(vector).ok().filter(|vector| u64::from(*vector) >= FIRST_VECTOR) else {
            return GuestCallStatus::InvalidOperand;
        };
        // The lowest eight bits of the id in their old place, the others where x2APIC has them.
        let id = u64::from(apic_id);
        let address = MSI_ADDRESS | (id & 0xff) << 12 | (id & !0xff) << 32;
        match self.notice.interrupt.set(Some(MsiMessage { address, data: vector.into() })) {
            Ok(()) => {
                self.notice.wanted.store(true, Ordering::Release);
                GuestCallStatus::Success
            }
            Err(error) => {
                tracing::error!("the interrupt for quotes: {error}");
                GuestCallStatus::Retry
            }
        }
    }
}

impl Line {
    fn new(address: QuoteService, pace: Pace, notice: &Arc<Notice>, counters: &Arc<QuoteCounters>) -> io::Result<Self> {
        counters.configure();
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let (requests, orders) = channel();
        let worker = Worker {
            address,
            pace,
            requests: orders,
            wake: wake.clone(),
            notice: notice.clone(),
            counters: counters.clone(),
            flights: Vec::new(),
            probed: Instant::now(),
        };
        let work = move || {
            sandbox::enter(sandbox::Thread::Quotes);
            worker.run();
        };
        let thread = Builder::new().name("quotes".into()).spawn(work)?;
        Ok(Self { requests: Some(requests), wake, thread: Some(thread) })
    }

    /// Hands a request to the thread. Where that has ended, the request ends as well.
    fn ask(&self, request: Request) {
        if let Some(requests) = &self.requests
            && let Err(lost) = requests.send(request)
        {
            lost.0.buffer.tell(Status::Unavailable);
        }
        self.wake();
    }

    fn wake(&self) {
        // The only error is a counter at its limit, and then the event is signalled all the same.
        let _ = self.wake.write(1);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        drop(self.requests.take());
        self.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread for quotes panicked");
        }
    }
}
