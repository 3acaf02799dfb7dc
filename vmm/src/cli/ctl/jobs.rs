//! Waiting for jobs.

use std::io::{self, IsTerminal, Write};

use api::{EventKind, Events, Job, JobState};

use super::failed::{Done, Failed};
use super::{Ctl, show};

/// How many characters the bar of a job's progress has.
const BAR: u8 = 30;

impl Ctl {
    /// Waits for the end of a job and prints it. `events` must have begun before the job was seen as it is in `job`.
    pub(super) fn wait_for(&mut self, job: Job, events: Events) -> Done {
        let progress = Progress::new();
        progress.show(&job);
        let ended = self.end_of(job, events, &progress)?;
        drop(progress);
        self.answer(&ended, show::job)?;
        match ended.state {
            JobState::Succeeded => Ok(()),
            JobState::Cancelled => Err(Failed::job(format!("job {} was cancelled", ended.id))),
            JobState::Failed | JobState::Running => {
                let why = ended.error.map_or_else(|| "it does not say why".to_owned(), |error| error.detail);
                Err(Failed::job(format!("job {} failed: {why}", ended.id)))
            }
        }
    }

    fn end_of(&mut self, mut job: Job, events: Events, progress: &Progress) -> Done<Job> {
        if job.state != JobState::Running {
            return Ok(job);
        }
        for event in events {
            match event?.event {
                EventKind::Job { job: now } if now.id == job.id => job = now,
                // What was lost may have been the job's end.
                EventKind::Gap { .. } => job = self.client.job(job.id)?,
                _ => continue,
            }
            progress.show(&job);
            if job.state != JobState::Running {
                return Ok(job);
            }
        }
        Err(Failed::gone(format!("the monitor ended before job {} did", job.id)))
    }
}

/// A line at the terminal that tells how far a job is. Where standard error is no terminal, there is none. Dropping it
/// removes it.
struct Progress {
    terminal: bool,
}

impl Progress {
    fn new() -> Self {
        Self { terminal: io::stderr().is_terminal() }
    }

    fn show(&self, job: &Job) {
        if self.terminal {
            // Where it cannot be shown, nobody looks.
            let _ = write!(io::stderr(), "\r\x1b[K{}", line(job));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.terminal {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

/// How far a job is.
fn line(job: &Job) -> String {
    let what = format!("job {}: {}", job.id, show::word(&job.kind));
    match job.progress {
        Some(percent) => {
            let full = usize::from(u16::from(percent.min(100)) * u16::from(BAR) / 100);
            let rest = usize::from(BAR) - full;
            format!("{what} [{}{}] {percent} %", "#".repeat(full), ".".repeat(rest))
        }
        None => format!("{what}, {}", show::word(&job.state)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_tells_how_far_a_job_is() {
        let text = r#"{"id": 3, "kind": "shutdown", "state": "running", "started_ms": 0}"#;
        let mut job: Job = serde_json::from_str(text).unwrap();
        assert_eq!(line(&job), "job 3: shutdown, running");
        for (percent, full) in [(0, 0), (50, 15), (99, 29), (100, 30), (255, 30)] {
            job.progress = Some(percent);
            let line = line(&job);
            assert_eq!((line.matches('#').count(), line.matches('.').count()), (full, 30 - full), "{line}");
        }
    }
}
