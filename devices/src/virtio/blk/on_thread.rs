//! Running a piece of work in an I/O thread, and waiting for it.
//!
//! A disk's ring is made, drained and dropped in the thread that serves it. The kernel interrupts every thread that
//! has ever entered a ring when it goes away, and the caller may be a vCPU's; besides, no other thread needs the
//! right to use rings.

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};

use crate::io_thread::IoThread;

/// A worker that does its work when it is added.
enum Once<F, T> {
    Before(F),
    Done(T),
    Failed,
}

impl<F: FnOnce() -> T, T> MutEventSubscriber for Once<F, T> {
    fn init(&mut self, _ops: &mut EventOps) {
        if let Self::Before(work) = std::mem::replace(self, Self::Failed) {
            *self = Self::Done(work());
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // It waits for nothing.
    }
}

/// Does `work` in `thread`, between its workers' events.
///
/// # Errors
/// The thread has ended, or it is the calling one.
pub(super) fn run_on<F, T>(thread: &Arc<IoThread>, work: F) -> io::Result<T>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    match *thread.add(Once::Before(work))?.remove()? {
        Once::Done(result) => Ok(result),
        _ => Err(io::Error::other("an I/O thread did not do its work")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_in_the_thread() {
        let thread = IoThread::spawn("test").unwrap();
        let name = run_on(&thread, || std::thread::current().name().map(str::to_owned)).unwrap();
        assert_eq!(name.as_deref(), Some("io-test"));
    }
}
