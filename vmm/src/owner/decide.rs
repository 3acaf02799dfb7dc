//! What a report of the guest means for its machine.

use api::{Lifecycle, OnPanic, OnReset, Outcome, Reason};
use devices::legacy::PlatformEvent;

use crate::inbox::{Event, VcpuEnd};

/// What a report means for the machine.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It runs on.
    GoOn,
    /// It is made anew and boots again, for this reason.
    Restart(Reason),
    /// The run is over.
    Stop(Outcome),
}

/// Says what an event means under the VM's lifecycle settings.
pub fn decide(lifecycle: &Lifecycle, event: Event) -> Verdict {
    match event {
        Event::Platform(PlatformEvent::Shutdown) => Verdict::Stop(Outcome::PoweredOff),
        Event::Platform(PlatformEvent::Reset) | Event::Vcpu(VcpuEnd::Reset) => match lifecycle.on_reset {
            OnReset::Restart => Verdict::Restart(Reason::Guest),
            OnReset::Exit => Verdict::Stop(Outcome::Reset),
        },
        Event::Platform(PlatformEvent::Panicked) => match lifecycle.on_panic {
            OnPanic::Exit => Verdict::Stop(Outcome::Panicked),
            OnPanic::Restart => Verdict::Restart(Reason::Panic),
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
        Event::Slot { .. } | Event::DriverCame { .. } | Event::DeviceFails { .. } | Event::MemoryPlugged => {
            Verdict::GoOn
        }
        Event::ProcessorAnswered { .. } | Event::ProcessorEjected(_) => Verdict::GoOn,
        Event::Quit => Verdict::Stop(Outcome::Quit),
    }
}

/// Whose doing an outcome is.
pub fn reason_of(outcome: &Outcome) -> Reason {
    match outcome {
        Outcome::PoweredOff | Outcome::Reset | Outcome::DebugExit { .. } => Reason::Guest,
        Outcome::Panicked => Reason::Panic,
        Outcome::Crashed { .. } => Reason::Crash,
        Outcome::BootTimeout { .. } => Reason::Deadline,
        Outcome::Destroyed => Reason::Request,
        Outcome::Failed { .. } => Reason::Host,
        Outcome::Quit | Outcome::Signalled { .. } => Reason::Operator,
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
            (Reset, OnReset::Restart, OnPanic::Exit, Verdict::Restart(Reason::Guest)),
            (Reset, OnReset::Exit, OnPanic::Restart, Verdict::Stop(Outcome::Reset)),
            (Panicked, OnReset::Restart, OnPanic::Exit, Verdict::Stop(Outcome::Panicked)),
            (Panicked, OnReset::Exit, OnPanic::Restart, Verdict::Restart(Reason::Panic)),
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
            Event::BootTimeout("in the way".into()),
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
}
