//! The thread that waits for a boot's end and writes what is known of it.

use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use super::View;
use super::recorder::Recorder;
use super::report::Report;

/// A machine under observation. Dropping it ends the observation: what is known is written, and nothing of the machine
/// is kept. The machine's vCPU threads must have ended before.
pub struct Attached {
    recorder: Arc<Recorder>,
    thread: Option<JoinHandle<()>>,
}

impl Attached {
    pub(super) fn start(recorder: Arc<Recorder>, view: View) -> io::Result<Self> {
        let view = Arc::new(view);
        recorder.look_at(view.clone());
        let watched = recorder.clone();
        let thread = Builder::new().name("boot-watch".into()).spawn(move || watch(&watched, &view))?;
        Ok(Self { recorder, thread: Some(thread) })
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.recorder.end();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that watches the boot panicked");
        }
        self.recorder.forget_machine();
    }
}

fn watch(recorder: &Recorder, view: &View) {
    let mut state = recorder.lock();
    while !state.up && !state.ended {
        state = recorder.wait(state, None);
    }
    drop(state);
    write(recorder, view);
}

/// Writes the report, where one is wanted.
fn write(recorder: &Recorder, view: &View) {
    let mut state = recorder.lock();
    let Some(outputs) = state.outputs.take() else { return };
    let end = recorder.now();
    let data = (state.marks.clone(), state.phases.clone(), state.seats.len());
    drop(state);
    let report = Report::new(view, &data.0, &data.1, data.2, end);
    if let Err(error) = outputs.write(&report) {
        tracing::error!("boot trace: {error}");
    }
}
