//! What a device's threads tell the driver, without a lock: interrupts, and that a reset is needed.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::super::QueueEvents;

/// How a transport interrupts its driver. Called by devices' threads: none of these takes a lock or waits.
pub trait Signals: Send + Sync {
    /// Used buffers wait in queue `index`.
    fn queue(&self, index: u16);
    /// The device's configuration or its status changed.
    fn config(&self);
}

/// Takes the reason for a reset.
pub(super) type OnBroken = dyn Fn(&str) + Send + Sync;

/// What queues in service share with the registers.
pub(super) struct Shared {
    /// Stands in messages.
    pub(super) name: String,
    pub(super) signals: Arc<dyn Signals>,
    /// Counts changes of the configuration.
    pub(super) generation: AtomicU8,
    pub(super) needs_reset: AtomicBool,
    /// Counts reasons for a reset.
    pub(super) faults: Arc<AtomicU64>,
    /// Told each time that the device is marked as one that needs a reset.
    pub(super) on_broken: OnceLock<Box<OnBroken>>,
}

impl Shared {
    pub(super) fn new(name: &str, signals: Arc<dyn Signals>) -> Self {
        Self {
            name: name.to_owned(),
            signals,
            generation: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            faults: Arc::default(),
            on_broken: OnceLock::new(),
        }
    }

    pub(super) fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.signals.config();
    }

    pub(super) fn broken(&self, reason: &str) {
        let before = self.faults.fetch_add(1, Ordering::Relaxed);
        if before == 0 {
            tracing::warn!(device = self.name, "needs a reset: {reason}");
        } else {
            // A guest that keeps at it shall not fill the log.
            tracing::debug!(device = self.name, "needs a reset: {reason}");
        }
        let marked = !self.needs_reset.swap(true, Ordering::AcqRel);
        if let (true, Some(tell)) = (marked, self.on_broken.get()) {
            tell(reason);
        }
        self.signals.config();
    }
}

/// The way from one queue to the driver.
pub(super) struct Events {
    pub(super) index: u16,
    pub(super) shared: Arc<Shared>,
}

impl QueueEvents for Events {
    fn used(&self) {
        self.shared.signals.queue(self.index);
    }

    fn config_changed(&self) {
        self.shared.config_changed();
    }

    fn broken(&self, reason: &str) {
        self.shared.broken(reason);
    }
}
