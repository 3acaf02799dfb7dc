//! Quotes for a trust domain: what its calls GetQuote, SetupEventNotifyInterrupt and GetTdVmCallInfo are answered with
//! (Intel TDX Guest-Hypervisor Communication Interface).
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

use devices::seam::{Interrupt, MsiMessage};
use hal::GpaRange;
use nix::sys::eventfd::{EfdFlags, EventFd};
use vm_memory::GuestMemoryMmap;

pub use buffer::{Asked, Buffer, Status};
pub use counters::{End, QuoteCounters, QuoteFigures, ServiceState};
pub use service::{Address, Fault};
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
/// The call SetupEventNotifyInterrupt, in the first word of what GetTdVmCallInfo tells of calls.
const SETUP_EVENT_NOTIFY: u64 = 1 << 1;

/// What a call of a trust domain returns (TDG.VP.VMCALL's status, in R10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallStatus {
    /// It was done, or is in flight.
    Success,
    /// To be made again, later.
    Retry,
    /// It gives what it cannot.
    InvalidOperand,
    /// What it gives is not aligned.
    AlignError,
    /// There is no such call.
    Unsupported,
}

impl CallStatus {
    /// As the guest gets it.
    pub fn code(self) -> u64 {
        match self {
            Self::Success => 0,
            Self::Retry => 1,
            Self::InvalidOperand => 1 << 63,
            Self::AlignError => (1 << 63) + 2,
            Self::Unsupported => (1 << 63) + 3,
        }
    }
}

/// Which memory of its guest the monitor may look at.
pub trait SharedMemory: Send + Sync {
    /// Whether all of a range is shared.
    fn is_shared(&self, range: GpaRange) -> bool;
}

/// What the hypervisor says of the calls that it knows beside the base ones: what it answers itself, and what it lets the
/// monitor answer (Linux, `struct kvm_tdx_capabilities`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KnownCalls {
    /// What it answers itself, for R11 and R12.
    pub kernel: [u64; 2],
    /// What it lets the monitor answer, for R11 and R12.
    pub monitor: [u64; 2],
}

impl KnownCalls {
    /// R11 to R14 of GetTdVmCallInfo's answer; `None` where there is no such leaf.
    pub fn info(&self, leaf: u64) -> Option<[u64; 4]> {
        let ([kernel, more], [monitor, _]) = (self.kernel, self.monitor);
        (leaf == 1).then_some([kernel | monitor & SETUP_EVENT_NOTIFY, more, 0, 0])
    }
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
    pub service: Option<Address>,
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
    memory: GuestMemoryMmap,
    shared: Arc<dyn SharedMemory>,
    notice: Arc<Notice>,
    counters: Arc<QuoteCounters>,
    /// `None` where there is no service to ask.
    line: Option<Line>,
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
        Ok(Self { memory, shared, notice, counters, line })
    }

    /// The guest asks for a quote, in a buffer of `len` bytes at `gpa`, of which the bit that says that an address is
    /// shared was taken away. What the call returns; the buffer's own status tells of the quote. Where the guest has set up
    /// no interrupt, the answer is waited for, a few milliseconds at most.
    pub fn get_quote(&self, gpa: u64, len: u64) -> CallStatus {
        let Asked { buffer, report } = match Buffer::take(&self.memory, &self.shared, gpa, len) {
            Ok(asked) => asked,
            Err(status) => {
                self.counters.refused(false);
                return status;
            }
        };
        let Some(line) = &self.line else {
            buffer.tell(Status::Unavailable);
            return CallStatus::Success;
        };
        let Some(report) = report else {
            self.counters.refused(false);
            buffer.tell(Status::Failed);
            return CallStatus::Success;
        };
        let Some(place) = Place::take(&self.counters) else {
            self.counters.refused(true);
            return CallStatus::Retry;
        };
        buffer.tell(Status::InFlight);
        let (answered, answer) = channel();
        line.ask(Request { buffer, report, place, answered });
        if !self.notice.wanted.load(Ordering::Acquire) {
            // Nothing is ever sent: the end of the request ends the wait.
            let _ = answer.recv_timeout(BRIEF);
        }
        CallStatus::Success
    }

    /// The guest's vCPU with this local APIC id wants the interrupt `vector` for answers from now on.
    pub fn set_up_event_notify(&self, apic_id: u32, vector: u64) -> CallStatus {
        let Some(vector) = u8::try_from(vector).ok().filter(|vector| u64::from(*vector) >= FIRST_VECTOR) else {
            return CallStatus::InvalidOperand;
        };
        // The lowest eight bits of the id in their old place, the others where x2APIC has them.
        let id = u64::from(apic_id);
        let address = MSI_ADDRESS | (id & 0xff) << 12 | (id & !0xff) << 32;
        match self.notice.interrupt.set(Some(MsiMessage { address, data: vector.into() })) {
            Ok(()) => {
                self.notice.wanted.store(true, Ordering::Release);
                CallStatus::Success
            }
            Err(error) => {
                tracing::error!("the interrupt for quotes: {error}");
                CallStatus::Retry
            }
        }
    }
}

impl Line {
    fn new(address: Address, pace: Pace, notice: &Arc<Notice>, counters: &Arc<QuoteCounters>) -> io::Result<Self> {
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
