//! The owner thread: it alone decides what becomes of the machine.
//!
//! Devices, vCPU threads, the terminal and signals only report; the owner takes one report at a time and
//! [`decide`] says what it means.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use api::{Lifecycle, OnPanic, OnReset, Outcome};
use devices::legacy::PlatformEvent;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::inbox::{Event, Inbox, VcpuEnd};

/// Signals that reach the owner thread as reports. They are blocked in every thread.
const SIGNALS: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];

/// What a report means for the machine.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It runs on.
    GoOn,
    /// It runs on, and its power button is pressed.
    PressPowerButton,
    /// It is made anew and boots again.
    Restart,
    /// The run is over.
    Stop(Outcome),
}

/// Says what an event means under the VM's lifecycle settings.
pub fn decide(lifecycle: &Lifecycle, event: Event) -> Verdict {
    match event {
        Event::Platform(PlatformEvent::Shutdown) => Verdict::Stop(Outcome::PoweredOff),
        Event::Platform(PlatformEvent::Reset) | Event::Vcpu(VcpuEnd::Reset) => match lifecycle.on_reset {
            OnReset::Restart => Verdict::Restart,
            OnReset::Exit => Verdict::Stop(Outcome::Reset),
        },
        Event::Platform(PlatformEvent::Panicked) => match lifecycle.on_panic {
            OnPanic::Exit => Verdict::Stop(Outcome::Panicked),
            OnPanic::Restart => Verdict::Restart,
            OnPanic::Ignore => Verdict::GoOn,
        },
        // The guest's crash kernel is at work: it will reset or power off when it has written its dump.
        Event::Platform(PlatformEvent::CrashLoaded) => Verdict::GoOn,
        Event::Platform(PlatformEvent::DebugExit(value)) => {
            Verdict::Stop(Outcome::DebugExit { value: value.to_le_bytes()[0] })
        }
        Event::Vcpu(VcpuEnd::TripleFault) => Verdict::Stop(Outcome::Crashed { reason: "a triple fault".into() }),
        Event::Vcpu(VcpuEnd::Crash(reason)) => Verdict::Stop(Outcome::Crashed { reason }),
        Event::BootTimeout(reason) => Verdict::Stop(Outcome::BootTimeout { reason }),
        Event::Quit => Verdict::Stop(Outcome::Quit),
    }
}

/// Says what a signal means: the first SIGTERM is the power button, all others end the run.
pub fn decide_signal(signal: Signal, pressed_before: bool) -> Verdict {
    if signal == Signal::SIGTERM && !pressed_before {
        return Verdict::PressPowerButton;
    }
    // Signal numbers are below 65.
    Verdict::Stop(Outcome::Signalled { signal: u8::try_from(signal as i32).unwrap_or(u8::MAX) })
}

