//! A queue as a driver sets it up.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::super::QueueState;

/// One of a queue's three areas (virtio 1.2 §2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Area {
    /// The descriptor table.
    Descriptors,
    /// The driver area: the available ring.
    Driver,
    /// The device area: the used ring.
    Device,
}

/// A queue as the driver sets it up, and where it stands while it is stopped.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) max_size: u16,
    pub(super) size: u16,
    pub(super) enabled: bool,
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
    pub(super) next_avail: u16,
    pub(super) next_used: u16,
    /// There from the enabling on.
    pub(super) kick: Option<EventFd>,
    pub(super) running: bool,
}

impl Slot {
    pub(super) fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
            next_avail: 0,
            next_used: 0,
            kick: None,
            running: false,
        }
    }

    pub(super) fn state(&self, features: u64) -> QueueState {
        QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: features & 1 << VIRTIO_RING_F_EVENT_IDX != 0,
            size: self.size,
            ready: true,
            desc_table: self.descriptors,
            avail_ring: self.driver,
            used_ring: self.device,
        }
    }
}

/// A saved [`Slot`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedQueue {
    pub(super) size: u16,
    pub(super) enabled: bool,
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
    pub(super) next_avail: u16,
    pub(super) next_used: u16,
}

/// Checks that a queue can work: its size, and that its rings lie aligned within guest memory.
pub(super) fn check_rings(
    state: QueueState,
    memory: &GuestMemoryAtomic<GuestMemoryMmap>,
) -> std::result::Result<(), String> {
    let queue = Queue::try_from(state).map_err(|e| e.to_string())?;
    match queue.is_valid(&*memory.memory()) && state.avail_ring != 0 {
        true => Ok(()),
        false => Err("a ring lies outside guest memory".into()),
    }
}
