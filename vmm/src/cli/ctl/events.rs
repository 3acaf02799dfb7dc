//! What happened, and what happens.

use api::{Event, EventKind, to_yaml};

use super::args::{EventsArgs, Output};
use super::failed::{Done, Failed};
use super::{Ctl, put, show};

impl Ctl {
    /// Prints events: all that the monitor still knows, or those that happen from now on.
    pub(super) fn events(&mut self, which: &EventsArgs) -> Done {
        let now = self.client.vm()?.sequence;
        let mut at = which.after.unwrap_or(if which.follow { now } else { 0 });
        if !which.follow {
            return if at == now { Ok(()) } else { self.read(&mut at, Some(now)) };
        }
        loop {
            let before = at;
            match self.read(&mut at, None) {
                // A connection that broke is made again, once for as long as nothing comes over it.
                Err(failed) if failed.is_connection() && at != before => {}
                ended => return ended,
            }
        }
    }

    /// Prints events after number `at`, which is the last one's afterwards, until the monitor ends, or up to number
    /// `last`.
    fn read(&self, at: &mut u64, last: Option<u64>) -> Done {
        for event in self.client.events(Some(*at))? {
            let event = event?;
            *at = event.sequence;
            put(&self.line(&event)?)?;
            if last.is_some_and(|last| *at >= last) {
                break;
            }
        }
        Ok(())
    }

    /// An event as it is printed: a line, or for YAML a document.
    fn line(&self, event: &Event) -> Done<String> {
        let failed = |error| Failed::here(format!("an event cannot be written: {error}"));
        match self.output {
            Output::Table => Ok(show::event(event)),
            Output::Json => serde_json::to_string(event).map(|text| text + "\n").map_err(failed),
            Output::Yaml => to_yaml(event).map(|text| format!("---\n{text}")).map_err(failed),
        }
    }
}

/// How often something happened, where it was more than once.
fn times(count: u64) -> String {
    if count > 1 { format!(" ({count} times)") } else { String::new() }
}

/// What an event tells, beside its kind.
pub fn detail(event: &EventKind) -> String {
    match event {
        EventKind::Phase { phase, reason, outcome } => {
            let outcome = outcome.as_ref().map(|outcome| format!(": {outcome}")).unwrap_or_default();
            format!("{phase} ({}){outcome}", show::word(reason))
        }
        EventKind::ConfigChanged {} => String::new(),
        EventKind::VcpusChanged { present } => format!("{present} present"),
        EventKind::DeviceAdded { id }
        | EventKind::DeviceChanged { id }
        | EventKind::DeviceRemoved { id, .. }
        | EventKind::ConsoleOpened { id }
        | EventKind::ConsoleClosed { id } => id.clone(),
        EventKind::DeviceFailed { id, reason, count } => format!("{id}: {reason}{}", times(*count)),
        EventKind::IoError { id, operation, offset, reason, count, .. } => {
            format!("{id}: {operation} at {offset}: {reason}{}", times(*count))
        }
        EventKind::MemoryResized { present } => api::ByteSize::new(*present).to_string(),
        EventKind::GuestPanic { crash_kernel: true } => "its crash kernel is at work".to_owned(),
        EventKind::GuestPanic { crash_kernel: false } => String::new(),
        EventKind::Reset { reason } | EventKind::PowerButton { reason } => show::word(reason),
        EventKind::Job { job } => {
            let error = job.error.as_ref().map(|error| format!(": {}", error.detail)).unwrap_or_default();
            let progress = job.progress.map(|percent| format!(" {percent} %")).unwrap_or_default();
            format!("{} {} {}{progress}{error}", job.id, show::word(&job.kind), show::word(&job.state))
        }
        EventKind::Gap { first, last } => {
            format!("events {first} to {last} are lost to this reader; read the state again")
        }
    }
}
