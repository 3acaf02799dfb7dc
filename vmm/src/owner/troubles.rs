//! Devices that fail while they run: an event at once, and then one each second, as long as they go on failing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use api::{EventKind, IoOperation};
use devices::disk::Operation;
use devices::virtio::blk::IoFailure;

use super::Owner;
use super::phase::Phase;
use crate::troubles::Found;

/// The least time between two events of one kind and device.
const PERIOD: Duration = Duration::from_secs(1);

/// When each device that failed is looked at again.
#[derive(Debug, Default)]
pub(super) struct Failing(BTreeMap<String, Instant>);

impl Failing {
    /// The next time that one is to be looked at.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.0.values().min().copied()
    }
}

impl Owner {
    /// A device has failed for the first time since it was last seen to work.
    pub(super) fn device_fails(&mut self, id: String) {
        if self.tell_troubles(&id) {
            self.failing.0.insert(id, Instant::now() + PERIOD);
        }
    }

    /// Looks again at devices that failed a while ago.
    pub(super) fn mind_failing(&mut self) {
        let now = Instant::now();
        let due: Vec<String> =
            self.failing.0.iter().filter(|(_, time)| **time <= now).map(|(id, _)| id.clone()).collect();
        for id in due {
            self.failing.0.remove(&id);
            self.device_fails(id);
        }
    }

    /// Tells what is left to tell of a machine that is about to go.
    pub(super) fn end_failing(&mut self) {
        self.failing = Failing::default();
        let ids = self.phase.live().map(|live| live.machine.device_ids()).unwrap_or_default();
        for id in ids {
            self.tell_troubles(&id);
        }
    }

    /// Publishes what went wrong with a device. Whether there was something.
    fn tell_troubles(&mut self, id: &str) -> bool {
        let machine = match &self.phase {
            Phase::Running(live) | Phase::Paused(live) => &live.machine,
            _ => return false,
        };
        let Some(Found { io, broken }) = machine.troubles(id).and_then(|troubles| troubles.take()) else {
            return false;
        };
        let id = || id.to_owned();
        if let Some((IoFailure { operation, offset, error }, count)) = io {
            let (errno, reason) = (error.raw_os_error(), error.to_string());
            self.board.publish(EventKind::IoError {
                id: id(),
                operation: named(operation),
                offset,
                errno,
                reason,
                count,
            });
        }
        if let Some((reason, count)) = broken {
            self.board.publish(EventKind::DeviceFailed { id: id(), reason, count });
        }
        true
    }
}

fn named(operation: Operation) -> IoOperation {
    match operation {
        Operation::Read => IoOperation::Read,
        Operation::Write { .. } => IoOperation::Write,
        Operation::Flush => IoOperation::Flush,
        Operation::Discard => IoOperation::Discard,
        Operation::WriteZeroes { .. } => IoOperation::WriteZeroes,
    }
}
