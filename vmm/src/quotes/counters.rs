//! What is known of the quote service and counted of quotes. It outlives the machine, whose engine it is that counts.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::service::{Address, Fault};

/// How the quote service was when it was last asked.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ServiceState {
    /// Nobody has asked yet.
    #[default]
    Unknown,
    /// It answers.
    Answers,
    /// It does not, and why.
    Fails(String),
}

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

    /// Its name, for metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Quote => "quote",
            Self::Absent => "absent",
            Self::Late => "late",
            Self::Failed => "failed",
        }
    }
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
    /// There is a service to ask.
    configured: AtomicBool,
    service: Mutex<Service>,
}

#[derive(Debug, Default)]
struct Service {
    state: ServiceState,
    /// When the log was told of it last.
    told: Option<Instant>,
}

/// The log is told of changes no more often than that: guests have a hand in them.
const LOG_EVERY: Duration = Duration::from_secs(1);

/// A moment of [`QuoteCounters`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct QuoteFigures {
    /// Requests that have ended, by their ends.
    pub ends: [u64; 4],
    /// Calls that were refused because of what they gave.
    pub invalid: u64,
    /// Calls that were told to come again, since too many were in flight.
    pub retried: u64,
    /// Requests in flight.
    pub in_flight: usize,
    /// From request to answer, of all requests that have ended.
    pub time: Duration,
    /// The longest of these times.
    pub longest: Duration,
    /// How the service was when it was last asked; `None` where there is none to ask.
    pub service: Option<ServiceState>,
}

impl QuoteCounters {
    /// All figures as they are now.
    pub fn figures(&self) -> QuoteFigures {
        QuoteFigures {
            ends: self.ends.each_ref().map(get),
            invalid: get(&self.invalid),
            retried: get(&self.retried),
            in_flight: self.in_flight.load(Ordering::Relaxed),
            time: Duration::from_nanos(get(&self.nanoseconds)),
            longest: Duration::from_nanos(get(&self.longest)),
            service: self.configured.load(Ordering::Relaxed).then(|| self.state()),
        }
    }

    /// How the service was when it was last asked.
    pub fn state(&self) -> ServiceState {
        self.lock().state.clone()
    }

    pub(super) fn configure(&self) {
        self.configured.store(true, Ordering::Relaxed);
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
    pub(super) fn note(&self, address: &Address, outcome: Result<(), &Fault>) {
        let new = match outcome {
            // The service did all that it could.
            Ok(()) | Err(Fault::Room { .. }) => ServiceState::Answers,
            Err(fault) => ServiceState::Fails(fault.to_string()),
        };
        let mut service = self.lock();
        if service.state == new {
            return;
        }
        if service.told.is_none_or(|told| told.elapsed() >= LOG_EVERY) {
            service.told = Some(Instant::now());
            match &new {
                ServiceState::Fails(why) => tracing::warn!("the quote service at {address}: {why}"),
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
