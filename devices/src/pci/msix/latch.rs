//! The lock-free part of a vector: an interrupt goes through, or is kept until it may. `devices/tests/msix_model.rs` has this
//! very file tried in all its orders, with the atomics of a model in place of `super::sync`.

use super::sync::{AtomicBool, SeqCst};

/// Lets interrupts through while it is open, and keeps one while it is not.
pub(super) struct Latch {
    open: AtomicBool,
    pending: AtomicBool,
}

impl Latch {
    /// A closed one, with nothing kept.
    pub(super) fn new() -> Self {
        Self { open: AtomicBool::new(false), pending: AtomicBool::new(false) }
    }

    /// The device interrupts: `ring` is called now, or by who opens the latch.
    pub(super) fn signal(&self, ring: impl FnOnce()) {
        if self.open.load(SeqCst) {
            return ring();
        }
        self.pending.store(true, SeqCst);
        // It may have been opened after our look at the flag and before the bit was set.
        if self.open.load(SeqCst) {
            self.ring_if_pending(ring);
        }
    }

    /// Opens or closes it; what was kept goes through as it opens.
    pub(super) fn set_open(&self, open: bool, ring: impl FnOnce()) {
        self.open.store(open, SeqCst);
        if open {
            self.ring_if_pending(ring);
        }
    }

    fn ring_if_pending(&self, ring: impl FnOnce()) {
        if self.pending.swap(false, SeqCst) {
            ring();
        }
    }

    /// Whether an interrupt is kept.
    pub(super) fn is_pending(&self) -> bool {
        self.pending.load(SeqCst)
    }

    /// Keeps an interrupt, or forgets the one that was kept.
    pub(super) fn set_pending(&self, pending: bool) {
        self.pending.store(pending, SeqCst);
    }
}
