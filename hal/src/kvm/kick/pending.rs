//! The lock-free part of a kick: who notes it, who delivers it, and until when. `hal/tests/kick_model.rs` has this very
//! file tried in all its orders, with the atomics of a model in place of `super::sync`.

use super::sync::{AtomicBool, AtomicU64, SeqCst, yield_now};

/// Kicks of one vCPU, and the thread that is inside `run`.
pub(super) struct Pending {
    /// A kick that no run has reported yet.
    noted: AtomicBool,
    /// In the upper half the thread inside `run`, by its number in the kernel, 0 while there is none; in the lower
    /// half how many kicks saw it there and are not through yet.
    runner: AtomicU64,
}

impl Pending {
    pub(super) fn new() -> Self {
        Self { noted: AtomicBool::new(false), runner: AtomicU64::new(0) }
    }

    /// The thread of this number runs the vCPU from here on. Whether a kick waits, which nobody delivers any more.
    pub(super) fn enter(&self, thread: u32) -> bool {
        self.runner.store(u64::from(thread) << 32, SeqCst);
        self.noted.load(SeqCst)
    }

    /// Notes a kick, and delivers it to the thread inside `run`, if there is one: it does not leave meanwhile.
    pub(super) fn kick(&self, deliver: impl FnOnce(u32)) {
        if self.noted.swap(true, SeqCst) {
            // Who noted the kick that still waits also sees to its delivery. Real-time signals queue up, so a storm
            // of kicks with a signal each would keep the vCPU's thread in the signal's handler for ever.
            return;
        }
        let seen = self.runner.fetch_update(SeqCst, SeqCst, |runner| (runner >> 32 != 0).then(|| runner + 1));
        let Ok(runner) = seen else { return };
        deliver(u32::try_from(runner >> 32).unwrap_or(u32::MAX));
        self.runner.fetch_sub(1, SeqCst);
    }

    /// Takes the kick that waits; `forget` undoes its delivery.
    pub(super) fn take(&self, forget: impl FnOnce()) -> bool {
        // What was delivered first: a kick that comes in between notes itself before it is delivered again, and what
        // is left of a delivery costs no more than another look.
        forget();
        self.noted.swap(false, SeqCst)
    }

    /// The thread runs the vCPU no more: it waits for those who deliver to it.
    pub(super) fn leave(&self) {
        self.runner.fetch_and(u64::from(u32::MAX), SeqCst);
        while self.runner.load(SeqCst) != 0 {
            yield_now();
        }
    }
}
