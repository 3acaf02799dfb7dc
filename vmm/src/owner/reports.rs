//! The owner's ear: what machine and clients put into its inbox, the process's signals, the person at the terminal, and
//! the time.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Instant;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::inbox::{Event, Inbox};
use crate::request::Asked;

/// Signals that reach the owner thread as reports. They are blocked in every thread.
const SIGNALS: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];

/// What the owner is told.
pub enum Report {
    /// The machine, or the person at the terminal, has something to say.
    Event(Event),
    /// A client asks something.
    Request(Asked),
    /// The process got a signal.
    Signal(Signal),
    /// The time that the owner waited for has come.
    Time,
}

/// Everything that the owner waits for.
pub struct Reports {
    inbox: Inbox,
    signals: SignalFd,
    quit: Option<EventFd>,
    waits: Epoll,
}

impl Reports {
    /// Takes over [`SIGNALS`] of the process. To be called before any thread is started, so that all inherit the mask.
    ///
    /// # Errors
    /// The signal descriptor cannot be made.
    pub fn new(inbox: Inbox) -> io::Result<Self> {
        let mask: SigSet = SIGNALS.into_iter().collect();
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let waits = Epoll::new()?;
        for fd in [inbox.wake().as_fd().as_raw_fd(), signals.as_raw_fd()] {
            waits.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        }
        Ok(Self { inbox, signals, quit: None, waits })
    }

    /// Listens to the event with which the person at the terminal asks to quit, instead of one before.
    ///
    /// # Errors
    /// The event cannot be waited for.
    pub fn listen_for_quit(&mut self, quit: &EventFd) -> io::Result<()> {
        if let Some(old) = self.quit.take() {
            self.waits.ctl(ControlOperation::Delete, old.as_raw_fd(), EpollEvent::default())?;
        }
        let quit = quit.try_clone()?;
        self.waits.ctl(ControlOperation::Add, quit.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
        self.quit = Some(quit);
        Ok(())
    }

    /// Waits until something is reported, or until `time`.
    ///
    /// # Errors
    /// The wait itself failed.
    pub fn next(&mut self, time: Option<Instant>) -> io::Result<Report> {
        loop {
            if let Some(report) = self.pending()? {
                return Ok(report);
            }
            let timeout = match time.map(|time| time.saturating_duration_since(Instant::now())) {
                Some(left) if left.is_zero() => return Ok(Report::Time),
                // Rounded up, so that a short rest of a wait is not spent turning around.
                Some(left) => i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX),
                None => -1,
            };
            match self.waits.wait(timeout, &mut [EpollEvent::default(); 3]) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
    }

    fn pending(&mut self) -> io::Result<Option<Report>> {
        if let Some(info) = self.signals.read_signal()? {
            let number = i32::try_from(info.ssi_signo).unwrap_or(0);
            return Ok(Some(Report::Signal(Signal::try_from(number)?)));
        }
        if self.quit.as_ref().is_some_and(|quit| quit.read().is_ok()) {
            return Ok(Some(Report::Event(Event::Quit)));
        }
        if let Some(event) = self.inbox.take() {
            tracing::debug!(?event, "reported");
            return Ok(Some(Report::Event(event)));
        }
        Ok(self.inbox.take_request().map(Report::Request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use devices::legacy::PlatformEvent;

    use crate::request::Request;

    #[test]
    fn reports_wake_the_owner_in_order_and_the_time_comes_last() {
        let inbox = Inbox::new().unwrap();
        let mut reports = Reports::new(inbox.clone()).unwrap();
        let other = inbox.clone();
        let reporter = std::thread::spawn(move || {
            other.post(Event::Platform(PlatformEvent::CrashLoaded));
            other.post(Event::Quit);
            other.ask(Asked { request: Request::Boot, reply: Box::new(|_| {}) });
        });
        assert!(matches!(reports.next(None), Ok(Report::Event(Event::Platform(PlatformEvent::CrashLoaded)))));
        assert!(matches!(reports.next(None), Ok(Report::Event(Event::Quit))));
        assert!(matches!(reports.next(None), Ok(Report::Request(_))));
        reporter.join().unwrap();
        let soon = Instant::now() + Duration::from_millis(20);
        assert!(matches!(reports.next(Some(soon)), Ok(Report::Time)));
        assert!(Instant::now() >= soon);
    }

    #[test]
    fn a_guest_that_repeats_itself_does_not_grow_the_inbox() {
        let inbox = Inbox::new().unwrap();
        for _ in 0..5000 {
            inbox.post(Event::Platform(PlatformEvent::Reset));
        }
        assert_eq!(std::iter::from_fn(|| inbox.take()).count(), 1024);
    }

    #[test]
    fn a_machine_that_is_gone_takes_its_events_along_but_no_requests() {
        let inbox = Inbox::new().unwrap();
        let ask = || inbox.ask(Asked { request: Request::Pause, reply: Box::new(|_| {}) });
        inbox.post(Event::Quit);
        ask();
        inbox.clear();
        assert!(inbox.take().is_none());
        assert!(inbox.take_request().is_some());
        ask();
        inbox.close();
        ask();
        assert!(inbox.take_request().is_none(), "nobody is left to answer");
    }
}
