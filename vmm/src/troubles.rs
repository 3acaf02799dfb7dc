//! What goes wrong with a device while it runs: told of once, and then counted until somebody takes it.
//!
//! A guest that breaks rules in a loop, or a disk whose every request fails, shall neither fill the owner's queue nor the
//! list of events.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use devices::virtio::blk::IoFailure;

/// What repeats itself.
#[derive(Debug)]
struct Tally<T> {
    last: Option<T>,
    count: u64,
}

impl<T> Tally<T> {
    fn add(&mut self, what: T) {
        self.last = Some(what);
        self.count += 1;
    }

    fn take(&mut self) -> Option<(T, u64)> {
        self.last.take().map(|last| (last, std::mem::take(&mut self.count)))
    }
}

impl<T> Default for Tally<T> {
    fn default() -> Self {
        Self { last: None, count: 0 }
    }
}

/// What went wrong since it was last looked at: the last of each kind, and how many there were.
#[derive(Debug, Default)]
pub struct Found {
    /// Requests that failed on the host.
    pub io: Option<(IoFailure, u64)>,
    /// Reasons for which the device needed a reset.
    pub broken: Option<(String, u64)>,
}

#[derive(Debug, Default)]
struct State {
    io: Tally<IoFailure>,
    broken: Tally<String>,
    /// Somebody was told and has not found nothing new yet.
    told: bool,
}

/// The troubles of one device.
pub struct Troubles {
    state: Mutex<State>,
    tell: Box<dyn Fn() + Send + Sync>,
}

impl Troubles {
    /// None yet. `tell` is called when there is one, on the thread that found it, and not again before [`Troubles::take`]
    /// has found nothing new.
    pub fn new(tell: impl Fn() + Send + Sync + 'static) -> Self {
        Self { state: Mutex::default(), tell: Box::new(tell) }
    }

    /// A request failed on the host.
    pub fn io(&self, failure: IoFailure) {
        self.add(|state| state.io.add(failure));
    }

    /// The device needs a reset.
    pub fn broken(&self, reason: &str) {
        self.add(|state| state.broken.add(reason.to_owned()));
    }

    fn add(&self, add: impl FnOnce(&mut State)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        add(&mut state);
        if !std::mem::replace(&mut state.told, true) {
            (self.tell)();
        }
    }

    /// What went wrong since the last time. `None` where nothing did: `tell` is called again then.
    pub fn take(&self) -> Option<Found> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let found = Found { io: state.io.take(), broken: state.broken.take() };
        state.told = found.io.is_some() || found.broken.is_some();
        state.told.then_some(found)
    }
}

impl fmt::Debug for Troubles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Troubles").field("state", &self.state).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn what_repeats_itself_is_told_of_once_and_counted() {
        let told = Arc::new(AtomicU32::new(0));
        let counter = told.clone();
        let troubles = Troubles::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
        });
        assert!(troubles.take().is_none());
        for number in 0..1000 {
            troubles.broken(&format!("rule {number}"));
        }
        assert_eq!(told.load(Ordering::Relaxed), 1);
        assert_eq!(troubles.take().unwrap().broken, Some(("rule 999".into(), 1000)));
        troubles.broken("one more");
        assert_eq!(told.load(Ordering::Relaxed), 1, "who took has still to look once more");
        assert_eq!(troubles.take().unwrap().broken, Some(("one more".into(), 1)));
        assert!(troubles.take().is_none());
        troubles.broken("again");
        assert_eq!(told.load(Ordering::Relaxed), 2);
    }
}
