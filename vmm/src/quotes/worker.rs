//! The thread that asks the quote service for the guest. It is named `quotes`.

use std::io;
use std::mem;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use api::QuoteService;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::buffer::{Buffer, Status};
use super::counters::{End, QuoteCounters};
use super::service::{Connection, Fault, Progress};
use super::wire::{Question, REPORT_LEN, platform_request, quote_request};
use super::{MOST_IN_FLIGHT, Notice, Pace};

/// A guest's request, in its place among those in flight.
pub struct Request {
    pub buffer: Buffer,
    pub report: Box<[u8; REPORT_LEN]>,
    pub place: Place,
    /// Dropped when the guest has been answered.
    pub answered: Sender<()>,
}

/// A place among the requests in flight, given up on drop.
pub struct Place(Arc<QuoteCounters>);

impl Place {
    /// A place, where one is free.
    pub fn take(counters: &Arc<QuoteCounters>) -> Option<Self> {
        counters.enter(MOST_IN_FLIGHT).then(|| Self(counters.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// Who is to be answered.
enum Asker {
    /// The guest.
    Guest { buffer: Buffer, place: Place, _answered: Sender<()> },
    /// This thread itself.
    Probe,
}

impl Asker {
    fn question(&self) -> Question {
        match self {
            Self::Guest { .. } => Question::Quote,
            Self::Probe => Question::Platform,
        }
    }
}

/// A question that is being asked.
pub struct Flight {
    asker: Asker,
    connection: Connection,
    began: Instant,
}

/// What the thread works with. Dropping it gives up all that is in flight: the guest's memory is not touched any more.
pub struct Worker {
    pub address: QuoteService,
    pub pace: Pace,
    pub requests: Receiver<Request>,
    /// Written when there are requests, and when there will be none any more.
    pub wake: Arc<EventFd>,
    pub notice: Arc<Notice>,
    pub counters: Arc<QuoteCounters>,
    /// What is being asked.
    pub flights: Vec<Flight>,
    /// When the service was last looked for.
    pub probed: Instant,
}

impl Worker {
    /// Serves until there will be no more requests.
    pub fn run(mut self) {
        self.probe();
        loop {
            let ready = match self.wait() {
                Ok(ready) => ready,
                Err(error) => return tracing::error!("waiting for the quote service: {error}"),
            };
            self.go_on(&ready);
            if !self.take_requests() {
                return;
            }
            let probing = self.flights.iter().any(|flight| matches!(flight.asker, Asker::Probe));
            if !probing && self.next_probe().is_some_and(|at| at <= Instant::now()) {
                self.probe();
            }
        }
    }

    /// Takes the guest's requests, and begins to ask. False where there will be none any more.
    fn take_requests(&mut self) -> bool {
        // Read before the requests are looked for, so that none is missed.
        let _ = self.wake.read();
        loop {
            match self.requests.try_recv() {
                Ok(Request { buffer, report, place, answered }) => {
                    self.begin(Asker::Guest { buffer, place, _answered: answered }, quote_request(&report));
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn probe(&mut self) {
        self.probed = Instant::now();
        self.begin(Asker::Probe, platform_request());
    }

    /// When the service is to be looked for again; `None` where it answers.
    fn next_probe(&self) -> Option<Instant> {
        (!self.counters.answers()).then(|| self.probed + self.pace.probe)
    }

    fn begin(&mut self, asker: Asker, question: Vec<u8>) {
        let began = Instant::now();
        match Connection::open(&self.address, question) {
            Ok(connection) => self.flights.push(Flight { asker, connection, began }),
            Err(fault) => self.end(asker, began, Err(fault)),
        }
    }

    /// Waits until something can go on, or is late. Which flights can.
    fn wait(&self) -> io::Result<Vec<bool>> {
        let mut awaited = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        awaited.extend(
            self.flights
                .iter()
                .filter_map(|flight| flight.connection.awaited())
                .map(|(socket, events)| PollFd::new(socket, events)),
        );
        match poll(&mut awaited, self.timeout()) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut events = awaited.iter().skip(1).map(|fd| fd.any().unwrap_or(true));
        let now = Instant::now();
        let ready = |flight: &Flight| match flight.connection.again() {
            Some(again) => again <= now,
            None => events.next().unwrap_or(false),
        };
        Ok(self.flights.iter().map(ready).collect())
    }

    /// How long nothing is to be done unless something happens.
    fn timeout(&self) -> PollTimeout {
        let late = self.flights.iter().map(|flight| flight.began + self.pace.patience);
        let again = self.flights.iter().filter_map(|flight| flight.connection.again());
        let Some(first) = late.chain(again).chain(self.next_probe()).min() else { return PollTimeout::NONE };
        // To the next millisecond, so that it is over then.
        let left = first.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    }

    fn go_on(&mut self, ready: &[bool]) {
        for (flight, ready) in mem::take(&mut self.flights).into_iter().zip(ready) {
            let Flight { asker, connection, began } = flight;
            let progress = if *ready { connection.go_on(&self.address) } else { Ok(Progress::Waiting(connection)) };
            match progress {
                Ok(Progress::Answered(answer)) => {
                    let taken = answer.take(asker.question()).map_err(Fault::from);
                    self.end(asker, began, taken);
                }
                Ok(Progress::Waiting(_)) if began.elapsed() >= self.pace.patience => {
                    self.end(asker, began, Err(Fault::Late))
                }
                Ok(Progress::Waiting(connection)) => self.flights.push(Flight { asker, connection, began }),
                Err(fault) => self.end(asker, began, Err(fault)),
            }
        }
    }

    /// Answers who asked.
    fn end(&self, asker: Asker, began: Instant, answer: Result<&[u8], Fault>) {
        let Asker::Guest { buffer, place, _answered } = asker else {
            return self.counters.note(&self.address, answer.as_ref().map(|_| ()));
        };
        let room = buffer.room();
        let answer = match answer {
            Ok(quote) if quote.len() > room => Err(Fault::Room { quote: quote.len(), room }),
            answer => answer,
        };
        self.counters.note(&self.address, answer.as_ref().map(|_| ()));
        self.counters.ended(answer.as_ref().map_or_else(End::from, |_| End::Quote), began.elapsed());
        // Who sees the answer may ask again at once.
        drop(place);
        match answer {
            Ok(quote) => buffer.answer(quote),
            Err(Fault::Absent(_) | Fault::Late) => buffer.tell(Status::Unavailable),
            Err(_) => buffer.tell(Status::Failed),
        }
        self.notice.give();
    }
}