/// The owner's ear: the inbox, the process's signals and the person at the terminal.
pub struct Reports {
    inbox: Inbox,
    signals: SignalFd,
    quit: Option<EventFd>,
    waits: Epoll,
    power_button_pressed: bool,
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
        Ok(Self { inbox, signals, quit: None, waits, power_button_pressed: false })
    }

    /// Listens to the event with which the person at the terminal asks to quit.
    ///
    /// # Errors
    /// The event cannot be waited for.
    pub fn listen_for_quit(&mut self, quit: &EventFd) -> io::Result<()> {
        let quit = quit.try_clone()?;
        self.waits.ctl(ControlOperation::Add, quit.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
        self.quit = Some(quit);
        Ok(())
    }

    /// Waits until something is reported that the machine must know of.
    ///
    /// # Errors
    /// The wait itself failed.
    pub fn next(&mut self, lifecycle: &Lifecycle) -> io::Result<Verdict> {
        loop {
            if let Some(verdict) = self.pending(lifecycle)? {
                return Ok(verdict);
            }
            match self.waits.wait(-1, &mut [EpollEvent::default(); 3]) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
    }

    fn pending(&mut self, lifecycle: &Lifecycle) -> io::Result<Option<Verdict>> {
        if let Some(info) = self.signals.read_signal()? {
            let number = i32::try_from(info.ssi_signo).unwrap_or(0);
            let signal = Signal::try_from(number)?;
            let verdict = decide_signal(signal, self.power_button_pressed);
            self.power_button_pressed |= verdict == Verdict::PressPowerButton;
            return Ok(Some(verdict));
        }
        if self.quit.as_ref().is_some_and(|quit| quit.read().is_ok()) {
            return Ok(Some(decide(lifecycle, Event::Quit)));
        }
        while let Some(event) = self.inbox.take() {
            tracing::debug!(?event, "reported");
            match decide(lifecycle, event) {
                Verdict::GoOn => {}
                verdict => return Ok(Some(verdict)),
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lifecycle(on_reset: OnReset, on_panic: OnPanic) -> Lifecycle {
        Lifecycle { on_reset, on_panic, ..Lifecycle::default() }
    }

    #[test]
    fn reset_and_panic_follow_the_lifecycle_settings() {
        use PlatformEvent::{Panicked, Reset};
        let cases = [
            (Reset, OnReset::Restart, OnPanic::Exit, Verdict::Restart),
            (Reset, OnReset::Exit, OnPanic::Restart, Verdict::Stop(Outcome::Reset)),
            (Panicked, OnReset::Restart, OnPanic::Exit, Verdict::Stop(Outcome::Panicked)),
            (Panicked, OnReset::Exit, OnPanic::Restart, Verdict::Restart),
            (Panicked, OnReset::Exit, OnPanic::Ignore, Verdict::GoOn),
        ];
        for (event, on_reset, on_panic, expected) in cases {
            let verdict = decide(&lifecycle(on_reset, on_panic), Event::Platform(event));
            assert_eq!(verdict, expected, "{event:?} with {on_reset:?}, {on_panic:?}");
        }
    }

    #[test]
    fn each_way_to_end_has_a_code_of_its_own() {
        let events = [
            Event::Platform(PlatformEvent::Shutdown),
            Event::Platform(PlatformEvent::Reset),
            Event::Platform(PlatformEvent::Panicked),
            Event::Vcpu(VcpuEnd::TripleFault),
            Event::BootTimeout(String::new()),
            Event::Platform(PlatformEvent::DebugExit(7)),
            Event::Quit,
        ];
        let codes: Vec<u8> = events
            .into_iter()
            .map(|event| match decide(&lifecycle(OnReset::Exit, OnPanic::Exit), event) {
                Verdict::Stop(outcome) => outcome.exit_code(),
                verdict => panic!("{verdict:?} does not end the run"),
            })
            .collect();
        assert_eq!(codes, [0, 3, 4, 5, 6, 71, 130]);
    }

    #[test]
    fn the_first_sigterm_is_the_power_button_and_the_second_ends_the_run() {
        assert_eq!(decide_signal(Signal::SIGTERM, false), Verdict::PressPowerButton);
        assert_eq!(decide_signal(Signal::SIGTERM, true), Verdict::Stop(Outcome::Signalled { signal: 15 }));
        assert_eq!(decide_signal(Signal::SIGINT, false), Verdict::Stop(Outcome::Signalled { signal: 2 }));
    }

    #[test]
    fn reports_wake_the_owner_in_order() {
        let inbox = Inbox::new().unwrap();
        let mut reports = Reports::new(inbox.clone()).unwrap();
        let lifecycle = Lifecycle::default();
        let other = inbox.clone();
        let reporter = std::thread::spawn(move || {
            other.post(Event::Platform(PlatformEvent::CrashLoaded));
            other.post(Event::Platform(PlatformEvent::Reset));
            other.post(Event::Quit);
        });
        assert_eq!(reports.next(&lifecycle).unwrap(), Verdict::Restart);
        assert_eq!(reports.next(&lifecycle).unwrap(), Verdict::Stop(Outcome::Quit));
        reporter.join().unwrap();
    }

    #[test]
    fn a_guest_that_repeats_itself_does_not_grow_the_inbox() {
        let inbox = Inbox::new().unwrap();
        for _ in 0..5000 {
            inbox.post(Event::Platform(PlatformEvent::Reset));
        }
        assert_eq!(std::iter::from_fn(|| inbox.take()).count(), 1024);
    }
}
