//! What is known of the quote service and counted of quotes. It outlives the machine, whose engine it is that counts.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use api::{QuoteService, QuoteServiceState, Quotes};

use super::service::Fault;

/// Kinds of end that a guest's request has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The guest has its quote.
    Quote,
    /// The service is not there.
    Absent,
    /// It did not answer in time.
    Late,
    /// It answered with an error, with what is no answer, or not to the end.
    Failed,
}

impl End {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::Quote, Self::Absent, Self::Late, Self::Failed];
}

impl From<&Fault> for End {
    fn from(fault: &Fault) -> Self {
        match fault {
            Fault::Absent(_) => Self::Absent,
            Fault::Late => Self::Late,
            Fault::Connection(_) | Fault::Ended | Fault::Answer(_) | Fault::Room { .. } => Self::Failed,
        }
    }
}

/// Counts of one VM's quotes, and its service's state.
#[derive(Debug, Default)]
pub struct QuoteCounters {
    /// Requests by their ends, as in [`End::ALL`].
    ends: [AtomicU64; 4],
    /// Calls that were refused because of what they gave.
    invalid: AtomicU64,
    /// Calls that were told to come again, since too many were in flight.
    retried: AtomicU64,
    /// Requests in flight.
    in_flight: AtomicUsize,
    /// Time from request to answer, in nanoseconds, of all requests that have ended.
    nanoseconds: AtomicU64,
    /// The longest of these times.
    longest: AtomicU64,
    service: Mutex<Service>,
}

#[derive(Debug, Default)]
struct Service {
    state: QuoteServiceState,
    /// When the log was told of it last.
    told: Option<Instant>,
}

/// The log is told of changes no more often than that: guests have a hand in them.
const LOG_EVERY: Duration = Duration::from_secs(1);

impl QuoteCounters {
    /// All figures as they are now.
    pub fn figures(&self) -> Quotes {
        let [given, absent, late, failed] = self.ends.each_ref().map(get);
        Quotes {
            service: self.lock().state.clone(),
            in_flight: u64::try_from(self.in_flight.load(Ordering::Relaxed)).unwrap_or(u64::MAX),
            given,
            absent,
            late,
            failed,
            invalid: get(&self.invalid),
            retried: get(&self.retried),
            time_us: get(&self.nanoseconds) / 1000,
            longest_us: get(&self.longest) / 1000,
        }
    }

    /// Whether the service answered when it was last asked.
    pub(super) fn answers(&self) -> bool {
        self.lock().state == QuoteServiceState::Answers
    }

    /// There is a service, which was not asked yet.
    pub(super) fn configure(&self) {
        self.lock().state = QuoteServiceState::Unknown;
    }

    pub(super) fn refused(&self, again: bool) {
        let counter = if again { &self.retried } else { &self.invalid };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn ended(&self, end: End, took: Duration) {
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
        self.longest.fetch_max(nanoseconds, Ordering::Relaxed);
        for (kind, counter) in End::ALL.iter().zip(&self.ends) {
            if *kind == end {
                counter.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// A place for a request, where fewer than `most` are taken.
    pub(super) fn enter(&self, most: usize) -> bool {
        let one_more = |taken: usize| (taken < most).then_some(taken + 1);
        self.in_flight.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }

    pub(super) fn leave(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// Notes how the service is, and tells the log where that has changed.
    pub(super) fn note(&self, address: &QuoteService, outcome: Result<(), &Fault>) {
        let new = match outcome {
            // The service did all that it could.
            Ok(()) | Err(Fault::Room { .. }) => QuoteServiceState::Answers,
            Err(fault) => QuoteServiceState::Fails { reason: fault.to_string() },
        };
        let mut service = self.lock();
        if service.state == new {
            return;
        }
        if service.told.is_none_or(|told| told.elapsed() >= LOG_EVERY) {
            service.told = Some(Instant::now());
            match &new {
                QuoteServiceState::Fails { reason: why } => tracing::warn!("the quote service at {address}: {why}"),
                _ => tracing::info!("the quote service at {address} answers"),
            }
        }
        service.state = new;
    }

    fn lock(&self) -> MutexGuard<'_, Service> {
        self.service.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
